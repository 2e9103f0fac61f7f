"""Retention against size: how much of the teacher's skill students of each size keep.

The published figures are ratios of accuracies, student over teacher. Above chance is stricter:
(student - chance) / (teacher - chance). The interval of a ratio r is that of the mean of
(student - chance) - r (teacher - chance), row by row and seed by seed, over the teacher's skill
(the delta method). Its error is `pairs.hierarchical_errors`, by a bootstrap that draws validation
rows once for both models and the student's trials too. So it holds the teacher's own error. There
is one teacher, so it does not hold the variation between teachers.
"""

from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis.compression.students import KIND, SIZES, Students
from kd_utils.analysis.pairs import hierarchical_errors, hierarchical_interval

#: What is expected of a student that is so many times smaller: raw retention, from and to.
BANDS = {2: (0.95, 0.99), 4: (0.90, 0.95), 10: (0.80, 0.90), 50: (0.60, 0.80)}

#: A band is for ratios within this factor of its own.
NEAR = 1.25


def band_of(ratio: float) -> tuple[float, float] | None:
    """The band of a size ratio, or None between the bands."""
    for near, band in BANDS.items():
        if 1 / NEAR <= ratio / near <= NEAR:
            return band
    return None


def verdict(low: float, high: float, band: tuple[float, float] | None) -> str:
    """Where an interval lies beside its band: "inside" it, "above", "below", "not shown" (it
    reaches over an end of the band), "no figure", or "not tested" (fewer than two trials).
    """
    if band is None:
        return "no figure"
    if np.isnan(low):
        return "not tested"
    if low >= band[0] and high <= band[1]:
        return "inside"
    if low > band[1]:
        return "above"
    return "below" if high < band[0] else "not shown"


def retained(students: Students) -> pd.DataFrame:
    """Retention of every kind of student and every size, on the mean over tasks.

    Returns:
        `KIND`, n (trials), seeds, ratio, `SIZES` (means over trials), teacher (its accuracy);
        accuracy, raw and above_chance, each with NAME_low and NAME_high (95 %; NaN for one seed);
        fractions; band (text) and verdict, of the raw ratio; commit. Smaller ratios first.
    """
    rows = []
    for names, group in students.table.groupby(KIND, sort=False):
        correct = np.stack([*students.by_seed(group.index).values()])
        row = dict(zip(KIND, names, strict=True))
        row |= {"n": len(group), "seeds": len(correct), "ratio": group["ratio"].mean()}
        row |= {key: group[key].mean() for key in SIZES}
        row["teacher"] = float(students.teacher @ students.weights)
        row |= _with_interval("accuracy", correct, np.ones(1), 0.0, students)
        row |= _with_interval("raw", correct, students.teacher, 0.0, students)
        row |= _with_interval("above_chance", correct, students.teacher, students.chance, students)
        band = band_of(row["ratio"])
        row["band"] = "" if band is None else f"{100 * band[0]:.0f} to {100 * band[1]:.0f}"
        row["verdict"] = verdict(row["raw_low"], row["raw_high"], band)
        row["commit"] = " ".join(group["commit"].unique())
        rows.append(row)
    return pd.DataFrame(rows).sort_values("ratio", kind="stable", ignore_index=True)


def _with_interval(
    name: str, correct: np.ndarray, teacher: np.ndarray, chance: float, students: Students
) -> dict[str, Any]:
    """The ratio of mean skills above chance and its interval; NaN where the teacher's is not shown
    to be above chance.

    Args:
        correct: (S, N) of the seeds, each the mean of its draws; teacher: (N,), or a single 1,
            whose ratio is the accuracy.
    """
    weights, tasks = students.weights, students.tasks
    skills = np.broadcast_to(teacher - chance, correct.shape)
    skill = float(skills[0] @ weights)
    if skill <= 2 * _spread(skills[0], weights, tasks):
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), np.nan)
    ratio = float(np.mean(correct @ weights) - chance) / skill
    beside = correct - chance - ratio * skills
    [error] = hierarchical_errors(beside, tasks, weights[:, None])
    low, high = hierarchical_interval(0.0, error, beside, tasks, weights, 0.95)
    return {name: ratio, f"{name}_low": ratio + low / skill, f"{name}_high": ratio + high / skill}


def _spread(values: np.ndarray, weights: np.ndarray, tasks: np.ndarray) -> float:
    """The standard error of a weighted mean over rows that are drawn within their tasks."""
    beside = values.copy()
    for task in np.unique(tasks):
        beside[tasks == task] -= values[tasks == task].mean()
    return float(np.sqrt(np.sum((weights * beside) ** 2)))


def bits_retention(unigram: float, student: Any, teacher: float) -> Any:
    """Retention of text, for which there is no chance level: (H_1 - student) / (H_1 - teacher).

    Args:
        unigram: H_1, the entropy of the training text's tokens; student, teacher: cross-entropy of
            the same text; all in bits per byte, so that tokenizers do not matter.
    """
    return (unigram - student) / (unigram - teacher)
