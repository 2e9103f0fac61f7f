"""Retention against size: how much of the teacher's skill students of each size keep.

The published figures are ratios of accuracies, student over teacher. Above chance is stricter:
(student - chance) / (teacher - chance). Both have the interval of a paired bootstrap: validation
rows are drawn once for both models, and the student's trials are drawn too, so the interval holds
the teacher's own error. There is one teacher, so it does not hold the variation between teachers.
"""

from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis.compression.students import (
    SIZES,
    Students,
    draws_of_rows,
    draws_of_trials,
)

DRAWS = 2000

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
    reaches over an end of the band), or "no figure".
    """
    if band is None:
        return "no figure"
    if low >= band[0] and high <= band[1]:
        return "inside"
    if low > band[1]:
        return "above"
    return "below" if high < band[0] else "not shown"


def retained(students: Students) -> pd.DataFrame:
    """Retention of every kind of student and every size, on the mean over tasks.

    Returns:
        start, distill_type, shape, n (trials), ratio, `SIZES` (means over trials), accuracy and
        teacher (fractions); raw and above_chance, each with NAME_low and NAME_high (95 %); band
        (text) and verdict, of the raw ratio. Smaller ratios first.
    """
    weights = draws_of_rows(students.tasks, DRAWS)
    teacher, teachers = students.teacher @ students.weights, weights @ students.teacher
    rows = []
    groups = students.table.groupby(["start", "distill_type", "shape"], sort=False)
    for names, group in groups:
        correct = students.correct[group.index]
        accuracy = float(np.mean(correct @ students.weights))
        drawn = weights @ correct.T  # (draws, trials)
        chosen = draws_of_trials(len(group), DRAWS)
        means = np.take_along_axis(drawn, chosen, axis=1).mean(axis=1)
        row = dict(zip(("start", "distill_type", "shape"), names, strict=True))
        row |= {"n": len(group), "ratio": group["ratio"].mean()}
        row |= {key: group[key].mean() for key in SIZES}
        row |= {"accuracy": accuracy, "teacher": teacher}
        row |= _ratio("raw", accuracy, means, teacher, teachers, 0.0)
        row |= _ratio("above_chance", accuracy, means, teacher, teachers, students.chance)
        band = band_of(row["ratio"])
        row["band"] = "" if band is None else f"{100 * band[0]:.0f} to {100 * band[1]:.0f}"
        row["verdict"] = verdict(row["raw_low"], row["raw_high"], band)
        rows.append(row)
    return pd.DataFrame(rows).sort_values("ratio", kind="stable", ignore_index=True)


def _ratio(
    name: str,
    student: float,
    students: np.ndarray,
    teacher: float,
    teachers: np.ndarray,
    chance: float,
) -> dict[str, Any]:
    """A retention and its interval; NaN where the teacher is at chance in some draw."""
    if (teachers <= chance).any():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), np.nan)
    drawn = (students - chance) / (teachers - chance)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        name: (student - chance) / (teacher - chance),
        f"{name}_low": float(low),
        f"{name}_high": float(high),
    }


def bits_retention(unigram: float, student: float, teacher: float) -> float:
    """Retention of text, for which there is no chance level: (H_1 - student) / (H_1 - teacher).

    Args:
        unigram: H_1, the entropy of the training text's tokens; student, teacher: cross-entropy of
            the same text; all in bits per byte, so that tokenizers do not matter.
    """
    return (unigram - student) / (unigram - teacher)
