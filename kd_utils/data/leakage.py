"""What the data gives away: validation questions that training has seen, few-shot rows, labels and
baselines.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

import pandas as pd

from kd_utils.config.project_paths import project_path
from kd_utils.data.tasks import TASKS, content_key, load_task

#: Words of an n-gram, and the fewest that are looked for inside a longer text. GPT-3's range (Brown
#: et al. 2020, appendix C): below 8 words it met spurious collisions, and 13 is the most it took.
#: lm-evaluation-harness takes 13.
NGRAM, SHORTEST = 13, 8

#: A validation row counts as leaked if training has at least this fraction of its n-grams, and of a
#: task's rows no more than this fraction may be leaked. Both are ours: see `01_prepare_data`, which
#: gives the reasons.
LEAKED, MOST_LEAKED = 0.5, 0.02

#: Worked examples that lm-evaluation-harness puts before a question of MMLU and GSM8K when scores
#: are published.
SHOTS = 5

Gram = tuple[str | None, ...]


def question_words(task: str, prompt: str) -> list[str]:
    """The words of the question itself, normalised: what its prompt has beyond the text that all
    prompts share.

    SST-2's sentence, MMLU's question and choices without their letters and without the line that
    names the subject, GSM8K's question; then Unicode's NFKC, lower case, and everything but
    letters, digits and white space taken out, as in GPT-3's appendix C and lm-evaluation-harness's
    `decontamination/janitor.py` (which knows ASCII only).

    Raises:
        ValueError: an unknown task, or a prompt that does not read as `tasks` writes it without
            shots.
    """
    if task not in _TEMPLATES:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(_TEMPLATES)}")
    text = prompt.split("\n\n", 1)[-1] if task == "mmlu" else prompt  # as in `content_key`
    parts = _TEMPLATES[task].fullmatch(text)
    if not parts:
        raise ValueError(f"no {task} prompt: {prompt[:80]!r}: run 01_prepare_data again")
    plain = unicodedata.normalize("NFKC", " ".join(parts.groups())).casefold()
    return re.sub(r"[^\w\s]|_", "", plain).split()


def near_overlap(train: pd.DataFrame, validation: pd.DataFrame, n: int = NGRAM) -> pd.DataFrame:
    """How much of each validation question stands in the training questions of its task.

    shared = |{n-grams of the question that some training question has}| / |{n-grams of the
    question}|

    A question of 8 to n - 1 words is one n-gram of all its words. A shorter one is compared with
    whole questions only: "a good film" stands inside many sentences that are no copy of it.

    Args:
        train, validation: prepared tables (task, example_id, prompt), validation with a unique
            index.
        n: words, at least 8.

    Returns:
        A row per validation row, in its order and with its index: `task`, `example_id`, `words`,
            `shared` (0 to 1), and
        `nearest`, the `example_id` of the training row that has most of its n-grams ("" if none has
        any).

    Raises:
        ValueError: n below 8, or a prompt that cannot be read.
    """
    if n < SHORTEST:
        raise ValueError(f"n = {n} words: give at least {SHORTEST}, fewer collide by chance")
    parts = [
        _of_one_task(task, train[train["task"] == task], asked, n)
        for task, asked in validation.groupby("task", sort=False)
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
        `rows` (of validation), `short` (with fewer than 13 words, compared whole), `exact` (whose
        content, as `content_key` has it, is in training), `any_shared` (with any n-gram that
        training has), `leaked` (with at least half of them) and `leaked_share` (fraction of rows).
    """
    seen = _contents(train)
    exact = [key in seen for key in _keys(validation)]
    flags = pd.DataFrame(
        {
            "task": validation["task"],
            "rows": 1,
            "short": overlap["words"] < NGRAM,
            "exact": exact,
            "any_shared": overlap["shared"] > 0,
            "leaked": overlap["shared"] >= LEAKED,
        }
    )
    table = flags.groupby("task", sort=False).sum().astype(int)
    return table.assign(leaked_share=table["leaked"] / table["rows"]).reset_index()


def nearest_pairs(
    train: pd.DataFrame, validation: pd.DataFrame, overlap: pd.DataFrame, rows: int = 1
) -> pd.DataFrame:
    """The validation prompts that share most, `rows` of each task at most, each with its nearest
    training prompt.

    Returns:
        `task`, `shared`, `validation`, `training` (prompts); no row for a task whose questions
        share nothing.
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
    """Raise a ValueError if `overlap_by_task` has an exact overlap, or more leaked rows of a task
    than `most` of it.
    """
    for line in by_task.itertuples():
        if line.exact:
            raise ValueError(
                f"{line.task}: the content of {line.exact} of {line.rows} validation rows is in "
                f"training "
                "too: run 01_prepare_data again"
            )
        if line.leaked_share > most:
            raise ValueError(
                f"{line.task}: training has half or more of {line.leaked} of {line.rows} "
                f"validation "
                f"questions, above {most:.0%}: lower {line.task}_train or {line.task}_validation, "
                f"or set "
                "another data_seed"
            )


def few_shot_rows(data_dir: str, tasks: Iterable[str], count: int = SHOTS) -> pd.DataFrame:
    """The rows that few-shot evaluation puts before every question: the first `count` of each
    task's few-shot split.

    Args:
        data_dir: as in the config: a folder with the hub's schema, or "" for the hub.
        tasks: names of tasks.
        count: rows; of MMLU, of each subject.

    Returns:
        The columns of `tasks.load_task`.
    """
    folder = project_path(data_dir) if data_dir else None
    tables = [
        load_task(task, TASKS[task].shot_split, data_dir=folder, limit=count) for task in tasks
    ]
    return pd.concat(tables, ignore_index=True)


def few_shot_overlap(
    shots: pd.DataFrame, train: pd.DataFrame, validation: pd.DataFrame
) -> pd.DataFrame:
    """A row per task: `shots` (rows), and how many rows `in_train` and `in_validation` have the
    content of a shot.
    """
    contents = _contents(shots)
    counted = {"shots": shots["task"].value_counts(sort=False)}
    for name, table in (("in_train", train), ("in_validation", validation)):
        counted[name] = table["task"][[key in contents for key in _keys(table)]].value_counts()
    table = pd.DataFrame(counted).reindex(counted["shots"].index).fillna(0).astype(int)
    return table.rename_axis("task").reset_index()


def require_unseen_shots(by_task: pd.DataFrame) -> None:
    """Raise a ValueError if `few_shot_overlap` has a few-shot row in training or in validation."""
    for line in by_task.itertuples():
        if line.in_train or line.in_validation:
            raise ValueError(
                f"{line.task}: few-shot rows stand among the prepared rows ({line.in_train} in "
                f"train, "
                f"{line.in_validation} in validation): run 01_prepare_data again"
            )


def label_balance(train: pd.DataFrame, validation: pd.DataFrame) -> pd.DataFrame:
    """Each label's fraction of the rows, for the tasks with choices: `task`, `label`, `train`,
    `validation`.
    """
    counted = {}
    for split, table in (("train", train), ("validation", validation)):
        for task, rows in table.groupby("task", sort=False):
            for place, choice in enumerate(rows["choices"].iloc[0]):
                share = float((rows["gold"] == str(place)).mean())
                counted.setdefault((task, choice.strip()), {})[split] = share
    lines = [{"task": task, "label": label, **shares} for (task, label), shares in counted.items()]
    return pd.DataFrame(lines, columns=["task", "label", "train", "validation"])


def baselines(train: pd.DataFrame, validation: pd.DataFrame) -> pd.DataFrame:
    """What needs no skill: accuracy on validation, a row per task and one for all examples
    together.

    Returns:
        `task`, `rows` (of validation), `commonest` (the commonest answer in training; of several,
        the first in order), `majority` (accuracy of always giving it; NaN without training rows)
        and `random` (expected accuracy of a blind choice, 1 / choices; 0 where the answer is free).
    """
    lines = []
    for task, rows in validation.groupby("task", sort=False):
        choices = rows["choices"].iloc[0]
        learned = _answers(train[train["task"] == task]).mode()
        majority = (
            float((_answers(rows) == learned.iloc[0]).mean()) if len(learned) else float("nan")
        )
        commonest = learned.iloc[0] if len(learned) else ""
        lines.append(
            {
                "task": task,
                "rows": len(rows),
                "majority": majority,
                "commonest": choices[int(commonest)].strip()
                if len(choices) and commonest
                else commonest,
                "random": 1 / len(choices) if len(choices) else 0.0,
            }
        )
    table = pd.DataFrame(lines, columns=["task", "rows", "commonest", "majority", "random"])
    if table.empty:
        return table
    weights = table["rows"] / table["rows"].sum()
    table.loc[len(table)] = [
        "all",
        table["rows"].sum(),
        "",
        *((table[name] * weights).sum(skipna=False) for name in ("majority", "random")),
    ]
    return table


def _template(task: str) -> re.Pattern[str]:
    """What all prompts of a task share, taken from a prompt whose content is a mark, with a group
    for each content.
    """
    mark = "\ue000"
    row = {column: [mark] * 4 if column == "choices" else mark for column in TASKS[task].columns}
    return re.compile("(.*?)".join(map(re.escape, TASKS[task].prompt(row).split(mark))), re.DOTALL)


_TEMPLATES = {task: _template(task) for task in TASKS}


def _of_one_task(task: str, train: pd.DataFrame, asked: pd.DataFrame, n: int) -> pd.DataFrame:
    questions = [question_words(task, prompt) for prompt in asked["prompt"]]
    lengths = {min(n, len(words)) for words in questions}
    holders = defaultdict(set)  # n-gram -> training rows that have it
    for example_id, prompt in zip(train["example_id"], train["prompt"], strict=True):
        words = question_words(task, prompt)
        for length in lengths:
            for gram in _grams(words, length):
                holders[gram].add(example_id)
    shared, nearest = [], []
    for words in questions:
        grams = dict.fromkeys(
            _grams(words, min(n, len(words)))
        )  # no set: ties must fall the same way in every run
        rows = Counter(row for gram in grams for row in sorted(holders.get(gram, ())))
        shared.append(sum(gram in holders for gram in grams) / len(grams))
        nearest.append(rows.most_common(1)[0][0] if rows else "")
    return pd.DataFrame(
        {
            "task": task,
            "example_id": asked["example_id"],
            "words": list(map(len, questions)),
            "shared": shared,
            "nearest": nearest,
        },
        index=asked.index,
    )


def _grams(words: list[str], length: int) -> Iterable[Gram]:
    """All runs of `length` words; below 8 words only the whole question, marked so that nothing
    else is equal to it.
    """
    if length < SHORTEST:
        return [(None, *words)] if len(words) == length else []
    return zip(*(words[start:] for start in range(length)))


def _answers(table: pd.DataFrame) -> pd.Series:
    """Gold answers as scoring compares them, so without GSM8K's commas of thousands."""
    from kd_utils.data.tasks import normalise_number

    return table["gold"].map(normalise_number)


def _contents(table: pd.DataFrame) -> set[str]:
    return set(_keys(table))


def _keys(table: pd.DataFrame) -> list[str]:
    return [
        content_key(task, prompt)
        for task, prompt in zip(table["task"], table["prompt"], strict=True)
    ]
