"""Tables and sentences for a reader, from tidy tables of `tables` and `comparisons` or rows of one:
accuracies in per cent, differences in points, a dash for no value.
"""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis import stats, tables
from kd_utils.analysis.comparisons import interaction_tasks
from kd_utils.analysis.questions import primary

Row = dict[str, Any]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """`tables.summary_table`'s rows: accuracies in per cent, losses in nats per token."""
    rows = []
    for row in table.to_dict("records"):
        scale, form = (100, "{:.1f}") if tables.is_accuracy(row["metric"]) else (1, "{:.3f}")
        rows.append(
            {
                "metric": row["metric"],
                **({"setting": row["setting"]} if table["setting"].any() else {}),
                "method": row["distill_type"],
                "n": f"{row['n']} of {row['planned']}",
                "mean": _text(form, scale * row["mean"]),
                "sd": _text(form, scale * row["sd"]),
                "95 % interval": _text(
                    f"[{form}, {form}]", scale * row["low"], scale * row["high"]
                ),
            }
        )
    return _indexed(rows, "metric", "setting", "method")


def means(results: pd.DataFrame, metrics: Mapping[str, str]) -> pd.DataFrame:
    """Mean +- sd over seeds: a row per method, a column per name of `metrics` (column name ->
    metric), where a metric that the results do not have is left out.
    """
    columns: dict[str, pd.Series] = {}
    for name, metric in metrics.items():
        if metric in results:
            table = summary(tables.summary_table(results, metric)).droplevel("metric")
            columns.setdefault("n", table["n"])
            columns[name] = table["mean"] + (" ± " + table["sd"]).replace(" ± –", "")
    return pd.DataFrame(columns)


def glance(results: pd.DataFrame, teacher: Mapping[str, float]) -> pd.DataFrame:
    """Accuracies in per cent, every method's mean +- sd over seeds and the teacher's: n, mean of
    tasks (and of the informed ones, where they are not all), all examples, a column per task.

    Args:
        results: as in `tables.planned_trials`.
        teacher: metric -> fraction, as in a trial's record.
    """
    metrics = {"mean of tasks": f"{tables.ACCURACY}/macro"}
    metrics["mean of informed tasks"] = f"{tables.ACCURACY}/{tables.INFORMED}"
    metrics["all examples"] = tables.ACCURACY
    metrics |= {task: f"{tables.ACCURACY}/{task}" for task in tables.tasks_of(results)}
    shown = means(results, metrics)
    of_teacher = {
        name: _text("{:.1f}", 100 * teacher.get(metric, np.nan))
        for name, metric in metrics.items()
        if name in shown
    }
    label = "teacher" if shown.index.nlevels == 1 else ("", "teacher")
    shown.loc[label, :] = pd.Series({"n": "1"} | of_teacher)
    return shown


def retention(table: pd.DataFrame) -> pd.DataFrame:
    """`retention.retention`'s rows: per cent with interval, a row per method and a column per
    task, whose name says the teacher's accuracy and that of chance.
    """
    shown, heads = [], {}
    for row in table.to_dict("records"):
        chance, top = 100 * row["chance"], 100 * row["teacher"]
        unknown = "not known" if np.isnan([chance, top]).any() else "–"
        kept = _text("{:.0f}", 100 * row["retention"], unknown=unknown)
        interval = _text(" [{:.0f}, {:.0f}]", 100 * row["low"], 100 * row["high"], unknown="")
        shown.append(kept + interval)
        of_teacher = _text("teacher {:.1f}", top, unknown="teacher not known")
        of_chance = _text("chance {:.0f}", chance, unknown="chance not known")
        heads[row["task"]] = f"{row['task']} ({of_teacher}, {of_chance})"
    wide = table.assign(shown=shown).pivot(index=tables.KEYS[::-1], columns="task", values="shown")
    order = list(dict.fromkeys(zip(table["distill_type"], table["setting"], strict=True)))
    wide = wide.loc[order, list(heads)].rename(columns=heads)
    return wide if table["setting"].any() else wide.droplevel("setting")


def comparisons(table: pd.DataFrame) -> pd.DataFrame:
    """`comparisons.compare`'s rows: differences in points, pairs of planned pairs."""
    rows = [
        {
            "metric": row["metric"],
            **({"setting": row["setting"]} if table["setting"].any() else {}),
            "method": row["method"],
            **({"question": row["question"]} if table["question"].nunique() > 1 else {}),
            "minus": row["baseline"],
            "pairs": f"{row['pairs']} of {row['planned']}",
            "points": _text("{:+.1f}", 100 * row["difference"]),
            "95 % interval": _text("[{:+.1f}, {:+.1f}]", 100 * row["low"], 100 * row["high"]),
            "p": _text("{:.3f}", row["p"]),
            "Holm": _text("{:.3f}", row["p_holm"]),
            "Holm, over rows too": _text("{:.3f}", row["p_rows_holm"]),
            "TOST, Holm": _text("{:.3f}", row["p_equivalence_holm"]),
            "g": _text("{:.2f}", row["g"]),
            "detectable": _text("{:.1f}", 100 * row["detectable_seeds"]).replace("inf", "none"),
            "over rows too": _text("{:.1f}", 100 * row["detectable_rows"]),
            "outcome": row["outcome"],
        }
        for _, rows in table.groupby("metric", sort=False)
        for row in rows.to_dict("records")
    ]
    return _indexed(rows, "metric", "method")


def interactions(table: pd.DataFrame) -> pd.DataFrame:
    """`comparisons.interactions`'s rows: differences per task in points, and the tests' p."""
    points = 100 * table[interaction_tasks(table)]
    return table.assign(**points).round(3)


def spreads(table: pd.DataFrame) -> pd.DataFrame:
    """Standard deviations over seeds (points) of the methods and of black box, and their ratio's
    test, from `comparisons.compare`'s rows.
    """
    is_primary = table["metric"] == primary(table["metric"])
    rows = table[is_primary & (table["question"] == "white_box")]
    columns = "sd baseline_sd sd_ratio sd_ratio_low sd_ratio_high p_spread p_spread_holm".split()
    shown = rows.set_index("method")[columns].astype(float)
    return shown.assign(sd=100 * shown["sd"], baseline_sd=100 * shown["baseline_sd"]).round(3)


def gradient_shares(terms: pd.DataFrame) -> pd.DataFrame:
    """The share (per cent) of each of `tables.loss_terms` in the gradient norm, in each method's
    and setting's last epoch.
    """
    arms = ["distill_type", "setting"]
    last = terms["epoch"] == terms.groupby(arms)["epoch"].transform("max")
    shares = terms[last & (terms["quantity"] == "gradient share")]
    wide = shares.pivot_table("value", arms, "term", sort=False)
    return wide.mul(100).round(3)


def by_task(values: pd.Series) -> pd.DataFrame:
    """Means over trials in per cent: a row per method, a column per task. The values are fractions
    with the index levels distill_type and task.
    """
    if values.empty:
        return pd.DataFrame()
    wide = values.groupby(["distill_type", "task"]).mean().mul(100).round(1).unstack("task")
    return wide.loc[tables.method_order(wide.index)]


def sentence(row: Row, margin: float) -> str:
    """A comparison in words: what was found, on how many pairs, and what could have been found."""
    if row["outcome"] == "not tested":
        return f"{_what(row)}: not tested, {_pairs(row)} are done and a test needs two."
    size = "" if np.isnan(row["g"]) else f", g = {row['g']:.2f}"
    numbers = (
        f"{_what(row)}: {difference(row)}, {_p(row['p'])}, Holm {_p(row['p_holm'])}, "
        f"rows {_p(row['p_rows_holm'])}{size}, {_pairs(row)}"
    )
    within = f"equal within {margin_text(margin)}"
    if row["outcome"] == "equivalent":
        return f"{numbers}: {within} (TOST {_p(row['p_equivalence_holm'])})."
    if row["outcome"] == "undecided":
        return f"{numbers}: neither a difference nor equality is shown; {_could_have(row)}."
    also = f" (and {within})" if row["equal"] else ""
    elsewhere = "; other validation rows might not show it" * row["outcome"].endswith("these rows")
    return f"{numbers}: {row['outcome']}{also}{elsewhere}."


def difference(row: Row) -> str:
    """A comparison's difference with its interval."""
    low, high = _points(row["low"]), _points(row["high"])
    return f"{_points(row['difference'])} points [{low}, {high}]"


def _could_have(row: Row) -> str:
    """For a null result: the difference found with power 0.8, or the pairs that a finding needs."""
    if stats.smallest_p(row["pairs"]) * row["family"] > stats.ALPHA:
        needed = next(n for n in range(2, 99) if stats.smallest_p(n) * row["family"] <= stats.ALPHA)
        return (
            f"no difference, however large, could be significant with {row['pairs']} pairs: "
            f"{needed} are needed"
        )
    if not max(row["detectable_seeds"], row["detectable_rows"]) > 0:
        return "the accuracies are equal in every pair"
    return (
        f"{row['pairs']} pairs detect a difference of {100 * row['detectable_seeds']:.1f} points "
        f"on these rows, {100 * row['detectable_rows']:.1f} over other rows too, with power "
        f"{stats.POWER}"
    )


def interaction_sentence(row: Row) -> str:
    """A row of `comparisons.interactions` in words."""
    tasks = interaction_tasks(row)
    if np.isnan(row["p"]):
        done = f"{_pairs(row)} on {len(tasks)} tasks"
        return f"{_what(row)}: not tested, {done}; a test needs two of each."
    differences = ", ".join(f"{task} {_points(row[task])}" for task in tasks)
    few = "; with so few pairs no interaction could be significant" * (
        row["smallest_p"] > stats.ALPHA
    )
    return (
        f"{_what(row)}: {differences} points; interaction {_p(row['p'])}, "
        f"Holm {_p(row['p_holm'])}, rows {_p(row['p_rows_holm'])}, {_pairs(row)}{few}."
    )


def spread_sentence(row: Row) -> str:
    """The spreads of a comparison in words."""
    if np.isnan(row["p_spread"]):
        few = row["pairs"] < stats.FEWEST
        why = "a test of the spread needs five" if few else "the accuracies do not vary"
        return f"{row['method']}: not tested, {_pairs(row)}; {why}."
    ratio = stats.detectable_ratio(row["pairs"], stats.ALPHA / row["family"])
    return (
        f"{row['method']}: sd {100 * row['sd']:.1f} points, {row['baseline']} "
        f"{100 * row['baseline_sd']:.1f}, "
        f"ratio {row['sd_ratio']:.2f} [{row['sd_ratio_low']:.2f}, {row['sd_ratio_high']:.2f}], "
        f"Brown-Forsythe {_p(row['p_spread'])}, Holm {_p(row['p_spread_holm'])}; {row['pairs']} "
        f"seeds detect a ratio of {ratio:.1f} or 1/{ratio:.1f} with power {stats.POWER} if the "
        f"values are normal."
    )


def task_sentence(row: Row) -> str:
    """A comparison on one task in few words."""
    could = f" ({_could_have(row)})" if row["outcome"] == "undecided" else ""
    return (
        f"{row['metric']} {_points(row['difference'])} "
        f"[{_points(row['low'])}, {_points(row['high'])}], Holm {_p(row['p_holm'])}, "
        f"TOST {_p(row['p_equivalence_holm'])}, {row['outcome']}{could}"
    )


def _what(row: Row) -> str:
    return f"{row['method']} minus {row['baseline']}"


def _pairs(row: Row) -> str:
    return f"{row['pairs']} of {row['planned']} pairs"


def margin_text(margin: float) -> str:
    return f"{100 * margin:g} point{'s' * (margin != 0.01)}"


def wrapped(text: str, indent: str = "") -> list[str]:
    """The text in lines of at most 118 columns; what follows a dash is indented."""
    return textwrap.wrap(
        text,
        118,
        initial_indent=indent,
        subsequent_indent=indent + "  " * text.startswith("- "),
        break_on_hyphens=False,
    )


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _p(value: float) -> str:
    if np.isnan(value):
        return "p –"
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def _text(form: str, *values: float, unknown: str = "–") -> str:
    return unknown if np.isnan(values).any() else form.format(*values)


def _indexed(rows: list[dict[str, Any]], *names: str) -> pd.DataFrame:
    shown = pd.DataFrame(rows)
    return shown.set_index([name for name in names if name in shown]) if rows else shown
