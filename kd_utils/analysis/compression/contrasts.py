"""Kinds of students compared at one size: by start, importance, losses, and number of cuts."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kd_utils.analysis import stats
from kd_utils.analysis.compression.students import Students
from kd_utils.analysis.pairs import hierarchical_errors, hierarchical_interval, hierarchical_p


class Kind(NamedTuple):
    """A kind of student: its start (`students.start_of`) and its method."""

    start: str
    method: str = "black_box"

    def __str__(self) -> str:
        return f"{self.start} + {self.method}"


PRUNED, RANDOM = Kind("pruned minitron"), Kind("random")

#: Question -> pairs of kinds, the second of which is the baseline. Fixed before any result.
QUESTIONS: dict[str, tuple[tuple[Kind, Kind], ...]] = {
    "Does the teacher help a cut student?": ((PRUNED, Kind(PRUNED.start, "task_only")),),
    "Does the cut help, beside random weights?": (
        (PRUNED, RANDOM),
        (Kind("svd weights"), RANDOM),
    ),
    "Does it matter which units are kept?": (
        (PRUNED, Kind("pruned random")),
        (PRUNED, Kind("pruned lowest")),
    ),
    "Which basis is best for a narrower student?": (
        (Kind("svd weights"), Kind("svd activations")),
        (Kind("svd weights"), Kind("svd channels")),
        (Kind("svd weights"), Kind("svd random")),
    ),
    "Is it better to cut in rounds?": (
        (Kind("pruned minitron rounds=3"), PRUNED),
        (Kind("pruned minitron rounds=2"), PRUNED),
    ),
    "Do intermediate states help a cut student?": tuple(
        (Kind(PRUNED.start, method), PRUNED) for method in ("hidden_state", "attention", "combined")
    ),
}


def contrasts(students: Students) -> pd.DataFrame:
    """Every pair of kinds of every question, at each shape and setting that both have.

    The difference is within a seed; several draws of a random start count as their mean. The
    interval (95 %, not corrected) and p are over validation rows and seeds
    (`pairs.hierarchical_interval`); p_holm is corrected within a question.

    Returns:
        question, shape, setting, ratio, method, baseline, seeds, accuracy, baseline_accuracy,
        difference, low, high (fractions), p, p_holm, and outcome: "better", "worse" (p_holm under
        0.05), "not shown", or "not tested" with fewer than two seeds.
    """
    rows = [
        {"question": question, **row}
        for question, pairs in QUESTIONS.items()
        for method, baseline in pairs
        for row in _compared(students, method, baseline)
    ]
    columns = (
        "question shape setting ratio method baseline seeds accuracy baseline_accuracy difference "
        "low high p"
    )
    table = pd.DataFrame(rows, columns=columns.split())
    table["p_holm"] = table.groupby("question", sort=False)["p"].transform(stats.holm)
    found = zip(table["p_holm"], table["difference"], strict=True)
    return table.assign(outcome=[_outcome(p, difference) for p, difference in found])


def _outcome(p: float, difference: float) -> str:
    if np.isnan(p):
        return "not tested"
    if p >= stats.ALPHA:
        return "not shown"
    return "better" if difference > 0 else "worse"


def _compared(students: Students, method: Kind, baseline: Kind) -> Iterator[dict[str, Any]]:
    """A row for each shape and setting in which both kinds have trials of the same seeds."""
    tasks, weights = students.tasks, students.weights
    of_kinds = [_by_shape(students.table, kind) for kind in (method, baseline)]
    for (shape, setting), places in of_kinds[0].items():
        if (shape, setting) not in of_kinds[1]:
            continue
        both = [_by_seed(students, found) for found in (places, of_kinds[1][shape, setting])]
        if not (seeds := sorted(both[0].keys() & both[1].keys())):
            continue
        correct = [np.stack([found[seed] for seed in seeds]) for found in both]
        difference = correct[0] - correct[1]
        centre = float(np.mean(difference @ weights))
        [error] = hierarchical_errors(difference, tasks, weights[:, None])
        low, high = hierarchical_interval(centre, error, difference, tasks, weights, 0.95)
        yield {
            "shape": shape,
            "setting": setting,
            "ratio": students.table.loc[places, "ratio"].mean(),
            "method": str(method),
            "baseline": str(baseline),
            "seeds": len(seeds),
            "accuracy": float(np.mean(correct[0] @ weights)),
            "baseline_accuracy": float(np.mean(correct[1] @ weights)),
            "difference": centre,
            "low": low,
            "high": high,
            "p": hierarchical_p(centre, error, len(seeds)) if len(seeds) > 1 else np.nan,
        }


def _by_shape(table: pd.DataFrame, kind: Kind) -> dict[tuple[str, str], pd.Index]:
    """(shape, setting) -> the places of a kind's trials."""
    of_kind = table[(table["start"] == kind.start) & (table["distill_type"] == kind.method)]
    groups = of_kind.groupby(["shape", "setting"], sort=False)
    return {(str(shape), str(setting)): group.index for (shape, setting), group in groups}


def _by_seed(students: Students, places: pd.Index) -> dict[int, np.ndarray]:
    """Seed -> (N,) the share of its draws that answered each row right."""
    seeds = students.table.loc[places, "seed"]
    return {
        int(seed): students.correct[seeds.index[seeds == seed]].mean(axis=0)
        for seed in seeds.unique()
    }
