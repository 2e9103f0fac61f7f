"""Random access to a finished teacher cache, whose files are checked when it is opened."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from kd_utils.cache.manifest import (
    PREDICTIONS,
    UNIT_SUMS,
    CacheError,
    check_files,
    sealed_cache,
)
from kd_utils.models.output_head import OutputHead
from kd_utils.models.signal_kinds import kind_of
from kd_utils.tokens.encoding import Example
from kd_utils.tokens.vocabulary import Vocabulary


def as_table(row: Example) -> pa.Table:
    """An example as a shard's row group: column "hidden.1" has the second byte of each value."""
    columns = {
        "example_id": pa.array([row.example_id]),
        "answer_start": pa.array([row.answer_start], pa.int32()),
        "tokens": pa.array([row.tokens], pa.large_list(pa.int32())),
        "ends": pa.array([[] if row.ends is None else row.ends], pa.large_list(pa.int32())),
    }
    for column, values in row.signals.items():
        planes = np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(values.size, -1).T
        ends = pa.py_buffer(np.array([0, values.size], np.int64))
        for j, plane in enumerate(planes):
            # From buffers: `pa.array([memoryview])` never lets go of the view (pyarrow 26).
            buffers = [None, ends, pa.py_buffer(np.ascontiguousarray(plane))]
            columns[f"{column}.{j}"] = pa.Array.from_buffers(pa.large_binary(), 1, buffers)
    return pa.table(columns)


class TeacherCache:
    """The rows of a finished cache by `example_id`; all files are checked first.

    Args:
        memory_bytes: how many bytes of rows are kept in memory, so that later epochs read nothing.

    Raises:
        CacheError: a file that is missing, damaged or from another cache.
    """

    def __init__(self, folder: Path, *, memory_bytes: int = 2**30) -> None:
        self.folder, self.manifest, self._memory = folder, check_files(folder), memory_bytes
        self.read_only(self.manifest["dtypes"])
        self._place: dict[str, tuple[pq.ParquetFile, int]] = {}
        self.lengths: dict[str, int] = {}
        self.splits: dict[str, list[str]] = {}
        for shard in self.manifest["shards"]:
            file = pq.ParquetFile(folder / shard["file"], memory_map=True)
            index = file.read(["example_id", "tokens"])
            ids = index["example_id"].to_pylist()
            self._place |= {example_id: (file, group) for group, example_id in enumerate(ids)}
            lengths = index["tokens"].combine_chunks().value_lengths()
            self.lengths.update(zip(ids, lengths.to_pylist()))
            self.splits.setdefault(shard["split"], []).extend(ids)

    def read_only(self, signals: Collection[str]) -> None:
        """From now on read only these columns of signals."""
        dtypes = self.manifest["dtypes"]
        self._dtypes = {name: np.dtype(dtypes[name]) for name in dtypes if name in signals}
        planes = [
            f"{name}.{j}" for name, dtype in self._dtypes.items() for j in range(dtype.itemsize)
        ]
        self._columns = ["tokens", "answer_start", "ends", *planes]
        self._kept: dict[str, Example] = {}
        self._room = self._memory

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, example_id: str) -> Example:
        """The example's row; a CacheError names an example that the cache lacks."""
        if example_id in self._kept:
            return self._kept[example_id]
        if example_id not in self._place:
            raise CacheError(
                f"{self.folder.name} has no row for example {example_id}: the data changed; "
                "run 02 again"
            )
        file, group = self._place[example_id]
        table = file.read_row_group(group, self._columns)
        tokens, ends = (table[name].chunk(0).values.to_numpy() for name in ("tokens", "ends"))
        row = Example(example_id, tokens, table["answer_start"][0].as_py(), ends)
        for column, dtype in self._dtypes.items():
            planes = [
                np.frombuffer(table[f"{column}.{j}"].chunk(0)[0].as_buffer(), np.uint8)
                for j in range(dtype.itemsize)
            ]
            rows, _ = kind_of(column).shape(len(row.tokens), self.manifest)
            row.signals[column] = np.stack(planes, axis=1).view(dtype).reshape(rows, -1)
        size = sum(value.nbytes for value in (tokens, ends, *row.signals.values()))
        if size <= self._room:
            self._room -= size
            self._kept[example_id] = row
        return row

    def stored_bytes(self) -> dict[str, int]:
        """Compressed bytes of each signal in the shards; "other" is ids, tokens and footers."""
        sizes: Counter[str] = Counter()
        for shard in self.manifest["shards"]:
            for group in pq.read_metadata(self.folder / shard["file"]).to_dict()["row_groups"]:
                for column in group["columns"]:
                    name = column["path_in_schema"].split(".")[0]
                    sizes[name] += column["total_compressed_size"]
        stored = {name: sizes[name] for name in self.manifest["dtypes"]}
        whole = sum(shard["bytes"] for shard in self.manifest["shards"])
        return {**stored, "other": whole - sum(stored.values())}

    def vocabulary(self) -> Vocabulary:
        """What the tokens' ids, and the rows of `lm_head`, spell; the file is checked again."""
        file = sealed_cache(self.folder).file("vocabulary.parquet", self.manifest)
        return Vocabulary.from_table(pq.read_table(file))

    def lm_head(self) -> Any:
        """(V, d) the teacher's output layer; None in a top-k cache. The file is checked again."""
        return self._head_file().get("lm_head")

    def head_bias(self) -> Any:
        """(V,) the bias of the teacher's output layer, if it has one. The file is checked again."""
        return self._head_file().get("bias")

    def answers(self) -> pd.DataFrame:
        """The teacher's answers to the training rows (`data.answers`); the file is checked again.

        Raises:
            CacheError: the cache has none.
        """
        return read_answers(self.folder)

    def unit_sums(self) -> pd.DataFrame | None:
        """The sums from which the importance of the teacher's units follows (`models.importance`),
        if it is of a family whose units are known. The file is checked again.
        """
        if UNIT_SUMS not in self.manifest["checksums"]:
            return None
        return pd.read_parquet(sealed_cache(self.folder).file(UNIT_SUMS, self.manifest))

    def with_teacher(self, predictions: pd.DataFrame) -> pd.DataFrame:
        """A student's predictions with the column `teacher_correct`: whether the teacher answers
        the same row right. A cache of older code does not say so; then nothing is added.

        Args:
            predictions: of the validation rows (`scoring.evaluate`).

        Raises:
            CacheError: the teacher was not asked a row, or the file is damaged.
        """
        if PREDICTIONS not in self.manifest["checksums"]:
            return predictions
        table = pd.read_parquet(sealed_cache(self.folder).file(PREDICTIONS, self.manifest))
        right = table.set_index("example_id")["correct"]
        if lacking := set(predictions["example_id"]) - set(right.index):
            raise CacheError(
                f"{self.folder.name}/{PREDICTIONS} lacks the teacher's answer to {len(lacking)} "
                "validation rows: run 02 again"
            )
        return predictions.assign(teacher_correct=predictions["example_id"].map(right))

    def _head_file(self) -> dict[str, Any]:
        if "lm_head.safetensors" not in self.manifest["checksums"]:
            return {}
        return load_file(sealed_cache(self.folder).file("lm_head.safetensors", self.manifest))


def read_answers(folder: Path) -> pd.DataFrame:
    """The teacher's answers in a finished cache, after their file was checked.

    Raises:
        CacheError: they are missing or damaged.
    """
    sealed = sealed_cache(folder)
    return pd.read_parquet(sealed.file("answers.parquet", sealed.read()))


def output_head(cache: TeacherCache, device: torch.device | str = "cpu") -> OutputHead | None:
    """The teacher's output layer in float32; None in a top-k cache."""
    if (weight := cache.lm_head()) is None:
        return None
    how = dict(cache.manifest["head"])
    # Only where there is a bias, the manifest mentions it.
    bias = cache.head_bias().float().to(device) if how.pop("bias", False) else None
    return OutputHead(weight.float().to(device), **how, bias=bias)
