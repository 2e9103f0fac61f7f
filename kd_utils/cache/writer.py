"""Writing a teacher cache: shards aside and renamed, the manifest last, a killed run goes on.

The teacher runs in the calling thread; packing, compression and disk are the writers' work, so that
a device does not wait for them. At most a few batches are in memory at any time, however much there
is to write.

Until the manifest stands, each finished shard has a note in the folder `.NAME.shards` beside the
cache: its checksum and what it was made for. A run that goes on keeps the shards that agree with
their notes, and no other.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
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
)
from kd_utils.store.files import (
    sha256_file,
    sha256_json,
    write_json,
    written_aside,
)
from kd_utils.tokens.encoding import Example

if TYPE_CHECKING:
    from torch import Tensor

    from kd_utils.tokens.vocabulary import Vocabulary
from kd_utils.cache.shards import (
    Shard,
    SignalsOf,
    _notes,
    plan_shards,
    write_shards,
)
from kd_utils.store.locks import locked


def cache_folder(artifacts: Path, name: str, key: dict[str, Any]) -> Path:
    """The folder for a cache of these ingredients: an earlier one of the same key, or a new one
    dated today.

    Args:
        artifacts: the project's artifacts folder.
        name: the experiment's name.
        key: everything that decides the content (data hash, teacher, tokenizer, signals, ...), JSON
            values.
    """
    digest = key_digest(key)
    earlier = sorted((artifacts / "cache").glob(f"{name}-????-??-??-{digest}"))
    return (
        earlier[-1] if earlier else artifacts / "cache" / f"{name}-{date.today():%Y-%m-%d}-{digest}"
    )


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
    """Write the shards that are missing, then vocabulary and head, then the manifest; nothing if
    the cache is whole.

    Args:
        folder: from `cache_folder`. Shards that an earlier, killed run finished there are kept.
        examples: split -> examples with tokens and no signals.
        signals_of: runs the teacher over one batch and fills in the signals.
        lm_head: (V, d) or None for top-k caches.
        header: what the manifest says besides files and counts.
        shard_examples: examples in one shard; the unit that a killed run redoes.
        batch_tokens: most tokens, padding included, in one batch of `signals_of`.
        vocabulary: what the teacher's ids spell: a student with another tokenizer needs it.
        progress: wraps the list of shards, e.g. `tqdm`.

    Returns:
        The manifest.
    """

    def here(shards: list[Shard]) -> None:
        write_shards(folder, shards, signals_of, batch_tokens=batch_tokens, progress=progress)

    return assemble_cache(
        folder,
        examples,
        here,
        lm_head,
        header,
        shard_examples=shard_examples,
        vocabulary=vocabulary,
    )


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
    """As `write_cache`, with `write` to make the missing shards: here, or on other machines that
    see `folder`.

    Raises:
        ValueError: another process is writing this cache.
        OSError: the disk is full; what is whole stays.
    """
    with locked(folder, "a caching run"):
        _remove_half_files(folder)
        try:
            manifest = check_files(folder)
        except (
            CacheError
        ):  # not finished, or damaged: what is whole is kept, the rest is written again
            manifest = _assemble(
                folder, examples, write, lm_head, vocabulary, header, shard_examples
            )
        _make_newest(folder / "manifest.json")
        shutil.rmtree(_notes(folder), ignore_errors=True)
    return manifest


def _make_newest(manifest: Path) -> None:
    """`find_cache` takes the newest: this is the one asked for last, also where a clock was ahead
    before.
    """
    others = [
        path.stat().st_mtime_ns
        for path in manifest.parents[1].glob("*/manifest.json")
        if path != manifest
    ]
    newest = max(
        [time.time_ns(), *(other + 10**9 for other in others)]
    )  # some file systems keep whole seconds
    os.utime(manifest, ns=(newest, newest))


def _assemble(
    folder: Path,
    examples: dict[str, list[Example]],
    write: Callable[[list[Shard]], None],
    lm_head: Tensor | None,
    vocabulary: Vocabulary | None,
    header: dict[str, Any],
    shard_examples: int,
) -> dict[str, Any]:
    shards = plan_shards(examples, shard_examples, header.get("key", header))
    known = _known_checksums(folder, shards)
    missing = [
        shard for shard in shards if not _is_whole(folder / shard.file, known.get(shard.file))
    ]
    try:
        if missing:
            write(missing)
    finally:
        _remove_half_files(folder)  # of workers that were killed
    known |= _known_checksums(folder, missing)
    if lost := [
        shard.file
        for shard in shards
        if shard.file not in known or not (folder / shard.file).is_file()
    ]:
        raise CacheError(
            f"{folder.name}: {len(lost)} shards were written and are not there ({lost[0]}): do all "
            "machines of the Ray cluster see this folder? Mount it on all, or set workers to 1"
        )
    entries = [
        {
            "file": shard.file,
            "split": shard.split,
            "rows": len(shard.rows),
            "tokens": sum(len(row.tokens) for row in shard.rows),
            "bytes": (folder / shard.file).stat().st_size,
            "sha256": known[shard.file],
        }
        for shard in shards
    ]
    manifest = {
        **header,
        "format": FORMAT_VERSION,
        "shards": entries,
        "rows": {split: len(rows) for split, rows in examples.items()},
    }
    if vocabulary is not None:
        manifest["vocabulary"] = _write_vocabulary(folder / "vocabulary.parquet", vocabulary)
    if lm_head is not None:
        manifest["lm_head"] = _write_lm_head(folder / "lm_head.safetensors", lm_head)
    manifest["content_hash"] = sha256_json(manifest)
    write_json(folder / "manifest.json", manifest)
    return manifest


def _known_checksums(folder: Path, shards: list[Shard]) -> dict[str, str]:
    """The checksums that these shards must have, by file, of those that were finished for this very
    cache.
    """
    try:  # whole, but for a shard that was damaged since
        known = {entry["file"]: entry["sha256"] for entry in read_manifest(folder)["shards"]}
    except CacheError:
        known = {}
    for shard in shards:
        try:
            note = json.loads((_notes(folder) / f"{shard.file}.json").read_bytes())
            if note["made_for"] == shard.made_for:
                known[shard.file] = note["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
    return known


def _is_whole(path: Path, checksum: str | None) -> bool:
    return checksum is not None and path.is_file() and sha256_file(path) == checksum


def _remove_half_files(folder: Path) -> None:
    for place in (folder, _notes(folder)):
        for aside in place.glob(".*.partial-*"):
            aside.unlink(missing_ok=True)


def _write_vocabulary(path: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    with written_aside(path) as aside:
        pq.write_table(vocabulary.table(), aside, compression="zstd")
        checksum = sha256_file(aside)
    return {"file": path.name, "rows": len(vocabulary.pieces), "sha256": checksum}


def _write_lm_head(path: Path, weight: Tensor) -> dict[str, Any]:
    from safetensors.torch import save_file

    with written_aside(path) as aside:
        save_file({"lm_head": weight}, aside)
        checksum = sha256_file(aside)
    return {
        "file": path.name,
        "shape": list(weight.shape),
        "dtype": str(weight.dtype),
        "sha256": checksum,
    }
