"""Figures of training over all trials: metrics and loss terms by epoch, over all seeds."""

import altair as alt
import pandas as pd

from kd_utils.analysis import questions, tables
from kd_utils.figures import panels, plots

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
        curves: of `tables.learning_curves`.
        metric: the column to draw, e.g. "held_out_accuracy" or "held_out_loss".
    """
    if curves.empty:
        return plots.sentence(NO_CURVES)
    scale, title = (100, "accuracy (%)") if tables.is_accuracy(metric) else (1, "nats per token")
    lines = curves.rename(columns={metric: "value"})[[*tables.KEYS, "seed", "epoch", "value"]]
    lines = tables.beside_each_setting(lines.dropna().assign(value=scale * lines["value"]))
    spread = tables.curve_spread(lines, "value")
    baseline = spread[spread["distill_type"] == questions.BASELINE].set_index(["setting", "epoch"])[
        "mean"
    ]
    spread = spread.join(baseline.rename("baseline"), on=["setting", "epoch"])
    # A facet has one table: it holds the rows of seeds and of means, and each layer draws its own.
    data = pd.concat([lines.assign(row="seed"), spread.assign(row="mean")], ignore_index=True)

    methods = tables.method_order(lines["distill_type"])
    base = alt.Chart().encode(
        x=plots.epoch_axis(lines["epoch"]), color=plots.method_colour(methods)
    )
    of_seed, of_mean = (base.transform_filter(alt.datum.row == row) for row in ("seed", "mean"))
    chart = alt.layer(
        of_mean.mark_area(opacity=0.22).encode(y="low:Q", y2="high:Q"),
        of_seed.mark_line(opacity=0.35, strokeWidth=1, point={"size": 10, "opacity": 0.35}).encode(
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False, padding=6)), detail="seed:N"
        ),
        of_mean.mark_line(strokeDash=[4, 3], strokeWidth=1.5).encode(
            y="baseline:Q", color=alt.value(plots.COLOURS[questions.BASELINE])
        ),
        of_mean.mark_line(strokeWidth=2.5, point={"size": 40}).encode(y="mean:Q"),
        width=150,
        height=panels.panel_height(data, 220),
    )
    legend = ["the scale does not start at 0"]
    if len(methods) > 1 and questions.BASELINE in methods:
        legend.insert(0, f"dashed: mean of {questions.BASELINE}")
    if spread["n"].max() > 1:
        legend.insert(0, "line: mean over seeds; band: one standard deviation; faint: each seed")
    return plots.finish(
        panels.facet(chart, data, "distill_type", methods),
        metric.replace("_", " ").replace("/", ", ").capitalize() + " by epoch",
        "; ".join(legend),
    )


def loss_terms(table: pd.DataFrame) -> alt.Chart:
    """Each loss term's value, weighted value and share of the gradient: a column per method, a row
    per quantity, log scales.

    With one setting the axis is the epoch. With several it is the setting, at the last epoch, which
    shows what a weight does to its term. Shares under 0.01 % are drawn at 0.01 %: such a term has
    almost no effect.

    Args:
        table: of `tables.loss_terms`.
    """
    if table.empty:
        return plots.sentence(NO_CURVES)
    drawn = 100 * table["value"].clip(lower=SMALLEST_SHARE)
    drawn = drawn.where(table["quantity"] == "gradient share", table["value"])
    data = tables.beside_each_setting(table.assign(value=drawn)[drawn > 0])
    if data["setting"].nunique() > 1:
        data = data[data["epoch"] == data.groupby(tables.KEYS)["epoch"].transform("max")]
        data, x, name = panels.setting_axis(data)
        width, heading = max(30 * data["at"].nunique(), 120), "at the last epoch, by setting"
    else:
        x, name, width, heading = plots.epoch_axis(data["epoch"]), "epoch", 140, "by epoch"
    methods = tables.method_order(data["distill_type"])
    terms = tables.known_first(data["term"], plots.TERM_COLOURS)
    colours = plots.colour(
        "term", terms, plots.TERM_COLOURS, title="loss term", legend=alt.Legend(values=terms)
    )
    quantities = tables.known_first(data["quantity"], TERM_QUANTITIES)
    rows = []
    # Every row is a chart, because the panels of a facet share all scales or none.
    for quantity in quantities:
        values = data[data["quantity"] == quantity]
        low, high = values["value"].min() / 1.3, values["value"].max() * 1.3
        if quantity == "gradient share":
            low, high = 100 * SMALLEST_SHARE, 100
        lines = (
            alt.Chart(width=width, height=150)
            .mark_line(point={"size": 36}, strokeWidth=2)
            .encode(
                x=x.title(name if quantity == quantities[-1] else None),
                y=alt.Y("value:Q", title=TERM_QUANTITIES[quantity], **plots.log_axis(low, high)),
                color=colours,
            )
        )
        header = alt.Header() if quantity == quantities[0] else None
        column = alt.Column("distill_type:N", title=None, sort=methods, header=header)
        rows.append(lines.facet(data=values, column=column))
    return plots.finish(
        alt.vconcat(*rows, spacing=8),
        f"Loss terms {heading}",
        "mean over seeds; task and kd in nats per token, hidden and attention are squared errors; "
        "shares under 0.01 % are drawn at 0.01 %",
    )
