"""How long a cut takes, and what importance costs beside the bare teacher pass.

    python benchmarks/cut_speed.py [--shapes toy-large smol]

The pass is that of notebook 02 (final hidden states and last maps), over one batch of random rows,
with the sums over units and without, taking turns in one process; the ratio is that of the fastest
of each. The limit is 1.10. A cut is from a stored folder to a model in memory. Nothing is
downloaded: the weights are random.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from kd_utils.demos import toy_large
from kd_utils.models.cut import bases, narrowing, pruning, sizes, slots
from kd_utils.models.importance import choosing
from kd_utils.teacher.extraction import signal_function
from kd_utils.tokens.encoding import Example

#: Config of a model, rows of a batch, tokens of a row.
SHAPES = {
    "toy-large": (dict(toy_large.SIZES, vocab_size=640), 128, 40),
    "smol": (
        dict(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
        ),
        24,
        128,
    ),
}
TURNS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    for name in parser.parse_args().shapes:
        print(json.dumps({"shape": name} | measured(*SHAPES[name])))


def measured(config: dict, rows: int, length: int) -> dict[str, float]:
    """Seconds of the parts, and the ratio of the passes."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    run = signal_function(model, signals="white_box")
    random = np.random.default_rng(0)
    batch = [
        Example(f"row{i}", random.integers(3, 600, length - i % 8).astype(np.int32), length - 9)
        for i in range(rows)
    ]
    sums, taken = run.new_sums(), {"bare": [], "counted": []}
    for _ in range(TURNS):
        taken["bare"].append(seconds(lambda: list(run(batch))))
        taken["counted"].append(seconds(lambda: list(run(batch, sums))))
    bare, counted = (min(times[1:]) for times in taken.values())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "source")
        source = slots.StoredModel(str(Path(folder) / "source"))
        whole = sizes.sizes_of(source.config)
        kept = whole._replace(mlp=whole.mlp // 2, layers=whole.layers // 2)
        units = choosing.kept_units(source.config, kept, choosing.random_scores(source.config, 0))
        width = sizes.legal_width(source.config, whole, whole.width // 2, "width", exact=False)
        pruned = seconds(lambda: pruning.pruned(source, units))
        basis = seconds(lambda: bases.of_weights(source, width))
        narrowed = seconds(
            lambda: narrowing.narrowed(source, bases.at_random(whole.width, width, 0))
        )
    return {
        "pass_s": round(bare, 4),
        "with_sums_s": round(counted, 4),
        "ratio": round(counted / bare, 3),
        "prune_s": round(pruned, 3),
        "basis_s": round(basis, 3),
        "narrow_s": round(narrowed, 3),
        "threads": torch.get_num_threads(),
    }


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
