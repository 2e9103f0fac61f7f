"""Prepared data: one table for training and one for validation, disjoint by content, in a folder
with a manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kd_utils.config.project_paths import project_path, short_path
from kd_utils.config.stages import DataConfig
from kd_utils.data.prepared_table import PREPARED, read_table, require_own_ids
from kd_utils.data.task_rows import content_keys
from kd_utils.data.tasks import find_task
from kd_utils.records.source_code import changed_files, code_of
from kd_utils.store.files import full_disk_named, sha256_file, written_folder
from kd_utils.store.sealed import RecordError, read_sealed, write_sealed
from kd_utils.tokens.encoding import tokenizer_files, tokenizer_fingerprint

FORMAT = 2

SPLITS = ("train", "validation")

MADE_FROM = ("config", "source", "code")


@dataclass(frozen=True)
class PreparedData:
    """What `01_prepare_data` makes: two tables with the columns of `tasks.COLUMNS` but `row`, and
    their record.

    `counts` has a row per task and split: `source` (the hub's split), `available` (rows there),
    `duplicates` (dropped for content that stands elsewhere in the data), `shots` (of the rest,
    dropped because few-shot evaluation shows that content before every question, see
    `leaks.few_shot_rows`), `too_long` (drawn, but dropped for more than max_length tokens; another
    was drawn instead), `taken`, and of those `mean_tokens`, `max_tokens` (prompt, answer and end
    token) and `mean_answer_tokens`.

    `made_from` is what `why_stale` compares: the `config`, digests of the `source` files and of the
    `code`.
    """

    train: pd.DataFrame
    validation: pd.DataFrame
    counts: pd.DataFrame
    config_fingerprint: str
    tokenizer_fingerprint: str
    made_from: dict[str, dict[str, Any]]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Each split's table."""
        return {split: getattr(self, split) for split in SPLITS}

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Raise a ValueError if lengths were counted, and rows dropped, with another tokenizer than
        this one.
        """
        if tokenizer_fingerprint(tokenizer) != self.tokenizer_fingerprint:
            raise ValueError(
                "the data was prepared with another tokenizer: run 01_prepare_data again with this "
                "one"
            )

    @property
    def data_hash(self) -> str:
        """SHA-256 over the content of both tables, row by row: it does not depend on how parquet
        stores them.
        """
        digest = hashlib.sha256()
        for split in SPLITS:
            table = getattr(self, split)
            for values in zip(*(table[column] for column in PREPARED), strict=True):
                line = json.dumps(
                    [split, *(list(v) if not isinstance(v, str) else v for v in values)]
                )
                digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def save_prepared(prepared: PreparedData, folder: str | Path) -> Path:
    """Write `{train,validation}.parquet` and `manifest.json` aside, then move them into place as
    one folder.

    The manifest is sealed and has the checksums of the tables, so that any later change is found.
    """
    folder = Path(folder)
    remove_leftovers(folder)
    with written_folder(folder) as aside:
        checksums = {}
        for split in SPLITS:
            path = aside / f"{split}.parquet"
            with full_disk_named(folder / path.name):
                getattr(prepared, split).to_parquet(path, index=False)
            checksums[path.name] = sha256_file(path)
        write_sealed(
            aside / "manifest.json",
            {
                "format": FORMAT,
                "name": folder.name,
                "config_fingerprint": prepared.config_fingerprint,
                "tokenizer_fingerprint": prepared.tokenizer_fingerprint,
                "data_hash": prepared.data_hash,
                "counts": prepared.counts.to_dict("records"),
                **prepared.made_from,
                "checksums": checksums,
            },
            "checksums",
        )
    return folder


def load_prepared(folder: str | Path) -> PreparedData:
    """Read a folder that `save_prepared` wrote, and check it against its manifest, and every row.

    Raises:
        FileNotFoundError: no such folder, or one of its files is missing.
        ValueError: another format, a file that was changed or is another folder's, a column, type
            or value that a prepared table cannot have, or a content or example_id in both splits.
    """
    folder = Path(folder)
    where = short_path(folder)
    manifest = read_manifest(folder)
    for path in [folder / f"{split}.parquet" for split in SPLITS]:
        if not path.is_file():
            raise FileNotFoundError(
                f"no prepared data in {where} ({path.name} is missing): run 01_prepare_data first"
            )
        if sha256_file(path) != manifest["checksums"].get(path.name):
            raise ValueError(
                f"{where}/{path.name} is not the file that manifest.json was written with (its "
                f"checksum "
                "differs): run 01_prepare_data again"
            )
    tables = [read_table(folder / f"{split}.parquet") for split in SPLITS]
    require_own_ids({f"{split}.parquet": table for split, table in zip(SPLITS, tables)}, where)
    _require_disjoint(*tables, where)
    prepared = PreparedData(
        *tables,
        pd.DataFrame(manifest["counts"]),
        manifest["config_fingerprint"],
        manifest["tokenizer_fingerprint"],
        {key: manifest[key] for key in MADE_FROM},
    )
    if prepared.data_hash != manifest["data_hash"]:
        raise ValueError(
            f"{where}: the tables hash to {prepared.data_hash[:12]}, the manifest says "
            f"{manifest['data_hash'][:12]}: they were changed, run 01_prepare_data again"
        )
    return prepared


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of prepared data, if no byte of it changed since it was written for this very
    folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another format, or another folder's.
    """
    path = Path(folder) / "manifest.json"
    where = short_path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no prepared data in {short_path(folder)} (manifest.json is missing): run "
            "01_prepare_data first"
        )
    try:
        manifest = read_sealed(path, "checksums")
    except RecordError as error:
        raise ValueError(f"{short_path(folder)}/{error}: run 01_prepare_data again") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{where} is not a manifest of format {FORMAT}: run 01_prepare_data again")
    wanted = {
        "name",
        "config_fingerprint",
        "tokenizer_fingerprint",
        "data_hash",
        "counts",
        *MADE_FROM,
    }
    if missing := wanted - manifest.keys():
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}: run 01_prepare_data again")
    if manifest["name"] != Path(folder).name:
        raise ValueError(
            f"{where} is that of {manifest['name']!r}: it was copied here, run 01_prepare_data "
            f"again"
        )
    return manifest


def why_stale(folder: str | Path, config: DataConfig) -> str:
    """Why the prepared data is not what `01_prepare_data` would make now; "" if it is. The tables
    are not read.

    It compares the config, the code, and the files that rows and tokenizer come from, where they
    are local.
    """
    try:
        then, now = read_manifest(folder), _made_from(config)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    differing = {
        kind: sorted(
            name
            for name in then[kind].keys() | now[kind].keys()
            if then[kind].get(name) != now[kind].get(name)
        )
        for kind in ("config", "source")
    }
    reasons = [f"{kind} changed ({', '.join(names)})" for kind, names in differing.items() if names]
    if then["code"] != now["code"]:
        reasons.append(f"code changed ({changed_files(then['code'], now['code'])})")
    return "; ".join(reasons)


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed left beside `path` while they wrote it; a living one's
    is left alone.
    """
    pattern = re.compile(rf"\.+{re.escape(path.name)}(?:\.(?:partial|old)-(\d{{1,9}}))+")
    for leftover in path.parent.glob(".*") if path.parent.is_dir() else ():
        if (found := pattern.fullmatch(leftover.name)) and not _lives(int(found[1])):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()  # an earlier process had our number: we are only about to write


def _made_from(config: DataConfig) -> dict[str, dict[str, Any]]:
    """What decides the rows: config, local files (rows and tokenizer), code (of the embedded
    models' builder too).
    """
    builder = {
        "toy": {"demos.toy_models"},
        "smol": {"demos.smol"},
        "smol-cross": {"demos.smol"},
    }.get(config.build, set())
    values = config.model_dump(exclude={"name", "artifacts_dir"})
    return {
        "config": values,
        "source": _source_files(config),
        "code": code_of("01_prepare_data", {"data.prepared_data", "data.drawing", *builder}),
    }


def _source_files(config: DataConfig) -> dict[str, str]:
    """Digests of the local files that rows, shots and tokenizer are read from; the hub's are not
    looked at.
    """
    files: dict[str, Path] = {}
    if config.data_dir:
        used = {
            f"{task}/{source}.parquet"
            for split in SPLITS
            for task in config.rows(split)
            for source in (find_task(task).splits[split], find_task(task).splits["shots"])
        }
        files |= {name: project_path(config.data_dir) / name for name in sorted(used)}
    digests = {name: sha256_file(path) for name, path in files.items() if path.is_file()}
    if project_path(config.tokenizer).is_dir():
        digests |= {
            f"tokenizer/{name}": one
            for name, one in tokenizer_files(project_path(config.tokenizer)).items()
        }
    return digests


def _require_disjoint(train: pd.DataFrame, validation: pd.DataFrame, where: str) -> None:
    both = {*content_keys(train)} & {*content_keys(validation)}
    if both:
        raise ValueError(
            f"{where}: {len(both)} contents are in train and in validation, expected none: run "
            "01_prepare_data again"
        )
