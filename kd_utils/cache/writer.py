"""Writing a teacher cache: each shard is renamed into place, the manifest is written last.

The teacher runs in the calling thread; writer threads pack, compress and write, so that a device
does not wait for them, with at most a few batches in memory. Until there is a manifest, each
finished shard has a note (`shard_notes`). A run that resumes keeps the shards that agree with their
notes, and no others.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Full, Queue
from typing import Any, NamedTuple, Protocol

import pandas as pd
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch import Tensor

from kd_utils.cache import manifest, shard_notes
from kd_utils.cache.teacher_cache import as_table
from kd_utils.models.importance.sums import UnitSums
from kd_utils.store import files, locks
from kd_utils.tokens.encoding import Example
from kd_utils.tokens.vocabulary import Vocabulary

WRITERS = 2  # shards that are packed and compressed side by side


class SignalsOf(Protocol):
    """Starts the teacher on one batch; the result waits for the device and gives rows with signals.

    It is given `sums` where the batch's rows are to be counted in them.
    """

    def __call__(self, batch: list[Example], sums: UnitSums | None = None) -> Iterable[Example]: ...


class End(NamedTuple):
    """Follows a shard's last batch; `sums` are those over its rows, a table of `UnitSums`."""

    sums: pd.DataFrame | None


class Shard(NamedTuple):
    """One file of a cache, and the examples without signals that go into it."""

    file: str
    split: str
    rows: list[Example]
    made_for: str  # digest of the cache's ingredients and of the examples in this shard


def assemble_cache(
    folder: Path,
    examples: dict[str, list[Example]],
    write: Callable[[list[Shard]], None],
    lm_head: Tensor | None,
    header: dict[str, Any],
    *,
    shard_examples: int,
    vocabulary: Vocabulary | None = None,
    head_bias: Tensor | None = None,
    answers: pd.DataFrame | None = None,
    predictions: pd.DataFrame | None = None,
) -> dict[str, Any]:
    """Write what is missing of a cache.

    Args:
        folder: from `manifest.cache_folder`. Finished shards of a killed run are kept.
        examples: split -> examples with tokens and no signals.
        write: makes the missing shards, with `write_shards` here or on machines that see `folder`.
        lm_head: (V, d) or None for top-k caches.
        header: what the manifest says besides files and counts.
        shard_examples: examples in one shard; the unit that a killed run repeats.
        vocabulary: what the teacher's ids spell, for a student with another tokenizer.
        head_bias: (V,) of an output layer that has one.
        answers: the teacher's, over which rows without a label are cached (`data.answers`).
        predictions: the teacher's, of the validation rows (`scoring.evaluate`).

    Returns:
        The manifest.

    Raises:
        ValueError: another process is writing this cache.
        OSError: the disk is full; finished shards are kept.
    """
    with locks.locked(folder, "a caching run"):
        _remove_half_files(folder)
        try:
            document = manifest.check_files(folder)
        except manifest.CacheError:
            shards = plan_shards(examples, shard_examples, header.get("key", header))
            checksums = _write_missing(folder, shards, write)
            beside: dict[str, Callable[[Path], object]] = {}
            if answers is not None:
                beside["answers.parquet"] = partial(answers.to_parquet, index=False)
            if predictions is not None:
                right = predictions[["example_id", "correct"]]
                beside[manifest.PREDICTIONS] = partial(right.to_parquet, index=False)
            if vocabulary is not None:
                table = vocabulary.table()
                beside["vocabulary.parquet"] = partial(pq.write_table, table, compression="zstd")
            if lm_head is not None:
                bias = {} if head_bias is None else {"bias": head_bias}
                beside["lm_head.safetensors"] = partial(save_file, {"lm_head": lm_head, **bias})
            if (sums := shard_notes.unit_sums(folder, shards)) is not None:
                beside[manifest.UNIT_SUMS] = partial(sums.to_parquet, index=False)
            for name, save in beside.items():
                with files.written_aside(folder / name) as aside:
                    save(aside)
                    checksums[name] = files.sha256_file(aside)
            about = {
                "format": manifest.FORMAT_VERSION,
                "shards": [
                    {
                        "file": shard.file,
                        "split": shard.split,
                        "rows": len(shard.rows),
                        "tokens": sum(len(row.tokens) for row in shard.rows),
                        "bytes": (folder / shard.file).stat().st_size,
                    }
                    for shard in shards
                ],
                "rows": {split: len(rows) for split, rows in examples.items()},
            }
            manifest.sealed_cache(folder).seal({**header, **about}, checksums)
            document = manifest.read_manifest(folder)
        # `find_cache` takes the newest, and clocks may have been wrong before. A second, since some
        # file systems keep whole seconds only.
        other_manifests = {*folder.parent.glob("*/manifest.json")} - {folder / "manifest.json"}
        newest = max(
            [time.time_ns(), *(other.stat().st_mtime_ns + 10**9 for other in other_manifests)]
        )
        os.utime(folder / "manifest.json", ns=(newest, newest))
        shutil.rmtree(shard_notes.folder_of(folder), ignore_errors=True)
    return document


def plan_shards(
    examples: dict[str, list[Example]], shard_examples: int, key: dict[str, Any]
) -> list[Shard]:
    """Each split's examples by length, in shards; `key` holds the cache's ingredients. A shard is
    made for certain tokens: those of a row without a label are whatever the teacher answered.
    """
    return [
        Shard(
            f"{split}-{start // shard_examples:05d}.parquet",
            split,
            rows,
            files.sha256_json(
                {
                    "key": key,
                    "rows": [[r.example_id, r.answer_start, r.tokens.tolist()] for r in rows],
                }
            ),
        )
        for split, unordered in examples.items()
        for ordered in [sorted(unordered, key=lambda row: (len(row.tokens), row.example_id))]
        for start in range(0, len(ordered), shard_examples)
        for rows in [ordered[start : start + shard_examples]]
    ]


def _write_missing(
    folder: Path, shards: list[Shard], write: Callable[[list[Shard]], None]
) -> dict[str, str]:
    """Write the shards that are missing or damaged; returns the checksum of each shard's file."""
    known = shard_notes.known_checksums(folder, shards)
    missing = [
        shard
        for shard in shards
        if not (folder / shard.file).is_file()
        or files.sha256_file(folder / shard.file) != known.get(shard.file)
    ]
    try:
        if missing:
            write(missing)
    finally:
        _remove_half_files(folder)  # of workers that were killed
    known |= shard_notes.known_checksums(folder, missing)
    names = [shard.file for shard in shards]
    if lost := [name for name in names if name not in known or not (folder / name).is_file()]:
        raise manifest.CacheError(
            f"{folder.name}: {len(lost)} shards were written but are missing ({lost[0]}): mount "
            "this folder on every machine of the Ray cluster, or set workers to 1"
        )
    return {name: known[name] for name in names}


def _remove_half_files(folder: Path) -> None:
    for place in (folder, shard_notes.folder_of(folder)):
        for aside in place.glob(".*.partial-*"):
            aside.unlink(missing_ok=True)


def write_shards(
    folder: Path,
    shards: list[Shard],
    signals_of: SignalsOf,
    *,
    batch_tokens: int,
    new_sums: Callable[[], UnitSums | None] = lambda: None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Write each shard aside and rename it, while the teacher runs over the next batches.

    Args:
        signals_of: runs the teacher over one batch and fills in the signals.
        batch_tokens: most tokens, padding included, in one batch.
        new_sums: begins the sums over a shard of training rows, if there are to be any.
        progress: wraps the list of shards, e.g. `tqdm`.

    Raises:
        Exception: whatever failed in the teacher or a writer; shards that are whole stay.
    """
    jobs: list[Future] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for shard in progress(shards):
            if len(jobs) == WRITERS:
                jobs.pop(0).result()
            batches: Queue = Queue(maxsize=2)
            sums = new_sums() if shard.split == "train" else None
            try:
                jobs.append(pool.submit(_write_shard, folder, shard, batches))
                for batch in token_batches(shard.rows, batch_tokens):
                    rows = signals_of(batch) if sums is None else signals_of(batch, sums)
                    _hand_over(batches, rows, jobs[-1])
                _hand_over(batches, End(None if sums is None else sums.table()), jobs[-1])
            except BaseException as error:  # the writer must not wait for rows that will never come
                while not batches.empty():
                    batches.get_nowait()
                batches.put(error)
                raise
        for job in jobs:
            job.result()


def _hand_over(batches: Queue, item: Any, job: Future) -> None:
    """Put `item`; if the writer has ended, raise its error instead."""
    while not job.done():
        with suppress(Full):
            return batches.put(item, timeout=0.2)
    job.result()


def token_batches(rows: list[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """Neighbouring rows in batches whose padded size is at most `batch_tokens`, or of one row.

    A batch with an eighth of these tokens ends before a row that would make a fifth of it padding.
    """
    batch: list[Example] = []
    longest = real = 0
    for row in rows:
        widest, padded = max(longest, len(row.tokens)), longest * len(batch)
        grown = widest * (len(batch) + 1)
        if batch and (
            grown > batch_tokens
            or padded > batch_tokens / 8
            and real + len(row.tokens) < 0.8 * grown
        ):
            yield batch
            batch, widest, real = [], len(row.tokens), 0
        batch.append(row)
        longest, real = widest, real + len(row.tokens)
    if batch:
        yield batch


def _write_shard(folder: Path, shard: Shard, batches: Queue) -> None:
    writer = None
    with files.written_aside(folder / shard.file) as aside:
        try:
            while not isinstance(batch := batches.get(), End):
                if isinstance(batch, BaseException):
                    raise RuntimeError("the teacher stopped") from batch
                for row in batch:
                    table = as_table(row)
                    writer = writer or pq.ParquetWriter(
                        aside,
                        table.schema,
                        compression="zstd",
                        compression_level=1,
                        use_dictionary=False,
                        write_statistics=False,
                    )
                    writer.write_table(table)
        finally:
            if writer:
                writer.close()
        # Before the shard is renamed: a note without its shard only has the shard written again.
        shard_notes.write(folder, shard, files.sha256_file(aside), batch.sums)
