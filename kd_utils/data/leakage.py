"""What the data gives away: questions seen in training, few-shot rows, labels and baselines."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

import pandas as pd

from kd_utils.config.project_paths import project_path
from kd_utils.data.task_rows import content_keys, load_task
from kd_utils.data.tasks import find_task

#: Words of an n-gram, and the fewest that are looked for inside a longer text. GPT-3's range (Brown
#: et al. 2020, appendix C): below 8 words it met spurious collisions, and 13 is the most it took.
#: lm-evaluation-harness takes 13.
NGRAM, SHORTEST = 13, 8

#: A validation row counts as leaked if training has at least this fraction of its n-grams, and of a
#: task's rows no more than this fraction may be leaked. `01_prepare_data` gives the reasons.
LEAKED, MOST_LEAKED = 0.5, 0.02

#: Worked examples that lm-evaluation-harness puts before a question of MMLU and GSM8K when scores
#: are published.
SHOTS = 5

Gram = tuple[str | None, ...]


def question_words(task: str, prompt: str) -> list[str]:
    """The words of the question itself (`Task.question`), normalised.

    They are put into Unicode's NFKC and lower case, and everything but letters, digits and white
    space is removed, as in GPT-3's appendix C and lm-evaluation-harness's
    `decontamination/janitor.py` (which handles ASCII only).

    Raises:
        ValueError: an unknown task, or a prompt that the task does not write without shots.
    """
    plain = unicodedata.normalize("NFKC", find_task(task).question(prompt)).casefold()
    return re.sub(r"[^\w\s]|_", "", plain).split()


def near_overlap(train: pd.DataFrame, validation: pd.DataFrame, n: int = NGRAM) -> pd.DataFrame:
    """How much of each validation question is in the training questions of its task.

    shared = |{n-grams of the question that some training question has}| / |{n-grams of the
    question}|

    A question of 8 to n - 1 words is one n-gram of all its words. A shorter one is compared with
    whole questions only: "a good film" is part of many sentences that are no copy of it.

    Args:
        train, validation: prepared tables (task, example_id, prompt), validation with a unique
            index.
        n: words, at least 8.

    Returns:
        A row per validation row, in its order and with its index: `task`, `example_id`, `words`,
        `shared` (0 to 1), and `nearest`, the `example_id` of the training row that has most of its
        n-grams ("" if none has any).

    Raises:
        ValueError: n below 8, or a prompt that cannot be read.
    """
    if n < SHORTEST:
        raise ValueError(f"n = {n} words: give at least {SHORTEST}, fewer collide by chance")
    parts = [
        _overlap_of_task(task, train[train["task"] == task], rows, n)
        for task, rows in validation.groupby("task", sort=False)
    ]
    columns = ["task", "example_id", "words", "shared", "nearest"]
    return (
        pd.concat(parts).loc[validation.index, columns] if parts else pd.DataFrame(columns=columns)
    )


def overlap_by_task(
    train: pd.DataFrame, validation: pd.DataFrame, overlap: pd.DataFrame
) -> pd.DataFrame:
    """`near_overlap` counted, a row per task.

    Returns:
        `rows` (of validation), `short` (fewer than 13 words, compared whole), `exact` (the content,
        by `Task.content_key`, is in training), `any_shared` (training has any of its n-grams),
        `leaked` (training has at least half of them) and `leaked_share` (fraction of rows).
    """
    flags = pd.DataFrame(
        {
            "task": validation["task"],
            "rows": 1,
            "short": overlap["words"] < NGRAM,
            "exact": content_keys(validation).isin(set(content_keys(train))),
            "any_shared": overlap["shared"] > 0,
            "leaked": overlap["shared"] >= LEAKED,
        }
    )
    table = flags.groupby("task", sort=False).sum().astype(int)
    return table.assign(leaked_share=table["leaked"] / table["rows"]).reset_index()


def nearest_pairs(
    train: pd.DataFrame, validation: pd.DataFrame, overlap: pd.DataFrame, rows: int = 1
) -> pd.DataFrame:
    """The validation prompts that share most, each with its nearest training prompt.

    Returns:
        `task`, `shared`, `validation`, `training` (prompts): at most `rows` rows of each task, none
        for a task whose questions share nothing.
    """
    near = overlap[overlap["shared"] > 0].sort_values("shared", ascending=False, kind="stable")
    near = near.groupby("task", sort=False).head(rows)
    prompts = train.drop_duplicates("example_id").set_index("example_id")["prompt"]
    return pd.DataFrame(
        {
            "task": near["task"],
            "shared": near["shared"],
            "validation": validation["prompt"][near.index],
            "training": near["nearest"].map(prompts),
        }
    ).reset_index(drop=True)


def require_no_leak(by_task: pd.DataFrame, most: float = MOST_LEAKED) -> None:
    """Check the table of `overlap_by_task`.

    Raises:
        ValueError: an exact overlap, or a task of whose rows more than the fraction `most` leaked.
    """
    for line in by_task.itertuples():
        if line.exact:
            raise ValueError(
                f"{line.task}: the content of {line.exact} of {line.rows} validation rows is in "
                "training too: run 01_prepare_data again"
            )
        if line.leaked_share > most:
            raise ValueError(
                f"{line.task}: training has half or more of {line.leaked} of {line.rows} "
                f"validation questions, above {most:.0%}: lower {line.task} in train_rows or "
                "validation_rows, or set another data_seed"
            )


def few_shot_rows(data_dir: str, tasks: Iterable[str], count: int = SHOTS) -> pd.DataFrame:
    """The rows that few-shot evaluation puts before every question.

    Args:
        data_dir: as in the config: a folder with the hub's schema, or "" for the hub.
        tasks: names of tasks.
        count: rows, the first of each subject in the task's few-shot split.

    Returns:
        The columns of `load_task`.
    """
    folder = project_path(data_dir) if data_dir else None
    tables = [
        load_task(task, find_task(task).splits["shots"], data_dir=folder, limit=count)
        for task in tasks
    ]
    return pd.concat(tables, ignore_index=True)


def few_shot_overlap(
    shots: pd.DataFrame, train: pd.DataFrame, validation: pd.DataFrame
) -> pd.DataFrame:
    """How many prepared rows have the content of a few-shot row: `task`, `shots` (rows),
    `in_train`, `in_validation`.
    """
    contents = set(content_keys(shots))
    counted = {"shots": shots["task"].value_counts(sort=False)}
    for name, table in (("in_train", train), ("in_validation", validation)):
        counted[name] = table["task"][content_keys(table).isin(contents)].value_counts()
    table = pd.DataFrame(counted).reindex(counted["shots"].index).fillna(0).astype(int)
    return table.rename_axis("task").reset_index()


def require_unseen_shots(by_task: pd.DataFrame) -> None:
    """Raise a ValueError if `few_shot_overlap` has a few-shot row in training or in validation."""
    for line in by_task.itertuples():
        if line.in_train or line.in_validation:
            raise ValueError(
                f"{line.task}: few-shot rows are among the prepared rows ({line.in_train} in "
                f"train, {line.in_validation} in validation): run 01_prepare_data again"
            )


def label_balance(train: pd.DataFrame, validation: pd.DataFrame) -> pd.DataFrame:
    """How often each label is right, for the tasks with choices.

    Returns:
        `task`, `label` (the choice, or its number where choices differ from row to row), `train`,
        `validation` (fractions of the rows).
    """
    counted: dict[tuple[str, str], dict[str, float]] = {}
    for split, table in (("train", train), ("validation", validation)):
        for task, rows in table.groupby("task", sort=False):
            for number, label in enumerate(_labels(rows)):
                share = float((rows["gold"] == str(number)).mean())
                counted.setdefault((task, label), {})[split] = share
    lines = [{"task": task, "label": label, **shares} for (task, label), shares in counted.items()]
    return pd.DataFrame(lines, columns=["task", "label", "train", "validation"])


def baselines(train: pd.DataFrame, validation: pd.DataFrame) -> pd.DataFrame:
    """The accuracies that need no skill: a row per task, and one for all examples together.

    Returns:
        `task`, `rows` (of validation), `commonest` (the commonest answer in training; of several,
        the first in order), `majority` (accuracy of always giving it; NaN without training rows)
        and `random` (expected accuracy of a blind choice, the mean of 1 / choices; 0 where the
        answer is generated).
    """
    lines = []
    for task, rows in validation.groupby("task", sort=False):
        learned = _answers(train[train["task"] == task]).mode()
        labels, commonest, majority = _labels(rows), "", float("nan")
        if len(learned):
            commonest = labels[int(learned[0])] if labels else learned[0]
            majority = float((_answers(rows) == learned[0]).mean())
        blind = [1 / len(choices) if len(choices) else 0.0 for choices in rows["choices"]]
        lines.append((task, len(rows), commonest, majority, sum(blind) / len(blind)))
    table = pd.DataFrame(lines, columns=["task", "rows", "commonest", "majority", "random"])
    if table.empty:
        return table
    weights = table["rows"] / table["rows"].sum()
    means = [(table[name] * weights).sum(skipna=False) for name in ("majority", "random")]
    table.loc[len(table)] = ["all", table["rows"].sum(), "", *means]
    return table


def _labels(rows: pd.DataFrame) -> list[str]:
    """Names of a task's choices: their text, or numbers where they differ from row to row."""
    texts = {tuple(choices) for choices in rows["choices"]}
    if len(texts) > 1:
        return [f"choice {number}" for number in range(max(map(len, texts)))]
    return [choice.strip() for choice in texts.pop()]


def _overlap_of_task(
    task: str, train: pd.DataFrame, validation: pd.DataFrame, n: int
) -> pd.DataFrame:
    questions = [question_words(task, prompt) for prompt in validation["prompt"]]
    lengths = {min(n, len(words)) for words in questions}
    holders = defaultdict(set)  # n-gram -> training rows that have it
    for example_id, prompt in zip(train["example_id"], train["prompt"], strict=True):
        words = question_words(task, prompt)
        for length in lengths:
            for gram in _grams(words, length):
                holders[gram].add(example_id)
    shared, nearest = [], []
    for words in questions:
        # No set: ties must fall the same way in every run.
        grams = dict.fromkeys(_grams(words, min(n, len(words))))
        rows = Counter(row for gram in grams for row in sorted(holders.get(gram, ())))
        shared.append(sum(gram in holders for gram in grams) / len(grams))
        nearest.append(rows.most_common(1)[0][0] if rows else "")
    return pd.DataFrame(
        {
            "task": task,
            "example_id": validation["example_id"],
            "words": list(map(len, questions)),
            "shared": shared,
            "nearest": nearest,
        },
        index=validation.index,
    )


def _grams(words: list[str], length: int) -> Iterable[Gram]:
    """All runs of `length` words. Below 8 words only the whole question, marked so that nothing
    else is equal to it.
    """
    if length < SHORTEST:
        return [(None, *words)] if len(words) == length else []
    return zip(*(words[start:] for start in range(length)), strict=False)


def _answers(table: pd.DataFrame) -> pd.Series:
    """Gold answers in the form in which they are compared, such as without commas of thousands."""
    pairs = zip(table["task"], table["gold"], strict=True)
    return pd.Series([find_task(task).normalise(gold) for task, gold in pairs], dtype=object)
