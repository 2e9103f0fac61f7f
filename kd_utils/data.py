"""Prepared data: one table for training and one for validation, disjoint by content, in a folder with a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kd_utils.config import TASK_NAMES, DataConfig, resolve, short_path
from kd_utils.leaks import few_shot_rows
from kd_utils.tasks import COLUMNS, content_key, load_task
from kd_utils.tokens import encode_example, tokenizer_fingerprint

FORMAT = 1
SPLITS = ("train", "validation")

#: The hub's split that each of ours is drawn from. MMLU has too few rows in its own `dev` and `validation`, so both
#: come from `test`, which is cut in two.
SOURCES = {
    "sst2": {"train": "train", "validation": "validation"},
    "mmlu": {"train": "test", "validation": "test"},
    "gsm8k": {"train": "train", "validation": "test"},
}


@dataclass(frozen=True)
class PreparedData:
    """What `01_prepare_data` makes: two tables with the columns of `tasks.COLUMNS` but `row`, and their record.

    `counts` has a row per task and split: `source` (the hub's split), `available` (rows there), `duplicates` (dropped
    for content that stands elsewhere in the data), `shots` (of the rest, dropped because few-shot evaluation shows that
    content before every question, see `leaks.few_shot_rows`), `too_long` (drawn, but dropped for more than max_length
    tokens; another was drawn instead), `taken`, and of those `mean_tokens`, `max_tokens` (prompt, answer and end token)
    and `mean_answer_tokens`.
    """

    train: pd.DataFrame
    validation: pd.DataFrame
    counts: pd.DataFrame
    config_fingerprint: str
    tokenizer_fingerprint: str

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Raise a ValueError if lengths were counted, and rows dropped, with another tokenizer than this one."""
        if tokenizer_fingerprint(tokenizer) != self.tokenizer_fingerprint:
            raise ValueError("the data was prepared with another tokenizer: run 01_prepare_data again with this one")

    @property
    def data_hash(self) -> str:
        """SHA-256 over the content of both tables, row by row: it does not depend on how parquet stores them."""
        digest = hashlib.sha256()
        for split in SPLITS:
            table = getattr(self, split)
            columns = [table[column] for column in COLUMNS if column != "row"]
            for values in zip(*columns, strict=True):
                line = json.dumps([split, *(list(v) if not isinstance(v, str) else v for v in values)])
                digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def prepare(config: DataConfig, tokenizer: Any) -> PreparedData:
    """Draw the training and validation examples that the config asks for.

    Rows are taken in the order of a hash of `data_seed` and content, so an example's place depends neither on the
    counts nor on other rows: validation takes from the front; training from the front of its own split, or from
    the back where both come from one split. Examples with the content of an earlier one are dropped (between the
    splits: from training), and so are those with the content of a few-shot row and those with more than `max_length`
    tokens, never cut.

    Raises:
        ValueError: fewer rows than asked for, no row that fits `max_length`, or a content in both splits.
    """
    drawn = {split: [] for split in SPLITS}
    counts = []
    for task in TASK_NAMES:
        taken: set[str] = set()  # contents that training must not have
        for split in ("validation", "train"):
            if asked := config.rows(task, split):
                rows, count = _draw(config, tokenizer, task, split, asked, taken)
                taken |= {content_key(task, prompt) for prompt in rows["prompt"]}
                drawn[split].append(rows)
                counts.append(count)
    tables = [pd.concat(drawn[split], ignore_index=True) for split in SPLITS]
    counts = pd.DataFrame(counts).sort_values(["split", "task"], key=_as_listed).reset_index(drop=True)
    _require_disjoint(*tables)
    return PreparedData(*tables, counts, config.fingerprint(), tokenizer_fingerprint(tokenizer))


def save_prepared(prepared: PreparedData, folder: str | Path) -> Path:
    """Write `{train,validation}.parquet` and `manifest.json` aside, then move them into place as one folder."""
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for split in SPLITS:
        getattr(prepared, split).to_parquet(aside / f"{split}.parquet", index=False)
    manifest = {
        "format": FORMAT,
        "config_fingerprint": prepared.config_fingerprint,
        "tokenizer_fingerprint": prepared.tokenizer_fingerprint,
        "data_hash": prepared.data_hash,
        "counts": prepared.counts.to_dict("records"),
    }
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():  # a folder cannot be renamed over one that has files
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def load_prepared(folder: str | Path) -> PreparedData:
    """Read a folder that `save_prepared` wrote, and check it against its manifest.

    Raises:
        FileNotFoundError: no such folder, or one of its files is missing.
        ValueError: another format, a column missing, an empty split, a content in both splits, or tables that are not
            those of the manifest.
    """
    folder = Path(folder)
    where = short_path(folder)
    for name in ("manifest.json", *(f"{split}.parquet" for split in SPLITS)):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no prepared data in {where} ({name} is missing): run 01_prepare_data first")
    manifest = _read_manifest(folder / "manifest.json")
    tables = [_read_split(folder / f"{split}.parquet") for split in SPLITS]
    _require_disjoint(*tables)
    prepared = PreparedData(*tables, pd.DataFrame(manifest["counts"]), manifest["config_fingerprint"],
                            manifest["tokenizer_fingerprint"])
    if prepared.data_hash != manifest["data_hash"]:
        raise ValueError(f"{where}: the tables hash to {prepared.data_hash[:12]}, the manifest says "
                         f"{manifest['data_hash'][:12]}: they were changed, run 01_prepare_data again")
    return prepared


def _draw(config: DataConfig, tokenizer: Any, task: str, split: str, asked: int,
          taken: set[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """`asked` rows of a task for one split, and their line of the counts."""
    source = SOURCES[task][split]
    table = load_task(task, source, data_dir=resolve(config.data_dir) if config.data_dir else None)
    keys = pd.Series([content_key(task, prompt) for prompt in table["prompt"]], index=table.index)
    shown = {content_key(task, prompt) for prompt in few_shot_rows(config.data_dir, [task])["prompt"]}
    duplicate = keys.duplicated() | keys.isin(taken)
    shot = keys.isin(shown) & ~duplicate
    free = ~duplicate & ~shot
    # Both splits from one source: rows of validation are no duplicates of themselves.
    shared_source = split == "train" and source == SOURCES[task]["validation"]
    duplicates = int((keys.duplicated() if shared_source else duplicate).sum())
    order = keys[free].map(lambda key: hashlib.sha256(f"{config.data_seed}:{key}".encode()).hexdigest())
    chosen, lengths, long = [], [], []
    for index in order.sort_values(ascending=not shared_source).index:
        if len(chosen) == asked:
            break
        prompt_ids, answer_ids = encode_example(tokenizer, table.at[index, "prompt"], table.at[index, "answer"])
        length = len(prompt_ids) + len(answer_ids)
        if length > config.max_length:
            long.append(length)
        else:
            chosen.append(index)
            lengths.append((length, len(answer_ids)))
    why = (f"{source} has {len(table)} rows, of which {int(duplicate.sum())} are duplicates or in validation, "
           f"{int(shot.sum())} are few-shot rows and {len(long)} longer than max_length")
    _require_enough(task, split, asked, config.max_length, len(chosen), long, why)
    tokens = pd.DataFrame(lengths, columns=["tokens", "answer"])
    count = {"task": task, "split": split, "source": source, "available": len(table), "duplicates": duplicates,
             "shots": int(shot.sum()), "too_long": len(long), "taken": len(chosen),
             "mean_tokens": round(float(tokens["tokens"].mean()), 1), "max_tokens": int(tokens["tokens"].max()),
             "mean_answer_tokens": round(float(tokens["answer"].mean()), 1)}
    return table.loc[chosen].drop(columns="row").reset_index(drop=True), count


def _require_enough(task: str, split: str, asked: int, max_length: int, found: int, long: list[int], why: str) -> None:
    if long and not found:
        raise ValueError(f"{task}: none of its {len(long)} {split} rows fits max_length = {max_length} tokens with its "
                         f"whole answer (the longest has {max(long)}, the shortest {min(long)}): set max_length to at "
                         f"least {min(long)}, better {max(long)}")
    if found < asked:
        raise ValueError(f"{task}_{split} = {asked}, but there are {found} ({why}): lower {task}_{split}")


def _read_manifest(path: Path) -> dict[str, Any]:
    where = short_path(path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{where} is not JSON: run 01_prepare_data again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{where} is not a manifest of format {FORMAT}: run 01_prepare_data again")
    missing = {"config_fingerprint", "tokenizer_fingerprint", "data_hash", "counts"} - manifest.keys()
    if missing:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}: run 01_prepare_data again")
    return manifest


def _read_split(path: Path) -> pd.DataFrame:
    where = short_path(path)
    try:
        table = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where} is no whole parquet file ({' '.join(str(error).split())[:200]}): run "
                         "01_prepare_data again") from None
    missing = [column for column in COLUMNS if column != "row" and column not in table]
    if missing:
        raise ValueError(f"{where} has no column {', '.join(missing)}: run 01_prepare_data again")
    if table.empty:
        raise ValueError(f"{where} has no rows: run 01_prepare_data again")
    table["choices"] = [list(choices) for choices in table["choices"]]
    return table


def _require_disjoint(train: pd.DataFrame, validation: pd.DataFrame) -> None:
    both = _contents(train) & _contents(validation)
    if both:
        raise ValueError(f"{len(both)} contents are in train and validation: run 01_prepare_data again")


def _contents(table: pd.DataFrame) -> set[str]:
    return {content_key(task, prompt) for task, prompt in zip(table["task"], table["prompt"], strict=True)}


def _as_listed(column: pd.Series) -> pd.Series:
    """Sort key: tasks and splits in the order in which the project lists them."""
    return column.map({name: place for place, name in enumerate((*TASK_NAMES, *SPLITS))})
