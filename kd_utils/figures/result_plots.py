"""Figures over trials: every trial a point, the mean with its interval, the black box as the dashed
rule.

A method that does not use a swept key has one set of trials for all its values (setting ""); it is
drawn beside every setting that it goes with, so that each row of panels can be read alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from kd_utils.analysis.comparisons import BASELINE
from kd_utils.analysis.stats import interval
from kd_utils.analysis.tables import ACCURACY, KEYS, beside_each_setting, method_order
from kd_utils.figures.plots import (
    COLOURS,
    NOT_USED,
    facet,
    finish,
    method_colour,
    panel_height,
    panel_name,
    setting_axis,
)

if TYPE_CHECKING:
    import altair as alt

SETTLED = ("better", "worse", "equivalent")


def accuracy_by_task(table: pd.DataFrame, teacher: Mapping[str, float] | None = None) -> alt.Chart:
    """Accuracy by task and method: every seed a point, the mean a tick, its 95 % t interval over
    seeds a bar behind.

    Seeds stand in the same order within each method, so pairs can be followed. A method with one
    trial has no bar.

    Args:
        table: `tables.per_task`: setting, distill_type, seed, task, accuracy (fraction).
        teacher: metric -> fraction, as `evaluation.accuracies` gives it; its
            "validation_accuracy/TASK" is the dotted rule.
    """
    import altair as alt

    data = _with_interval(beside_each_setting(_in_percent(table)))
    means = (
        data[data["distill_type"] == BASELINE]
        .groupby(["setting", "task"])["mean"]
        .first()
        .rename("baseline")
    )
    data = data.join(means, on=["setting", "task"])
    top = {
        panel_name(metric.removeprefix(f"{ACCURACY}/")): 100 * value
        for metric, value in (teacher or {}).items()
    }
    data["teacher"] = data["task"].map(top).astype(float)

    methods = method_order(data["distill_type"])
    x = alt.X(
        "distill_type:N",
        title=None,
        axis=alt.Axis(labelAngle=-35),
        scale=alt.Scale(domain=methods, paddingInner=0.25, paddingOuter=0.15),
    )
    base = alt.Chart().encode(x=x, color=method_colour(methods))
    y = alt.Y(
        "percent:Q",
        title="validation accuracy (%)",
        scale=alt.Scale(zero=False, nice=True, padding=6),
    )
    spread = base.mark_bar(size=32, opacity=0.22).encode(y="mean(low):Q", y2="mean(high):Q")
    mean = base.mark_tick(size=32, thickness=2.5).encode(y="mean(mean):Q")
    points = base.mark_circle(size=28, opacity=0.9).encode(y=y, xOffset=_offset(alt.XOffset))
    rules = [
        alt.Chart()
        .transform_filter(f"isValid(datum.{column})")
        .mark_rule(strokeDash=dash, color=COLOURS[BASELINE], strokeWidth=width)
        .encode(y=f"mean({column}):Q")
        for column, dash, width in (("baseline", [4, 3], 1), ("teacher", [1.5, 2.5], 1.5))
    ]
    panels = alt.layer(spread, *rules, mean, points).properties(
        width=46 * len(methods) + 10, height=panel_height(data, 240)
    )
    legend = ["tick: mean; bar: its 95 % t interval over seeds"]
    legend += [f"dashed: mean of {BASELINE}"] if data["baseline"].notna().any() else []
    legend += ["dotted: the teacher"] if data["teacher"].notna().any() else []
    chart = facet(panels, data, "task", list(dict.fromkeys(data["task"])))
    return finish(
        chart.resolve_scale(y="independent"),
        "Accuracy by task and method, one point per seed",
        f"{'; '.join(legend)}. Scales differ and do not start at 0.",
    )


def differences_from_baseline(
    differences: pd.DataFrame, comparisons: pd.DataFrame, margin: float = 0.01
) -> alt.Chart:
    """Method minus black box within each seed: every pair a point, the mean and its interval; the
    rule is 0.

    Args:
        differences: `comparisons.differences`: metric, setting, distill_type, baseline, seed,
            difference (fraction).
        comparisons: `comparisons.compare`; of its question "white_box": metric, setting, method,
            difference, low, high (fractions, the interval over seeds and examples), outcome. An
            outcome that decides is written above.
        margin: what counts as equal, a fraction: the light band.
    """
    import altair as alt

    of_pair = comparisons[comparisons["question"] == "white_box"].rename(
        columns={"method": "distill_type", "difference": "mean"}
    )[["metric", *KEYS, "mean", "low", "high", "outcome"]]
    data = _slots(differences, ["metric", *KEYS]).merge(of_pair, on=["metric", *KEYS], how="left")
    data["points"] = 100 * data.pop("difference")
    data[["mean", "low", "high"]] *= 100
    # The word stands once, above the mean.
    data["word"] = data["outcome"].where(
        data["outcome"].isin(SETTLED) & ~data.duplicated(["metric", *KEYS])
    )
    data = (
        beside_each_setting(data)
        .drop(columns=["outcome", "baseline"])
        .assign(
            zero=0,
            margin_low=-100 * margin,
            margin_high=100 * margin,
            metric=lambda rows: rows["metric"].map(panel_name),
        )
    )

    methods = method_order(differences["distill_type"])
    base = alt.Chart().encode(
        y=alt.Y(
            "distill_type:N",
            title=None,
            scale=alt.Scale(domain=methods, paddingInner=0.45, paddingOuter=0.35),
        ),
        color=method_colour(methods),
    )
    x = alt.X("points:Q", title=f"minus {BASELINE} (points)", scale=alt.Scale(padding=6))
    band = (
        alt.Chart()
        .mark_rect(color="#7f7f7f", opacity=0.15)
        .encode(x="mean(margin_low):Q", x2="mean(margin_high):Q")
    )
    rule = (
        alt.Chart().mark_rule(strokeDash=[4, 3], color=COLOURS[BASELINE]).encode(x="mean(zero):Q")
    )
    spread = base.mark_bar(size=20, opacity=0.22).encode(x="mean(low):Q", x2="mean(high):Q")
    mean = base.mark_tick(size=20, thickness=2.5).encode(x="mean(mean):Q")
    points = base.mark_circle(size=26, opacity=0.9).encode(x=x, yOffset=_offset(alt.YOffset))
    word = (
        base.transform_filter("isValid(datum.word)")
        .mark_text(dy=-15, fontSize=10)
        .encode(x="mean:Q", text="word:N")
    )
    panels = alt.layer(band, spread, rule, mean, points, word).properties(
        width=150, height=40 * len(methods)
    )
    return finish(
        facet(panels, data, "metric", list(dict.fromkeys(data["metric"]))),
        f"Difference from {BASELINE} within each seed",
        [
            "point: one seed; tick: mean; bar: its 95 % interval over seeds and examples "
            "(hierarchical "
            "bootstrap), not corrected for the number of comparisons;",
            f"grey: 0 ± {100 * margin:g} points, which counts as equal; a word: the outcome after "
            f"correction",
        ],
    )


def swept(table: pd.DataFrame) -> alt.Chart:
    """Accuracy against the value of the swept key: every seed a point, each method's mean and its
    95 % t interval.

    Methods that do not use the key stand at the left, and their mean runs through the panel as a
    dashed rule. With more than one swept key the axis has the settings as they are.

    Args:
        table: `tables.per_task`, of a run whose grid swept another key: setting
            ("gamma_hidden=0.1"; "" for a method that does not use the key), distill_type, seed,
            task, accuracy (fraction; NaN is left out). A panel per task; rows of
            `tables.trial_values` with the task "macro" or "micro" are named for what they are.

    Raises:
        ValueError: no trial has a setting, so nothing was swept.
    """
    import altair as alt

    if not table["setting"].any():
        raise ValueError(
            "nothing was swept beside the method and the seed: draw accuracy_by_task instead"
        )
    data, x, name = setting_axis(_with_interval(_in_percent(table)))
    x.title = name
    data["reference"] = data["mean"].where(data["setting"] == "")
    crowd = int(data.groupby("at")["distill_type"].nunique().max())
    data = _side_by_side(data, 0.8 / crowd)
    methods, step = method_order(data["distill_type"]), 32 + 12 * (crowd - 1)
    mark = 0.8 * (0.85 * step) / crowd  # 0.85: what the axis' padding leaves of a step

    legend = alt.Legend(title="method", values=methods, symbolOpacity=1)
    base = alt.Chart().encode(x=x, color=method_colour(methods, legend))
    y = alt.Y(
        "percent:Q",
        title="validation accuracy (%)",
        scale=alt.Scale(zero=False, nice=True, padding=6),
    )
    middle = _offset(alt.XOffset, "centre")
    rule = (
        alt.Chart()
        .transform_filter("isValid(datum.reference)")
        .mark_rule(strokeDash=[4, 3])
        .encode(y="mean(reference):Q", color=method_colour(methods, legend))
    )
    spread = base.mark_rule(strokeWidth=mark, opacity=0.22).encode(
        y="mean(low):Q", y2="mean(high):Q", xOffset=middle
    )
    line = (
        base.transform_filter("datum.setting != ''")
        .mark_line(strokeWidth=1.5, opacity=0.6)
        .encode(y="mean(mean):Q", xOffset=middle)
    )
    mean = base.mark_tick(size=mark, thickness=2.5).encode(y="mean(mean):Q", xOffset=middle)
    points = base.mark_circle(size=20, opacity=0.9).encode(y=y, xOffset=_offset(alt.XOffset))
    # A line through settings of several keys would say that they have an order.
    layers = [spread, rule, *([line] if name else []), mean, points]
    panels = alt.layer(*layers).properties(width=step * data["at"].nunique(), height=220)
    task = {"shorthand": "task:N", "title": None, "sort": list(dict.fromkeys(data["task"]))}
    chart = (
        panels.facet(data=data, column=alt.Column(**task))
        if name
        else panels.facet(data=data, facet=alt.Facet(**task), columns=2)
    )
    return finish(
        chart.resolve_scale(y="independent"),
        f"Accuracy by {name or 'setting'}",
        "point: one seed; tick: mean; bar: its 95 % t interval over seeds; "
        f"{NOT_USED} and dashed: methods that do not use it. Scales differ and do not start at 0.",
    )


def reliability_diagram(table: pd.DataFrame) -> alt.Chart:
    """Is a method as often right as it is sure? Accuracy against confidence, a row per task and a
    column per method.

    On the dotted diagonal it is; under it, it is too sure. A point is a bin, its area the number of
    answers in it.

    Args:
        table: `calibration.reliability_by_method`: task, distill_type, setting (where there is
            one), n, confidence and accuracy (fractions), error (the expected calibration error of
            all bins).

    Raises:
        ValueError: the table has no rows, as of tasks whose answers are generated.
    """
    import altair as alt

    if table.empty:
        raise ValueError("no bins to draw: only tasks with choices have a confidence")
    data = beside_each_setting(table.assign(setting=table["setting"] if "setting" in table else ""))
    data = data.sort_values(
        "task", key=lambda tasks: tasks.map(list(dict.fromkeys(data["task"])).index), kind="stable"
    )
    several = data["setting"].nunique() > 1
    data["row"] = [
        f"{task}, {setting}" if several else task
        for task, setting in zip(data["task"], data["setting"])
    ]
    data[["confidence", "accuracy"]] *= 100
    data["error"] = (
        data["error"].map("error {:.3f}".format).where(~data.duplicated(["row", "distill_type"]))
    )
    methods, whole = method_order(data["distill_type"]), alt.Scale(domain=[0, 100], nice=False)
    most = int(data["n"].max())
    axis = alt.Axis(values=[0, 25, 50, 75, 100])
    x = alt.X("confidence:Q", title="confidence (%)", scale=whole, axis=axis)
    y = alt.Y("accuracy:Q", title="accuracy (%)", scale=whole, axis=axis)
    base = alt.Chart().encode(x=x, y=y, color=method_colour(methods))
    diagonal = (
        alt.Chart()
        .mark_rule(strokeDash=[1.5, 2.5], color="#7f7f7f")
        .encode(x=alt.datum(0), y=alt.datum(0), x2=alt.datum(100), y2=alt.datum(100))
    )
    line = base.mark_line(strokeWidth=1, opacity=0.5)
    points = base.mark_circle(opacity=0.75).encode(
        size=alt.Size(
            "n:Q",
            title="answers",
            scale=alt.Scale(domain=[0, most], range=[6, 220]),
            legend=alt.Legend(
                values=[*(10**power for power in range(7) if 2 * 10**power <= most), most]
            ),
        )
    )
    error = (
        alt.Chart()
        .transform_filter("isValid(datum.error)")
        .mark_text(align="left", fontSize=10)
        .encode(x=alt.datum(4), y=alt.datum(92), text="error:N")
    )
    panels = alt.layer(diagonal, line, points, error).properties(width=125, height=125)
    return finish(
        facet(panels, data, "distill_type", methods, row="row"),
        "Accuracy by confidence in the choice made",
        "all seeds' answers together, in bins of equal width; under the diagonal: too sure; "
        "error: expected calibration error, 0 to 1",
    )


def _in_percent(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that have an accuracy, in per cent, with their panel's name for a task."""
    done = table.dropna(subset=["accuracy"])
    return done.assign(percent=100 * done["accuracy"], task=done["task"].map(panel_name)).drop(
        columns="accuracy"
    )


def _with_interval(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with mean, low and high (95 % t interval over seeds) of their trials, and their
    seed's slot.
    """
    parts = [
        group.assign(
            **{
                key: value
                for key, value in interval(group["percent"]).items()
                if key not in ("n", "sd")
            }
        )
        for _, group in table.groupby([*KEYS, "task"], sort=False)
    ]
    return _slots(pd.concat(parts, ignore_index=True), [*KEYS, "task"])


def _slots(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """With `slot`, a seed's place within its method's bar, 0 to 1: the same for all methods, alone
    in the middle.
    """
    seeds = sorted(table["seed"].unique())
    place = {seed: (at + 0.5) / len(seeds) for at, seed in enumerate(seeds)}
    alone = table.groupby(by)["seed"].transform("size") == 1
    return table.assign(slot=table["seed"].map(place).where(~alone, 0.5))


def _side_by_side(data: pd.DataFrame, width: float) -> pd.DataFrame:
    """With `centre`, where a method stands among those at its place on the axis, 0 to 1, and the
    slots about it.
    """
    methods = data.groupby("at")["distill_type"].agg(method_order)
    centre = pd.Series(
        [
            (methods[at].index(method) + 0.5) / len(methods[at])
            for at, method in zip(data["at"], data["distill_type"])
        ],
        data.index,
    )
    return data.assign(centre=centre, slot=centre + (data["slot"] - 0.5) * width)


def _offset(channel: type, field: str = "slot") -> Any:
    import altair as alt

    return channel(f"{field}:Q", scale=alt.Scale(domain=[0, 1], nice=False, zero=False))
