"""Kinds of students compared at one size: by start, importance, losses, and number of cuts."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kd_utils.analysis import stats
from kd_utils.analysis.compression.students import KIND, SIZES, Students
from kd_utils.analysis.pairs import hierarchical_errors, hierarchical_interval, hierarchical_p


class Kind(NamedTuple):
    """A kind of student: its start (`students.start_of`), its method, and where it matters its
    setting.
    """

    start: str
    method: str = "black_box"
    setting: str = ""

    def __str__(self) -> str:
        return " ".join([self.start, "+", self.method, self.setting]).rstrip()


PRUNED, RANDOM = Kind("pruned minitron"), Kind("random")

#: Question -> pairs of kinds, the second of which is the baseline. Fixed before any result.
QUESTIONS: dict[str, tuple[tuple[Kind, Kind], ...]] = {
    "Does the teacher help a cut student?": (
        (PRUNED, Kind(PRUNED.start, "task_only")),
        (PRUNED, Kind(PRUNED.start, "teacher_answers")),
    ),
    "Do logits alone do as well?": (
        (Kind(*PRUNED[:2], setting="alpha=0"), Kind(*PRUNED[:2], setting="alpha=1")),
    ),
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
    "Do the teacher's states or maps help a cut student?": tuple(
        (Kind(PRUNED.start, method), PRUNED) for method in ("hidden_state", "attention", "combined")
    ),
}


#: A question about shapes, such as fewer layers or narrower ones: those whose non-embedding sizes
#: differ by less than this share are of one size.
SHAPES, SAME_SIZE = "Which shape, at one size?", 0.02


def contrasts(students: Students) -> pd.DataFrame:
    """Every pair of kinds of every question, at each shape and setting that both have; and every
    pair of shapes of one kind and one size.

    The difference is within a seed; several draws of a random start count as their mean. The
    interval (95 %, not corrected) and p are over validation rows and seeds
    (`pairs.hierarchical_interval`); p_holm is corrected within a question.

    Returns:
        question, shape, setting, ratio, method, baseline, seeds, accuracy, baseline_accuracy,
        difference, low, high (fractions), p, p_holm, and outcome: "better", "worse" (p_holm under
        0.05), "not shown", or "not tested" with fewer than two seeds.
    """
    of_kinds = (
        {"question": question, **row}
        for question, pairs in QUESTIONS.items()
        for method, baseline in pairs
        for row in _compared(students, method, baseline)
    )
    return _with_outcomes([*of_kinds, *({"question": SHAPES, **row} for row in _shapes(students))])


def with_a_chain(chain: Students, students: Students) -> pd.DataFrame:
    """Students of a chain of teachers beside every kind of student of the first teacher, at each
    shape that both have: the table of `contrasts`, whose question it is whether the chain helps.

    Args:
        chain: students that were taught by students; students: of a run without a chain. Their
            setting, such as more epochs or another teacher beside, is the baseline's.

    Raises:
        ValueError: they did not answer the same rows.
    """
    if not chain.examples.equals(students.examples):
        raise ValueError(
            "the chain's students did not answer the same validation rows as the run's: set "
            "chain_run and run_dir to runs on the same data"
        )
    rows = []
    for (start, method, _), places in chain.table.groupby(KIND[:3], sort=False).groups.items():
        same = students.table[[*SIZES]] == chain.table.loc[places[0], [*SIZES]]
        kinds = students.table[same.all(axis=1)].groupby(KIND, sort=False).groups
        for (other, losses, shape, setting), found in kinds.items():
            row = _row((chain, places), (students, found))
            if row:
                row |= {"shape": shape, "setting": setting, "baseline": f"{other} + {losses}"}
                rows.append(row | {"method": f"chain, {start} + {method}"})
    return _with_outcomes({"question": "Does a chain of teachers help?", **row} for row in rows)


def _with_outcomes(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The table of these rows, with Holm's correction within a question."""
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
    first, second = (_by_shape(students.table, kind) for kind in (method, baseline))
    for shape, setting in (place for place in first if place in second):
        row = _row((students, first[shape, setting]), (students, second[shape, setting]))
        if row:
            row |= {"shape": shape, "setting": setting}
            yield row | {"method": str(method), "baseline": str(baseline)}


def _shapes(students: Students) -> Iterator[dict[str, Any]]:
    """A row for each pair of shapes of one size that trials of one kind and setting have."""
    for (start, method, setting), group in students.table.groupby([*KIND[:2], KIND[3]], sort=False):
        shapes = group.groupby("shape", sort=False)
        for (first, found), (second, other) in itertools.combinations(shapes, 2):
            sizes = found["non_embedding"].mean(), other["non_embedding"].mean()
            row = {}
            if max(sizes) / min(sizes) < 1 + SAME_SIZE:
                row = _row((students, found.index), (students, other.index))
            if row:
                row |= {"shape": f"{first}, {second}", "setting": setting}
                kind = Kind(start, method)
                yield row | {"method": f"{kind}, {first}", "baseline": f"{kind}, {second}"}


def _row(method: tuple[Students, pd.Index], baseline: tuple[Students, pd.Index]) -> dict[str, Any]:
    """What is measured of two sets of trials on the same rows; {} where no seed has both."""
    tasks, weights = method[0].tasks, method[0].weights
    both = [of_run.by_seed(places) for of_run, places in (method, baseline)]
    seeds = sorted(both[0].keys() & both[1].keys())
    if not seeds:
        return {}
    correct = [np.stack([found[seed] for seed in seeds]) for found in both]
    difference = correct[0] - correct[1]
    centre = float(np.mean(difference @ weights))
    [error] = hierarchical_errors(difference, tasks, weights[:, None])
    low, high = hierarchical_interval(centre, error, difference, tasks, weights, 0.95)
    return {
        "ratio": baseline[0].table.loc[baseline[1], "ratio"].mean(),
        "seeds": len(seeds),
        "accuracy": float(np.mean(correct[0] @ weights)),
        "baseline_accuracy": float(np.mean(correct[1] @ weights)),
        "difference": centre,
        "low": low,
        "high": high,
        "p": hierarchical_p(centre, error, len(seeds)) if len(seeds) > 1 else np.nan,
    }


def _by_shape(table: pd.DataFrame, kind: Kind) -> dict[tuple[str, str], pd.Index]:
    """(shape, setting) -> the places of a kind's trials; "" for a setting that the kind names."""
    of_kind = table[(table["start"] == kind.start) & (table["distill_type"] == kind.method)]
    if kind.setting:
        of_kind = of_kind[of_kind["setting"] == kind.setting].assign(setting="")
    groups = of_kind.groupby(["shape", "setting"], sort=False)
    return {(str(shape), str(setting)): group.index for (shape, setting), group in groups}
