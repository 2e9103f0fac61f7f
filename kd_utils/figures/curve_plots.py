"""Figures of training over all trials: metrics and loss terms by epoch, over all seeds of each
method.
"""

import altair as alt
import pandas as pd

from kd_utils.analysis.comparisons import BASELINE
from kd_utils.analysis.tables import (
    KEYS,
    beside_each_setting,
    curve_spread,
    is_accuracy,
    known_first,
    method_order,
)
from kd_utils.figures.panels import facet, panel_height, setting_axis
from kd_utils.figures.plots import (
    COLOURS,
    TERM_COLOURS,
    colour,
    epoch_axis,
    finish,
    log_axis,
    method_colour,
    sentence,
    words,
)

SMALLEST_SHARE = 1e-4

TERM_QUANTITIES = {
    "value": "value (log)",
    "weighted value": "value × weight (log)",
    "gradient share": "gradient share (%, log)",
}

NO_CURVES = "No trained student: no curves to draw"


def learning_curves(curves: pd.DataFrame, metric: str) -> alt.Chart:
    """One metric by epoch, a panel per method: mean over seeds with one standard deviation, each
    seed a faint line.

    The dashed line is the black box's mean, the same in every panel. Accuracies are drawn in per
    cent.

    Args:
        curves: of `tables.learning_curves`: setting, distill_type, seed, epoch and metrics.
        metric: the column to draw, e.g. "validation_accuracy" or "validation_loss".
    """
    if curves.empty:
        return sentence(NO_CURVES)
    scale, title = (100, "accuracy (%)") if is_accuracy(metric) else (1, "nats per token")
    curves = curves.rename(columns={metric: "value"}).dropna(subset=["value"])
    lines = beside_each_setting(curves[[*KEYS, "seed", "epoch", "value"]])
    lines["value"] *= scale
    spread = curve_spread(lines, "value")
    baseline = spread[spread["distill_type"] == BASELINE].set_index(["setting", "epoch"])["mean"]
    spread = spread.join(baseline.rename("baseline"), on=["setting", "epoch"])
    methods = method_order(lines["distill_type"])
    # A facet has one table, so it holds the rows of seeds and of means, and each layer draws its
    # own.
    data = pd.concat([lines.assign(row="seed"), spread.assign(row="mean")], ignore_index=True)

    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False, padding=6))
    base = alt.Chart().encode(x=epoch_axis(curves["epoch"]), color=method_colour(methods))
    of_seed, of_mean = (base.transform_filter(alt.datum.row == row) for row in ("seed", "mean"))
    point = {"size": 10, "opacity": 0.35}
    faint = of_seed.mark_line(opacity=0.35, strokeWidth=1, point=point).encode(y=y, detail="seed:N")
    band = of_mean.mark_area(opacity=0.22).encode(y="low:Q", y2="high:Q")
    line = of_mean.mark_line(strokeWidth=2.5, point={"size": 40}).encode(y="mean:Q")
    dashed = of_mean.mark_line(strokeDash=[4, 3], strokeWidth=1.5).encode(
        y="baseline:Q", color=alt.value(COLOURS[BASELINE])
    )
    panels = alt.layer(band, faint, dashed, line).properties(
        width=150, height=panel_height(data, 220)
    )
    legend = ["the scale does not start at 0"]
    if len(methods) > 1 and BASELINE in methods:
        legend.insert(0, f"dashed: mean of {BASELINE}")
    if spread["n"].max() > 1:
        legend.insert(0, "line: mean over seeds; band: one standard deviation; faint: each seed")
    title = f"{words(metric).capitalize()} by epoch"
    return finish(facet(panels, data, "distill_type", methods), title, "; ".join(legend))


def loss_terms(table: pd.DataFrame) -> alt.Chart:
    """Each loss term's value, weighted value and share of the gradient: a column per method, a row
    per quantity, log scales.

    With one setting the axis is the epoch. With several it is the setting, at the last epoch, which
    shows what a weight does to its term. Shares under 0.01 % are drawn at 0.01 %: such a term has
    almost no effect.

    Args:
        table: of `tables.loss_terms`: setting, distill_type, epoch, term, quantity, value (of a
            share: a fraction).
    """
    if table.empty:
        return sentence(NO_CURVES)
    data = beside_each_setting(
        table[(table["value"] > 0) | (table["quantity"] == "gradient share")]
    )
    share = data["quantity"] == "gradient share"
    data.loc[share, "value"] = 100 * data.loc[share, "value"].clip(lower=SMALLEST_SHARE)
    if data["setting"].nunique() > 1:
        data = data[data["epoch"] == data.groupby(KEYS)["epoch"].transform("max")]
        data, x, name = setting_axis(data)
        width, heading = max(30 * data["at"].nunique(), 120), "at the last epoch, by setting"
    else:
        x, name, width, heading = epoch_axis(data["epoch"]), "epoch", 140, "by epoch"
    methods = method_order(data["distill_type"])
    terms = known_first(data["term"], TERM_COLOURS)
    colours = colour(
        "term", terms, TERM_COLOURS, title="loss term", legend=alt.Legend(values=terms)
    )
    quantities = known_first(data["quantity"], TERM_QUANTITIES)
    rows = []
    # Every row is a chart, because the panels of a facet share all scales or none.
    for quantity in quantities:
        values = data[data["quantity"] == quantity]
        domain = (values["value"].min() / 1.3, values["value"].max() * 1.3)
        if quantity == "gradient share":
            domain = (100 * SMALLEST_SHARE, 100)
        y = alt.Y("value:Q", title=TERM_QUANTITIES[quantity], **log_axis(*domain))
        across = x.copy()
        across.title = name if quantity == quantities[-1] else None
        header = alt.Header() if quantity == quantities[0] else None
        column = alt.Column("distill_type:N", title=None, sort=methods, header=header)
        lines = alt.Chart().mark_line(point={"size": 36}, strokeWidth=2)
        lines = lines.encode(x=across, y=y, color=colours).properties(width=width, height=150)
        rows.append(lines.facet(data=values, column=column))
    return finish(
        alt.vconcat(*rows, spacing=8),
        f"Loss terms {heading}",
        "mean over seeds; task and kd in nats per token, hidden and attention are squared errors; "
        "shares under 0.01 % are drawn at 0.01 %",
    )
