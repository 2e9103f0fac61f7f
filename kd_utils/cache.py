"""The teacher cache: its signals for every example, ragged, keyed by `example_id`, checksummed, resumable.

A cache is a folder `NAME-DATE-KEY`: Parquet shards of one row group per example (so that one row is one read),
`vocabulary.parquet` (what each id spells), `lm_head.safetensors`, and `manifest.json`, which is written last: without
it there is no cache. Tokens are the teacher's own; where the student's differ, the two are lined up when it trains.

| column | per example of n tokens |
|---|---|
| `example_id`, `tokens`, `answer_start` | key, int32 (n,), index of the answer's first token |
| `ends` | int32 (n,) behind which byte of the text each token ends; empty if the tokens do not spell the text |
| `hidden` | float16 (n, d) final hidden state, after the last norm: times `lm_head` it is the logits |
| `attention` | float16 or uint8 (H, n (n + 1) / 2) last layer's map as `signals.encode_map` gives it |
| `hidden_7`, `attention_7`, ... | the same of other layers that were asked for; the hidden state before any norm |
| `top_logits`, `top_ids`, `log_mass` | instead of these: float32 (n, k), int32 (n, k), float32 (n, temperatures) |

A signal is stored as byte planes: column `hidden.0` has the first byte of every value, `hidden.1` the second. Exponents
then stand beside exponents and compress, mantissas beside mantissas (Parquet's BYTE_STREAM_SPLIT does the same, but the
lists that it needs are read and written at half the speed). `manifest.json` has the dtypes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import sha256_file, sha256_json
from .source_code import code_of

if TYPE_CHECKING:
    from torch import Tensor

    from .vocabulary import Vocabulary

FORMAT_VERSION = 3
FOLDER = re.compile(r"(?P<name>.+)-\d{4}-\d\d-\d\d-(?P<key>[0-9a-f]{8})")
TOP_K = ("top_logits", "top_ids", "log_mass")


class CacheError(ValueError):
    """A cache that is missing, damaged, unverified, or made for something else."""


@dataclass
class CachedExample:
    """One row, shaped: `signals` has those of its columns that are read, by name. Shapes as in the module's table."""

    example_id: str
    tokens: np.ndarray
    answer_start: int
    ends: np.ndarray | None = None
    signals: dict[str, np.ndarray] = field(default_factory=dict)


def signal_of(column: str) -> str:
    """Which signal a column holds: "attention_7" is attention of the layer 7."""
    return column.split("_")[0] if column.startswith(("hidden", "attention")) else column


def byte_planes(column: str, values: np.ndarray) -> dict[str, pa.Array]:
    """One example's values as columns: plane j has the j-th byte of each."""
    planes = np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(values.size, -1).T
    ends = pa.py_buffer(np.array([0, values.size], np.int64))
    # From buffers: `pa.array([memoryview])` never lets go of the view (pyarrow 26).
    return {f"{column}.{j}": pa.Array.from_buffers(pa.large_binary(), 1,
                                                   [None, ends, pa.py_buffer(np.ascontiguousarray(plane))])
            for j, plane in enumerate(planes)}


def joined_planes(table: pa.Table, column: str, dtype: str) -> np.ndarray:
    """The values of the one row in `table`, flat."""
    width = np.dtype(dtype).itemsize
    planes = [np.frombuffer(table[f"{column}.{j}"].chunk(0)[0].as_buffer(), np.uint8) for j in range(width)]
    if width == 1:
        return planes[0].view(dtype)
    values = np.empty((planes[0].size, width), np.uint8)
    for j, plane in enumerate(planes):
        values[:, j] = plane
    return values.view(dtype)[:, 0]


@lru_cache(maxsize=1)  # what this process imported, and not what is edited while it runs
def cache_code() -> dict[str, str]:
    """Digests of the code that decides what a cache holds (see `source_code.code_of`)."""
    return code_of("02_cache_teacher", ("teacher", "cache_writer"))


def key_digest(key: dict[str, Any]) -> str:
    """The end of a cache folder's name: everything that decides the content, in eight hex digits."""
    return sha256_json({"format": FORMAT_VERSION, **key})[:8]


def finished_caches(artifacts: Path, name: str) -> list[Path]:
    """Folders of experiment `name`'s finished caches, in the order in which 02 wrote, or was asked for, them last."""
    folders = [path.parent for path in (artifacts / "cache").glob("*/manifest.json")
               if (parts := FOLDER.fullmatch(path.parent.name)) and parts["name"] == name]
    return sorted(folders, key=lambda folder: (folder / "manifest.json").stat().st_mtime_ns)


def find_cache(artifacts: Path, name: str) -> Path:
    """The finished cache of experiment `name` that 02 wrote, or was asked for, last.

    Raises:
        CacheError: there is none, or it is not what its folder's name says.
    """
    folders = finished_caches(artifacts, name)
    if not folders:
        raise CacheError(f"no finished teacher cache of experiment {name!r}: run notebook 02_cache_teacher first")
    read_manifest(folders[-1])
    return folders[-1]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if it is one of this format, this folder's own, and unchanged since it was written."""
    where = f"{folder.name}/manifest.json"
    try:
        text = (folder / "manifest.json").read_bytes().decode()
        manifest = json.loads(text)
        # The text is compared too, since other digits, or an E for an e, can read as the same number.
        unchanged = text == json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        stated = manifest.pop("content_hash")
        unchanged &= sha256_json(manifest) == stated
    except FileNotFoundError:
        raise CacheError(f"{where} is missing: caching did not finish; run 02 again, it resumes") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CacheError(f"{where} is damaged or cannot be read: run 02 again") from None
    if not unchanged:
        raise CacheError(f"{where} was changed after it was written: run 02 again")
    if manifest.get("format") != FORMAT_VERSION:
        raise CacheError(f"{where} has format {manifest.get('format')}, this code reads {FORMAT_VERSION}: run 02 again")
    parts = FOLDER.fullmatch(folder.name)
    if parts and "key" in manifest and (parts["name"], parts["key"]) != (manifest["name"], key_digest(manifest["key"])):
        raise CacheError(f"{where} is that of {manifest['name']}-DATE-{key_digest(manifest['key'])}: another cache was "
                         "copied here, or the folder renamed: run 02 again")
    return {**manifest, "content_hash": stated}


def check_files(folder: Path) -> dict[str, Any]:
    """Every file that the manifest names is there, byte for byte. Returns the manifest.

    Raises:
        CacheError: the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    for entry in [*manifest["shards"], *(manifest[name] for name in ("vocabulary", "lm_head") if name in manifest)]:
        _check_file(folder, entry)
    return manifest


def _check_file(folder: Path, entry: dict[str, Any]) -> Path:
    path = folder / entry["file"]
    if not path.is_file():
        raise CacheError(f"{folder.name}/{path.name} is missing: run 02 again, it writes what is missing")
    if sha256_file(path) != entry["sha256"]:
        raise CacheError(f"{folder.name}/{path.name} is damaged, or another cache's (checksum differs): run 02 again")
    return path


class TeacherCache:
    """Random access to a finished cache, all of whose files are looked at first.

    Args:
        folder: the cache's folder.
        memory_bytes: rows read are kept in memory up to this many bytes, so that later epochs read nothing.

    Raises:
        CacheError: a file that is missing, damaged or another cache's.
    """

    def __init__(self, folder: Path, *, memory_bytes: int = 2**30) -> None:
        self.folder, self.manifest = folder, check_files(folder)
        self.read_only(self.manifest["dtypes"])
        self._files: dict[str, pq.ParquetFile] = {}
        self._place: dict[str, tuple[str, int]] = {}
        self._room = memory_bytes
        self.lengths: dict[str, int] = {}
        self.splits: dict[str, list[str]] = {}
        for shard in self.manifest["shards"]:
            index = self._file(shard["file"]).read(["example_id", "tokens"])
            ids = index["example_id"].to_pylist()
            self._place.update({example_id: (shard["file"], group) for group, example_id in enumerate(ids)})
            self.lengths.update(zip(ids, pc.list_value_length(index["tokens"]).to_pylist()))
            self.splits.setdefault(shard["split"], []).extend(ids)

    def read_only(self, signals: Collection[str]) -> None:
        """From now on rows have these of the cache's signals; the others are not read."""
        self._dtypes = {name: dtype for name, dtype in self.manifest["dtypes"].items() if name in signals}
        self._columns = ["example_id", "tokens", "answer_start", "ends", *(
            f"{name}.{j}" for name, dtype in self._dtypes.items() for j in range(np.dtype(dtype).itemsize))]
        self._kept: dict[str, CachedExample] = {}

    def _file(self, name: str) -> pq.ParquetFile:
        if name not in self._files:
            self._files[name] = pq.ParquetFile(self.folder / name, memory_map=True)
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
        row = self._shape(self._file(file).read_row_group(group, self._columns))
        size = sum(value.nbytes for value in (row.tokens, row.ends, *row.signals.values()))
        if size <= self._room:
            self._room -= size
            self._kept[example_id] = row
        return row

    def _shape(self, table: pa.Table) -> CachedExample:
        row = CachedExample(table["example_id"][0].as_py(), table["tokens"].chunk(0).values.to_numpy(),
                            table["answer_start"][0].as_py(), table["ends"].chunk(0).values.to_numpy())
        for column, dtype in self._dtypes.items():
            rows = self.manifest["heads"] if signal_of(column) == "attention" else len(row.tokens)
            row.signals[column] = joined_planes(table, column, dtype).reshape(rows, -1)
        return row

    def stored_bytes(self) -> dict[str, int]:
        """What each signal takes in the shards, compressed; "other" is ids, tokens and the files' footers."""
        stored = dict.fromkeys((*self.manifest["dtypes"], "other"), 0)
        for shard in self.manifest["shards"]:
            metadata, signals = self._file(shard["file"]).metadata, 0
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                for column in map(group.column, range(group.num_columns)):
                    if (name := column.path_in_schema.split(".")[0]) in self.manifest["dtypes"]:
                        stored[name] += column.total_compressed_size
                        signals += column.total_compressed_size
            stored["other"] += shard["bytes"] - signals
        return stored

    def vocabulary(self) -> Vocabulary:
        """What the ids of the tokens, and the rows of `lm_head`, stand for.

        Raises:
            CacheError: the file was damaged since the cache was opened.
        """
        from .vocabulary import Vocabulary

        return Vocabulary.from_table(pq.read_table(_check_file(self.folder, self.manifest["vocabulary"])))

    def lm_head(self) -> Tensor | None:
        """(V, d) the teacher's output layer, as stored; None in a top-k cache.

        Raises:
            CacheError: the file was damaged since the cache was opened.
        """
        from safetensors.torch import load_file

        if "lm_head" not in self.manifest:
            return None
        return load_file(_check_file(self.folder, self.manifest["lm_head"]))["lm_head"]
