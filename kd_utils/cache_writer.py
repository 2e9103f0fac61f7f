"""Writing a teacher cache: shards aside and renamed, the manifest last, a killed run goes on.

The teacher runs in the calling thread; packing, compression and disk are the writers' work, so that a device does not
wait for them. At most a few batches are in memory at any time, however much there is to write.

Until the manifest stands, each finished shard has a note in the folder `.NAME.shards` beside the cache: its checksum
and what it was made for. A run that goes on keeps the shards that agree with their notes, and no other.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .cache import FORMAT_VERSION, CachedExample, CacheError, byte_planes, check_files, key_digest, read_manifest
from .files import full_disk_named, locked, sha256_file, sha256_json, write_json, written_aside

if TYPE_CHECKING:
    from torch import Tensor

    from .vocabulary import Vocabulary

#: Starts the teacher on one batch; what it returns waits for the device and gives the rows with their signals.
SignalsOf = Callable[[list[CachedExample]], Iterable[CachedExample]]

WRITERS = 2  # shards that are packed and compressed side by side


@dataclass(frozen=True)
class Shard:
    """One file of a cache, and the examples (with tokens, without signals) that go into it.

    `made_for` is a digest of what the cache is made from and of which examples are in this shard.
    """

    file: str
    split: str
    rows: list[CachedExample]
    made_for: str


def cache_folder(artifacts: Path, name: str, key: dict[str, Any]) -> Path:
    """The folder for a cache of these ingredients: an earlier one of the same key, or a new one dated today.

    Args:
        artifacts: the project's artifacts folder.
        name: the experiment's name.
        key: everything that decides the content (data hash, teacher, tokenizer, signals, ...), JSON values.
    """
    digest = key_digest(key)
    earlier = sorted((artifacts / "cache").glob(f"{name}-????-??-??-{digest}"))
    return earlier[-1] if earlier else artifacts / "cache" / f"{name}-{date.today():%Y-%m-%d}-{digest}"


def write_cache(folder: Path, examples: dict[str, list[CachedExample]], signals_of: SignalsOf, lm_head: Tensor | None,
                header: dict[str, Any], *, shard_examples: int, batch_tokens: int, vocabulary: Vocabulary | None = None,
                progress: Callable[[Iterable], Iterable] = iter) -> dict[str, Any]:
    """Write the shards that are missing, then vocabulary and head, then the manifest; nothing if the cache is whole.

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

    return assemble_cache(folder, examples, here, lm_head, header, shard_examples=shard_examples,
                          vocabulary=vocabulary)


def assemble_cache(folder: Path, examples: dict[str, list[CachedExample]], write: Callable[[list[Shard]], None],
                   lm_head: Tensor | None, header: dict[str, Any], *, shard_examples: int,
                   vocabulary: Vocabulary | None = None) -> dict[str, Any]:
    """As `write_cache`, with `write` to make the missing shards: here, or on other machines that see `folder`.

    Raises:
        ValueError: another process is writing this cache.
        OSError: the disk is full; what is whole stays.
    """
    with held(folder, "a caching run"):
        _remove_half_files(folder)
        try:
            manifest = check_files(folder)
        except CacheError:  # not finished, or damaged: what is whole is kept, the rest is written again
            manifest = _assemble(folder, examples, write, lm_head, vocabulary, header, shard_examples)
        _make_newest(folder / "manifest.json")
        shutil.rmtree(_notes(folder), ignore_errors=True)
    return manifest


def _make_newest(manifest: Path) -> None:
    """`find_cache` takes the newest: this is the one asked for last, also where a clock was ahead before."""
    others = [path.stat().st_mtime_ns for path in manifest.parents[1].glob("*/manifest.json") if path != manifest]
    newest = max([time.time_ns(), *(other + 10**9 for other in others)])  # some file systems keep whole seconds
    os.utime(manifest, ns=(newest, newest))


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """`files.locked` for what 02 writes; a disk that has no room for the lock is named too."""
    with ExitStack() as lock:
        with full_disk_named(folder):
            lock.enter_context(locked(folder, what, "wait for it, or stop it and run 02 again"))
        yield


def _assemble(folder: Path, examples: dict[str, list[CachedExample]], write: Callable[[list[Shard]], None],
              lm_head: Tensor | None, vocabulary: Vocabulary | None, header: dict[str, Any],
              shard_examples: int) -> dict[str, Any]:
    shards = plan_shards(examples, shard_examples, header.get("key", header))
    known = _known_checksums(folder, shards)
    missing = [shard for shard in shards if not _is_whole(folder / shard.file, known.get(shard.file))]
    try:
        if missing:
            write(missing)
    finally:
        _remove_half_files(folder)  # of workers that were killed
    known |= _known_checksums(folder, missing)
    if lost := [shard.file for shard in shards if shard.file not in known or not (folder / shard.file).is_file()]:
        raise CacheError(f"{folder.name}: {len(lost)} shards were written and are not there ({lost[0]}): do all "
                         "machines of the Ray cluster see this folder? Mount it on all, or set workers to 1")
    entries = [{"file": shard.file, "split": shard.split, "rows": len(shard.rows),
                "tokens": sum(len(row.tokens) for row in shard.rows),
                "bytes": (folder / shard.file).stat().st_size, "sha256": known[shard.file]} for shard in shards]
    manifest = {**header, "format": FORMAT_VERSION, "shards": entries,
                "rows": {split: len(rows) for split, rows in examples.items()}}
    if vocabulary is not None:
        manifest["vocabulary"] = _write_vocabulary(folder / "vocabulary.parquet", vocabulary)
    if lm_head is not None:
        manifest["lm_head"] = _write_lm_head(folder / "lm_head.safetensors", lm_head)
    manifest["content_hash"] = sha256_json(manifest)
    write_json(folder / "manifest.json", manifest)
    return manifest


def plan_shards(examples: dict[str, list[CachedExample]], shard_examples: int, key: dict[str, Any]) -> list[Shard]:
    """Each split's examples by length, in shards of `shard_examples`; `key` is what the cache is made from."""
    return [Shard(f"{split}-{start // shard_examples:05d}.parquet", split, rows,
                  sha256_json({"key": key, "rows": [row.example_id for row in rows]}))
            for split, unordered in examples.items()
            for ordered in [sorted(unordered, key=lambda row: (len(row.tokens), row.example_id))]
            for start in range(0, len(ordered), shard_examples)
            for rows in [ordered[start:start + shard_examples]]]


def write_shards(folder: Path, shards: list[Shard], signals_of: SignalsOf, *, batch_tokens: int,
                 progress: Callable[[Iterable], Iterable] = iter) -> None:
    """Write each shard aside and rename it, while the teacher already runs over what comes next.

    Raises:
        Exception: whatever the teacher or a writer met; shards that are whole stay.
    """
    jobs: deque[Future] = deque()
    with ThreadPoolExecutor(WRITERS) as pool:
        for shard in progress(shards):
            while len(jobs) >= WRITERS:
                jobs.popleft().result()
            batches: Queue = Queue(maxsize=2)
            try:
                jobs.append(pool.submit(_write_shard, folder, shard, batches))
                for batch in token_batches(shard.rows, batch_tokens):
                    _hand_over(batches, signals_of(batch), jobs[-1])
                _hand_over(batches, None, jobs[-1])
            except BaseException as error:  # the writer must not wait for rows that will never come
                while not batches.empty():
                    batches.get_nowait()
                batches.put(error)
                raise
        while jobs:
            jobs.popleft().result()


def _hand_over(batches: Queue, item: Any, job: Future) -> None:
    """Put `item`, unless the writer is gone: then raise what it met."""
    while True:
        try:
            return batches.put(item, timeout=0.2)
        except Full:
            if job.done():
                return job.result()


def token_batches(rows: list[CachedExample], batch_tokens: int) -> Iterator[list[CachedExample]]:
    """Neighbours in batches whose padded size, rows x longest, is at most `batch_tokens` (one row at the least).

    A batch that has an eighth of them closes before a row that would leave a fifth of it padding.
    """
    batch: list[CachedExample] = []
    longest = real = 0
    for row in rows:
        widest, padded = max(longest, len(row.tokens)), longest * len(batch)
        grown = widest * (len(batch) + 1)
        if batch and (grown > batch_tokens or padded > batch_tokens / 8 and real + len(row.tokens) < 0.8 * grown):
            yield batch
            batch, widest, real = [], len(row.tokens), 0
        batch.append(row)
        longest, real = widest, real + len(row.tokens)
    if batch:
        yield batch


def _notes(folder: Path) -> Path:
    """Where the finished shards of a cache without a manifest have their notes."""
    return folder.with_name(f".{folder.name}.shards")


def _known_checksums(folder: Path, shards: list[Shard]) -> dict[str, str]:
    """The checksums that these shards must have, by file, of those that were finished for this very cache."""
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


def _write_shard(folder: Path, shard: Shard, batches: Queue) -> None:
    path, writer = folder / shard.file, None
    with written_aside(path) as aside:
        try:
            while (batch := batches.get()) is not None:
                if isinstance(batch, BaseException):
                    raise RuntimeError("the teacher stopped") from batch
                for row in batch:
                    table = _table(row)
                    writer = writer or pq.ParquetWriter(aside, table.schema, compression="zstd", compression_level=1,
                                                        use_dictionary=False, write_statistics=False)
                    writer.write_table(table)
        finally:
            if writer:
                writer.close()
        # Before the shard takes its place: a note whose shard never came only makes it be written again.
        write_json(_notes(folder) / f"{shard.file}.json", {"made_for": shard.made_for, "sha256": sha256_file(aside)})


def _table(row: CachedExample) -> pa.Table:
    values = {"example_id": pa.array([row.example_id]), "answer_start": pa.array([row.answer_start], pa.int32()),
              "tokens": pa.array([row.tokens], pa.large_list(pa.int32())),
              "ends": pa.array([[] if row.ends is None else row.ends], pa.large_list(pa.int32()))}
    for column, array in row.signals.items():
        values |= byte_planes(column, array)
    return pa.table(values)


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
    return {"file": path.name, "shape": list(weight.shape), "dtype": str(weight.dtype), "sha256": checksum}
