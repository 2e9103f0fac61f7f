"""Which trials are compared with which, and what the statistics say of each pair: tidy tables from
results.

A question has a family of comparisons, fixed before anything is seen. Holm's correction is within
one question and one metric, over its comparisons and all swept settings. Accuracies and differences
are fractions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kd_utils.analysis import stats
from kd_utils.analysis.bootstrap import (
    example_weights,
    hierarchical_errors,
    hierarchical_interval,
    hierarchical_p,
    interaction_p_rows,
    unseen_discordance,
)
from kd_utils.analysis.tables import planned_trials, setting_items, trial_values
from kd_utils.data.tasks import task_order

BASELINE = "black_box"

WHITE_BOX = ("hidden_state", "attention", "combined")

#: Question -> its family: method and what it is compared with.
QUESTIONS = {
    "teacher": (("black_box", "task_only"),),
    "white_box": tuple((method, BASELINE) for method in WHITE_BOX),
    "which": (("attention", "hidden_state"),),
    "combining": (("combined", "hidden_state"), ("combined", "attention")),
}

#: The metric that verdicts over all tasks rest on: how many rows of a task were drawn should not
#: weigh the tasks.
PRIMARY = "macro"

COLUMNS = [
    "question",
    "metric",
    "setting",
    "method",
    "baseline",
    "planned",
    "pairs",
    "family",
    "difference",
    "difference_sd",
    "low",
    "high",
    "low_90",
    "high_90",
    "p",
    "p_holm",
    "p_rows",
    "p_rows_holm",
    "p_equivalence",
    "p_equivalence_holm",
    "g",
    "sd",
    "baseline_sd",
    "sd_ratio",
    "sd_ratio_low",
    "sd_ratio_high",
    "p_spread",
    "p_spread_holm",
    "smallest_p",
    "detectable",
    "equal",
    "outcome",
]


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

    @property
    def difference(self) -> np.ndarray:
        """(S, N) of -1, 0, 1."""
        return self.method - self.baseline


class Answers:
    """Whether each done trial answered each validation example rightly.

    Args:
        results: `records.collect`'s table.
        predictions: `records.predictions`'s table.

    Attributes:
        tasks: (N,) task of each example.

    Raises:
        ValueError: the trials did not answer the same examples, so they cannot be compared by
            example.
    """

    def __init__(self, results: pd.DataFrame, predictions: pd.DataFrame) -> None:
        self.trials = planned_trials(results)
        wide = predictions.pivot(index="example_id", columns="trial", values="correct")
        if wide.isna().any(axis=None):
            trial = wide.isna().sum().idxmax()
            raise ValueError(
                f"trials did not answer the same examples: {trial} lacks "
                f"{wide[trial].isna().sum()} of "
                f"{len(wide)}; run the sweep again, which redoes trials of other data"
            )
        self.correct = {trial: wide[trial].to_numpy(dtype=float) for trial in wide}
        task_of = predictions.drop_duplicates("example_id").set_index("example_id")["task"]
        self.tasks = task_of.loc[wide.index].to_numpy()

    @property
    def metrics(self) -> list[str]:
        """ "macro", "micro" and the tasks, in the order in which the project lists them."""
        return ["macro", "micro", *task_order(self.tasks)]

    def pairs(self, method: str, baseline: str) -> Iterator[Pairs]:
        """Method and baseline wherever their settings agree; a key that only one of them uses does
        not part them.
        """
        for setting, both in matches(self.trials, method, baseline):
            done = both[both["done"] & both["done_baseline"]]
            stack = [
                np.array([self.correct[trial] for trial in done[column]]).reshape(
                    len(done), len(self.tasks)
                )
                for column in ("trial", "trial_baseline")
            ]
            yield Pairs(setting, len(both), done["seed"].tolist(), *stack)


def matches(trials: pd.DataFrame, method: str, baseline: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each setting in which two methods meet, with their planned trials side by side, by seed
    (`trial_baseline`).
    """
    of = {name: trials[trials["distill_type"] == name] for name in (method, baseline)}
    order = list(
        dict.fromkeys(
            key
            for setting in sorted(trials["setting"].unique(), key=len, reverse=True)
            for key in setting_items(setting)
        )
    )
    for mine, of_mine in of[method].groupby("setting", sort=False):
        for theirs, of_theirs in of[baseline].groupby("setting", sort=False):
            a, b = setting_items(mine), setting_items(theirs)
            if all(a[key] == b[key] for key in a.keys() & b.keys()):
                # Keys in the grid's order, whichever of the two has them: settings are told apart
                # by their text.
                both = {key: (a | b)[key] for key in order if key in a | b}
                setting = ", ".join(f"{key}={value}" for key, value in both.items())
                yield setting, of_mine.merge(of_theirs, on="seed", suffixes=("", "_baseline"))


def reach(trials: pd.DataFrame) -> pd.DataFrame:
    """What a plan could show at best: of every question the family's size, its pairs and the
    smallest corrected p.

    Args:
        trials: `tables.planned_trials`'s columns distill_type, setting, seed.

    Returns:
        question, comparisons, pairs (the fewest of the family), smallest_p (after Holm).
    """
    rows = []
    for question, family in QUESTIONS.items():
        counts = [len(both) for pair in family for _, both in matches(trials, *pair)]
        if counts:
            rows.append(
                {
                    "question": question,
                    "comparisons": len(counts),
                    "pairs": min(counts),
                    "smallest_p": min(len(counts) * stats.smallest_p(min(counts)), 1.0),
                }
            )
    return pd.DataFrame(rows, columns=["question", "comparisons", "pairs", "smallest_p"])


def compare(answers: Answers, margin: float = 0.01) -> pd.DataFrame:
    """Every comparison of every question, on every metric.

    Args:
        answers: of one run.
        margin: what counts as equal in `p_equivalence`, a fraction (0.01: one point).

    Returns:
        question, metric, setting, method, baseline; planned and pairs (seeds); family (comparisons
        in it); difference (mean over pairs), its sd, low, high (95 %, hierarchical bootstrap),
        low_90, high_90; p (exact sign flips over seeds, on these examples), p_rows (over seeds and
        examples, by the bootstrap's error); p_equivalence (TOST); g (Hedges); sd, baseline_sd,
        sd_ratio, sd_ratio_low, sd_ratio_high, p_spread (Brown-Forsythe); of each p its Holm
        correction, X_holm; smallest_p (that the family's size and the pairs allow, after Holm);
        detectable (the difference that is found with power 0.8); equal (bool) and outcome, by
        `judge`. NaN where pairs are too few.
    """
    rows = []
    for question, family in QUESTIONS.items():
        found = [
            (method, baseline, pairs)
            for method, baseline in family
            for pairs in answers.pairs(method, baseline)
        ]
        for method, baseline, pairs in found:
            named = {
                "question": question,
                "setting": pairs.setting,
                "method": method,
                "baseline": baseline,
                "family": len(found),
            }
            rows += [named | row for row in _compare_pairs(pairs, answers, margin, len(found))]
    table = pd.DataFrame(rows, columns=COLUMNS)
    family = table.groupby(["question", "metric"], sort=False)
    for column in ("p", "p_rows", "p_equivalence", "p_spread"):
        table[f"{column}_holm"] = family[column].transform(
            lambda values: stats.holm(values.to_numpy())
        )
    judged = [judge(row, margin) for row in table.to_dict("records")]
    return table.assign(
        equal=[equal for equal, _ in judged], outcome=[outcome for _, outcome in judged]
    )


def judge(row: dict[str, Any], margin: float) -> tuple[bool, str]:
    """What a comparison shows, by rule: whether the two are equal within the margin, and the
    outcome in a word.

    equal: Holm's p of TOST under 0.05, and the 90 % interval over seeds and examples within the
    margin.
    better, worse: Holm's p under 0.05, both of the sign flips and over seeds and examples.
    better (worse) on these rows: only of the sign flips, so other examples might show otherwise.
    equivalent: equal, and none of those. undecided: nothing was shown, which is no equality. not
    tested: fewer than two pairs.
    """
    if not row["pairs"] > 1:
        return False, "not tested"
    inside = -margin < row["low_90"] and row["high_90"] < margin
    equal = bool(row["p_equivalence_holm"] < stats.ALPHA and inside)
    if row["p_holm"] < stats.ALPHA:
        word = "better" if row["difference"] > 0 else "worse"
        return equal, word if row["p_rows_holm"] < stats.ALPHA else f"{word} on these rows"
    return equal, "equivalent" if equal else "undecided"


def interactions(answers: Answers) -> pd.DataFrame:
    """Does a method's difference from black box depend on the task? One row per white-box method
    and setting.

    Returns:
        setting, method, baseline, planned, pairs, a column of mean differences per task, p
            (`stats.interaction_p`: over
        seeds, on these examples), p_rows (over seeds and examples), their Holm corrections over all
        rows, smallest_p.
    """
    rows = []
    tasks = answers.metrics[2:]
    weights = np.stack([example_weights(answers.tasks, task) for task in tasks], axis=1)
    for method, baseline in QUESTIONS["white_box"]:
        for pairs in answers.pairs(method, baseline):
            by_task = pairs.difference @ weights
            means = by_task.mean(axis=0) if len(by_task) else np.full(len(tasks), np.nan)
            errors = hierarchical_errors(pairs.difference, answers.tasks, weights)
            rows.append(
                {
                    "setting": pairs.setting,
                    "method": method,
                    "baseline": baseline,
                    "planned": pairs.planned,
                    "pairs": len(pairs.seeds),
                    **dict(zip(tasks, means)),
                    "p": stats.interaction_p(by_task),
                    "p_rows": interaction_p_rows(by_task, errors),
                }
            )
    table = pd.DataFrame(
        rows, columns=["setting", "method", "baseline", "planned", "pairs", *tasks, "p", "p_rows"]
    )
    return table.assign(
        p_holm=stats.holm(table["p"]),
        p_rows_holm=stats.holm(table["p_rows"]),
        smallest_p=[min(stats.smallest_p(n) * len(table), 1.0) for n in table["pairs"]],
    )


def compare_metric(results: pd.DataFrame, metric: str, question: str = "white_box") -> pd.DataFrame:
    """A question's family on any metric of the results (a loss, a calibration error): over seeds
    alone.

    Returns:
        metric, setting, method, baseline, pairs, difference (mean), low, high (95 % t interval over
        seeds), p (exact sign flips), p_holm; in the metric's unit.
    """
    trials = planned_trials(results)
    value = dict(zip(trials["trial"], trial_values(results, metric)["value"]))
    rows = []
    for method, baseline in QUESTIONS[question]:
        for setting, both in matches(trials, method, baseline):
            each = (
                (both["trial"].map(value) - both["trial_baseline"].map(value)).dropna().to_numpy()
            )
            found = stats.interval(each)
            rows.append(
                {
                    "metric": metric,
                    "setting": setting,
                    "method": method,
                    "baseline": baseline,
                    "pairs": found["n"],
                    "difference": found["mean"],
                    "low": found["low"],
                    "high": found["high"],
                    "p": stats.sign_flip_p(each),
                }
            )
    table = pd.DataFrame(
        rows,
        columns=[
            "metric",
            "setting",
            "method",
            "baseline",
            "pairs",
            "difference",
            "low",
            "high",
            "p",
        ],
    )
    return table.assign(p_holm=stats.holm(table["p"]))


def differences(answers: Answers, question: str = "white_box") -> pd.DataFrame:
    """The differences within each seed, for a figure.

    Returns:
        metric, setting, distill_type (the method), baseline, seed, difference (fraction).
    """
    rows = [
        {
            "metric": metric,
            "setting": pairs.setting,
            "distill_type": method,
            "baseline": baseline,
            "seed": seed,
            "difference": value,
        }
        for method, baseline in QUESTIONS[question]
        for pairs in answers.pairs(method, baseline)
        for metric in answers.metrics
        for seed, value in zip(
            pairs.seeds, pairs.difference @ example_weights(answers.tasks, metric)
        )
    ]
    return pd.DataFrame(
        rows, columns=["metric", "setting", "distill_type", "baseline", "seed", "difference"]
    )


def display(table: pd.DataFrame) -> pd.DataFrame:
    """`compare`'s rows for the eye: differences in points, n of planned pairs, a dash where there
    are too few.
    """

    def points(row: dict[str, Any], form: str, *keys: str) -> str:
        values = [100 * row[key] for key in keys]
        return "–" if np.isnan(values).any() else form.format(*values)

    def p(value: float) -> str:
        return "–" if np.isnan(value) else f"{value:.3f}"

    rows = [
        {
            "metric": row["metric"],
            **({"setting": row["setting"]} if table["setting"].any() else {}),
            "method": row["method"],
            "minus": row["baseline"],
            "pairs": f"{row['pairs']} of {row['planned']}",
            "points": points(row, "{:+.1f}", "difference"),
            "95 % interval": points(row, "[{:+.1f}, {:+.1f}]", "low", "high"),
            "p": p(row["p"]),
            "Holm": p(row["p_holm"]),
            "Holm, over rows too": p(row["p_rows_holm"]),
            "TOST, Holm": p(row["p_equivalence_holm"]),
            "g": "–" if np.isnan(row["g"]) else f"{row['g']:.2f}",
            "detectable": points(row, "{:.1f}", "detectable").replace("inf", "none"),
            "outcome": row["outcome"],
        }
        for _, of_metric in table.groupby("metric", sort=False)
        for row in of_metric.to_dict("records")
    ]
    return pd.DataFrame(rows).set_index(["metric", "method"]) if rows else pd.DataFrame()


def _compare_pairs(
    pairs: Pairs, answers: Answers, margin: float, family: int
) -> Iterator[dict[str, Any]]:
    weights = np.stack(
        [example_weights(answers.tasks, metric) for metric in answers.metrics], axis=1
    )
    errors = hierarchical_errors(pairs.difference, answers.tasks, weights)
    n = len(pairs.seeds)
    for metric, weight, error in zip(answers.metrics, weights.T, errors):
        mine, theirs = pairs.method @ weight, pairs.baseline @ weight
        values = np.round(mine - theirs, 12)
        centre = float(values.mean()) if n else np.nan
        bounds = {
            level: hierarchical_interval(
                centre,
                error,
                n,
                level,
                unseen_discordance(pairs.difference, answers.tasks, weight, level),
            )
            for level in (0.95, 0.9)
        }
        spread = stats.spread_comparison(mine, theirs)
        sd = float(values.std(ddof=1)) if n > 1 else np.nan
        yield {
            "metric": metric,
            "planned": pairs.planned,
            "pairs": n,
            "difference": centre,
            "difference_sd": sd,
            "low": bounds[0.95][0],
            "high": bounds[0.95][1],
            "low_90": bounds[0.9][0],
            "high_90": bounds[0.9][1],
            "p": stats.sign_flip_p(values),
            "p_rows": hierarchical_p(centre, error, n),
            "p_equivalence": stats.equivalence_p(mine, theirs, margin),
            "g": stats.hedges_g(mine, theirs),
            "sd": spread["sd"],
            "baseline_sd": spread["baseline_sd"],
            "sd_ratio": spread["ratio"],
            "sd_ratio_low": spread["low"],
            "sd_ratio_high": spread["high"],
            "p_spread": spread["p"],
            "smallest_p": min(stats.smallest_p(n) * family, 1.0),
            "detectable": _detectable(sd, error, n, family),
        }


def _detectable(sd: float, error: float, n: int, family: int) -> float:
    """The difference that both tests find with power 0.8 at Holm's first step: the larger of what
    each needs.
    """
    if n < 2:
        return np.nan
    from scipy.stats import norm, t

    over_rows = error * (t.ppf(1 - stats.ALPHA / family / 2, n - 1) + norm.ppf(stats.POWER))
    return max(stats.smallest_detectable(sd, n, stats.ALPHA / family), float(over_rows))
