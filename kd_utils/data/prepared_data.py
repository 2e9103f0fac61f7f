"""Prepared data: tables for training, for choices and for the end, with no content in two.

They are kept in a folder with a manifest (a `SealedFolder`). When they are read, every row is
looked at, so that nothing later meets a surprise.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from kd_utils.config import fields, project_paths, stages
from kd_utils.data import task_rows, tasks
from kd_utils.records import provenance
from kd_utils.store import files, sealed
from kd_utils.tokens import encoding

FORMAT = 4

#: What students are trained on; what every choice (rest, stopping, settings) reads; what is used
#: once, at the end.
SPLITS = ("train", "held_out", "validation")

KEYS = {"name", "config_fingerprint", "tokenizer_fingerprint", "data_hash", "counts", "made_from"}

#: Columns of a prepared table, in order.
PREPARED = tuple(column for column in task_rows.COLUMNS if column != "row")

#: The modules that build the embedded models and tables, whose code decides the rows too.
BUILDERS = {"toy": ["demos.toy_models"], "smol": ["demos.smol"], "smol-cross": ["demos.smol"]}


@dataclass(frozen=True)
class PreparedData:
    """What `01_prepare_data` makes: tables with the columns of `PREPARED`, and their record.

    `train` has also `labelled` (bool): whether training may use the row's own answer. Other rows
    keep it, so that 02 can say how often the teacher's answer is right; `answers.answered` gives
    the rows as they are trained on.

    `counts` has a row per task and split: `source` (the hub's split), `available` (rows there),
    `duplicates` (dropped, since their content is elsewhere in the data), `shots` (dropped, since
    few-shot evaluation shows that content before every question, see `leakage.few_shot_rows`),
    `too_long` (drawn and dropped for more than max_length tokens; others were drawn instead),
    `taken`, and of those `mean_tokens`, `max_tokens` (prompt, answer and end token) and
    `mean_answer_tokens`.

    `made_from` has the `config`, digests of the `source` files and of the `code`.
    """

    train: pd.DataFrame
    held_out: pd.DataFrame
    validation: pd.DataFrame
    counts: pd.DataFrame
    config_fingerprint: str
    tokenizer_fingerprint: str
    made_from: provenance.Ingredients

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Each split's table."""
        return {split: getattr(self, split) for split in SPLITS}

    @property
    def max_length(self) -> int:
        """Most tokens of a row, counted with the student's tokenizer."""
        return self.made_from["config"]["max_length"]

    @property
    def labels(self) -> pd.DataFrame:
        """How many labels are used, a row per task: `train_rows`, of which `labelled`; `held_out`,
        whose labels count too; and `labels`, the sum of the last two.
        """
        train = self.train.groupby("task", sort=False)["labelled"]
        table = train.agg(train_rows="size", labelled="sum")
        table["held_out"] = self.held_out["task"].value_counts()
        return table.assign(labels=table["labelled"] + table["held_out"]).reset_index()

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Raise a ValueError if the lengths of the rows were counted with another tokenizer."""
        if encoding.tokenizer_fingerprint(tokenizer) != self.tokenizer_fingerprint:
            raise ValueError(
                "the data was prepared with another tokenizer: run 01_prepare_data again with this "
                "tokenizer"
            )

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 of the content of all tables, row by row, however parquet stores them."""
        digest = hashlib.sha256()
        for split, table in self.tables.items():
            for values in zip(
                *(table[column].tolist() for column in columns_of(split)), strict=True
            ):
                row = [v if isinstance(v, (str, bool)) else list(v) for v in values]
                digest.update(json.dumps([split, *row]).encode() + b"\n")
        return digest.hexdigest()


def save_prepared(prepared: PreparedData, folder: str | Path) -> Path:
    """Write `SPLIT.parquet` for each split, and `manifest.json`; returns the folder."""
    folder = Path(folder)
    manifest = {
        "format": FORMAT,
        "name": folder.name,
        "config_fingerprint": prepared.config_fingerprint,
        "tokenizer_fingerprint": prepared.tokenizer_fingerprint,
        "data_hash": prepared.data_hash,
        "counts": prepared.counts.to_dict("records"),
        "made_from": prepared.made_from,
    }
    with _sealed(folder).replaced(manifest) as aside:
        for split, table in prepared.tables.items():
            table.to_parquet(aside / f"{split}.parquet", index=False)
    return folder


def load_prepared(folder: str | Path) -> PreparedData:
    """Read a folder that `save_prepared` wrote; checks its files, and every row.

    Raises:
        RecordError: a file that is missing, was changed or is another folder's, a column, type or
            value that a prepared table cannot have, or a content or example_id in two splits.
    """
    home, manifest = _sealed(folder), read_manifest(folder)
    home.check(*(f"{split}.parquet" for split in SPLITS))
    seen: dict[str, str] = {}
    tables = {split: _read_table(home, split, seen) for split in SPLITS}
    contents = {split: {*task_rows.content_keys(table)} for split, table in tables.items()}
    for first, second in combinations(SPLITS, 2):
        if both := contents[first] & contents[second]:
            raise home.problem(
                f"{first}.parquet: {len(both)} contents are in {second}.parquet too, expected none"
            )
    prepared = PreparedData(
        **tables,
        counts=pd.DataFrame(manifest["counts"]),
        config_fingerprint=manifest["config_fingerprint"],
        tokenizer_fingerprint=manifest["tokenizer_fingerprint"],
        made_from=provenance.Ingredients(manifest["made_from"]),
    )
    if prepared.data_hash != manifest["data_hash"]:
        raise home.problem("manifest.json has another data_hash than the tables")
    return prepared


def columns_of(split: str) -> list[str]:
    """The columns of a split's table."""
    return [*PREPARED, *["labelled"] * (split == "train")]


def _read_table(home: sealed.SealedFolder, split: str, seen: dict[str, str]) -> pd.DataFrame:
    """A prepared table whose rows were all looked at.

    Args:
        seen: example_id -> the file and row that has it; the rows of this table are added.
    """
    file, columns = f"{split}.parquet", columns_of(split)
    try:
        rows = pq.ParquetFile(home.path / file).read(columns=columns).to_pylist()
    except Exception as error:  # a file that somebody else made may be wrong in every way
        raise home.problem(
            f"{file} is not a complete parquet file of Unicode text ({fields.shown(str(error))})"
        ) from None
    if not rows:
        raise home.problem(f"{file} has no rows")
    if missing := [column for column in columns if column not in rows[0]]:
        raise home.problem(
            f"{file} has no column {', '.join(missing)} (it has {', '.join(rows[0])})"
        )
    for number, row in enumerate(rows):
        place = f"{file}, row {number}"
        if problem := _row_problem(row):
            raise home.problem(f"{place}: {problem}")
        if (first := seen.setdefault(row["example_id"], place)) != place:
            raise home.problem(
                f"{place}: example_id {fields.shown(row['example_id'])} is already used by {first}"
            )
    return pd.DataFrame(rows, columns=columns)


def _row_problem(row: dict[str, Any]) -> str:
    """What is wrong with a row, and what is expected; "" for nothing."""
    choices = row["choices"]
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
        return f"choices = {fields.shown(choices)}, expected a list of texts"
    if not isinstance(row.get("labelled", True), bool):
        return f"labelled = {fields.shown(row['labelled'])}, expected true or false"
    for column in PREPARED:
        if column != "choices" and not isinstance(row[column], str):
            return f"{column} = {fields.shown(row[column])}, expected text"
    if not row["example_id"]:
        return "example_id is empty, expected the example's own"
    if not row["prompt"].strip():
        return "prompt is empty, expected a question: a model needs a token to start from"
    if row["task"] not in tasks.TASKS:
        known = ", ".join(tasks.TASKS)
        return f"task = {fields.shown(row['task'])}, expected one of {known}"
    task = tasks.TASKS[row["task"]]
    return task.prepared_problem(choices, row["answer"], row["gold"])


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of prepared data; the tables are not read.

    Raises:
        RecordError: it is missing, damaged, of another format, or another folder's.
    """
    home = _sealed(folder)
    manifest = home.read()
    if manifest.get("format") != FORMAT:
        raise home.problem(f"manifest.json is not a manifest of format {FORMAT}")
    if missing := KEYS - manifest.keys():
        raise home.problem(f"manifest.json lacks {', '.join(sorted(missing))}")
    if manifest["name"] != home.path.name:
        raise home.problem(f"manifest.json was copied here from the data {manifest['name']!r}")
    return manifest


def why_stale(folder: str | Path, config: stages.DataConfig) -> str:
    """Why the prepared data is not what `01_prepare_data` would make now; "" if it is.

    It compares config, code, the local files of rows and tokenizer, and the bytes of the tables.
    """
    try:
        made_from = provenance.Ingredients(read_manifest(folder)["made_from"])
        _sealed(folder).check()
        return made_from.why_stale(ingredients(config))
    except (sealed.RecordError, FileNotFoundError) as error:
        return str(error)


def _sealed(folder: str | Path) -> sealed.SealedFolder:
    return sealed.SealedFolder(
        Path(folder),
        "manifest.json",
        label=project_paths.short_path(folder),
        remedy="run 01_prepare_data again",
    )


def ingredients(config: stages.DataConfig) -> provenance.Ingredients:
    """What decides the rows: the config, the code, and the local files of rows, few-shot rows and
    tokenizer; the hub is not asked.
    """
    names = {
        f"{task}/{tasks.find_task(task).splits[use]}.parquet"
        for split in ("train", "validation")  # held-out rows are from the source of training
        for task in config.rows(split)
        for use in (split, "shots")
    }
    folder = project_paths.project_path(config.data_dir) if config.data_dir else None
    paths = {name: folder / name for name in sorted(names)} if folder else {}
    source = {name: files.sha256_file(path) for name, path in paths.items() if path.is_file()}
    tokenizer = project_paths.project_path(config.tokenizer)
    of_tokenizer = encoding.tokenizer_files(tokenizer) if tokenizer.is_dir() else {}
    builders = BUILDERS.get("toy" if config.toy_name else config.build, [])
    start = {"data.prepared_data", "data.drawing", *builders}
    return provenance.Ingredients(
        config=config.model_dump(exclude={"name", "artifacts_dir"}),
        source=source | {f"tokenizer/{name}": digest for name, digest in of_tokenizer.items()},
        code=provenance.code_of("01_prepare_data", start),
    )
