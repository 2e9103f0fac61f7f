"""The rows of a task, read from a folder or the hub, as prompts, answers, choices and gold.

The default sampler of lm-evaluation-harness draws shots at random for tasks without a fixed order;
here shots are the first rows of the few-shot split, in order, for every task.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from kd_utils.data.hub import hub_folder, one_line
from kd_utils.data.tasks import find_task
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
    task = find_task(name)
    if num_fewshot < 0 or (limit is not None and limit < 1):
        raise ValueError(
            f"num_fewshot = {num_fewshot} must be at least 0 and limit = {limit} at least 1"
        )
    rows = _read(task, split, data_dir)
    shots = _shots(task, split, rows, data_dir, num_fewshot)
    kept: list[Row] = []
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows):
        seen[task.subject(row)] += 1
        if limit is None or seen[task.subject(row)] <= limit:
            kept.append(_example(task, split, number, row, shots(row)))
    return pd.DataFrame(kept, columns=list(COLUMNS))


def content_keys(table: pd.DataFrame) -> pd.Series:
    """`Task.content_key` of each row of a table with the columns `task` and `prompt`."""
    pairs = zip(table["task"], table["prompt"], strict=True)
    keys = [find_task(task).content_key(prompt) for task, prompt in pairs]
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


def _shots(
    task: Task, split: str, rows: list[Row], data_dir: str | Path | None, count: int
) -> Callable[[Row], list[Row]]:
    """A function from a row to the worked examples that come before it."""
    if not count:
        return lambda row: []
    source = task.splits["shots"]
    by_subject: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows if split == source else _read(task, source, data_dir):
        # One more than asked for, so that a row of the same split can be left out of its prompt.
        if len(group := by_subject[task.subject(row)]) <= count:
            group.append(row)

    def shots(row: Row) -> list[Row]:
        subject = task.subject(row)
        found = [shot for shot in by_subject[subject] if split != source or shot != row][:count]
        if len(found) < count:
            of_subject = f" of subject {subject!r}" if subject else ""
            raise ValueError(
                f"{task.name}: num_fewshot = {count}, but {source} has {len(found)} other rows"
                f"{of_subject}: lower num_fewshot"
            )
        return found

    return shots


def _read(task: Task, split: str, data_dir: str | Path | None) -> list[Row]:
    """Checked rows of one split, with the task's columns only and plain Python values."""
    import pyarrow.parquet

    if data_dir is None:
        paths, where = _hub_files(task, split), f"{task.hub[0]} {split}"
    else:
        paths = [_folder_file(task, split, Path(data_dir))]
        where = str(paths[0])
    tables = []
    for path in paths:
        try:
            tables.append(pyarrow.parquet.read_table(path))
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            raise ValueError(
                f"{path} is no whole parquet file ({one_line(error)}): copy it again"
            ) from None
    table = pyarrow.concat_tables(tables)
    missing = [column for column in task.columns if column not in table.column_names]
    if missing:
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


def _folder_file(task: Task, split: str, data_dir: Path) -> Path:
    """The split's file in a folder with the hub's schema."""
    path = data_dir / task.name / f"{split}.parquet"
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"no data folder {data_dir}: give the one that holds {task.name}/{split}.parquet"
        )
    if not path.is_file():
        present = ", ".join(sorted(file.name for file in path.parent.glob("*.parquet"))) or "none"
        raise FileNotFoundError(
            f"no file {path} (parquet files there: {present}): {task.name} needs its {split} "
            "split. Set data_dir to a folder with the hub's schema, or to '' for the hub"
        )
    return path


def _hub_files(task: Task, split: str) -> list[Path]:
    """The split's files from the hub, in its local cache.

    `datasets` would wait for minutes for a hub that does not answer, and does not say which file is
    damaged.
    """
    dataset, config = task.hub
    files = f"{config}/{split}-*.parquet"
    remedy = f"set data_dir to a folder with {task.name}/{split}.parquet"
    folder = hub_folder(dataset, [files], kind="dataset", otherwise=remedy)
    if paths := sorted(folder.glob(files)):
        return paths
    raise FileNotFoundError(
        f"the hub's {dataset} has no {files}: choose another split than {split}, or {remedy}"
    )
