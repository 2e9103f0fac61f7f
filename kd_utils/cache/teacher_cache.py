"""Random access to a finished teacher cache, whose files are checked when it is opened.

`cache.manifest` describes the files and columns.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.torch import load_file
from torch import Tensor

from kd_utils.cache.manifest import CacheError, check_files, sealed_cache
from kd_utils.models.signal_kinds import kind_of
from kd_utils.tokens.encoding import Example
from kd_utils.tokens.vocabulary import Vocabulary


def byte_planes(column: str, values: np.ndarray) -> dict[str, pa.Array]:
    """One example's values as columns: plane j has the j-th byte of each value."""
    planes = np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(values.size, -1).T
    ends = pa.py_buffer(np.array([0, values.size], np.int64))
    # From buffers: `pa.array([memoryview])` never lets go of the view (pyarrow 26).
    return {
        f"{column}.{j}": pa.Array.from_buffers(
            pa.large_binary(), 1, [None, ends, pa.py_buffer(np.ascontiguousarray(plane))]
        )
        for j, plane in enumerate(planes)
    }


def joined_planes(table: pa.Table, column: str, dtype: str) -> np.ndarray:
    """The values of the one row in `table`, flat."""
    width = np.dtype(dtype).itemsize
    planes = [
        np.frombuffer(table[f"{column}.{j}"].chunk(0)[0].as_buffer(), np.uint8)
        for j in range(width)
    ]
    if width == 1:
        return planes[0].view(dtype)
    values = np.empty((planes[0].size, width), np.uint8)
    for j, plane in enumerate(planes):
        values[:, j] = plane
    return values.view(dtype)[:, 0]


class TeacherCache:
    """The rows of a finished cache by `example_id`; all files are checked first.

    Args:
        folder: the cache's folder.
        memory_bytes: how many bytes of rows are kept in memory, so that later epochs read nothing.

    Raises:
        CacheError: a file that is missing, damaged or from another cache.
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
            self._place.update(
                {example_id: (shard["file"], group) for group, example_id in enumerate(ids)}
            )
            self.lengths.update(zip(ids, pc.list_value_length(index["tokens"]).to_pylist()))
            self.splits.setdefault(shard["split"], []).extend(ids)

    def read_only(self, signals: Collection[str]) -> None:
        """From now on read only these columns of signals."""
        self._dtypes = {
            name: dtype for name, dtype in self.manifest["dtypes"].items() if name in signals
        }
        self._columns = [
            "example_id",
            "tokens",
            "answer_start",
            "ends",
            *(
                f"{name}.{j}"
                for name, dtype in self._dtypes.items()
                for j in range(np.dtype(dtype).itemsize)
            ),
        ]
        self._kept: dict[str, Example] = {}

    def _file(self, name: str) -> pq.ParquetFile:
        if name not in self._files:
            self._files[name] = pq.ParquetFile(self.folder / name, memory_map=True)
        return self._files[name]

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, example_id: str) -> bool:
        return example_id in self._place

    def __getitem__(self, example_id: str) -> Example:
        """The example's row.

        Raises:
            CacheError: no such example.
        """
        if example_id in self._kept:
            return self._kept[example_id]
        if example_id not in self._place:
            raise CacheError(
                f"{self.folder.name} has no row for example {example_id}: the data changed; run 02 "
                f"again"
            )
        file, group = self._place[example_id]
        row = self._shape(self._file(file).read_row_group(group, self._columns))
        size = sum(value.nbytes for value in (row.tokens, row.ends, *row.signals.values()))
        if size <= self._room:
            self._room -= size
            self._kept[example_id] = row
        return row

    def _shape(self, table: pa.Table) -> Example:
        row = Example(
            table["example_id"][0].as_py(),
            table["tokens"].chunk(0).values.to_numpy(),
            table["answer_start"][0].as_py(),
            table["ends"].chunk(0).values.to_numpy(),
        )
        for column, dtype in self._dtypes.items():
            rows, _ = kind_of(column).shape(len(row.tokens), self.manifest)
            row.signals[column] = joined_planes(table, column, dtype).reshape(rows, -1)
        return row

    def stored_bytes(self) -> dict[str, int]:
        """Compressed bytes of each signal in the shards; "other" is ids, tokens and footers."""
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
        """What the ids of the tokens, and the rows of `lm_head`, spell.

        Raises:
            CacheError: the file was damaged since the cache was opened.
        """
        file = sealed_cache(self.folder).file("vocabulary.parquet", self.manifest)
        return Vocabulary.from_table(pq.read_table(file))

    def lm_head(self) -> Tensor | None:
        """(V, d) the teacher's output layer, as stored; None in a top-k cache.

        Raises:
            CacheError: the file was damaged since the cache was opened.
        """
        if "lm_head.safetensors" not in self.manifest["checksums"]:
            return None
        file = sealed_cache(self.folder).file("lm_head.safetensors", self.manifest)
        return load_file(file)["lm_head"]
