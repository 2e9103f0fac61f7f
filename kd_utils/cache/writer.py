"""Writing a teacher cache: each shard is renamed into place, the manifest is written last.

Until there is a manifest, each finished shard has a note in the folder `.NAME.shards` beside the
cache, with its checksum and what it was made for. A run that resumes keeps the shards that agree
with their notes, and no others.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from kd_utils.cache.manifest import (
    FORMAT_VERSION,
    CacheError,
    check_files,
    key_digest,
    read_manifest,
    sealed_cache,
)
from kd_utils.cache.shards import Shard, SignalsOf, _notes, plan_shards, write_shards
from kd_utils.store.files import sha256_file, written_aside
from kd_utils.store.locks import locked
from kd_utils.tokens.encoding import Example

if TYPE_CHECKING:
    from torch import Tensor

    from kd_utils.tokens.vocabulary import Vocabulary


def cache_folder(artifacts: Path, name: str, key: dict[str, Any]) -> Path:
    """The folder for a cache with this key: an earlier one, or a new one dated today.

    Args:
        artifacts: the project's artifacts folder.
        name: the experiment's name.
        key: JSON values that decide the content (data hash, teacher, tokenizer, signals, ...).
    """
    digest = key_digest(key)
    earlier = sorted((artifacts / "cache").glob(f"{name}-????-??-??-{digest}"))
    new = artifacts / "cache" / f"{name}-{date.today():%Y-%m-%d}-{digest}"
    return earlier[-1] if earlier else new


def write_cache(
    folder: Path,
    examples: dict[str, list[Example]],
    signals_of: SignalsOf,
    lm_head: Tensor | None,
    header: dict[str, Any],
    *,
    shard_examples: int,
    batch_tokens: int,
    vocabulary: Vocabulary | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Any]:
    """Run the teacher in this process and write what is missing of a cache.

    Args:
        folder: from `cache_folder`. Finished shards of a killed run are kept.
        examples: split -> examples with tokens and no signals.
        signals_of: runs the teacher over one batch and fills in the signals.
        lm_head: (V, d) or None for top-k caches.
        header: what the manifest says besides files and counts.
        shard_examples: examples in one shard; the unit that a killed run repeats.
        batch_tokens: most tokens, padding included, in one batch of `signals_of`.
        vocabulary: what the teacher's ids spell, for a student with another tokenizer.
        progress: wraps the list of shards, e.g. `tqdm`.

    Returns:
        The manifest.
    """

    def write(shards: list[Shard]) -> None:
        write_shards(folder, shards, signals_of, batch_tokens=batch_tokens, progress=progress)

    about = {"shard_examples": shard_examples, "vocabulary": vocabulary}
    return assemble_cache(folder, examples, write, lm_head, header, **about)


def assemble_cache(
    folder: Path,
    examples: dict[str, list[Example]],
    write: Callable[[list[Shard]], None],
    lm_head: Tensor | None,
    header: dict[str, Any],
    *,
    shard_examples: int,
    vocabulary: Vocabulary | None = None,
) -> dict[str, Any]:
    """As `write_cache`; `write` makes the missing shards, here or on machines that see `folder`.

    Raises:
        ValueError: another process is writing this cache.
        OSError: the disk is full; finished shards are kept.
    """
    with locked(folder, "a caching run"):
        _remove_half_files(folder)
        try:
            manifest = check_files(folder)
        except CacheError:
            shards = plan_shards(examples, shard_examples, header.get("key", header))
            checksums = _write_missing(folder, shards, write)
            if vocabulary is not None:
                with written_aside(folder / "vocabulary.parquet") as aside:
                    pq.write_table(vocabulary.table(), aside, compression="zstd")
                    checksums["vocabulary.parquet"] = sha256_file(aside)
            if lm_head is not None:
                from safetensors.torch import save_file

                with written_aside(folder / "lm_head.safetensors") as aside:
                    save_file({"lm_head": lm_head}, aside)
                    checksums["lm_head.safetensors"] = sha256_file(aside)
            document = {
                **header,
                "format": FORMAT_VERSION,
                "shards": [_entry(folder, shard) for shard in shards],
                "rows": {split: len(rows) for split, rows in examples.items()},
            }
            sealed_cache(folder).seal(document, checksums)
            manifest = read_manifest(folder)
        _make_newest(folder / "manifest.json")
        shutil.rmtree(_notes(folder), ignore_errors=True)
    return manifest


def _make_newest(manifest: Path) -> None:
    """Let `find_cache` take this cache, even if a clock was wrong before."""
    others = [
        path.stat().st_mtime_ns
        for path in manifest.parents[1].glob("*/manifest.json")
        if path != manifest
    ]
    # Some file systems keep whole seconds only.
    newest = max([time.time_ns(), *(other + 10**9 for other in others)])
    os.utime(manifest, ns=(newest, newest))


def _write_missing(
    folder: Path, shards: list[Shard], write: Callable[[list[Shard]], None]
) -> dict[str, str]:
    """Write the shards that are missing or damaged; returns the checksum of each shard's file."""
    known = _known_checksums(folder, shards)
    missing = [
        shard
        for shard in shards
        if not (folder / shard.file).is_file()
        or sha256_file(folder / shard.file) != known.get(shard.file)
    ]
    try:
        if missing:
            write(missing)
    finally:
        _remove_half_files(folder)  # of workers that were killed
    known |= _known_checksums(folder, missing)
    files = [shard.file for shard in shards]
    lost = [file for file in files if file not in known or not (folder / file).is_file()]
    if lost:
        raise CacheError(
            f"{folder.name}: {len(lost)} shards were written and are not there ({lost[0]}): do all "
            "machines of the Ray cluster see this folder? Mount it on all, or set workers to 1"
        )
    return {file: known[file] for file in files}


def _entry(folder: Path, shard: Shard) -> dict[str, Any]:
    """What the manifest says about a shard."""
    return {
        "file": shard.file,
        "split": shard.split,
        "rows": len(shard.rows),
        "tokens": sum(len(row.tokens) for row in shard.rows),
        "bytes": (folder / shard.file).stat().st_size,
    }


def _known_checksums(folder: Path, shards: list[Shard]) -> dict[str, str]:
    """The checksums of those of these shards that were finished for this very cache."""
    known: dict[str, str] = {}
    with suppress(CacheError):
        known |= read_manifest(folder)["checksums"]
    for shard in shards:
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads((_notes(folder) / f"{shard.file}.json").read_bytes())
            if note["made_for"] == shard.made_for:
                known[shard.file] = note["sha256"]
    return known


def _remove_half_files(folder: Path) -> None:
    for place in (folder, _notes(folder)):
        for aside in place.glob(".*.partial-*"):
            aside.unlink(missing_ok=True)
