"""What each row of a cache must hold: shapes, finite values, and what the table of signals adds."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kd_utils.cache.manifest import CacheError
from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.models.signal_kinds import kind_of
from kd_utils.tokens.encoding import Example


def check_rows(cache: TeacherCache) -> dict[str, str]:
    """Check every row of a cache.

    Returns:
        Check -> result, as `verify` shows them.

    Raises:
        CacheError: the first row that is wrong.
    """
    worst: dict[str, float] = {}
    for example_id in cache.lengths:
        for promise, off in check_row(cache.manifest, cache[example_id]).items():
            worst[promise] = max(off, worst.get(promise, 0.0))
    kept = {promise: f"within {off:.1e}" for promise, off in worst.items()}
    return {"values": f"{len(cache)} rows, shapes right, all finite", **kept}


def check_row(manifest: dict[str, Any], row: Example) -> dict[str, float]:
    """Check one row.

    Returns:
        What a kind of signal promises -> how far this row is from it (`SignalKind.check`).

    Raises:
        CacheError: what is wrong with the row.
    """
    n, kept = len(row.tokens), {}
    for column in manifest["dtypes"]:
        array, kind = row.signals[column], kind_of(column)
        if array.shape != (shape := kind.shape(n, manifest)):
            raise CacheError(
                f"row {row.example_id}: {column} has shape {array.shape}, expected {shape}"
            )
        if not np.isfinite(array).all():
            remedy = (
                "signals to 'top_k'" if column == kind.name else f"{kind.name}_layers to others"
            )
            raise CacheError(
                f"row {row.example_id}: {column} has values that are not finite: the teacher "
                f"overflowed {array.dtype}; set {remedy} and run 02 again"
            )
        try:
            off = kind.check(array, n) if kind.check else None
        except ValueError as error:
            raise CacheError(f"row {row.example_id}: {error}") from None
        if off is not None:
            kept[kind.promise] = max(off, kept.get(kind.promise, 0.0))
    if not 0 < row.answer_start < n:
        raise CacheError(
            f"row {row.example_id}: its answer starts at {row.answer_start} of {n} tokens"
        )
    ends = row.ends
    if ends is not None and len(ends) and (len(ends) != n or (np.diff(ends, prepend=0) < 0).any()):
        raise CacheError(
            f"row {row.example_id}: the byte positions where its {n} tokens end are not in order"
        )
    return kept


def check_recomputed(
    cache: TeacherCache, recompute: Callable, samples: int, tolerance: float
) -> str:
    """Compare evenly spaced rows with what the teacher computes now.

    Returns:
        The result, as `verify` shows it.

    Raises:
        CacheError: a relative difference above `tolerance`.
    """
    ids = list(cache.lengths)
    chosen = [ids[i] for i in np.linspace(0, len(ids) - 1, min(samples, len(ids))).astype(int)]
    worst = 0.0
    for example_id in chosen:
        stored = cache[example_id]
        [fresh] = recompute([Example(example_id, stored.tokens, stored.answer_start, stored.ends)])
        for column, array in stored.signals.items():
            if kind_of(column).recomputed:
                old, new = array.astype(np.float32), np.asarray(fresh.signals[column], np.float32)
                worst = max(worst, float(np.linalg.norm(old - new) / np.linalg.norm(new)))
    if not worst <= tolerance:
        raise CacheError(
            f"{cache.folder.name}: recomputed rows differ from the stored ones by {worst:.1%}: "
            "the teacher is not the one that was cached; run 02 again"
        )
    return f"{len(chosen)} rows, equal within {worst:.1e}"
