"""Verify a teacher cache and record the result; training refuses a cache that was not verified."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from kd_utils.cache.manifest import (
    CacheError,
    cache_code,
    finished_caches,
    key_digest,
    read_manifest,
    sealed_cache,
)
from kd_utils.cache.row_checks import check_recomputed, check_rows
from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config.project_paths import project_path
from kd_utils.records.provenance import Ingredients
from kd_utils.store.locks import locked
from kd_utils.tokens.encoding import Example, tokenizer_files


def verify(
    folder: Path,
    data: dict[str, pd.DataFrame] | None = None,
    recompute: Callable[[list[Example]], Iterable[Example]] | None = None,
    *,
    samples: int = 4,
    tolerance: float = 0.05,
) -> pd.DataFrame:
    """Check files, shapes, finite values, attention rows that sum to 1, and coverage of the data.

    Args:
        folder: a finished cache.
        data: split -> prepared table; the cache must have exactly its `example_id`s.
        recompute: runs the teacher again over sampled rows (compared by relative norm).
        samples: rows to recompute, evenly spaced.
        tolerance: largest ||stored - recomputed|| / ||recomputed||; bfloat16 in other batches gives
            up to 0.02.

    Returns:
        One row per check: `check`, `result`. With `data` and `recompute` it is also written to
        `verified.json`, which training asks for; a check without them leaves that file unchanged.

    Raises:
        CacheError: the first check that fails.
        ValueError: another process is writing this cache.
    """
    if data is None or recompute is None:
        cache = TeacherCache(folder, memory_bytes=0)
        if (folder / "verified.json").exists():
            _require_verified(cache)
        return _table(_checks(cache, data, recompute, samples, tolerance))
    read_manifest(folder)  # a lock would create the folder
    with locked(folder, "a verification"):
        # If a check fails, no earlier result must be left.
        (folder / "verified.json").unlink(missing_ok=True)
        cache = TeacherCache(folder, memory_bytes=0)
        checks = _checks(cache, data, recompute, samples, tolerance)
        document = {"content_hash": cache.manifest["content_hash"], "checks": checks}
        sealed_cache(folder, "verified.json").seal(document, {})
    return _table(checks)


def _table(checks: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame({"check": list(checks), "result": list(checks.values())})


def _checks(
    cache: TeacherCache,
    data: dict[str, pd.DataFrame] | None,
    recompute: Callable | None,
    samples: int,
    tolerance: float,
) -> dict[str, str]:
    folder, manifest = cache.folder, cache.manifest
    checks = {"files": f"{len(manifest['shards'])} shards, checksums equal"}
    for split, table in (data or {}).items():
        wanted, cached = set(table["example_id"]), set(cache.splits.get(split, []))
        if wanted != cached:
            raise CacheError(
                f"{folder.name} covers {len(wanted & cached)} of {len(wanted)} {split} rows and "
                f"{len(cached - wanted)} that are not in the data: run 02 again"
            )
        checks[f"rows, {split}"] = f"{len(cached)} of {len(wanted)}"
    checks |= check_rows(cache)
    if recompute is not None:
        checks["recomputed"] = check_recomputed(cache, recompute, samples, tolerance)
    return checks


def open_verified(folder: Path, *, data_hash: str, teacher: str | None) -> TeacherCache:
    """Open a cache for training: whole, verified, and made from this data, teacher and code.

    Args:
        data_hash, teacher: as in `why_stale`.

    Raises:
        CacheError: what is wrong, and the remedy.
    """
    cache = TeacherCache(folder)
    if not (folder / "verified.json").is_file():
        raise CacheError(f"{folder.name} has not been verified: run 02 again, it verifies caches")
    _require_verified(cache)
    if reasons := why_stale(cache.manifest, data_hash=data_hash, teacher=teacher):
        raise CacheError(f"{folder.name} is stale: {reasons}: run 02 again")
    return cache


def _require_verified(cache: TeacherCache) -> None:
    sealed = sealed_cache(cache.folder, "verified.json")
    if sealed.read().get("content_hash") != cache.manifest["content_hash"]:
        raise sealed.problem("verified.json is from another cache")


def why_stale(manifest: dict[str, Any], *, data_hash: str, teacher: str | None) -> str:
    """Why a cache is not what 02 would make now from this data and teacher; "" if it is.

    Args:
        manifest: the cache's.
        data_hash: of the prepared data.
        teacher: the config's, before any fine-tuning. Weights and tokenizer are compared if it is a
            folder, else only the name. None: any (another experiment's).
    """
    base = manifest["base_teacher"]
    then = {"name": base}
    now = {"name": base if teacher is None else teacher}
    if then == now and "base_fingerprint" in manifest and project_path(base).is_dir():
        from kd_utils.models.loading import model_fingerprint

        files = manifest.get("tokenizer_files", {})
        then |= {f"tokenizer/{name}": digest for name, digest in files.items()}
        files = tokenizer_files(project_path(base))
        now |= {f"tokenizer/{name}": digest for name, digest in files.items()}
        with suppress(FileNotFoundError):  # weights that are gone did not change
            now["weights"] = model_fingerprint(base)
            then["weights"] = manifest["base_fingerprint"]
    made = Ingredients(
        data={"rows": manifest["data_hash"]}, teacher=then, code=manifest.get("code", {})
    )
    return made.why_stale(Ingredients(data={"rows": data_hash}, teacher=now, code=cache_code()))


def what_changed(artifacts: Path, header: dict[str, Any]) -> str:
    """How a cache with this header differs from its experiment's last one; "" if it exists.

    Args:
        header: what `extraction.cache_header` gave.
    """
    earlier = finished_caches(artifacts, header["name"])
    digest = key_digest(header["key"])
    if not earlier or any(folder.name.endswith(f"-{digest}") for folder in earlier):
        return ""
    try:
        then = read_manifest(earlier[-1])
    except CacheError as error:
        return str(error)
    made, now = (
        Ingredients(inputs={**about.get("key", {}), "code": ""}, code=about.get("code", {}))
        for about in (then, header)
    )
    return f"{earlier[-1].name} is stale: {made.why_stale(now)}"
