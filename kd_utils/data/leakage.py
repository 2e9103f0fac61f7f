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


def near_overlap(train: pd.DataFrame, validation: pd.DataFrame) -> pd.DataFrame:
    """How much of each validation question is in the training questions of its task.

    shared = |{n-grams of the question that some training question has}| / |{n-grams of the
    question}|

    with n = 13 words. A question of 8 to 12 words is one n-gram of all its words. A shorter one is
    compared with whole questions only: "a good film" is part of many sentences that are no copy.

    Args:
        train, validation: prepared tables (task, example_id, prompt).

    Returns:
        A row per validation row, in its order and with its index: `task`, `example_id`, `words`,
        `shared` (0 to 1), and `nearest`, the `example_id` of the training row that has most of its
        n-grams ("" if none has any).

    Raises:
        ValueError: a prompt that cannot be read.
    """
    questions = list(map(question_words, validation["task"], validation["prompt"]))
    lengths = defaultdict(set)  # task -> lengths of its n-grams
    for task, words in zip(validation["task"], questions, strict=True):
        lengths[task].add(min(NGRAM, len(words)))
    holders = defaultdict(set)  # task, n-gram -> training rows that have it
    for task, example_id, prompt in train[["task", "example_id", "prompt"]].to_numpy():
        words = question_words(task, prompt)
        for length in lengths[task]:
            for gram in _grams(words, length):
                holders[task, gram].add(example_id)
    shared, nearest = [], []
    for task, words in zip(validation["task"], questions, strict=True):
        # No set: ties must fall the same way in every run.
        grams = dict.fromkeys(_grams(words, min(NGRAM, len(words))))
        rows = Counter(row for gram in grams for row in sorted(holders.get((task, gram), ())))
        shared.append(sum((task, gram) in holders for gram in grams) / len(grams))
        nearest.append(rows.most_common(1)[0][0] if rows else "")
    return validation[["task", "example_id"]].assign(
        words=list(map(len, questions)), shared=shared, nearest=nearest
    )


def _grams(words: list[str], length: int) -> Iterable[tuple[str | None, ...]]:
    """All runs of `length` words. Below 8 words only the whole question, marked so that nothing
    else is equal to it.
    """
    if length < SHORTEST:
        return [(None, *words)] if len(words) == length else []
    return zip(*(words[start:] for start in range(length)), strict=False)


def overlap_by_task(
    train: pd.DataFrame, validation: pd.DataFrame, overlap: pd.DataFrame
) -> pd.DataFrame:
    """`near_overlap` counted, a row per task.

    Returns:
        `rows` (of validation), `short` (fewer than 13 words, compared whole), `exact` (the content,
        by `Task.content_key`, is in training), `any_shared` (training has any of its n-grams),
        `leaked` (training has at least half of them) and `leaked_share` (fraction of rows).
    """
    flags = overlap[["task"]].assign(
        rows=1,
        short=overlap["words"] < NGRAM,
        exact=content_keys(validation).isin(set(content_keys(train))),
        any_shared=overlap["shared"] > 0,
        leaked=overlap["shared"] >= LEAKED,
    )
    table = flags.groupby("task", sort=False).sum().astype(int)
    return table.assign(leaked_share=table["leaked"] / table["rows"]).reset_index()


def nearest_pairs(
    train: pd.DataFrame, validation: pd.DataFrame, overlap: pd.DataFrame
) -> pd.DataFrame:
    """The validation prompt of each task that shares most, with its nearest training prompt.

    Returns:
        `task`, `shared`, `validation`, `training` (prompts); no row for a task whose questions
        share nothing.
    """
    near = overlap[overlap["shared"] > 0].sort_values("shared", ascending=False, kind="stable")
    near = near.drop_duplicates("task")
    prompts = train.drop_duplicates("example_id").set_index("example_id")["prompt"]
    pairs = near[["task", "shared"]].assign(
        validation=validation["prompt"][near.index], training=near["nearest"].map(prompts)
    )
    return pairs.reset_index(drop=True)


def require_no_leak(by_task: pd.DataFrame, split: str = "validation") -> None:
    """Check the table of `overlap_by_task`.

    Args:
        split: whose rows were looked for in training.

    Raises:
        ValueError: an exact overlap, or a task of whose rows more than `MOST_LEAKED` leaked.
    """
    for line in by_task.itertuples():
        if line.exact:
            raise ValueError(
                f"{line.task}: the content of {line.exact} of {line.rows} {split} rows is in "
                "training too: run 01_prepare_data again"
            )
        if line.leaked_share > MOST_LEAKED:
            raise ValueError(
                f"{line.task}: training has half or more of {line.leaked} of {line.rows} "
                f"{split} questions, above {MOST_LEAKED:.0%}: lower {line.task} in train_rows "
                f"or {split}_rows, or set another data_seed"
            )


def few_shot_rows(data_dir: str, tasks: Iterable[str]) -> pd.DataFrame:
    """The rows that few-shot evaluation puts before every question: the first of each subject.

    Args:
        data_dir: as in the config: a folder with the hub's schema, or "" for the hub.
        tasks: names of tasks.

    Returns:
        The columns of `load_task`.
    """
    folder = project_path(data_dir) if data_dir else None
    tables = [
        load_task(task, find_task(task).splits["shots"], data_dir=folder, limit=SHOTS)
        for task in tasks
    ]
    return pd.concat(tables, ignore_index=True)


def few_shot_overlap(shots: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """How many prepared rows have the content of a few-shot row: `task`, `shots` (rows), and
    `in_SPLIT` for each of the prepared tables.
    """
    contents = set(content_keys(shots))
    table = shots["task"].value_counts(sort=False).to_frame("shots")
    for split, prepared in tables.items():
        found = prepared["task"][content_keys(prepared).isin(contents)]
        table[f"in_{split}"] = found.value_counts()
    return table.fillna(0).astype(int).reset_index()


def require_unseen_shots(by_task: pd.DataFrame) -> None:
    """Raise a ValueError if `few_shot_overlap` has a few-shot row among the prepared rows."""
    for line in by_task.to_dict("records"):
        places = {name: line[name] for name in line if name.startswith("in_")}
        if any(places.values()):
            found = ", ".join(
                f"{count} {name.replace('_', ' ', 1)}" for name, count in places.items()
            )
            raise ValueError(
                f"{line['task']}: few-shot rows are among the prepared rows ({found}): run "
                "01_prepare_data again"
            )


def label_balance(train: pd.DataFrame, validation: pd.DataFrame) -> pd.DataFrame:
    """How often each label is right, for the tasks with choices.

    Returns:
        `task`, `label` (the choice, or its number where choices differ from row to row), `train`,
        `validation` (fractions of the rows).
    """
    counted: defaultdict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for split, table in (("train", train), ("validation", validation)):
        for task, rows in table.groupby("task", sort=False):
            for number, label in enumerate(_labels(rows)):
                counted[task, label][split] = float((rows["gold"] == str(number)).mean())
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
        normalise = find_task(task).normalise  # such as without commas of thousands
        learned = train["gold"][train["task"] == task].map(normalise).mode()
        labels, commonest, majority = _labels(rows), "", float("nan")
        if len(learned):
            commonest = labels[int(learned[0])] if labels else learned[0]
            majority = float((rows["gold"].map(normalise) == learned[0]).mean())
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
