"""Figures of the results of all trials: every trial a point, the mean with its interval, and the
black box as a dashed rule.

A method that does not use a swept key has one set of trials for all its values (setting ""). It is
drawn beside every setting that it goes with, so that each row of panels can be read alone.
"""

from collections.abc import Mapping

import altair as alt
import pandas as pd

from kd_utils.analysis import stats, tables
from kd_utils.analysis.questions import BASELINE
from kd_utils.figures import panels, plots

SETTLED = ("better", "worse", "equivalent")

UNIT = alt.Scale(domain=[0, 1], nice=False, zero=False)

SLOT = alt.XOffset("slot:Q", scale=UNIT)

ACCURACY_AXIS = alt.Y(
    "percent:Q",
    title="validation accuracy (%)",
    scale=alt.Scale(zero=False, nice=True, padding=6),
)


def accuracy_by_task(
    table: pd.DataFrame, teacher: Mapping[str, float] | None = None, point: str = "seed"
) -> alt.Chart:
    """Accuracy by task and method: every seed a point, the mean a tick, its 95 % t interval a bar.

    Seeds are in the same order within each method, so a pair can be followed. A method with one
    trial has no bar.

    Args:
        table: of `tables.per_task`.
        teacher: metric -> fraction, as in a trial's record; "validation_accuracy/TASK" is the
            dotted rule.
        point: what the table has in place of seeds, such as worlds.
    """
    data = tables.beside_each_setting(_with_interval(table))
    means = data[data["distill_type"] == BASELINE].groupby(["setting", "task"])["mean"].first()
    data = data.join(means.rename("baseline"), on=["setting", "task"])
    top = {key.removeprefix(f"{tables.ACCURACY}/"): 100 * v for key, v in (teacher or {}).items()}
    data["teacher"] = data["task"].map(top).astype(float)

    methods = tables.method_order(data["distill_type"])
    scale = alt.Scale(domain=methods, paddingInner=0.25, paddingOuter=0.15)
    base = alt.Chart().encode(
        x=alt.X("distill_type:N", title=None, axis=alt.Axis(labelAngle=-35), scale=scale),
        color=plots.method_colour(methods),
    )
    layers = [base.mark_bar(size=32, opacity=0.22).encode(y="mean(low):Q", y2="mean(high):Q")]
    legend = [f"tick: mean; bar: its 95 % t interval over {point}s"]
    for column, dash, width, meaning in (
        ("baseline", [4, 3], 1, f"dashed: mean of {BASELINE}"),
        ("teacher", [1.5, 2.5], 1.5, "dotted: the teacher"),
    ):
        if data[column].notna().any():
            layers.append(
                alt.Chart()
                .transform_filter(f"isValid(datum.{column})")
                .mark_rule(strokeDash=dash, color=plots.COLOURS[BASELINE], strokeWidth=width)
                .encode(y=f"mean({column}):Q")
            )
            legend.append(meaning)
    layers += [
        base.mark_tick(size=32, thickness=2.5).encode(y="mean(mean):Q"),
        base.mark_circle(size=28, opacity=0.9).encode(y=ACCURACY_AXIS, xOffset=SLOT),
    ]
    chart = alt.layer(*layers, width=46 * len(methods) + 10, height=panels.panel_height(data, 240))
    return plots.finish(
        panels.facet(chart, data, "task").resolve_scale(y="independent"),
        f"Accuracy by task and method, one point per {point}",
        f"{'; '.join(legend)}. Scales differ and do not start at 0.",
    )


def differences_from_baseline(
    differences: pd.DataFrame, comparisons: pd.DataFrame, margin: float = 0.01
) -> alt.Chart:
    """Method minus black box within each seed: every pair a point, the mean and its interval; the
    rule is 0.

    Args:
        differences: of `comparisons.differences`.
        comparisons: of `comparisons.compare`, whose question "white_box" gives means, intervals
            over seeds and examples, and outcomes; one that decides is written above the mean.
        margin: differences within +- margin count as equal, a fraction: the light band.
    """
    if differences.empty:
        return plots.sentence("No pair of trials: no differences to draw")
    keys, numbers = ["metric", *tables.KEYS], ["mean", "low", "high"]
    compared = comparisons[comparisons["question"] == "white_box"].rename(
        columns={"method": "distill_type", "difference": "mean"}
    )
    compared[numbers] *= 100
    data = panels.seed_slots(differences, keys).drop(columns="baseline")
    data = data.merge(compared[[*keys, *numbers, "outcome"]], on=keys, how="left")
    # The outcome is written once, above the mean.
    is_written = data["outcome"].isin(SETTLED) & ~data.duplicated(keys)
    data = data.assign(
        points=100 * data.pop("difference"),
        metric=data["metric"].map(panels.panel_name),
        word=data.pop("outcome").where(is_written),
        zero=0,
        margin_low=-100 * margin,
        margin_high=100 * margin,
    )
    data = tables.beside_each_setting(data)

    methods = tables.method_order(differences["distill_type"])
    scale = alt.Scale(domain=methods, paddingInner=0.45, paddingOuter=0.35)
    base = alt.Chart().encode(
        y=alt.Y("distill_type:N", title=None, scale=scale), color=plots.method_colour(methods)
    )
    chart = alt.layer(
        alt.Chart()
        .mark_rect(color="#7f7f7f", opacity=0.15)
        .encode(x="mean(margin_low):Q", x2="mean(margin_high):Q"),
        base.mark_bar(size=20, opacity=0.22).encode(x="mean(low):Q", x2="mean(high):Q"),
        alt.Chart()
        .mark_rule(strokeDash=[4, 3], color=plots.COLOURS[BASELINE])
        .encode(x="mean(zero):Q"),
        base.mark_tick(size=20, thickness=2.5).encode(x="mean(mean):Q"),
        base.mark_circle(size=26, opacity=0.9).encode(
            x=alt.X("points:Q", title="difference (points)", scale=alt.Scale(padding=6)),
            yOffset=alt.YOffset("slot:Q", scale=UNIT),
        ),
        base.transform_filter("isValid(datum.word)")
        .mark_text(dy=-15, fontSize=10)
        .encode(x="mean:Q", text="word:N"),
        width=150,
        height=40 * len(methods),
    )
    return plots.finish(
        panels.facet(chart, data, "metric"),
        f"Difference from {BASELINE} within each seed",
        [
            "point: one seed; tick: mean; bar: its 95 % interval over seeds and rows "
            "(hierarchical bootstrap), not corrected for the number of comparisons;",
            f"grey: 0 ± {100 * margin:g} points, which counts as equal; a word: the outcome after "
            "correction",
        ],
    )


def swept(table: pd.DataFrame) -> alt.Chart:
    """Accuracy against the value of the swept key: every seed a point, each method's mean and its
    95 % t interval.

    Methods that do not use the key are at the left, and their mean crosses the panel as a dashed
    rule. With more than one swept key the axis has whole settings.

    Args:
        table: of `tables.per_task`, of a run whose grid swept another key; a panel per task.
    """
    if not table["setting"].any():
        return plots.sentence(
            "The grid swept only methods and seeds: there is nothing else to draw"
        )
    data, x, name = panels.setting_axis(_with_interval(table))
    data["reference"] = data["mean"].where(data["setting"] == "")
    # Methods at the same place on the axis are side by side, each with its seeds about its centre.
    beside = data.groupby("at")["distill_type"].agg(tables.method_order)
    crowd = int(beside.map(len).max())
    data["centre"] = [
        (beside[at].index(method) + 0.5) / len(beside[at])
        for at, method in zip(data["at"], data["distill_type"])
    ]
    data["slot"] = data["centre"] + (data["slot"] - 0.5) * (0.8 / crowd)
    methods, step = tables.method_order(data["distill_type"]), 32 + 12 * (crowd - 1)
    mark = 0.8 * (0.85 * step) / crowd  # 0.85: what the axis' padding leaves of a step

    colour = plots.method_colour(
        methods, alt.Legend(title="method", values=methods, symbolOpacity=1)
    )
    base = alt.Chart().encode(x=x.title(name), color=colour)
    centred = base.encode(xOffset=alt.XOffset("centre:Q", scale=UNIT))
    layers = [
        centred.mark_rule(strokeWidth=mark, opacity=0.22).encode(
            y="mean(low):Q", y2="mean(high):Q"
        ),
        alt.Chart()
        .transform_filter("isValid(datum.reference)")
        .mark_rule(strokeDash=[4, 3])
        .encode(y="mean(reference):Q", color=colour),
        centred.mark_tick(size=mark, thickness=2.5).encode(y="mean(mean):Q"),
        base.mark_circle(size=20, opacity=0.9).encode(y=ACCURACY_AXIS, xOffset=SLOT),
    ]
    if name:  # settings of several keys have no order that a line could follow
        line = centred.transform_filter("datum.setting != ''")
        line = line.mark_line(strokeWidth=1.5, opacity=0.6).encode(y="mean(mean):Q")
        layers.insert(2, line)
    data["task"] = data["task"].map(panels.panel_name)
    task = {"shorthand": "task:N", "title": None, "sort": list(dict.fromkeys(data["task"]))}
    grid = {"column": alt.Column(**task)} if name else {"facet": alt.Facet(**task), "columns": 2}
    chart = alt.layer(*layers, width=step * data["at"].nunique(), height=220)
    chart = chart.facet(data=data, **grid)
    return plots.finish(
        chart.resolve_scale(y="independent"),
        f"Accuracy by {name or 'setting'}",
        "point: one seed; tick: mean; bar: its 95 % t interval over seeds; "
        f"{panels.NOT_USED} and dashed: methods that do not use {name or 'the swept keys'}. "
        "Scales differ and do not start at 0.",
    )


def reliability_diagram(table: pd.DataFrame) -> alt.Chart:
    """Is a method as often right as it is sure? Accuracy against confidence, a row per task and a
    column per method.

    On the dotted diagonal it is; below it, the method is too sure. A point is a bin, and its area
    the number of answers in the bin.

    Args:
        table: of `calibration.reliability_by_method`, with a column `setting` where there are some.
    """
    if table.empty:
        return plots.sentence("No task with choices: only choices have a confidence")
    data = tables.beside_each_setting(table if "setting" in table else table.assign(setting=""))
    tasks = list(dict.fromkeys(data["task"]))
    data = data.sort_values("task", key=lambda column: column.map(tasks.index), kind="stable")
    several = data["setting"].nunique() > 1
    data["row"] = data["task"] + (", " + data["setting"] if several else "")
    data[["confidence", "accuracy"]] *= 100
    is_first = ~data.duplicated(["row", "distill_type"])
    data["error"] = data["error"].map("error {:.3f}".format).where(is_first)
    methods, most = tables.method_order(data["distill_type"]), int(data["n"].max())
    side = min(125, 900 // len(methods))
    axis = {
        "scale": alt.Scale(domain=[0, 100], nice=False),
        "axis": alt.Axis(values=[0, 25, 50, 75, 100]),
    }
    base = alt.Chart().encode(
        x=alt.X("confidence:Q", title="confidence (%)", **axis),
        y=alt.Y("accuracy:Q", title="accuracy (%)", **axis),
        color=plots.method_colour(methods),
    )
    sizes = [*(10**power for power in range(7) if 2 * 10**power <= most), most]
    size = alt.Size(
        "n:Q",
        title="answers",
        scale=alt.Scale(domain=[0, most], range=[6, 220]),
        legend=alt.Legend(values=sizes),
    )
    chart = alt.layer(
        alt.Chart()
        .mark_rule(strokeDash=[1.5, 2.5], color="#7f7f7f")
        .encode(x=alt.datum(0), y=alt.datum(0), x2=alt.datum(100), y2=alt.datum(100)),
        base.mark_line(strokeWidth=1, opacity=0.5),
        base.mark_circle(opacity=0.75).encode(size=size),
        alt.Chart()
        .transform_filter("isValid(datum.error)")
        .mark_text(align="left", fontSize=10)
        .encode(x=alt.datum(4), y=alt.datum(92), text="error:N"),
        width=side,
        height=side,
    )
    return plots.finish(
        panels.facet(chart, data, "distill_type", methods, row="row"),
        "Accuracy by confidence in the choice made",
        "all seeds' answers together, in bins of equal width; under the diagonal: overconfident; "
        "error: expected calibration error, 0 to 1",
    )


def _with_interval(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that have an accuracy, in per cent, with the seed's slot and the mean, low and high
    (95 % t interval over seeds) of their trials.
    """
    done = table.dropna(subset=["accuracy"]).rename(columns={"accuracy": "percent"})
    done["percent"] *= 100
    keys = [*tables.KEYS, "task"]
    parts = [
        trials.assign(**stats.interval(trials["percent"]))
        for _, trials in done.groupby(keys, sort=False)
    ]
    return panels.seed_slots(pd.concat(parts, ignore_index=True).drop(columns=["n", "sd"]), keys)
