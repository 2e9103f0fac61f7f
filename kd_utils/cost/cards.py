"""What fits on which card: the largest settings of notebooks 02 and 03, all in bfloat16."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

CARDS = (16, 24, 40, 80)  # GB

#: Share of a card that torch can use, beside the driver's context and what lies between tensors.
USABLE = 0.95

#: The values of each parameter that are tried on a card.
TRIED = {
    "batch_tokens": (16384, 8192, 4096, 2048, 1024),
    "eval_batch_size": (128, 64, 32, 16, 8),
    "micro_batch_size": (8, 4, 2, 1),
    "teacher_batch_size": (8, 4, 2, 1),
}

#: A notebook's config, and the bytes that each of its parts holds, by the parameter that decides.
Part = tuple[Any, Callable[[Any], dict[str, float]]]


def what_fits(parts: Mapping[str, Part]) -> pd.DataFrame:
    """The largest settings with which each card can do each part.

    Args:
        parts: of 02, 03 or both, by the notebook's number.

    Returns:
        A row per card; for each parameter that decides about memory, the largest of those in
        `TRIED`, or "does not fit".
    """
    table = pd.DataFrame({"card": [f"{card} GB" for card in CARDS]})
    for notebook, (config, memory_of) in parts.items():
        for name in memory_of(config):
            changed = {n: config.model_copy(update={name: n}) for n in TRIED[name]}
            needed = {n: memory_of(changed[n])[name] / 1e9 for n in changed}
            table[f"{notebook}: {name}"] = [
                next((f"{n}" for n in needed if needed[n] <= USABLE * card), "does not fit")
                for card in CARDS
            ]
    return table


def lines(parts: Mapping[str, Part], note: str = "") -> Iterator[str]:
    """The table under its title, as it is printed.

    Args:
        note: what the reader must know of it.
    """
    yield f"what fits on a card, in bfloat16{note}:"
    yield what_fits(parts).to_string(index=False)
