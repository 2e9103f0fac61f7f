"""Kinds of students compared at one size: by start, importance, losses, and number of cuts."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from kd_utils.analysis.compression.retained import DRAWS
from kd_utils.analysis.compression.students import Students, draws_of_rows, draws_of_trials


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
    """Every pair of kinds of every question, at each shape that both have.

    The difference is within a seed; several draws of a random start count as their mean. The
    interval (95 %) is over validation rows and seeds, both drawn with replacement.

    Returns:
        question, shape, ratio, method, baseline, seeds, accuracy, baseline_accuracy, difference,
        low, high (fractions), and outcome: "better", "worse" (the interval does not hold 0) or "not
        shown"; "not tested" with fewer than two seeds.
    """
    weights, rows = draws_of_rows(students.tasks, DRAWS), []
    for question, pairs in QUESTIONS.items():
        for method, baseline in pairs:
            for shape, both in _matched(students, method, baseline):
                first, second = (_by_seed(students, places) for places in both)
                seeds = sorted(first.keys() & second.keys())
                difference = np.stack([first[seed] - second[seed] for seed in seeds])
                chosen = draws_of_trials(len(seeds), DRAWS)
                drawn = np.take_along_axis(weights @ difference.T, chosen, axis=1).mean(axis=1)
                low, high = np.quantile(drawn, [0.025, 0.975])
                accuracies = [
                    float(np.mean([found[seed] @ students.weights for seed in seeds]))
                    for found in (first, second)
                ]
                word = "better" if low > 0 else "worse" if high < 0 else "not shown"
                rows.append(
                    {
                        "question": question,
                        "shape": shape,
                        "ratio": students.table.loc[both[0], "ratio"].mean(),
                        "method": str(method),
                        "baseline": str(baseline),
                        "seeds": len(seeds),
                        "accuracy": accuracies[0],
                        "baseline_accuracy": accuracies[1],
                        "difference": accuracies[0] - accuracies[1],
                        "low": float(low),
                        "high": float(high),
                        "outcome": word if len(seeds) > 1 else "not tested",
                    }
                )
    columns = (
        "question shape ratio method baseline seeds accuracy baseline_accuracy difference low high "
        "outcome"
    )
    return pd.DataFrame(rows, columns=columns.split())


def _matched(
    students: Students, method: Kind, baseline: Kind
) -> Iterator[tuple[str, tuple[pd.Index, pd.Index]]]:
    """The shapes that both kinds have, and the places of their trials."""
    table = students.table
    of_kind = [
        table[(table["start"] == kind.start) & (table["distill_type"] == kind.method)]
        for kind in (method, baseline)
    ]
    for shape in of_kind[0]["shape"].unique():
        places = [kind.index[kind["shape"] == shape] for kind in of_kind]
        seeds = [set(table.loc[place, "seed"]) for place in places]
        if seeds[0] & seeds[1]:
            yield shape, (places[0], places[1])


def _by_seed(students: Students, places: pd.Index) -> dict[int, np.ndarray]:
    """Seed -> (N,) the share of its draws that answered each row right."""
    seeds = students.table.loc[places, "seed"]
    return {
        int(seed): students.correct[seeds.index[seeds == seed]].mean(axis=0)
        for seed in seeds.unique()
    }
