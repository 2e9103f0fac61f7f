"""What of a task does the teacher know, and how much of it does a student keep?"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy

from kd_utils.analysis import tables
from kd_utils.data.tasks import TASKS


def retention(
    results: pd.DataFrame, teacher: Mapping[str, float], rows: Mapping[str, int]
) -> pd.DataFrame:
    """How much of the teacher's skill a student has: (student - chance) / (teacher - chance).

    Args:
        results: as in `tables.planned_trials`.
        teacher: metric -> fraction.
        rows: task -> validation rows, to see whether the teacher itself is above chance.

    Returns:
        task, setting, distill_type, chance, teacher, n, retention (mean over seeds, a fraction),
        low, high (95 % t interval over seeds). `chance` is NaN for a task that is not in
        `data/tasks`, `teacher` where its accuracy is not recorded. Retention is NaN for both, and
        where a one-sided binomial test does not put the teacher above chance (p < 0.05).
    """
    parts = []
    for name in tables.tasks_of(results):
        metric = f"{tables.ACCURACY}/{name}"
        task, top = TASKS.get(name), float(teacher.get(metric, np.nan))
        chance, scale = task.chance if task else np.nan, np.nan
        if task and metric in teacher:
            guessed = max(chance, task.guessed)
            right = round(top * rows[name])
            test = scipy.stats.binomtest(right, rows[name], guessed, alternative="greater")
            scale = top - chance if test.pvalue < 0.05 else np.nan
        table = tables.summary_table(results, metric).rename(columns={"mean": "retention"})
        numbers = ["retention", "low", "high"]
        table[numbers] = table[numbers].sub(chance).div(scale)
        parts.append(table.assign(task=name, chance=chance, teacher=top))
    columns = ["task", *tables.KEYS, "chance", "teacher", "n", "retention", "low", "high"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
