"""What of a task does the teacher know, and how much of it does a student keep?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy

from kd_utils.analysis import tables
from kd_utils.data.tasks import TASKS


def above_chance(name: str, accuracy: float, rows: int) -> bool | None:
    """Whether a one-sided binomial test puts the teacher above chance on a task (p < 0.05); None
    where the task is not in `data/tasks`, or the accuracy is not recorded (NaN).
    """
    task = TASKS.get(name)
    if task is None or np.isnan(accuracy):
        return None
    guessed = max(task.chance, task.guessed)
    test = scipy.stats.binomtest(round(accuracy * rows), rows, guessed, alternative="greater")
    return bool(test.pvalue < 0.05)


def uninformed_tasks(teacher: Mapping[str, float], rows: Mapping[str, int]) -> list[str]:
    """The tasks on which the teacher is not shown to be above chance: it has nothing to hand on.

    Held-out rows decide, so that no validation row chooses what a verdict rests on. The teacher of
    an older record answered validation rows alone; there these decide.

    Args:
        teacher: metric -> fraction, and `held_out_rows/TASK`, as in a trial's record.
        rows: task -> validation rows.
    """

    def known(task: str) -> bool | None:
        held_out = teacher.get(f"held_out_accuracy/{task}")
        if held_out is not None:
            return above_chance(task, held_out, round(teacher[f"held_out_rows/{task}"]))
        return above_chance(task, teacher.get(f"{tables.ACCURACY}/{task}", np.nan), rows[task])

    return [task for task in rows if known(task) is False]


def with_informed(values: Any, tasks: Sequence[str]) -> Any:
    """The values with `validation_accuracy/informed`, the mean over these tasks; as they are if
    there are none.

    Args:
        values: a results table, or metric -> fraction.
    """
    if not tasks:
        return values
    known = [values.get(f"{tables.ACCURACY}/{task}", np.nan) for task in tasks]
    mean = {f"{tables.ACCURACY}/{tables.INFORMED}": sum(known) / len(known)}
    return values.assign(**mean) if isinstance(values, pd.DataFrame) else {**values, **mean}


def retention(
    results: pd.DataFrame, teacher: Mapping[str, float], uninformed: Sequence[str] = ()
) -> pd.DataFrame:
    """How much of the teacher's skill a student has: (student - chance) / (teacher - chance).

    Args:
        results: as in `tables.planned_trials`.
        teacher: metric -> fraction.
        uninformed: of `uninformed_tasks`.

    Returns:
        task, setting, distill_type, chance, teacher, n, retention (mean over seeds, a fraction),
        low, high (95 % t interval over seeds). `chance` is NaN for a task that is not in
        `data/tasks`, `teacher` where its accuracy is not recorded. Retention is NaN for both, and
        for uninformed tasks.
    """
    parts = []
    for name in tables.tasks_of(results):
        metric = f"{tables.ACCURACY}/{name}"
        task, top = TASKS.get(name), float(teacher.get(metric, np.nan))
        chance = task.chance if task else np.nan
        scale = np.nan if name in uninformed else top - chance
        table = tables.summary_table(results, metric).rename(columns={"mean": "retention"})
        numbers = ["retention", "low", "high"]
        table[numbers] = table[numbers].sub(chance).div(scale)
        parts.append(table.assign(task=name, chance=chance, teacher=top))
    columns = ["task", *tables.KEYS, "chance", "teacher", "n", "retention", "low", "high"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
