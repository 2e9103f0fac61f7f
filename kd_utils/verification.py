"""Is a cache to be trusted? `verify` looks at everything in it and leaves its word; training asks for that word."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .cache import SIGNAL_COLUMNS, CachedExample, CacheError, TeacherCache, check_files
from .files import write_json


def verify(folder: Path, data: dict[str, pd.DataFrame] | None = None,
           recompute: Callable[[list[CachedExample]], Iterable[CachedExample]] | None = None, *,
           samples: int = 4, tolerance: float = 0.05) -> pd.DataFrame:
    """Look at everything: checksums, shapes, finite values, attention rows that sum to 1, rows that cover the data.

    Args:
        folder: a finished cache.
        data: split -> prepared table; its `example_id`s and the cache's must be the same.
        recompute: runs the teacher again over sampled rows (they are compared by relative norm).
        samples: rows to recompute, evenly spaced.
        tolerance: largest ||stored - recomputed|| / ||recomputed||; bfloat16 in other batches gives up to 0.02.

    Returns:
        One row per check: `check`, `result`. Given `data` and `recompute`, it is also written to `verified.json`, which
        training asks for; a look without them vouches for less and leaves that file as it is.

    Raises:
        CacheError: the first check that fails.
    """
    sealed = data is not None and recompute is not None
    if sealed:  # a failure below must not leave an earlier word behind
        (folder / "verified.json").unlink(missing_ok=True)
    manifest = check_files(folder)
    cache = TeacherCache(folder, memory_bytes=0)
    checks = {"files": f"{len(manifest['shards'])} shards, checksums equal"}
    for split, table in (data or {}).items():
        wanted, held = set(table["example_id"]), set(cache.splits.get(split, []))
        if wanted != held:
            raise CacheError(f"{folder.name} covers {len(wanted & held)} of {len(wanted)} {split} rows and "
                             f"{len(held - wanted)} that are not in the data: run 02 again")
        checks[f"rows, {split}"] = f"{len(held)} of {len(wanted)}"
    worst = max((_check_row(manifest, cache[example_id]) for example_id in cache._place), default=0.0)
    checks["values"] = f"{len(cache)} rows, shapes right, all finite"
    if manifest["signals"] == "white_box":
        checks["attention rows"] = f"sum to 1 within {worst:.1e}"
    if recompute is not None:
        checks["recomputed"] = _check_recomputed(cache, recompute, samples, tolerance)
    report = pd.DataFrame({"check": list(checks), "result": list(checks.values())})
    if sealed:
        write_json(folder / "verified.json", {"content_hash": manifest["content_hash"], "checks": checks})
    return report


def _check_row(manifest: dict[str, Any], row: CachedExample) -> float:
    """Check one row; returns how far its attention rows are from summing to 1."""
    n = len(row.tokens)
    shapes = {"hidden": (n, manifest.get("hidden_size")), "attention": (manifest.get("heads"), n * (n + 1) // 2),
              "top_logits": (n, manifest.get("top_k")), "top_ids": (n, manifest.get("top_k")),
              "log_mass": (n, len(manifest.get("temperatures", [])))}
    for column in SIGNAL_COLUMNS[manifest["signals"]]:
        array = getattr(row, column)
        if array is None or array.shape != shapes[column]:
            raise CacheError(f"row {row.example_id}: {column} has shape {getattr(array, 'shape', None)}, "
                             f"expected {shapes[column]}")
        if not np.isfinite(array).all():
            raise CacheError(f"row {row.example_id}: {column} has values that are not finite: the teacher overflowed "
                             "float16; set signals to 'top_k' and run 02 again")
    if not 0 < row.answer_start < n:
        raise CacheError(f"row {row.example_id}: its answer starts at {row.answer_start} of {n} tokens")
    if row.attention is None:
        return 0.0
    compact = row.attention.dtype == np.uint8
    probs = np.square(row.attention / np.float32(255)) if compact else row.attention.astype(np.float32)
    off = np.abs(np.add.reduceat(probs, np.cumsum(np.arange(n)), axis=1) - 1)
    keys = np.arange(1, n + 1)
    # Rounding sqrt(p) by at most 1/510, an entry at a time, moves a row of k keys by at most sqrt(k) / 255 + k / 510^2.
    allowed = np.sqrt(keys) / 255 + keys / 510**2 + 1e-3 if compact else np.full(n, 5e-3)
    worst = float(off.max())
    if (off > allowed).any():
        raise CacheError(f"row {row.example_id}: an attention row sums to {1 - worst:.4f} or {1 + worst:.4f}, not 1")
    return worst


def _check_recomputed(cache: TeacherCache, recompute: Callable, samples: int, tolerance: float) -> str:
    ids = list(cache._place)
    chosen = [ids[i] for i in np.linspace(0, len(ids) - 1, min(samples, len(ids))).astype(int)]
    worst = 0.0
    for example_id in chosen:
        stored = cache[example_id]
        [fresh] = recompute([CachedExample(example_id, stored.tokens, stored.answer_start)])
        for column in ("hidden", "attention", "top_logits"):
            if (old := getattr(stored, column)) is not None:
                old, new = old.astype(np.float32), np.asarray(getattr(fresh, column), np.float32)
                worst = max(worst, float(np.linalg.norm(old - new) / np.linalg.norm(new)))
    if not worst <= tolerance:
        raise CacheError(f"{cache.folder.name}: recomputed rows differ from the stored ones by {worst:.1%}: "
                         "the teacher is not the one that was cached; run 02 again")
    return f"{len(chosen)} rows, equal within {worst:.1e}"


def open_verified(folder: Path, *, data_hash: str, tokenizer_fingerprint: str, teacher: str,
                  skip: Collection[str] = ()) -> TeacherCache:
    """The gate in front of training: verified, unchanged since, and made for this data, tokenizer and teacher.

    Args:
        skip: signals that the method does not look at; they are not read.

    Raises:
        CacheError: what is wrong, and the remedy.
    """
    manifest = check_files(folder)
    try:
        verified = json.loads((folder / "verified.json").read_text(encoding="utf-8"))["content_hash"]
    except (OSError, ValueError, KeyError):
        verified = None
    if verified != manifest["content_hash"]:
        raise CacheError(f"{folder.name} has not been verified: run 02 again, it verifies what it wrote")
    if manifest["data_hash"] != data_hash:
        raise CacheError(f"{folder.name} was made for other data ({manifest['data_hash'][:8]}, prepared is "
                         f"{data_hash[:8]}): run 02 again")
    if manifest["tokenizer_fingerprint"] != tokenizer_fingerprint:
        raise CacheError(f"{folder.name} was made with another tokenizer than the student's: a teacher whose tokenizer "
                         "differs is not supported yet; run 02 again with the student's tokenizer")
    if manifest["base_teacher"] != teacher:
        raise CacheError(f"{folder.name} was made from teacher {manifest['base_teacher']}, not {teacher}: run 02 again")
    return TeacherCache(folder, skip=skip)
