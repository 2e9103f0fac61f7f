"""Notes on the finished shards of a cache that has no manifest yet, so that a killed run resumes.

They are in the folder `.NAME.shards` beside the cache: a shard's checksum, what it was made for,
and the sums over its training rows from which the importance of the teacher's units follows. The
manifest takes their place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kd_utils.cache import manifest
from kd_utils.models.importance.sums import added_up
from kd_utils.store import files

if TYPE_CHECKING:
    from kd_utils.cache.writer import Shard


def folder_of(cache: Path) -> Path:
    """Where the notes on a cache's shards are."""
    return cache.with_name(f".{cache.name}.shards")


def write(cache: Path, shard: Shard, sha256: str, sums: pd.DataFrame | None) -> None:
    """Note that a shard is finished.

    Args:
        sha256: of its file.
        sums: over its rows, a table of `UnitSums`.
    """
    note: dict[str, Any] = {"made_for": shard.made_for, "sha256": sha256}
    if sums is not None:
        with files.written_aside(_sums_file(cache, shard)) as aside:
            sums.to_parquet(aside, index=False)
            note["sums"] = files.sha256_file(aside)
    files.write_json(folder_of(cache) / f"{shard.file}.json", note)


def known_checksums(cache: Path, shards: Sequence[Shard]) -> dict[str, str]:
    """The checksums of those of these shards that were finished for this very cache.

    In a finished cache whose sums are damaged the training shards count as not finished: only the
    teacher can count their rows again.
    """
    known: dict[str, str] = {}
    with suppress(manifest.CacheError):
        known |= manifest.read_manifest(cache)["checksums"]
    if manifest.UNIT_SUMS in known and not _is_whole(cache / manifest.UNIT_SUMS, known):
        known = {name: known[name] for name in known if not name.startswith("train-")}
    for shard in shards:
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads((folder_of(cache) / f"{shard.file}.json").read_bytes())
            if "sums" in note and note["sums"] != files.sha256_file(_sums_file(cache, shard)):
                continue
            if note["made_for"] == shard.made_for:
                known[shard.file] = note["sha256"]
    return known


def unit_sums(cache: Path, shards: Sequence[Shard]) -> pd.DataFrame | None:
    """The sums over all training rows, or None where they were not counted.

    They are those of the notes or, where only some shards of a finished cache were written again,
    that cache's own, which hold the same rows.
    """
    counted = [_sums_file(cache, shard) for shard in shards if shard.split == "train"]
    if counted and all(file.is_file() for file in counted):
        return added_up([pd.read_parquet(file) for file in counted])
    with suppress(manifest.CacheError):
        if _is_whole(cache / manifest.UNIT_SUMS, manifest.read_manifest(cache)["checksums"]):
            return pd.read_parquet(cache / manifest.UNIT_SUMS)
    return None


def _sums_file(cache: Path, shard: Shard) -> Path:
    return folder_of(cache) / f"{shard.file}.sums"


def _is_whole(file: Path, checksums: dict[str, str]) -> bool:
    return file.is_file() and files.sha256_file(file) == checksums.get(file.name)
