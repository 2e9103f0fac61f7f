"""What one row of a cache must be: shapes, finite values, attention rows that sum to 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kd_utils.cache.manifest import (
    CacheError,
)
from kd_utils.cache.teacher_cache import TeacherCache, signal_of
from kd_utils.tokens.encoding import Example


def check_row(manifest: dict[str, Any], row: Example) -> float:
    """Check one row; returns how far its attention rows are from summing to 1."""
    n, worst = len(row.tokens), 0.0
    shapes = {
        "hidden": (n, manifest.get("hidden_size")),
        "attention": (manifest.get("heads"), n * (n + 1) // 2),
        "top_logits": (n, manifest.get("top_k")),
        "top_ids": (n, manifest.get("top_k")),
        "log_mass": (n, len(manifest.get("temperatures", []))),
    }
    for column in manifest["dtypes"]:
        array, shape = row.signals[column], shapes[signal_of(column)]
        if array.shape != shape:
            raise CacheError(
                f"row {row.example_id}: {column} has shape {array.shape}, expected {shape}"
            )
        if not np.isfinite(array).all():
            remedy = (
                "signals to 'top_k'"
                if column == signal_of(column)
                else f"{signal_of(column)}_layers to others"
            )
            raise CacheError(
                f"row {row.example_id}: {column} has values that are not finite: the teacher "
                f"overflowed "
                f"float16; set {remedy} and run 02 again"
            )
        if signal_of(column) == "attention":
            worst = max(worst, _check_map(row.example_id, array, n))
    if not 0 < row.answer_start < n:
        raise CacheError(
            f"row {row.example_id}: its answer starts at {row.answer_start} of {n} tokens"
        )
    ends = row.ends
    if ends is not None and len(ends) and (len(ends) != n or (np.diff(ends, prepend=0) < 0).any()):
        raise CacheError(
            f"row {row.example_id}: its {n} tokens end behind bytes that are not in order"
        )
    return worst


def _check_map(example_id: str, packed: np.ndarray, n: int) -> float:
    """How far the rows of one example's map are from summing to 1."""
    compact = packed.dtype == np.uint8
    probs = np.square(packed / np.float32(255)) if compact else packed.astype(np.float32)
    off = np.abs(np.add.reduceat(probs, np.cumsum(np.arange(n)), axis=1) - 1)
    keys = np.arange(1, n + 1)
    # Rounding sqrt(p) by at most 1/510, an entry at a time, moves a row of k keys by at most
    # sqrt(k) / 255 + k / 510^2.
    allowed = np.sqrt(keys) / 255 + keys / 510**2 + 1e-3 if compact else np.full(n, 5e-3)
    worst = float(off.max())
    if (off > allowed).any():
        raise CacheError(
            f"row {example_id}: an attention row sums to {1 - worst:.4f} or {1 + worst:.4f}, not 1"
        )
    return worst


def check_recomputed(
    cache: TeacherCache, recompute: Callable, samples: int, tolerance: float
) -> str:
    ids = list(cache._place)
    chosen = [ids[i] for i in np.linspace(0, len(ids) - 1, min(samples, len(ids))).astype(int)]
    worst = 0.0
    for example_id in chosen:
        stored = cache[example_id]
        [fresh] = recompute([Example(example_id, stored.tokens, stored.answer_start, stored.ends)])
        for column, old in stored.signals.items():
            if signal_of(column) in ("hidden", "attention", "top_logits"):
                old, new = old.astype(np.float32), np.asarray(fresh.signals[column], np.float32)
                worst = max(worst, float(np.linalg.norm(old - new) / np.linalg.norm(new)))
    if not worst <= tolerance:
        raise CacheError(
            f"{cache.folder.name}: recomputed rows differ from the stored ones by {worst:.1%}: "
            "the teacher is not the one that was cached; run 02 again"
        )
    return f"{len(chosen)} rows, equal within {worst:.1e}"
