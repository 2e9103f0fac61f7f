"""Writing the shards of a teacher cache.

The teacher runs in the calling thread; writer threads pack, compress and write, so that a device
does not wait for them, with at most a few batches in memory. Until the manifest is written, each
finished shard has a note in the folder `.NAME.shards` beside the cache: its checksum and what it
was made for. A run that resumes keeps the shards that agree with their notes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kd_utils.cache.teacher_cache import byte_planes
from kd_utils.store.files import sha256_file, sha256_json, write_json, written_aside
from kd_utils.tokens.encoding import Example

#: Starts the teacher on one batch; the result waits for the device and gives rows with signals.
SignalsOf = Callable[[list[Example]], Iterable[Example]]

WRITERS = 2  # shards that are packed and compressed side by side


@dataclass(frozen=True)
class Shard:
    """One file of a cache, and the examples without signals that go into it.

    `made_for` is a digest of the cache's ingredients and of the examples in this shard.
    """

    file: str
    split: str
    rows: list[Example]
    made_for: str


def plan_shards(
    examples: dict[str, list[Example]], shard_examples: int, key: dict[str, Any]
) -> list[Shard]:
    """Each split's examples by length, in shards; `key` holds the cache's ingredients."""
    return [
        Shard(
            f"{split}-{start // shard_examples:05d}.parquet",
            split,
            rows,
            sha256_json({"key": key, "rows": [row.example_id for row in rows]}),
        )
        for split, unordered in examples.items()
        for ordered in [sorted(unordered, key=lambda row: (len(row.tokens), row.example_id))]
        for start in range(0, len(ordered), shard_examples)
        for rows in [ordered[start : start + shard_examples]]
    ]


def write_shards(
    folder: Path,
    shards: list[Shard],
    signals_of: SignalsOf,
    *,
    batch_tokens: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Write each shard aside and rename it, while the teacher runs over the next batches.

    Raises:
        Exception: whatever failed in the teacher or a writer; shards that are whole stay.
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
    """Put `item`; if the writer has ended, raise its error instead."""
    while True:
        try:
            return batches.put(item, timeout=0.2)
        except Full:
            if job.done():
                return job.result()


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


def _notes(folder: Path) -> Path:
    """Where the finished shards of a cache without a manifest have their notes."""
    return folder.with_name(f".{folder.name}.shards")


def _write_shard(folder: Path, shard: Shard, batches: Queue) -> None:
    path, writer = folder / shard.file, None
    with written_aside(path) as aside:
        try:
            while (batch := batches.get()) is not None:
                if isinstance(batch, BaseException):
                    raise RuntimeError("the teacher stopped") from batch
                for row in batch:
                    table = _table(row)
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
        write_json(
            _notes(folder) / f"{shard.file}.json",
            {"made_for": shard.made_for, "sha256": sha256_file(aside)},
        )


def _table(row: Example) -> pa.Table:
    values = {
        "example_id": pa.array([row.example_id]),
        "answer_start": pa.array([row.answer_start], pa.int32()),
        "tokens": pa.array([row.tokens], pa.large_list(pa.int32())),
        "ends": pa.array([[] if row.ends is None else row.ends], pa.large_list(pa.int32())),
    }
    for column, array in row.signals.items():
        values |= byte_planes(column, array)
    return pa.table(values)
