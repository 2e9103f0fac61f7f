"""Prepared data: one table for training and one for validation, with no content in both.

They are kept in a folder with a manifest (a `SealedFolder`).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kd_utils.config.project_paths import project_path, short_path
from kd_utils.config.stages import DataConfig
from kd_utils.data.prepared_table import PREPARED, read_table, require_own_ids
from kd_utils.data.task_rows import content_keys
from kd_utils.data.tasks import find_task
from kd_utils.records.provenance import Ingredients, code_of
from kd_utils.store.files import sha256_file
from kd_utils.store.sealed import RecordError, SealedFolder
from kd_utils.tokens.encoding import tokenizer_files, tokenizer_fingerprint

FORMAT = 3

SPLITS = ("train", "validation")

FILES = ("train.parquet", "validation.parquet")

KEYS = {"name", "config_fingerprint", "tokenizer_fingerprint", "data_hash", "counts", "made_from"}

#: The modules that build the embedded models and tables, whose code decides the rows too.
BUILDERS = {"toy": "demos.toy_models", "smol": "demos.smol", "smol-cross": "demos.smol"}


@dataclass(frozen=True)
class PreparedData:
    """What `01_prepare_data` makes: two tables with the columns of `PREPARED`, and their record.

    `counts` has a row per task and split: `source` (the hub's split), `available` (rows there),
    `duplicates` (dropped, since their content is elsewhere in the data), `shots` (dropped, since
    few-shot evaluation shows that content before every question, see `leakage.few_shot_rows`),
    `too_long` (drawn and dropped for more than max_length tokens; others were drawn instead),
    `taken`, and of those `mean_tokens`, `max_tokens` (prompt, answer and end token) and
    `mean_answer_tokens`.

    `made_from` has the `config`, digests of the `source` files and of the `code`.
    """

    train: pd.DataFrame
    validation: pd.DataFrame
    counts: pd.DataFrame
    config_fingerprint: str
    tokenizer_fingerprint: str
    made_from: Ingredients

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Each split's table."""
        return {split: getattr(self, split) for split in SPLITS}

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Raise a ValueError if the lengths of the rows were counted with another tokenizer."""
        if tokenizer_fingerprint(tokenizer) != self.tokenizer_fingerprint:
            raise ValueError(
                "the data was prepared with another tokenizer: run 01_prepare_data again with this "
                "one"
            )

    @property
    def data_hash(self) -> str:
        """SHA-256 of the content of both tables, row by row, however parquet stores them."""
        digest = hashlib.sha256()
        for split in SPLITS:
            table = getattr(self, split)
            for values in zip(*(table[column] for column in PREPARED), strict=True):
                row = [value if isinstance(value, str) else list(value) for value in values]
                digest.update(json.dumps([split, *row]).encode() + b"\n")
        return digest.hexdigest()


def save_prepared(prepared: PreparedData, folder: str | Path) -> Path:
    """Write `train.parquet`, `validation.parquet` and `manifest.json`; returns the folder."""
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
        for split, file in zip(SPLITS, FILES, strict=True):
            getattr(prepared, split).to_parquet(aside / file, index=False)
    return folder


def load_prepared(folder: str | Path) -> PreparedData:
    """Read a folder that `save_prepared` wrote; checks its files, and every row.

    Raises:
        RecordError: a file that is missing, was changed or is another folder's, a column, type or
            value that a prepared table cannot have, or a content or example_id in both splits.
    """
    folder = Path(folder)
    where, manifest = short_path(folder), read_manifest(folder)
    _sealed(folder).check(*FILES)
    tables = {file: read_table(folder / file) for file in FILES}
    require_own_ids(tables, where)
    _require_disjoint(*tables.values(), where)
    prepared = PreparedData(
        *tables.values(),
        pd.DataFrame(manifest["counts"]),
        manifest["config_fingerprint"],
        manifest["tokenizer_fingerprint"],
        Ingredients(manifest["made_from"]),
    )
    if prepared.data_hash != manifest["data_hash"]:
        raise _sealed(folder).problem("manifest.json has another data_hash than the tables")
    return prepared


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of prepared data; the tables are not read.

    Raises:
        RecordError: it is missing, damaged, of another format, or another folder's.
    """
    sealed = _sealed(Path(folder))
    manifest = sealed.read()
    if manifest.get("format") != FORMAT:
        raise sealed.problem(f"manifest.json is not a manifest of format {FORMAT}")
    if missing := KEYS - manifest.keys():
        raise sealed.problem(f"manifest.json lacks {', '.join(sorted(missing))}")
    if manifest["name"] != Path(folder).name:
        raise sealed.problem(f"manifest.json was copied here from the data {manifest['name']!r}")
    return manifest


def why_stale(folder: str | Path, config: DataConfig) -> str:
    """Why the prepared data is not what `01_prepare_data` would make now; "" if it is.

    It compares config, code, and the local files of rows and tokenizer, and reads no table.
    """
    try:
        then = Ingredients(read_manifest(folder)["made_from"])
        return then.why_stale(_made_from(config))
    except (RecordError, FileNotFoundError) as error:
        return str(error)


def _sealed(folder: Path) -> SealedFolder:
    return SealedFolder(
        folder, "manifest.json", label=short_path(folder), remedy="run 01_prepare_data again"
    )


def _made_from(config: DataConfig) -> Ingredients:
    """What decides the rows: the config, local files of rows and tokenizer, and the code."""
    start = {"data.prepared_data", "data.drawing", *filter(None, [BUILDERS.get(config.build)])}
    return Ingredients(
        config=config.model_dump(exclude={"name", "artifacts_dir"}),
        source=_source_files(config),
        code=code_of("01_prepare_data", start),
    )


def _source_files(config: DataConfig) -> dict[str, str]:
    """Digests of the local files of rows, few-shot rows and tokenizer; the hub is not asked."""
    digests = {}
    if config.data_dir:
        names = {
            f"{task}/{source}.parquet"
            for split in SPLITS
            for task in config.rows(split)
            for source in (find_task(task).splits[split], find_task(task).splits["shots"])
        }
        files = {name: project_path(config.data_dir) / name for name in sorted(names)}
        digests = {name: sha256_file(path) for name, path in files.items() if path.is_file()}
    tokenizer = project_path(config.tokenizer)
    of_tokenizer = tokenizer_files(tokenizer) if tokenizer.is_dir() else {}
    return digests | {f"tokenizer/{name}": digest for name, digest in of_tokenizer.items()}


def _require_disjoint(train: pd.DataFrame, validation: pd.DataFrame, where: str) -> None:
    both = {*content_keys(train)} & {*content_keys(validation)}
    if both:
        raise ValueError(
            f"{where}: {len(both)} contents are in train and in validation, expected none: run "
            "01_prepare_data again"
        )
