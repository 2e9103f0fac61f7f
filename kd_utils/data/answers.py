"""Rows without a label: their answers are the teacher's, and their own are never seen again."""

import pandas as pd

from kd_utils.data import tasks
from kd_utils.data.prepared_data import PreparedData

#: Columns of the table of a teacher's answers, a row per training row: the text that continues the
#: prompt; whether it ended by itself; whether prompt and answer are a row as training takes it.
ANSWERS = ("example_id", "answer", "whole", "fits")


def answered(train: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """The training rows as they are trained on.

    A row without a label has the teacher's answer and no gold. It is left out if that answer is
    empty, was cut, or does not fit (`left_out`). Rows with a label are as they were prepared.

    Args:
        train: `PreparedData.train`.
        answers: the table of a teacher's answers, with the columns of `ANSWERS`.

    Raises:
        ValueError: the table lacks a row, or no row is left.
    """
    said, labelled = _of_rows(train, answers), train["labelled"]
    rows = train.assign(
        answer=train["answer"].where(labelled, said["answer"]),
        gold=train["gold"].where(labelled, ""),
    )
    rows = rows[labelled | (left_out(said) == "")]
    if rows.empty:
        raise ValueError(
            "no training row is left: none has a label, and no answer of the teacher can be used: "
            "raise labelled or max_length in 01, or max_new_tokens in 02"
        )
    return rows.reset_index(drop=True)


def answered_tables(prepared: PreparedData, *answers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Each split's table as it is cached and read: training rows as `answered`, the others as
    prepared.

    Args:
        answers: the table of each teacher.

    Raises:
        ValueError: teachers differ in the text of a row without a label; or as `answered`.
    """
    unlabelled = prepared.train[~prepared.train["labelled"]]
    first, *others = (_of_rows(unlabelled, table) for table in answers)
    for other in others:
        if differing := int((first != other).any(axis=1).sum()):
            raise ValueError(
                f"the teachers differ in their answers to {differing} of {len(unlabelled)} rows "
                "without a label, so their caches hold other texts: use one teacher (more_teachers "
                "''), or label all rows (labelled '1' in 01)"
            )
    return {**prepared.tables, "train": answered(prepared.train, answers[0])}


def left_out(answers: pd.DataFrame) -> pd.Series:
    """Why a row without a label cannot be trained on: "empty", "cut", "too long", or ""."""
    why = pd.Series("", index=answers.index, dtype=object)
    why[~answers["fits"]] = "too long"
    why[~answers["whole"]] = "cut"
    why[answers["answer"].str.strip() == ""] = "empty"
    return why


def report(train: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """How the teacher answered, a row per task.

    Returns:
        `labelled` (rows); `answered` (rows without a label that have the teacher's answer);
        `empty`, `cut`, `too long` (rows without a label that are left out); `right, labelled` and
        `right, unlabelled`: the share of all rows of either kind whose own answer, as prepared, is
        the teacher's (NaN where there are none).
    """
    said, labelled = _of_rows(train, answers), train["labelled"]
    right = pd.Series(
        [
            _is_right(row.task, row.choices, row.gold, answer)
            for row, answer in zip(train.itertuples(), said["answer"], strict=True)
        ],
        index=train.index,
        dtype=float,
    )
    why = left_out(said)
    columns = {
        "labelled": labelled,
        "answered": ~labelled & (why == ""),
        **{name: ~labelled & (why == name) for name in ("empty", "cut", "too long")},
    }
    task = train["task"]
    table = pd.DataFrame(columns).groupby(task, sort=False).sum()
    table["right, labelled"] = right.where(labelled).groupby(task).mean()
    table["right, unlabelled"] = right.where(~labelled).groupby(task).mean()
    return table.reset_index()


def _is_right(task: str, choices: list[str], gold: str, answer: str) -> bool:
    if len(choices):
        return answer == choices[int(gold)]
    generation = tasks.find_task(task).generation
    return bool(generation and generation.score(answer, gold)["correct"])


def _of_rows(train: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """The answers to these rows, in their order and with their index."""
    if missing := len(set(train["example_id"]) - set(answers["example_id"])):
        raise ValueError(
            f"the teacher's answers lack {missing} of {len(train)} training rows: run 02 again"
        )
    said = answers.set_index("example_id").loc[train["example_id"]]
    return said.set_index(train.index)
