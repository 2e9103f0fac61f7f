"""How much of the teacher's skill a student keeps, task by task."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis.tables import ACCURACY, KEYS, summary_table, tasks_of
from kd_utils.data.tasks import TASKS


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
        low, high (95 % t interval over seeds). `chance` is NaN for a task that is not in
        `data/tasks`, `teacher` where its accuracy is not recorded. Retention is NaN for both, and
        where a one-sided binomial test does not put the teacher above chance (p < 0.05).
    """
    from scipy.stats import binomtest

    parts = []
    for name in tasks_of(results):
        metric = f"{ACCURACY}/{name}"
        task, top = TASKS.get(name), float(teacher.get(metric, np.nan))
        chance, scale = task.chance if task else np.nan, np.nan
        if task and metric in teacher:
            guessed = max(chance, task.guessed)
            test = binomtest(round(top * rows[name]), rows[name], guessed, alternative="greater")
            scale = top - chance if test.pvalue < 0.05 else np.nan
        summary = summary_table(results, metric)
        scaled = summary[["mean", "low", "high"]].sub(chance).div(scale)
        scaled = scaled.rename(columns={"mean": "retention"})
        about = summary[[*KEYS, "n"]].assign(task=name, chance=chance, teacher=top)
        parts.append(about.join(scaled))
    columns = ["task", *KEYS, "chance", "teacher", "n", "retention", "low", "high"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def display(table: pd.DataFrame) -> pd.DataFrame:
    """`retention`'s rows for the eye: per cent with interval, a row per method and a column per
    task.
    """

    def show(row: Mapping[str, Any]) -> str:
        if np.isnan(row["retention"]):
            known = not np.isnan([row["chance"], row["teacher"]]).any()
            return "–" if known else "not known"
        interval = f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
        return f"{100 * row['retention']:.0f}{'' if np.isnan(row['low']) else interval}"

    shown = table.assign(shown=[show(row) for row in table.to_dict("records")])
    heads = {
        row["task"]: f"{row['task']} (teacher {_per_cent(row['teacher'], '.1f')}, "
        f"chance {_per_cent(row['chance'], '.0f')})"
        for row in table.to_dict("records")
    }
    wide = shown.pivot(index=KEYS[::-1], columns="task", values="shown")
    order = list(dict.fromkeys(zip(table["distill_type"], table["setting"], strict=True)))
    wide = wide.loc[order, list(heads)].rename(columns=heads)
    return wide if table["setting"].any() else wide.droplevel("setting")


def _per_cent(value: float, form: str) -> str:
    return "not known" if np.isnan(value) else format(100 * value, form)
