"""What the statistics say about each of the `questions`: tidy tables from results.

Holm's correction is within one question and one metric, over its comparisons and all swept
settings; a joint question needs no correction but that over methods and settings. Accuracies and
differences are fractions.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis import questions, stats, tables
from kd_utils.analysis.pairs import (
    Answers,
    Pairs,
    detectable,
    hierarchical_errors,
    hierarchical_interval,
    hierarchical_p,
    interaction_p_rows,
    matches,
)
from kd_utils.data.tasks import task_order

PAIR_COLUMNS = ["setting", "method", "baseline", "planned", "pairs"]

INTERACTION_COLUMNS = ["p", "p_rows", "p_holm", "p_rows_holm", "smallest_p"]

COLUMNS = """question metric setting method baseline planned pairs family difference difference_sd
    low high low_90 high_90 p p_holm p_rows p_rows_holm p_equivalence p_equivalence_holm g
    sd baseline_sd sd_ratio sd_ratio_low sd_ratio_high p_spread p_spread_holm
    smallest_p detectable detectable_seeds detectable_rows equal outcome""".split()


def compare(answers: Answers, margin: float = 0.01) -> pd.DataFrame:
    """Every comparison of every question, on every metric.

    Args:
        answers: of one run.
        margin: differences within +- margin count as equal, a fraction (0.01: one point).

    Returns:
        `COLUMNS`: planned and pairs count seeds; family is `questions.family_size`; difference is
        the mean over pairs, with low, high (95 %, hierarchical bootstrap), low_90, high_90; p is of
        exact sign flips over seeds, on these examples, p_rows over seeds and examples,
        p_equivalence of TOST, p_spread of Brown-Forsythe, X_holm corrected (gains of a joint
        question by `stats.joint_holm`); g is Hedges'; smallest_p is what pairs and family allow
        after Holm; detectable is the difference found with power 0.8, the larger of
        detectable_seeds and detectable_rows (over seeds and rows); equal (bool) and outcome are
        `judge`'s. NaN where pairs are too few.
    """
    rows = []
    for question, compared in questions.QUESTIONS.items():
        of_question = list(answers.pairs(compared))
        family = questions.family_size(question, [pairs.row for pairs in of_question])
        for pairs in of_question if family else []:
            rows += [
                {"question": question, "family": family} | pairs.row | numbers
                for numbers in _by_metric(pairs, answers, margin, family)
            ]
    return judged(rows, margin)


def judged(rows: Sequence[dict[str, Any]], margin: float) -> pd.DataFrame:
    """The table of `compare`: its rows with corrected p and outcomes; what they lack is NaN."""
    table = _with_holm(
        pd.DataFrame(rows, columns=COLUMNS), "p", "p_rows", "p_equivalence", "p_spread"
    )
    table = _with_joint_gains(table)
    found = [judge(row, margin) for row in table.to_dict("records")]
    return table.assign(equal=[equal for equal, _ in found], outcome=[word for _, word in found])


def _by_metric(
    pairs: Pairs, answers: Answers, margin: float, family: int
) -> Iterator[dict[str, Any]]:
    weights = answers.weights(answers.metrics)
    errors = hierarchical_errors(pairs.difference, answers.tasks, weights)
    n = len(pairs.seeds)
    for metric, weight, error in zip(answers.metrics, weights.T, errors):
        accuracy, baseline_accuracy = pairs.correct @ weight, pairs.baseline_correct @ weight
        values = np.round(accuracy - baseline_accuracy, 12)
        over_seeds = stats.interval(values)
        found = detectable(over_seeds["sd"], error, n, family)
        centre, sd = over_seeds["mean"], over_seeds["sd"]
        (low, high), (low_90, high_90) = (
            hierarchical_interval(centre, error, pairs.difference, answers.tasks, weight, level)
            for level in (0.95, 0.9)
        )
        yield {
            "metric": metric,
            "difference": centre,
            "difference_sd": sd,
            "low": low,
            "high": high,
            "low_90": low_90,
            "high_90": high_90,
            "p": stats.sign_flip_p(values),
            "p_rows": hierarchical_p(centre, error, n),
            "p_equivalence": stats.equivalence_p(accuracy, baseline_accuracy, margin),
            "g": stats.hedges_g(accuracy, baseline_accuracy),
            **stats.spread_comparison(accuracy, baseline_accuracy),
            "smallest_p": stats.smallest_p(n, family),
            "detectable": float(np.maximum(*found)),
            "detectable_seeds": found[0],
            "detectable_rows": found[1],
        }


def _with_holm(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The table with X_holm: each p corrected within its question and metric."""
    families = table.groupby(["question", "metric"], sort=False)
    corrected = {f"{column}_holm": families[column].transform(stats.holm) for column in columns}
    return table.assign(**corrected)


def _with_joint_gains(table: pd.DataFrame) -> pd.DataFrame:
    """The table in which the gains of joint questions have `stats.joint_holm` as p_holm and
    p_rows_holm. To be worse than one baseline, or equal to it, is a finding about any of several,
    which keeps Holm's correction over all of them.
    """
    table = table.copy()
    joint = table[table["question"].isin(questions.JOINT)]
    for _, rows in joint.groupby(["question", "metric"], sort=False):
        gain = rows["difference"] > 0
        for column in ("p", "p_rows"):
            # A loss stands in the way of its method, whatever its p.
            asked = rows["method"] + " " + rows["setting"]
            p = stats.joint_holm(rows[column].where(gain, 1.0), asked)
            table.loc[rows.index[gain], f"{column}_holm"] = p[gain]
    return table


def judge(row: dict[str, Any], margin: float) -> tuple[bool, str]:
    """The rule of the outcomes: does a comparison show the two equal, and its outcome in a word.

    equal: Holm's p of TOST is under 0.05, and the 90 % interval over seeds and examples is within
    the margin.
    better, worse: Holm's p is under 0.05, both of the sign flips and over seeds and examples.
    better (worse) on these rows: only that of the sign flips, so other examples might show
    otherwise.
    equivalent: equal, and none of those. undecided: nothing was shown, which does not mean equal.
    not tested: fewer than two pairs.
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
    """Does a method's difference from black box depend on the task? A row per method and setting.

    Returns:
        setting, method, baseline, planned, pairs; a column of mean differences per task; p
        (`stats.interaction_p`: over seeds, on these examples), p_rows (over seeds and examples),
        their Holm corrections over all rows, smallest_p.
    """
    tasks = task_order(answers.tasks)
    weights, rows = answers.weights(tasks), []
    for pairs in answers.pairs(questions.QUESTIONS["white_box"]):
        by_task = pairs.difference @ weights
        means = by_task.mean(axis=0) if len(by_task) else np.full(len(tasks), np.nan)
        errors = hierarchical_errors(pairs.difference, answers.tasks, weights)
        p = {"p": stats.interaction_p(by_task), "p_rows": interaction_p_rows(by_task, errors)}
        rows.append(pairs.row | dict(zip(tasks, means)) | p)
    table = pd.DataFrame(rows, columns=[*PAIR_COLUMNS, *tasks, "p", "p_rows"])
    return table.assign(
        p_holm=stats.holm(table["p"]),
        p_rows_holm=stats.holm(table["p_rows"]),
        smallest_p=[stats.smallest_p(n, len(table)) for n in table["pairs"]],
    )


def interaction_tasks(columns: Iterable[str]) -> list[str]:
    """The tasks of `interactions`'s table: the columns of differences among its columns."""
    return [name for name in columns if name not in (*PAIR_COLUMNS, *INTERACTION_COLUMNS)]


def compare_metrics(
    results: pd.DataFrame, metrics: Sequence[str], asked: Sequence[str] = ("white_box",)
) -> pd.DataFrame:
    """The families of some questions on any metrics of the results (a loss, a calibration error),
    over seeds alone.

    Returns:
        question, metric, setting, method, baseline, pairs, difference (mean), low, high (95 % t
        interval over seeds), p (exact sign flips), p_holm (within a question and a metric); in the
        metric's unit.
    """
    rows = []
    for metric, question in product(metrics, asked):
        for row, both in matches(
            tables.trial_values(results, metric), questions.QUESTIONS[question]
        ):
            difference = both["value"] - both["value_baseline"]
            found = stats.interval(difference)
            rows.append(
                {
                    "question": question,
                    "metric": metric,
                    **row,
                    **found,
                    "pairs": found["n"],
                    "difference": found["mean"],
                    "p": stats.sign_flip_p(difference),
                }
            )
    columns = "question metric setting method baseline pairs difference low high p".split()
    return _with_holm(pd.DataFrame(rows, columns=columns), "p")


def differences(answers: Answers) -> pd.DataFrame:
    """The white-box methods' differences from black box within each seed, for a figure.

    Returns:
        metric, setting, distill_type (the method), baseline, seed, difference (fraction).
    """
    rows = [
        (metric, pairs.row["setting"], pairs.row["method"], pairs.row["baseline"], seed, value)
        for pairs in answers.pairs(questions.QUESTIONS["white_box"])
        for metric in answers.metrics
        for seed, value in zip(pairs.seeds, pairs.difference @ answers.weights([metric])[:, 0])
    ]
    return pd.DataFrame(
        rows, columns=["metric", "setting", "distill_type", "baseline", "seed", "difference"]
    )
