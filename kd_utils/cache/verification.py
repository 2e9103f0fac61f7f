"""Is a cache to be trusted? `verify` looks at everything in it and leaves its word; training asks
for that word.
"""

from __future__ import annotations

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
)
from kd_utils.cache.row_checks import check_recomputed, check_rows
from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config.project_paths import project_path
from kd_utils.records.source_code import changed_files
from kd_utils.store.locks import locked
from kd_utils.store.sealed import RecordError, read_sealed, write_sealed
from kd_utils.tokens.encoding import Example, tokenizer_files


def verify(
    folder: Path,
    data: dict[str, pd.DataFrame] | None = None,
    recompute: Callable[[list[Example]], Iterable[Example]] | None = None,
    *,
    samples: int = 4,
    tolerance: float = 0.05,
) -> pd.DataFrame:
    """Look at everything: checksums, shapes, finite values, attention rows that sum to 1, rows that
    cover the data.

    Args:
        folder: a finished cache.
        data: split -> prepared table; its `example_id`s and the cache's must be the same.
        recompute: runs the teacher again over sampled rows (they are compared by relative norm).
        samples: rows to recompute, evenly spaced.
        tolerance: largest ||stored - recomputed|| / ||recomputed||; bfloat16 in other batches gives
            up to 0.02.

    Returns:
        One row per check: `check`, `result`. Given `data` and `recompute`, it is also written to
            `verified.json`, which
        training asks for; a look without them vouches for less and leaves that file as it is.

    Raises:
        CacheError: the first check that fails.
        ValueError: another process is writing this cache.
    """
    if data is None or recompute is None:
        cache = TeacherCache(folder, memory_bytes=0)
        if (folder / "verified.json").exists():
            _require_verified(cache)
        return _table(_checks(cache, data, recompute, samples, tolerance))
    read_manifest(folder)  # a lock would make the folder
    with locked(folder, "a verification"):
        (folder / "verified.json").unlink(
            missing_ok=True
        )  # a failure below must not leave an earlier word behind
        cache = TeacherCache(folder, memory_bytes=0)
        checks = _checks(cache, data, recompute, samples, tolerance)
        write_sealed(
            folder / "verified.json",
            {"content_hash": cache.manifest["content_hash"], "checks": checks},
            "checksums",
        )
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
    """The gate in front of training: whole, verified, and what this data, teacher and code would
    make.

    Args:
        data_hash, teacher: as in `why_stale`.

    Raises:
        CacheError: what is wrong, and the remedy.
    """
    cache = TeacherCache(folder)
    if not (folder / "verified.json").is_file():
        raise CacheError(
            f"{folder.name} has not been verified: run 02 again, it verifies what it wrote"
        )
    _require_verified(cache)
    if reasons := why_stale(cache.manifest, data_hash=data_hash, teacher=teacher):
        raise CacheError(f"{folder.name} {reasons}: run 02 again")
    return cache


def _require_verified(cache: TeacherCache) -> None:
    try:
        verified = read_sealed(cache.folder / "verified.json", "checksums")
    except RecordError as error:
        raise CacheError(
            f"{cache.folder.name}/{error}: run 02 again, it verifies the cache anew"
        ) from None
    if verified.get("content_hash") != cache.manifest["content_hash"]:
        raise CacheError(
            f"{cache.folder.name}/verified.json is of another cache: run 02 again, it verifies "
            f"this one"
        )


def why_stale(manifest: dict[str, Any], *, data_hash: str, teacher: str | None) -> str:
    """Why a cache is not what 02 would make now from this data and teacher; "" if it is.

    Args:
        manifest: the cache's.
        data_hash: of the prepared data.
        teacher: the config's, before any fine-tuning. A folder's weights and tokenizer are
            compared; of a hub's model, the name. None: whichever it is (another experiment's).
    """
    reasons, teacher = [], manifest["base_teacher"] if teacher is None else teacher
    if manifest["data_hash"] != data_hash:
        reasons.append(
            f"was made for other data ({manifest['data_hash'][:8]}, prepared is {data_hash[:8]})"
        )
    if manifest["base_teacher"] != teacher:
        reasons.append(f"was made from teacher {manifest['base_teacher']}, not {teacher}")
    elif "base_fingerprint" in manifest and project_path(teacher).is_dir():
        from kd_utils.models.loading import model_fingerprint

        if tokenizer_files(project_path(teacher)) != manifest.get("tokenizer_files", {}):
            reasons.append(f"was made with another tokenizer of teacher {teacher}")

        with suppress(FileNotFoundError):  # weights that are gone are no other ones
            if model_fingerprint(teacher) != manifest["base_fingerprint"]:
                reasons.append(f"was made from other weights of teacher {teacher}")
    if names := changed_files(manifest.get("code", {}), cache_code()):
        reasons.append(f"was made by other code ({names})")
    return ", ".join(reasons)


def what_changed(artifacts: Path, header: dict[str, Any]) -> str:
    """What a cache with this header differs in from the one that its experiment had last; "" if it
    is there, or none.

    Args:
        header: what `teacher.cache_header` gave.
    """
    earlier = finished_caches(artifacts, header["name"])
    if not earlier or any(
        folder.name.endswith(f"-{key_digest(header['key'])}") for folder in earlier
    ):
        return ""
    try:
        then = read_manifest(earlier[-1])
    except CacheError as error:
        return str(error)
    words = {
        "base_teacher": "teacher",
        "teacher": "the teacher's weights",
        "code": f"code ({changed_files(then.get('code', {}), header['code'])})",
    }
    names = [
        words.get(name, name)
        for name, value in header["key"].items()
        if then.get("key", {}).get(name) != value
    ]
    return f"{earlier[-1].name} is stale, changed since: {', '.join(names)}"
