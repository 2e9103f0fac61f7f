"""The three tasks: rows of the hub (or of a folder in its schema) to prompts, answers, choices and
gold.

Prompts, continuations and shots are those of EleutherAI's lm-evaluation-harness 0.4.13 for `sst2`,
`mmlu` and `gsm8k`, so that scores compare with everybody's. Its default sampler draws shots at
random for tasks without a fixed order; here shots are the first rows of the few-shot split, in
order, for every task.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kd_utils.data.hub import hub_folder, one_line

#: Columns of a task's table; see `load_task`.
COLUMNS = ("row", "example_id", "task", "subject", "prompt", "answer", "choices", "gold")

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Where a task's rows come from and how one row reads."""

    hub: tuple[str, str]
    columns: tuple[str, ...]
    shot_split: str
    prompt: Callable[[Row], str]
    answer: Callable[[Row], str]
    choices: tuple[str, ...]
    problem: Callable[[Row], str | None]


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
        name: "sst2", "mmlu" or "gsm8k".
        split: a split of the hub's dataset, such as "train", "validation", "test" or (MMLU) "dev".
        data_dir: folder with `NAME/SPLIT.parquet` in the hub's schema; None reads the hub.
        num_fewshot: worked examples before each question: the first rows of `dev` of the same
            subject (MMLU) or of `train` (GSM8K, SST-2); a row is never its own shot.
        limit: only the first `limit` rows (MMLU: of each subject).

    Returns:
        One row per example, in the split's order: `row` (int, its number in the split),
            `example_id` (hash of task,
        split and content, whatever the shots), `task`, `subject` ("" if none), `prompt`, `answer`
        (continuation with its leading space), `choices` (list of continuations; empty for GSM8K),
        `gold` (index of the right choice as a string, or the final number of a GSM8K answer as it
        is written).

    Raises:
        FileNotFoundError, ConnectionError: the folder, the split's file or the hub cannot be read,
            with the remedy.
        ValueError: an unknown task, a missing column, an empty split, a value out of range, too few
            rows for the shots.
    """
    find_task(name)
    if num_fewshot < 0 or (limit is not None and limit < 1):
        raise ValueError(
            f"num_fewshot = {num_fewshot} must be at least 0 and limit = {limit} at least 1"
        )
    rows = _read(name, split, data_dir)
    shots = _shots(name, split, rows, data_dir, num_fewshot)
    kept, seen = [], {}
    for number, row in enumerate(rows):
        subject = row.get("subject", "")
        seen[subject] = seen.get(subject, 0) + 1
        if limit is None or seen[subject] <= limit:
            kept.append(_example(name, split, number, row, shots(row)))
    return pd.DataFrame(kept, columns=list(COLUMNS))


def find_task(name: str) -> Task:
    """The task of that name; a ValueError with the known names otherwise."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def final_number(answer: str) -> str:
    """What stands behind the last `#### ` of a GSM8K answer, as it is written there."""
    return answer.rsplit("#### ", 1)[-1]


def content_key(task: str, prompt: str) -> str:
    """Hash by which two examples count as the same content, in whichever split they stand.

    It covers the question as it is asked (a question with other choices is another one), without
    MMLU's line that names the subject, and takes no notice of white space and letter case.
    """
    text = prompt.split("\n\n", 1)[-1] if task == "mmlu" else prompt
    return hashlib.sha256(f"{task}\n{' '.join(text.split()).casefold()}".encode()).hexdigest()


def _example(name: str, split: str, number: int, row: Row, shots: list[Row]) -> Row:
    task = TASKS[name]
    asked = [f"{task.prompt(shot)}{task.answer(shot)}\n\n" for shot in shots] + [task.prompt(row)]
    content = json.dumps(
        [name, split, [row[column] for column in task.columns]], ensure_ascii=False
    )
    return {
        "row": number,
        "example_id": hashlib.sha256(content.encode()).hexdigest()[:24],
        "task": name,
        "subject": row.get("subject", ""),
        "prompt": _description(row) + "".join(asked),
        "answer": task.answer(row),
        "choices": list(task.choices),
        "gold": final_number(row["answer"]) if name == "gsm8k" else str(row[LABELS[name]]),
    }


def _shots(
    name: str, split: str, rows: list[Row], data_dir: str | Path | None, count: int
) -> Callable[[Row], list[Row]]:
    """A function from a row to the worked examples that come before it."""
    if not count:
        return lambda row: []
    source = TASKS[name].shot_split
    by_subject: dict[str, list[Row]] = {}
    for row in rows if split == source else _read(name, source, data_dir):
        # One more than asked for, so that a row of the same split can be left out of its own
        # prompt.
        if len(group := by_subject.setdefault(row.get("subject", ""), [])) <= count:
            group.append(row)

    def shots(row: Row) -> list[Row]:
        subject = row.get("subject", "")
        found = [shot for shot in by_subject.get(subject, []) if split != source or shot != row][
            :count
        ]
        if len(found) < count:
            of = f" of subject {subject!r}" if subject else ""
            raise ValueError(
                f"{name}: {count} shots asked for, but {source} has {len(found)} other rows{of}: "
                f"lower "
                "num_fewshot"
            )
        return found

    return shots


def _description(row: Row) -> str:
    if "subject" not in row:
        return ""
    return f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}.\n\n"


def _sst2_prompt(row: Row) -> str:
    return f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"


def _mmlu_prompt(row: Row) -> str:
    options = "".join(
        f"{letter}. {text}\n" for letter, text in zip("ABCD", row["choices"], strict=True)
    )
    return f"{row['question'].strip()}\n{options}Answer:"


def _gsm8k_prompt(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _sst2_problem(row: Row) -> str | None:
    if not isinstance(row["sentence"], str):
        return f"sentence = {row['sentence']!r}, expected text"
    return _label_problem("label", row["label"], 2)


def _mmlu_problem(row: Row) -> str | None:
    if not isinstance(row["question"], str) or not isinstance(row["subject"], str):
        return f"question = {row['question']!r}, subject = {row['subject']!r}, expected text"
    choices = row["choices"]
    if (
        not isinstance(choices, list)
        or len(choices) != 4
        or not all(isinstance(text, str) for text in choices)
    ):
        return f"choices = {choices!r}, expected a list of 4 texts"
    return _label_problem("answer", row["answer"], 4)


def _gsm8k_problem(row: Row) -> str | None:
    if not isinstance(row["question"], str) or not isinstance(row["answer"], str):
        return f"question = {row['question']!r}, answer = {row['answer']!r}, expected text"
    if not re.fullmatch(r"-?[0-9.,]+", final_number(row["answer"])):
        return f"answer = {row['answer'][-40:]!r}, expected it to end in '#### ' and a number"
    return None


def _label_problem(column: str, value: Any, count: int) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count:
        return None
    hint = " (the hub's GLUE test split has no labels)" if value == -1 else ""
    return f"{column} = {value!r}, expected 0 to {count - 1}{hint}"


LABELS = {"sst2": "label", "mmlu": "answer"}

#: The hub's split that each of ours is drawn from. MMLU has too few rows in its own `dev` and
#: `validation`, so both come from `test`, which is cut in two.
SOURCES = {
    "sst2": {"train": "train", "validation": "validation"},
    "mmlu": {"train": "test", "validation": "test"},
    "gsm8k": {"train": "train", "validation": "test"},
}

TASKS = {
    "sst2": Task(
        ("nyu-mll/glue", "sst2"),
        ("sentence", "label"),
        "train",
        _sst2_prompt,
        lambda row: (" negative", " positive")[row["label"]],
        (" negative", " positive"),
        _sst2_problem,
    ),
    "mmlu": Task(
        ("cais/mmlu", "all"),
        ("question", "subject", "choices", "answer"),
        "dev",
        _mmlu_prompt,
        lambda row: (" A", " B", " C", " D")[row["answer"]],
        (" A", " B", " C", " D"),
        _mmlu_problem,
    ),
    "gsm8k": Task(
        ("openai/gsm8k", "main"),
        ("question", "answer"),
        "train",
        _gsm8k_prompt,
        lambda row: f" {row['answer']}",
        (),
        _gsm8k_problem,
    ),
}


def _read(name: str, split: str, data_dir: str | Path | None) -> list[Row]:
    """Checked rows of one split, with the task's columns only and plain Python values."""
    if data_dir is None:
        table, where = _read_hub(name, split), f"{TASKS[name].hub[0]} {split}"
    else:
        table, where = _read_folder(name, split, Path(data_dir))
    columns = TASKS[name].columns
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise ValueError(
            f"{where} has no column {', '.join(missing)} (it has {', '.join(table.column_names)}): "
            f"{name} "
            f"needs {', '.join(columns)}"
        )
    if not table.num_rows:
        raise ValueError(f"{where} is empty: {name} needs at least one row of {split}")
    rows = table.select(list(columns)).to_pylist()
    for number, row in enumerate(rows):
        if problem := TASKS[name].problem(row):
            raise ValueError(f"{where}, row {number}: {problem}")
    return rows


def _read_folder(name: str, split: str, data_dir: Path) -> tuple[Any, str]:
    """The split's Arrow table and its path."""
    path = data_dir / name / f"{split}.parquet"
    if not data_dir.is_dir():
        raise FileNotFoundError(
            f"no data folder {data_dir}: give the one that holds {name}/{split}.parquet"
        )
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in path.parent.glob("*.parquet"))) or "none"
        raise FileNotFoundError(
            f"no file {path} (parquet files there: {there}): {name} needs its {split} "
            "split. Set data_dir to a folder with the hub's schema, or to '' for the hub"
        )
    return _read_parquet(path), str(path)


def _read_hub(name: str, split: str) -> Any:
    """The split's Arrow table from the hub's parquet files, which its local cache keeps.

    `datasets` would wait for minutes for a hub that does not answer, and does not say which file is
    damaged.
    """
    import pyarrow

    hub, config = TASKS[name].hub
    files = f"{config}/{split}-*.parquet"
    folder = hub_folder(
        hub,
        [files],
        kind="dataset",
        otherwise=f"set data_dir to a folder with {name}/{split}.parquet",
    )
    paths = sorted(folder.glob(files))
    if not paths:
        raise FileNotFoundError(
            f"the hub's {hub} has no {files}: choose another split than {split}, or set data_dir "
            f"to a folder with {name}/{split}.parquet"
        )
    return pyarrow.concat_tables(map(_read_parquet, paths))


def _read_parquet(path: Path) -> Any:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except (pyarrow.lib.ArrowException, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is no whole parquet file ({one_line(error)}): copy it again"
        ) from None


def normalise_number(text: str) -> str:
    """What is compared: no commas, dollar signs, text up to `#### ` and final full stop; lower
    case.
    """
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()
