"""The teacher cache: its signals for every example, ragged, keyed by `example_id`, checksummed, resumable.

A cache is a folder `NAME-DATE-KEY`: Parquet shards of one row group per example (so that one row is one read),
`lm_head.safetensors`, and `manifest.json`, which is written last: without it there is no cache.

| column | per example of n tokens |
|---|---|
| `example_id`, `tokens`, `answer_start` | key, int32 (n,), index of the answer's first token |
| `hidden` | float16 (n, d) final hidden state, after the last norm: times `lm_head` it is the logits |
| `attention` | float16 (H, n (n + 1) / 2) last layer's map, causal entries only, row by row |
| `top_logits`, `top_ids`, `log_mass` | instead of these two: float32 (n, k), int32 (n, k), float32 (n, temperatures) |
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import sha256_file, sha256_json, write_json, written_aside

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
SIGNAL_COLUMNS = {"white_box": ("hidden", "attention"), "top_k": ("top_logits", "top_ids", "log_mass")}


class CacheError(ValueError):
    """A cache that is missing, damaged, unverified, or made for something else."""


@dataclass
class CachedExample:
    """One row, shaped; the signals that the cache does not hold are None. Shapes as in the module's table."""

    example_id: str
    tokens: np.ndarray
    answer_start: int
    hidden: np.ndarray | None = None
    attention: np.ndarray | None = None
    top_logits: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    log_mass: np.ndarray | None = None


# ---------------------------------------------------------------------------------------------------- writing

def cache_folder(artifacts: Path, name: str, key: dict[str, Any]) -> Path:
    """The folder for a cache of these ingredients: an earlier one of the same key, or a new one dated today.

    Args:
        artifacts: the project's artifacts folder.
        name: the experiment's name.
        key: everything that decides the content (data hash, teacher, tokenizer, signals, ...), JSON values.
    """
    digest = sha256_json({"format": FORMAT_VERSION, **key})[:8]
    earlier = sorted((artifacts / "cache").glob(f"{name}-????-??-??-{digest}"))
    return earlier[-1] if earlier else artifacts / "cache" / f"{name}-{date.today():%Y-%m-%d}-{digest}"


def write_cache(folder: Path, examples: dict[str, list[CachedExample]],
                signals_of: Callable[[list[CachedExample]], Iterable[CachedExample]], lm_head: Tensor | None,
                header: dict[str, Any], *, shard_examples: int, batch_tokens: int,
                progress: Callable[[Iterable], Iterable] = iter) -> dict[str, Any]:
    """Write the shards that are missing, then `lm_head`, then the manifest; nothing if the cache is whole already.

    Args:
        folder: from `cache_folder`. Shards that an earlier, killed run finished there are kept.
        examples: split -> examples with tokens and no signals.
        signals_of: runs the teacher over one batch and fills in the signals.
        lm_head: (V, d) or None for top-k caches.
        header: what the manifest says besides files and counts.
        shard_examples: examples in one shard; the unit that a killed run redoes.
        batch_tokens: most tokens, padding included, in one batch of `signals_of`.
        progress: wraps the list of shards, e.g. `tqdm`.

    Returns:
        The manifest.
    """
    try:
        manifest = check_files(folder)
        os.utime(folder / "manifest.json")  # `find_cache` takes the newest: this is the one asked for last
        return manifest
    except CacheError:  # not finished, or damaged: what is whole is kept, the rest is written again
        earlier = _earlier_checksums(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    plan = [(f"{split}-{start // shard_examples:05d}.parquet", split, ordered[start:start + shard_examples])
            for split, rows in examples.items()
            for ordered in [sorted(rows, key=lambda row: (len(row.tokens), row.example_id))]
            for start in range(0, len(ordered), shard_examples)]
    for file, _, rows in progress(plan):
        if not _is_finished(folder / file, rows, earlier.get(file)):
            with written_aside(folder / file) as aside:
                _write_shard(aside, (full for batch in token_batches(rows, batch_tokens) for full in signals_of(batch)))
    shards = [{"file": file, "split": split, "rows": len(rows), "tokens": sum(len(row.tokens) for row in rows),
               "bytes": (folder / file).stat().st_size, "sha256": sha256_file(folder / file)}
              for file, split, rows in plan]
    manifest = {**header, "format": FORMAT_VERSION, "shards": shards,
                "rows": {split: len(rows) for split, rows in examples.items()}}
    if lm_head is not None:
        manifest["lm_head"] = _write_lm_head(folder / "lm_head.safetensors", lm_head)
    manifest["content_hash"] = sha256_json(manifest)
    write_json(folder / "manifest.json", manifest)
    return manifest


def token_batches(rows: list[CachedExample], batch_tokens: int) -> Iterator[list[CachedExample]]:
    """Neighbours in batches whose padded size, rows x longest, is at most `batch_tokens` (one row at the least)."""
    batch: list[CachedExample] = []
    for row in rows:
        longest = max(len(other.tokens) for other in [*batch, row])
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch = [*batch, row]
    if batch:
        yield batch


def _earlier_checksums(folder: Path) -> dict[str, str]:
    """Checksums by file that a manifest states, whatever else is wrong with the folder."""
    try:
        return {shard["file"]: shard["sha256"] for shard in read_manifest(folder)["shards"]}
    except CacheError:
        return {}


def _is_finished(path: Path, rows: list[CachedExample], checksum: str | None) -> bool:
    if checksum is not None and path.is_file() and sha256_file(path) != checksum:
        return False
    try:
        return pq.read_table(path, columns=["example_id"])["example_id"].to_pylist() == [r.example_id for r in rows]
    except (OSError, pa.ArrowInvalid, KeyError):
        return False


def _write_shard(path: Path, rows: Iterable[CachedExample]) -> None:
    writer = None
    for row in rows:
        values = {"example_id": pa.array([row.example_id]), "answer_start": pa.array([row.answer_start], pa.int32())}
        for column in ("tokens", *SIGNAL_COLUMNS["white_box"], *SIGNAL_COLUMNS["top_k"]):
            array = getattr(row, column)
            if array is not None:
                flat = pa.array(np.ascontiguousarray(array).reshape(-1))
                values[column] = pa.LargeListArray.from_arrays(pa.array([0, len(flat)], pa.int64()), flat)
        table = pa.table(values)
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False,
                                      write_statistics=False)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _write_lm_head(path: Path, weight: Tensor) -> dict[str, Any]:
    from safetensors.torch import save_file

    with written_aside(path) as aside:
        save_file({"lm_head": weight}, aside)
    return {"file": path.name, "shape": list(weight.shape), "dtype": str(weight.dtype), "sha256": sha256_file(path)}


# ---------------------------------------------------------------------------------------------------- reading

def find_cache(artifacts: Path, name: str) -> Path:
    """The finished cache of experiment `name` that 02 wrote, or was asked for, last.

    Raises:
        CacheError: there is none.
    """
    pattern = re.compile(re.escape(name) + r"-\d{4}-\d\d-\d\d-[0-9a-f]{8}")
    folders = [path.parent for path in (artifacts / "cache").glob("*/manifest.json")
               if pattern.fullmatch(path.parent.name)]
    if not folders:
        raise CacheError(f"no finished teacher cache of experiment {name!r}: run notebook 02_cache_teacher first")
    return max(folders, key=lambda folder: (folder / "manifest.json").stat().st_mtime_ns)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if it is one of this format and unchanged since it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        stated = manifest.pop("content_hash")
    except FileNotFoundError:
        raise CacheError(f"{folder.name} has no manifest.json: caching did not finish; run 02 again, "
                         "it resumes") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
        raise CacheError(f"{folder.name}/manifest.json is damaged: delete the folder and run 02 again") from None
    if sha256_json(manifest) != stated:
        raise CacheError(f"{folder.name}/manifest.json was changed after it was written: delete the folder and run 02 "
                         "again")
    if manifest["format"] != FORMAT_VERSION:
        raise CacheError(f"{folder.name} has format {manifest['format']}, this code reads {FORMAT_VERSION}: run 02 "
                         "again")
    return {**manifest, "content_hash": stated}


def check_files(folder: Path) -> dict[str, Any]:
    """Every file that the manifest names is there, byte for byte. Returns the manifest.

    Raises:
        CacheError: the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    for entry in [*manifest["shards"], *([manifest["lm_head"]] if "lm_head" in manifest else [])]:
        path = folder / entry["file"]
        if not path.is_file():
            raise CacheError(f"{folder.name}/{entry['file']} is missing: run 02 again, it writes what is missing")
        if sha256_file(path) != entry["sha256"]:
            raise CacheError(f"{folder.name}/{entry['file']} is damaged (checksum differs): delete it and run 02 again")
    return manifest


class TeacherCache:
    """Random access to a finished cache.

    Args:
        folder: the cache's folder.
        memory_bytes: rows read are kept in memory up to this many bytes, so that later epochs read nothing.

    Raises:
        CacheError: no manifest, or one that is damaged.
    """

    def __init__(self, folder: Path, *, memory_bytes: int = 2**30) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self._files: dict[str, pq.ParquetFile] = {}
        self._place: dict[str, tuple[str, int]] = {}
        self._kept: dict[str, CachedExample] = {}
        self._room = memory_bytes
        self.lengths: dict[str, int] = {}
        self.splits: dict[str, list[str]] = {}
        for shard in self.manifest["shards"]:
            index = self._file(shard["file"]).read(["example_id", "tokens"])
            ids = index["example_id"].to_pylist()
            self._place.update({example_id: (shard["file"], group) for group, example_id in enumerate(ids)})
            self.lengths.update(zip(ids, pc.list_value_length(index["tokens"]).to_pylist()))
            self.splits.setdefault(shard["split"], []).extend(ids)

    def _file(self, name: str) -> pq.ParquetFile:
        if name not in self._files:
            try:
                self._files[name] = pq.ParquetFile(self.folder / name, memory_map=True)
            except (OSError, pa.ArrowInvalid) as error:
                raise CacheError(f"{self.folder.name}/{name} cannot be read ({error}): delete it and run 02 "
                                 "again") from None
        return self._files[name]

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, example_id: str) -> bool:
        return example_id in self._place

    def __getitem__(self, example_id: str) -> CachedExample:
        """The example's row.

        Raises:
            CacheError: no such example.
        """
        if example_id in self._kept:
            return self._kept[example_id]
        if example_id not in self._place:
            raise CacheError(f"{self.folder.name} has no row for example {example_id}: the data changed; run 02 again")
        file, group = self._place[example_id]
        row = self._shape(self._file(file).read_row_group(group))
        size = sum(value.nbytes for value in vars(row).values() if isinstance(value, np.ndarray))
        if size <= self._room:
            self._room -= size
            self._kept[example_id] = row
        return row

    def _shape(self, table: pa.Table) -> CachedExample:
        flat = {name: table[name].chunk(0) for name in table.column_names}
        row = CachedExample(flat["example_id"][0].as_py(), flat["tokens"].values.to_numpy(),
                            flat["answer_start"][0].as_py())
        rows_of = {"hidden": len(row.tokens), "attention": self.manifest.get("heads"), "top_logits": len(row.tokens),
                   "top_ids": len(row.tokens), "log_mass": len(row.tokens)}
        for column, rows in rows_of.items():
            if column in flat:
                setattr(row, column, flat[column].values.to_numpy(zero_copy_only=False).reshape(rows, -1))
        return row

    def lm_head(self) -> Tensor | None:
        """(V, d) the teacher's output layer, as stored; None in a top-k cache."""
        from safetensors.torch import load_file

        if "lm_head" not in self.manifest:
            return None
        return load_file(self.folder / self.manifest["lm_head"]["file"])["lm_head"]
