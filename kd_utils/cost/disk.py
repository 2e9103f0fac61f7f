"""How much disk: bytes of a teacher cache, a saved state and a saved model."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kd_utils.cost.shapes import Shape
from kd_utils.models import signal_kinds

#: What compression leaves of a column, by kind and type: hidden states of a bfloat16 teacher and
#: maps as in runs/2026-11-22-bench; hidden states of a float32 teacher as in runs/2026-11-28-toy.
#: Maps vary with the teacher: flat ones keep more than peaked ones, and uint8 ones of SmolLM2 kept
#: 0.55. What is not listed is taken as it is.
COMPRESSED = {
    ("hidden", "bfloat16"): 0.66,
    ("hidden", "float32"): 0.88,
    ("attention", "float16"): 0.84,
    ("attention", "uint8"): 0.65,
}

#: Ids, lengths and Parquet's own data of a row, and token ids with the bytes that they end after.
ROW_BYTES, TOKEN_BYTES = 600, 8

Columns = dict[str, tuple[signal_kinds.SignalKind, int, str]]


def signal_bytes(
    columns: Columns, teacher: Shape, lengths: Iterable[int], *, top_k: int = 0
) -> dict[str, float]:
    """Bytes of each column before compression.

    Args:
        columns: as `signal_kinds.columns_of` gives them.
        lengths: tokens of each row.
    """
    header = {
        "hidden_size": teacher.width,
        "heads": teacher.heads,
        "top_k": top_k,
        "temperatures": [1.0, 2.0],
    }
    sizes = dict.fromkeys(columns, 0.0)
    for length in lengths:
        for column, (kind, _, dtype) in columns.items():
            rows, wide = kind.shape(length, header)
            sizes[column] += rows * wide * np.dtype(dtype).itemsize
    return sizes


def cache(
    columns: Columns, teacher: Shape, lengths: list[int], *, teacher_dtype: str, top_k: int = 0
) -> float:
    """Bytes of a teacher cache, compressed, with its output layer.

    Args:
        teacher_dtype: of its weights, "bfloat16" or "float32": short mantissas compress.
    """
    total: float = sum(ROW_BYTES + TOKEN_BYTES * length for length in lengths)
    for column, size in signal_bytes(columns, teacher, lengths, top_k=top_k).items():
        kind, _, dtype = columns[column]
        key = (kind.name, teacher_dtype if kind.name == "hidden" else dtype)
        total += size * COMPRESSED.get(key, 1.0)
    has_head = any(kind.name == "hidden" for kind, *_ in columns.values())
    return total + has_head * teacher.vocabulary * teacher.width * _SIZES[teacher_dtype]


_SIZES = {"bfloat16": 2, "float32": 4}


def saved_state(trained: int) -> int:
    """Bytes of what a killed trial continues from: the weights and AdamW's two moments, float32.

    A new state is written before the last one is removed: for that moment there are two.
    """
    return 12 * trained


def saved_model(weights: int) -> int:
    """Bytes of a trained student, or of a fine-tuned teacher, in float32."""
    return 4 * weights


def free(place: Path) -> int:
    """Free bytes of the disk that has `place`, or will have it."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
