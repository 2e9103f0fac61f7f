"""The rows of a task, read from a folder or the hub, as prompts, answers, choices and gold.

The default sampler of lm-evaluation-harness draws shots at random for tasks without a fixed order;
here shots are the first rows of the few-shot split, in order, for every task.
"""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kd_utils.config.fields import shown
from kd_utils.data import tasks
from kd_utils.data.tasks.base import Row, Task

#: Columns of a task's table; see `load_task`.
COLUMNS = ("row", "example_id", "task", "subject", "prompt", "answer", "choices", "gold")


def load_task(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    num_fewshot: int = 0,
    limit: int | None = None,
) -> pd.DataFrame:
    """The rows of one split as lm-evaluation-harness would put them to a model.

    Args:
        name: the name of a task in `data/tasks`.
        split: a split of the hub's dataset, such as "train", "validation", "test" or "dev".
        data_dir: folder with `NAME/SPLIT.parquet` in the hub's schema; None reads the hub.
        num_fewshot: worked examples before each question: the first rows of the same subject in the
            task's few-shot split. A row is never its own shot.
        limit: only the first `limit` rows of each subject.

    Returns:
        One row per example, in the split's order: `row` (int, its number in the split),
        `example_id` (hash of task, split and content, whatever the shots), `task`, `subject` ("" if
        none), `prompt`, `answer` (continuation with its leading space), `choices` (list of
        continuations; empty if the answer is generated), `gold` (number of the right choice as a
        string, or the final answer as it is written).

    Raises:
        FileNotFoundError, ConnectionError: the folder, the split's file or the hub cannot be read,
            with the remedy.
        ValueError: an unknown task, a missing column, an empty split, a value out of range, or too
            few rows for the shots.
    """
    task = tasks.find_task(name)
    if num_fewshot < 0 or (limit is not None and limit < 1):
        raise ValueError(
            f"num_fewshot = {num_fewshot} must be at least 0 and limit = {limit} at least 1"
        )
    rows, source = _read(task, split, data_dir), task.splits["shots"]
    by_subject: defaultdict[str, list[Row]] = defaultdict(list)
    if num_fewshot:
        for row in rows if split == source else _read(task, source, data_dir):
            by_subject[task.subject(row)].append(row)
    kept: list[Row] = []
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows):
        subject = task.subject(row)
        seen[subject] += 1
        if limit is not None and seen[subject] > limit:
            continue
        # One more than asked for, so that the row itself can be left out.
        first = by_subject[subject][: num_fewshot + 1]
        shots = [shot for shot in first if split != source or shot != row][:num_fewshot]
        if len(shots) < num_fewshot:
            of_subject = f" of subject {subject!r}" if subject else ""
            raise ValueError(
                f"{name}: num_fewshot = {num_fewshot}, but {source} has {len(shots)} other rows"
                f"{of_subject}: lower num_fewshot"
            )
        kept.append(_example(task, split, number, row, shots))
    return pd.DataFrame(kept, columns=list(COLUMNS))


def content_keys(table: pd.DataFrame) -> pd.Series:
    """`Task.content_key` of each row of a table with the columns `task` and `prompt`."""
    pairs = zip(table["task"], table["prompt"], strict=True)
    keys = [tasks.find_task(task).content_key(prompt) for task, prompt in pairs]
    return pd.Series(keys, index=table.index, dtype=object)


def _example(task: Task, split: str, number: int, row: Row, shots: list[Row]) -> Row:
    worked = [f"{task.prompt(shot)}{task.answer(shot)}\n\n" for shot in shots]
    content = [task.name, split, [row[column] for column in task.columns]]
    digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    return {
        "row": number,
        "example_id": digest[:24],
        "task": task.name,
        "subject": task.subject(row),
        "prompt": task.description(row) + "".join(worked) + task.prompt(row),
        "answer": task.answer(row),
        "choices": task.choices(row),
        "gold": task.gold(row),
    }


def _read(task: Task, split: str, data_dir: str | Path | None) -> list[Row]:
    """Checked rows of one split, with the task's columns only and plain Python values."""
    paths = _files(task, split, data_dir)
    where = f"{task.hub[0]} {split}" if data_dir is None else str(paths[0])
    parts = []
    for path in paths:
        try:
            parts.append(pq.read_table(path))
        except (pa.ArrowException, ValueError, OSError) as error:
            raise ValueError(
                f"{path} is not a complete parquet file ({shown(str(error))}): copy it again"
            ) from None
    table = pa.concat_tables(parts)
    if missing := [column for column in task.columns if column not in table.column_names]:
        raise ValueError(
            f"{where} has no column {', '.join(missing)} (it has {', '.join(table.column_names)}): "
            f"{task.name} needs {', '.join(task.columns)}"
        )
    if not table.num_rows:
        raise ValueError(f"{where} is empty: {task.name} needs at least one row of {split}")
    rows = table.select(list(task.columns)).to_pylist()
    for number, row in enumerate(rows):
        if problem := task.row_problem(row):
            raise ValueError(f"{where}, row {number}: {problem}")
    return rows


def _files(task: Task, split: str, data_dir: str | Path | None) -> list[Path]:
    """The split's files in a folder with the hub's schema, or in the hub's local cache.

    `datasets` would wait for minutes for a hub that does not answer, and does not say which file is
    damaged.
    """
    file = f"{task.name}/{split}.parquet"
    if data_dir is None:
        from kd_utils.data.hub import hub_folder  # its library takes half a second to import

        dataset, config = task.hub
        pattern, remedy = f"{config}/{split}-*.parquet", f"set data_dir to a folder with {file}"
        folder = hub_folder(dataset, [pattern], kind="dataset", otherwise=remedy)
        if paths := sorted(folder.glob(pattern)):
            return paths
        raise FileNotFoundError(
            f"the hub's {dataset} has no {pattern}: choose another split than {split}, or {remedy}"
        )
    path = Path(data_dir, file)
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"no data folder {data_dir}: give the folder that holds {file}")
    if not path.is_file():
        present = ", ".join(sorted(other.name for other in path.parent.glob("*.parquet"))) or "none"
        raise FileNotFoundError(
            f"no file {path} (parquet files there: {present}): {task.name} needs its {split} "
            "split. Set data_dir to a folder with the hub's schema, or to '' for the hub"
        )
    return [path]
