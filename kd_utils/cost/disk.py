"""How much disk: bytes of a teacher's cache, and of a trial's files."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd_utils.cost.shapes import Shape
from kd_utils.models import signal_kinds

#: What compression leaves of a column, by kind and type: hidden states of a bfloat16 teacher and
#: maps as in runs/2026-11-22-bench; hidden states of a float32 teacher as in the toy's record of
#: 2026-11-28. Maps vary with the teacher: flat ones keep more than peaked ones, and uint8 ones of
#: SmolLM2 kept 0.55. What is not listed is taken as it is.
COMPRESSED = {
    ("hidden", "bfloat16"): 0.66,
    ("hidden", "float32"): 0.88,
    ("attention", "float16"): 0.84,
    ("attention", "uint8"): 0.65,
}

#: Of a row of a cache: ids, lengths and Parquet's own data. Of a token: its id and where it ends.
ROW_BYTES, TOKEN_BYTES = 600, 8

#: Of a weight in float32: a saved state has AdamW's two moments too. A new state is written before
#: the last one is removed, so that for a moment there are two.
STATE_BYTES, MODEL_BYTES = 12, 4

Columns = dict[str, tuple[signal_kinds.SignalKind, int, str]]


def signal_bytes(
    columns: Columns, teacher: Shape, lengths: Sequence[int], top_k: int = 0
) -> dict[str, int]:
    """Bytes of each column before compression.

    Args:
        columns: as `signal_kinds.columns_of` gives them.
        lengths: tokens of each row.
    """
    header = {
        "hidden_size": teacher["hidden_size"],
        "heads": teacher["num_attention_heads"],
        "top_k": top_k,
        "temperatures": [1.0, 2.0],
    }
    return {
        column: np.dtype(dtype).itemsize * sum(math.prod(kind.shape(n, header)) for n in lengths)
        for column, (kind, _, dtype) in columns.items()
    }


def cache(
    columns: Columns, teacher: Shape, lengths: Sequence[int], top_k: int = 0, *, half: bool
) -> float:
    """Bytes of a teacher cache, compressed, with its output layer.

    Args:
        half: the teacher's weights are in bfloat16, whose short mantissas compress.
    """
    total: float = ROW_BYTES * len(lengths) + TOKEN_BYTES * sum(lengths)
    for column, size in signal_bytes(columns, teacher, lengths, top_k).items():
        kind, _, dtype = columns[column]
        if kind.name == "hidden":
            dtype = "bfloat16" if half else "float32"
        total += size * COMPRESSED.get((kind.name, dtype), 1.0)
    has_head = any(kind.name == "hidden" for kind, *_ in columns.values())
    return total + has_head * teacher["vocab_size"] * teacher["hidden_size"] * (2 if half else 4)


def free(place: Path) -> int:
    """Free bytes of the disk that has `place`, or will have it."""
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
