"""How much of the teacher's skill a student keeps, task by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis.tables import ACCURACY, KEYS, summary_table, tasks_of
from kd_utils.config.stages import TASK_NAMES

#: What guessing gives: two choices, four choices, and no number is guessed.
CHANCE = dict(zip(TASK_NAMES, (0.5, 0.25, 0.0)))

#: A teacher must be above this to be said to know something: always saying GSM8K's commonest
#: training answer gets 2.7 % of the test right.
GUESSED = CHANCE | {"gsm8k": 0.027}


def retention(
    results: pd.DataFrame, teacher: Mapping[str, float], rows: Mapping[str, int]
) -> pd.DataFrame:
    """How much of what the teacher knows above chance the student has: (student - chance) /
    (teacher - chance).

    Args:
        results: as in `summary_table`.
        teacher: metric -> fraction.
        rows: task -> validation rows, to see whether the teacher itself is above chance.

    Returns:
        task, setting, distill_type, chance, teacher, n, retention (mean over seeds, a fraction),
        low, high (95 % t interval over seeds). NaN where a one-sided binomial test does not put the
        teacher above chance (p < 0.05).
    """
    from scipy.stats import binomtest

    parts = []
    for task in tasks_of(results):
        chance, top = CHANCE[task], float(teacher[f"{ACCURACY}/{task}"])
        knows = (
            binomtest(
                round(top * rows[task]), rows[task], GUESSED[task], alternative="greater"
            ).pvalue
            < 0.05
        )
        for row in summary_table(results, f"{ACCURACY}/{task}").to_dict("records"):
            scaled = {
                new: (row[old] - chance) / (top - chance) if knows else np.nan
                for new, old in (("retention", "mean"), ("low", "low"), ("high", "high"))
            }
            parts.append(
                {
                    "task": task,
                    "setting": row["setting"],
                    "distill_type": row["distill_type"],
                    "chance": chance,
                    "teacher": top,
                    "n": row["n"],
                    **scaled,
                }
            )
    return pd.DataFrame(parts)


def display(table: pd.DataFrame) -> pd.DataFrame:
    """`retention`'s rows for the eye: per cent with interval, a row per method and a column per
    task.
    """

    def show(row: Mapping[str, Any]) -> str:
        if np.isnan(row["retention"]):
            return "–"
        spread = (
            "" if np.isnan(row["low"]) else f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
        )
        return f"{100 * row['retention']:.0f}{spread}"

    shown = table.assign(shown=[show(row) for row in table.to_dict("records")])
    heads = {
        row[
            "task"
        ]: f"{row['task']} (teacher {100 * row['teacher']:.1f}, chance {100 * row['chance']:.0f})"
        for row in table.to_dict("records")
    }
    wide = shown.pivot(index=KEYS[::-1], columns="task", values="shown")
    order = list(dict.fromkeys(zip(table["distill_type"], table["setting"])))
    wide = wide.loc[order, list(heads)].rename(columns=heads)
    return wide if table["setting"].any() else wide.droplevel("setting")
