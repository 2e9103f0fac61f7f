"""Verify a teacher cache and record the result; training refuses a cache that was not verified."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.cache import manifest as manifests
from kd_utils.cache.manifest import UNIT_SUMS, CacheError
from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config.project_paths import project_path
from kd_utils.models import loading, signal_kinds
from kd_utils.models.importance.sums import ROWS, SUMS
from kd_utils.records.provenance import Ingredients
from kd_utils.store.locks import locked
from kd_utils.tokens.encoding import Example, tokenizer_files


def verify(
    folder: Path,
    data: dict[str, pd.DataFrame] | None = None,
    recompute: Callable[[list[Example]], Iterable[Example]] | None = None,
) -> pd.DataFrame:
    """Check files, shapes, finite values, attention rows that sum to 1, and coverage of the data.

    Args:
        folder: a finished cache.
        data: split -> prepared table; the cache must have exactly its `example_id`s.
        recompute: runs the teacher again over four evenly spaced rows.

    Returns:
        One row per check: `check`, `result`. With `data` and `recompute` it is also written to
        `verified.json`, which training asks for; a check without them leaves that file unchanged.

    Raises:
        CacheError: the first check that fails.
        ValueError: another process is writing this cache.
    """
    records = data is not None and recompute is not None
    manifests.read_manifest(folder)  # a lock would create the folder
    with locked(folder, "a verification") if records else nullcontext():
        if records:  # if a check fails, no earlier result must be left
            (folder / "verified.json").unlink(missing_ok=True)
        cache = TeacherCache(folder, memory_bytes=0)
        if (folder / "verified.json").exists():
            _require_verified(folder, cache.manifest)
        checks = {"files": f"{len(cache.manifest['shards'])} shards, checksums equal"}
        for split, table in (data or {}).items():
            wanted, cached = set(table["example_id"]), set(cache.splits.get(split, []))
            if wanted != cached:
                raise CacheError(
                    f"{folder.name} covers {len(wanted & cached)} of {len(wanted)} {split} rows "
                    f"and {len(cached - wanted)} that are not in the data: run 02 again"
                )
            checks[f"rows, {split}"] = f"{len(cached)} of {len(wanted)}"
        worst: dict[str, float] = {}
        for example_id in cache.lengths:
            for promise, off in check_row(cache.manifest, cache[example_id]).items():
                worst[promise] = max(off, worst.get(promise, 0.0))
        checks["values"] = f"{len(cache)} rows, shapes right, all finite"
        checks |= {promise: f"within {off:.1e}" for promise, off in worst.items()}
        if (sums := cache.unit_sums()) is not None:
            checks["importance"] = _check_unit_sums(cache, sums)
        if recompute is not None:
            checks["recomputed"] = _check_recomputed(cache, recompute)
        if records:
            manifests.sealed_cache(folder, "verified.json").seal(
                {"content_hash": cache.manifest["content_hash"], "checks": checks}, {}
            )
    return pd.DataFrame(checks.items(), columns=["check", "result"])


def check_row(manifest: dict[str, Any], row: Example) -> dict[str, float]:
    """Check one row: shapes, finite values, and what the table of signals adds.

    Returns:
        What a kind of signal promises -> how far this row is from it (`SignalKind.check`).

    Raises:
        CacheError: what is wrong with the row.
    """
    n, kept = len(row.tokens), dict[str, float]()
    for column in manifest["dtypes"]:
        array, kind = row.signals[column], signal_kinds.kind_of(column)
        if array.shape != (shape := kind.shape(n, manifest)):
            raise CacheError(
                f"row {row.example_id}: {column} has shape {array.shape}, expected {shape}: "
                "delete the cache's folder and run 02 again"
            )
        if not np.isfinite(array).all():
            remedy = "set signals to 'top_k'"
            if column != kind.name:
                remedy = f"set {kind.name}_layers to other layers"
            elif kind.name in signal_kinds.SIGNAL_SETS["top_k"]:
                remedy = "set precision to 'float32', or choose another teacher,"
            raise CacheError(
                f"row {row.example_id}: {column} has values that are not finite: the teacher "
                f"overflowed {array.dtype}; {remedy} and run 02 again"
            )
        if kind.check:
            try:
                kept[kind.promise] = max(kind.check(array, n), kept.get(kind.promise, 0.0))
            except ValueError as error:
                raise CacheError(
                    f"row {row.example_id}: {error}: delete the cache's folder and run 02 again"
                ) from None
    if not 0 < row.answer_start < n:
        raise CacheError(
            f"row {row.example_id}: its answer starts at {row.answer_start} of {n} tokens: "
            "delete the cache's folder and run 02 again"
        )
    ends = row.ends
    if ends is not None and len(ends) and (len(ends) != n or (np.diff(ends, prepend=0) < 0).any()):
        raise CacheError(
            f"row {row.example_id}: the byte positions where its {n} tokens end are not in order: "
            "delete the cache's folder and run 02 again"
        )
    return kept


def _check_unit_sums(cache: TeacherCache, sums: pd.DataFrame) -> str:
    values = sums[SUMS].to_numpy()
    counted, rows = values[sums["kind"] == ROWS].sum(), len(cache.splits["train"])
    why = "" if np.isfinite(values).all() else "values that are not finite"
    if why or counted != rows:
        raise CacheError(
            f"{cache.folder.name}: {UNIT_SUMS} has {why or f'{counted:g} of {rows} rows'}: delete "
            "the cache's folder and run 02 again"
        )
    return f"of {len(sums) - 1:,} units, from {rows} training rows, all finite"


def _check_recomputed(cache: TeacherCache, recompute: Callable) -> str:
    ids, worst = list(cache.lengths), 0.0
    chosen = np.linspace(0, len(ids) - 1, min(4, len(ids))).astype(int)
    for stored in (cache[ids[i]] for i in chosen):
        [fresh] = recompute([stored])
        for column in stored.signals:
            if signal_kinds.kind_of(column).recomputed:
                old = np.asarray(stored.signals[column], np.float32)
                new = np.asarray(fresh.signals[column], np.float32)
                # NaN is kept, unlike by `max`.
                worst = float(np.maximum(worst, np.linalg.norm(old - new) / np.linalg.norm(new)))
    if not worst <= 0.05:  # of the norm; bfloat16 in other batches gives up to 0.02
        raise CacheError(
            f"{cache.folder.name}: recomputed rows differ from the stored ones by {worst:.1%}: "
            "the teacher changed after it was cached; run 02 again"
        )
    return f"{len(chosen)} rows, equal within {worst:.1e}"


def open_verified(folder: Path, *, data_hash: str, teacher: str | None) -> TeacherCache:
    """Open a cache for training: whole, verified, and made from this data, teacher and code.

    Raises:
        CacheError: what is wrong, and the remedy.
    """
    cache = TeacherCache(folder)
    _require_verified(folder, cache.manifest)
    if reasons := why_stale(cache.manifest, data_hash=data_hash, teacher=teacher):
        raise CacheError(f"{folder.name} is stale: {reasons}: run 02 again")
    return cache


def why_not_verified(folder: Path, *, every_byte: bool) -> str:
    """Why a finished cache cannot be trained from, whatever it was made from; "" if it can.

    Args:
        every_byte: as `open_verified` looks at it; otherwise no large file is read.
    """
    try:
        _require_verified(folder, manifests.check_files(folder, every_byte=every_byte))
    except CacheError as error:
        return str(error)
    return ""


def _require_verified(folder: Path, manifest: dict[str, Any]) -> None:
    if not (folder / "verified.json").is_file():
        raise CacheError(f"{folder.name} has not been verified: run 02 again to verify it")
    sealed = manifests.sealed_cache(folder, "verified.json")
    if sealed.read().get("content_hash") != manifest["content_hash"]:
        raise sealed.problem("verified.json is from another cache")


def why_stale(manifest: dict[str, Any], *, data_hash: str, teacher: str | None) -> str:
    """Why a cache is not what 02 would make now from this data and teacher; "" if it is.

    Args:
        data_hash: of the prepared data.
        teacher: the config's, before any fine-tuning. Weights and tokenizer are compared if it is a
            folder, else only the name. None: any (another experiment's).
    """
    base = manifest["base_teacher"]
    then, now = {"name": base}, {"name": base if teacher is None else teacher}
    if then == now and "base_fingerprint" in manifest and project_path(base).is_dir():
        cached, found = manifest.get("tokenizer_files", {}), tokenizer_files(project_path(base))
        then |= {f"tokenizer/{name}": digest for name, digest in cached.items()}
        now |= {f"tokenizer/{name}": digest for name, digest in found.items()}
        with suppress(FileNotFoundError):  # weights that are gone did not change
            now["weights"] = loading.model_fingerprint(base)
            then["weights"] = manifest["base_fingerprint"]
    rows, code = manifest["data_hash"], manifest.get("code", {})
    return Ingredients(data={"rows": rows}, teacher=then, code=code).why_stale(
        Ingredients(data={"rows": data_hash}, teacher=now, code=manifests.cache_code())
    )


def what_changed(artifacts: Path, header: dict[str, Any]) -> str:
    """How a cache with this header differs from its experiment's last one; "" if it exists."""
    earlier = manifests.finished_caches(artifacts, header["name"])
    if not earlier or manifests.key_digest(header["key"]) in {path.name[-8:] for path in earlier}:
        return ""
    try:
        then = manifests.read_manifest(earlier[-1])
    except CacheError:
        return f"{earlier[-1].name} cannot be used; a new cache is made"
    made, now = (
        Ingredients(inputs={**about.get("key", {}), "code": ""}, code=about.get("code", {}))
        for about in (then, header)
    )
    return f"{earlier[-1].name} is stale: {made.why_stale(now)}; a new cache is made"
