"""Which trials are compared with which: the questions, fixed before any result is seen.

Each question has a family of comparisons. In a joint question the method must beat every baseline.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd

from kd_utils.analysis import stats, tables
from kd_utils.analysis.pairs import matches
from kd_utils.config.trial import METHODS

BASELINE = "black_box"

#: What a signal must beat to add something: the training without a teacher, with the teacher's hard
#: answers, with its entropy in place of its logits, and with its signals of other rows.
REFERENCES = ("task_only", "teacher_answers", "label_smoothing", "shuffled")

#: The distillations with the terms of black box and more.
WHITE_BOX = tuple(
    name
    for name, method in METHODS.items()
    if method.kind == "distillation" and method.terms.keys() > METHODS[BASELINE].terms.keys()
)

#: Question -> its family: pairs of a method and its baseline. "teacher" is the positive control,
#: "controls" are the negative ones.
QUESTIONS = {
    "teacher": ((BASELINE, "task_only"),),
    "hard_answers": ((BASELINE, "teacher_answers"),),
    "references": tuple((BASELINE, reference) for reference in REFERENCES),
    "controls": (("shuffled", "teacher_answers"), ("label_smoothing", "teacher_answers")),
    "white_box": tuple((method, BASELINE) for method in WHITE_BOX),
    "white_box_references": tuple(product(WHITE_BOX, REFERENCES)),
    "which": (("attention", "hidden_state"),),
    "combining": (("combined", "hidden_state"), ("combined", "attention")),
}

#: The questions of being better than the best of all baselines, asked of each method.
JOINT = ("references", "white_box_references")

#: The verdicts rest on the mean of the tasks: how many rows of a task were drawn should not weigh
#: the tasks.
PRIMARY = "macro"


def primary(metrics: Iterable[str]) -> str:
    """The metric among these that the verdicts rest on: a task on which the teacher has nothing to
    hand on is left out of the mean.
    """
    return tables.INFORMED if tables.INFORMED in set(metrics) else PRIMARY


def family_size(question: str, rows: Sequence[dict[str, Any]]) -> int:
    """By what a question's smallest p is multiplied: the number of its comparisons, for a joint
    question of its methods in each setting.

    0: it is not asked. A joint question that has one baseline left is another question.

    Args:
        rows: the comparisons that there are, with their `setting`, `method` and `baseline`.
    """
    if question not in JOINT:
        return len(rows)
    several = len({row["baseline"] for row in rows}) > 1
    return len({(row["setting"], row["method"]) for row in rows}) * several


def is_false_alarm(gains: Iterable[Mapping[str, Any]]) -> bool:
    """Whether these gains of negative controls (rows of `compare`) show a broken instrument:
    smoothing can truly help as a regulariser, signals of other rows cannot.
    """
    return any(row["method"] != "label_smoothing" for row in gains)


def reach(trials: pd.DataFrame) -> pd.DataFrame:
    """What a plan of `tables.planned_trials` could show at best: question, comparisons (how many it
    has), family (`family_size`), pairs (the fewest of its comparisons), smallest_p (after Holm).
    """
    found = []
    for question, compared in QUESTIONS.items():
        rows = [row for row, _ in matches(trials, compared)]
        if family := family_size(question, rows):
            pairs = min(row["planned"] for row in rows)
            smallest = stats.smallest_p(pairs, family)
            found.append((question, len(rows), family, pairs, smallest))
    columns = ["question", "comparisons", "family", "pairs", "smallest_p"]
    return pd.DataFrame(found, columns=columns)
