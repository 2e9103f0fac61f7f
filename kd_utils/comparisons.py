"""Which trials are compared with which, and what the statistics say of each pair: tidy tables from results.

A question has a family of comparisons, fixed before anything is seen. Holm's correction is within one question and one
metric, over its comparisons and all swept settings. Accuracies and differences are fractions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from . import stats
from .tables import planned_trials

BASELINE = "black_box"
WHITE_BOX = ("hidden_state", "attention", "combined")
#: Question -> its family: method and what it is compared with.
QUESTIONS = {
    "teacher": (("black_box", "task_only"),),
    "white_box": tuple((method, BASELINE) for method in WHITE_BOX),
    "which": (("attention", "hidden_state"),),
    "combining": (("combined", "hidden_state"), ("combined", "attention")),
}
#: The metric that verdicts over all tasks rest on: how many rows of a task were drawn should not weigh the tasks.
PRIMARY = "macro"
COLUMNS = ["question", "metric", "setting", "method", "baseline", "planned", "pairs", "difference", "difference_sd",
           "low", "high", "low_90", "high_90", "p", "p_holm", "p_equivalence", "p_equivalence_holm", "g", "sd",
           "baseline_sd", "sd_ratio", "sd_ratio_low", "sd_ratio_high", "p_spread", "p_spread_holm", "smallest_p",
           "detectable", "outcome"]


class Pairs(NamedTuple):
    """Two methods' trials, seed by seed.

    Attributes:
        setting: the swept keys that tell these trials from others, "temperature=4"; "" if none.
        planned: seeds of which both trials were planned.
        seeds: (S,) those of which both are done.
        method, baseline: (S, N) whether each example was answered rightly.
    """

    setting: str
    planned: int
    seeds: list[int]
    method: np.ndarray
    baseline: np.ndarray


class Answers:
    """Whether each done trial answered each validation example rightly.

    Args:
        results: `records.collect`'s table.
        predictions: `records.predictions`'s table.

    Attributes:
        tasks: (N,) task of each example.

    Raises:
        ValueError: the trials did not answer the same examples, so they cannot be compared by example.
    """

    def __init__(self, results: pd.DataFrame, predictions: pd.DataFrame) -> None:
        self.trials = planned_trials(results)
        wide = predictions.pivot(index="example_id", columns="trial", values="correct")
        if wide.isna().any(axis=None):
            trial = wide.isna().sum().idxmax()
            raise ValueError(f"trials did not answer the same examples: {trial} lacks {wide[trial].isna().sum()} of "
                             f"{len(wide)}; run the sweep again, which redoes trials of other data")
        self.correct = {trial: wide[trial].to_numpy(dtype=float) for trial in wide}
        task_of = predictions.drop_duplicates("example_id").set_index("example_id")["task"]
        self.tasks = task_of.loc[wide.index].to_numpy()

    @property
    def metrics(self) -> list[str]:
        """"macro", "micro" and the tasks, in the order in which the project lists them."""
        from .config import TASK_NAMES

        present = set(self.tasks)
        return ["macro", "micro", *(t for t in TASK_NAMES if t in present), *sorted(present - set(TASK_NAMES))]

    def pairs(self, method: str, baseline: str) -> Iterator[Pairs]:
        """Method and baseline wherever their settings agree; a key that only one of them uses does not part them."""
        of = {name: self.trials[self.trials["distill_type"] == name] for name in (method, baseline)}
        for mine, of_mine in of[method].groupby("setting", sort=False):
            for theirs, of_theirs in of[baseline].groupby("setting", sort=False):
                a, b = _items(mine), _items(theirs)
                if any(a[key] != b[key] for key in a.keys() & b.keys()):
                    continue
                both = of_mine.merge(of_theirs, on="seed", suffixes=("", "_baseline"))
                done = both[both["done"] & both["done_baseline"]]
                stack = [np.array([self.correct[trial] for trial in done[column]]).reshape(len(done), len(self.tasks))
                         for column in ("trial", "trial_baseline")]
                setting = ", ".join(f"{key}={value}" for key, value in (b | a).items())
                yield Pairs(setting, len(both), done["seed"].tolist(), *stack)


def compare(answers: Answers, margin: float = 0.01) -> pd.DataFrame:
    """Every comparison of every question, on every metric.

    Args:
        answers: of one run.
        margin: what counts as equal in `p_equivalence`, a fraction (0.01: one point).

    Returns:
        question, metric, setting, method, baseline; planned and pairs (seeds); difference (mean over pairs), its sd,
        low, high (95 %, hierarchical bootstrap), low_90, high_90; p (exact sign flips), p_holm; p_equivalence (TOST),
        p_equivalence_holm; g (Hedges); sd, baseline_sd, sd_ratio, sd_ratio_low, sd_ratio_high, p_spread
        (Brown-Forsythe), p_spread_holm; smallest_p (that the family's size and the pairs allow, after Holm);
        detectable (difference found with power 0.8 at Holm's first step). NaN where there are too few pairs.
    """
    rows = []
    for question, family in QUESTIONS.items():
        for method, baseline in family:
            for pairs in answers.pairs(method, baseline):
                for metric in answers.metrics:
                    rows.append({"question": question, "metric": metric, "setting": pairs.setting, "method": method,
                                 "baseline": baseline} | _compare_pairs(pairs, answers.tasks, metric, margin))
    if not rows:
        return pd.DataFrame(columns=COLUMNS)
    table = pd.DataFrame(rows)
    family = table.groupby(["question", "metric"], sort=False)
    for column in ("p", "p_equivalence", "p_spread"):
        table[f"{column}_holm"] = family[column].transform(lambda values: stats.holm(values.to_numpy()))
    size = family["method"].transform("size")
    table["smallest_p"] = [min(stats.smallest_p(n) * m, 1.0) for n, m in zip(table["pairs"], size)]
    table["detectable"] = [stats.smallest_detectable(sd, n, stats.ALPHA / m) if n > 1 else np.nan
                           for sd, n, m in zip(table["difference_sd"], table["pairs"], size)]
    return table.assign(outcome=[outcome(row, margin) for row in table.to_dict("records")])[COLUMNS]


def outcome(row: dict[str, Any], margin: float) -> str:
    """What a comparison shows, by rule: "better", "worse", "equivalent", "undecided" or "not tested".

    better, worse: Holm's p under 0.05. equivalent: not those, Holm's p of TOST under 0.05, and the 90 % interval over
    seeds and examples within the margin. undecided: neither was shown, which is no equality.
    """
    if not row["pairs"] > 1:
        return "not tested"
    if row["p_holm"] < stats.ALPHA:
        return "better" if row["difference"] > 0 else "worse"
    inside = -margin < row["low_90"] and row["high_90"] < margin
    return "equivalent" if row["p_equivalence_holm"] < stats.ALPHA and inside else "undecided"


def interactions(answers: Answers) -> pd.DataFrame:
    """Does a method's difference from black box depend on the task? One row per white-box method and setting.

    Returns:
        setting, method, baseline, planned, pairs, a column of mean differences per task, p (`stats.interaction_p`),
        p_holm over all rows, smallest_p.
    """
    rows = []
    tasks = answers.metrics[2:]
    for method, baseline in QUESTIONS["white_box"]:
        for pairs in answers.pairs(method, baseline):
            by_task = np.stack([(pairs.method - pairs.baseline) @ stats.example_weights(answers.tasks, task)
                                for task in tasks], axis=1)
            means = by_task.mean(axis=0) if len(by_task) else np.full(len(tasks), np.nan)
            rows.append({"setting": pairs.setting, "method": method, "baseline": baseline, "planned": pairs.planned,
                         "pairs": len(pairs.seeds), **dict(zip(tasks, means)), "p": stats.interaction_p(by_task)})
    if not rows:
        return pd.DataFrame(columns=["setting", "method", "baseline", "planned", "pairs", *tasks, "p", "p_holm"])
    table = pd.DataFrame(rows)
    return table.assign(p_holm=stats.holm(table["p"].to_numpy()),
                        smallest_p=[min(stats.smallest_p(n) * len(table), 1.0) for n in table["pairs"]])


def differences(answers: Answers, question: str = "white_box") -> pd.DataFrame:
    """The differences within each seed, for a figure.

    Returns:
        metric, setting, distill_type (the method), baseline, seed, difference (fraction).
    """
    rows = [{"metric": metric, "setting": pairs.setting, "distill_type": method, "baseline": baseline, "seed": seed,
             "difference": value}
            for method, baseline in QUESTIONS[question] for pairs in answers.pairs(method, baseline)
            for metric in answers.metrics
            for seed, value in zip(pairs.seeds, (pairs.method - pairs.baseline)
                                   @ stats.example_weights(answers.tasks, metric))]
    return pd.DataFrame(rows, columns=["metric", "setting", "distill_type", "baseline", "seed", "difference"])


def display(table: pd.DataFrame) -> pd.DataFrame:
    """`compare`'s rows for the eye: differences in points, n of planned pairs, a dash where there are too few."""
    def points(row: dict[str, Any], form: str, *keys: str) -> str:
        values = [100 * row[key] for key in keys]
        return "–" if np.isnan(values).any() else form.format(*values)

    def p(value: float) -> str:
        return "–" if np.isnan(value) else f"{value:.3f}"

    rows = [{"metric": row["metric"], **({"setting": row["setting"]} if table["setting"].any() else {}),
             "method": row["method"], "minus": row["baseline"], "pairs": f"{row['pairs']} of {row['planned']}",
             "points": points(row, "{:+.1f}", "difference"),
             "95 % interval": points(row, "[{:+.1f}, {:+.1f}]", "low", "high"), "p": p(row["p"]),
             "Holm": p(row["p_holm"]), "g": "–" if np.isnan(row["g"]) else f"{row['g']:.2f}",
             "equal (TOST, Holm)": p(row["p_equivalence_holm"]),
             "finds": points(row, "{:.1f}", "detectable").replace("inf", "nothing"), "outcome": row["outcome"]}
            for _, of_metric in table.groupby("metric", sort=False) for row in of_metric.to_dict("records")]
    return pd.DataFrame(rows).set_index(["metric", "method"]) if rows else pd.DataFrame()


def _compare_pairs(pairs: Pairs, tasks: np.ndarray, metric: str, margin: float) -> dict[str, Any]:
    weights = stats.example_weights(tasks, metric)
    mine, theirs = pairs.method @ weights, pairs.baseline @ weights
    values = mine - theirs
    n = len(values)
    intervals = stats.hierarchical_interval(pairs.method - pairs.baseline, tasks, weights, levels=(0.95, 0.9))
    spread = stats.spread_comparison(mine, theirs)
    return {"planned": pairs.planned, "pairs": n, "difference": values.mean() if n else np.nan,
            "difference_sd": values.std(ddof=1) if n > 1 else np.nan,
            **dict(zip(("low", "high", "low_90", "high_90"), intervals.ravel())),
            "p": stats.sign_flip_p(values), "p_equivalence": stats.equivalence_p(mine, theirs, margin),
            "g": stats.hedges_g(mine, theirs), "sd": spread["sd"], "baseline_sd": spread["baseline_sd"],
            "sd_ratio": spread["ratio"], "sd_ratio_low": spread["low"], "sd_ratio_high": spread["high"],
            "p_spread": spread["p"]}


def _items(setting: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in setting.split(", ")) if setting else {}
