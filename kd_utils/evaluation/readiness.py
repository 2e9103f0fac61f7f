"""Whether a model can be scored at all: told before anything else is computed."""

import inspect
from typing import Any

import torch

from kd_utils.evaluation import decoding
from kd_utils.models import folder_checks, output_head
from kd_utils.tokens.encoding import Example


def require_ready(model: Any, tokenizer: Any, encoded: dict[str, list[Example]]) -> None:
    """Refuse what would fail, on a GPU without a word, or be wrong only after a while of training.

    Args:
        encoded: rows as this tokenizer encodes them, by split.

    Raises:
        ValueError: the model does not know a token of these rows, it is not causal, or its own
            generation_config has a rule that greedy decoding cannot follow.
    """
    rows = [row.tokens for split in encoded.values() for row in split]
    folder_checks.require_known_ids(model, tokenizer, {int(tokens.max()) for tokens in rows})
    for tokens in rows[:1]:
        require_causal(model, tokenizer, tokens.tolist())
    decoding.end_ids(model, tokenizer)
    decoding.own_rules(model, [0])


@torch.no_grad()
def require_causal(model: Any, tokenizer: Any, ids: list[int]) -> None:
    """Check that scores do not depend on later tokens, and are read at the positions asked for.

    Args:
        ids: of any text; its first tokens are used.

    Raises:
        ValueError: they do (`output_head.require_causal`), or are of other positions.
    """
    start = ids[:7]
    folder_checks.require_known_ids(model, tokenizer, start)
    # A token follows, so that the position asked for is not the last one.
    rows, place = torch.tensor([[*start, 0]], device=model.device), len(start) - 1
    expected = output_head.require_causal(model, rows)[:, place]
    found = logits_at(model, rows, [place])[:, 0].float()
    # bfloat16 rounds to 1 %; what is not a number is told where it is scored.
    if (found - expected).norm() > 0.02 * expected.norm():
        raise ValueError(
            f"{type(model).__name__} gives scores of other positions than it is asked for: choose "
            "another model"
        )


def logits_at(model: Any, input_ids: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """(B, kept, V) logits at these positions, which rise, whether the model can leave out others.

    Raises:
        ValueError: the model's output has another shape.
    """
    can_leave_out = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": torch.tensor(kept, device=model.device)} if can_leave_out else {}
    logits = model(input_ids=input_ids, use_cache=False, **options).logits
    if logits.shape[:-1] == input_ids.shape:  # all of them
        logits = logits[:, kept]
    known = folder_checks.known_ids(model)
    if logits.shape[:-1] != (len(input_ids), len(kept)) or logits.shape[-1] < known:
        raise ValueError(
            f"{type(model).__name__}'s logits are {tuple(logits.shape)}, and "
            f"{(len(input_ids), len(kept), known)} were expected: its scores cannot be read"
        )
    return logits
