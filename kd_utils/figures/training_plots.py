"""Figures of how training went: metrics and loss terms by epoch, over all seeds of each method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from kd_utils.analysis.comparisons import BASELINE
from kd_utils.analysis.tables import KEYS, beside_each_setting, is_accuracy, method_order
from kd_utils.analysis.training_tables import curve_spread
from kd_utils.figures.plots import (
    COLOURS,
    TERM_COLOURS,
    epoch_axis,
    facet,
    finish,
    log_axis,
    method_colour,
    panel_height,
    setting_axis,
    words,
)

if TYPE_CHECKING:
    import altair as alt

SMALLEST_SHARE = 1e-4

TERM_QUANTITIES = {
    "value": "value (log)",
    "weighted value": "value × weight (log)",
    "gradient share": "gradient share (%, log)",
}


def learning_curves(curves: pd.DataFrame, metric: str) -> alt.Chart:
    """One metric by epoch, a panel per method: mean over seeds with one standard deviation, each
    seed a faint line.

    The dashed line is the black box's mean, the same in every panel. Accuracies are drawn in per
    cent.

    Args:
        curves: `tables.learning_curves`: setting, distill_type, seed, epoch and metrics.
        metric: the column to draw, e.g. "validation_accuracy" or "validation_loss".
    """
    import altair as alt

    scale, title = (
        (100, "accuracy (%)") if is_accuracy(metric) else (1, "nats per token")
    )  # the metric is the title
    lines = beside_each_setting(
        curves[[*KEYS, "seed", "epoch", metric]]
        .dropna(subset=[metric])
        .rename(columns={metric: "value"})
    )
    lines["value"] *= scale
    spread = curve_spread(lines, "value")
    base = (
        spread.loc[spread["distill_type"] == BASELINE]
        .set_index(["setting", "epoch"])["mean"]
        .rename("baseline")
    )
    spread = spread.join(base, on=["setting", "epoch"])
    methods = method_order(lines["distill_type"])
    # A facet has one table: rows of seeds and rows of means stand in it together, each layer draws
    # its own columns.
    data = pd.concat([lines.assign(row="seed"), spread.assign(row="mean")], ignore_index=True)

    x = epoch_axis(curves["epoch"])
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False, padding=6))
    of_seed, of_mean = (
        alt.Chart().transform_filter(alt.datum.row == row).encode(x=x, color=method_colour(methods))
        for row in ("seed", "mean")
    )
    faint = of_seed.mark_line(
        opacity=0.35, strokeWidth=1, point={"size": 10, "opacity": 0.35}
    ).encode(y=y, detail="seed:N")
    band = of_mean.mark_area(opacity=0.22).encode(y=alt.Y("low:Q"), y2="high:Q")
    line = of_mean.mark_line(strokeWidth=2.5, point={"size": 40}).encode(y="mean:Q")
    dashed = of_mean.mark_line(strokeDash=[4, 3], strokeWidth=1.5).encode(
        y="baseline:Q", color=alt.value(COLOURS[BASELINE])
    )
    panels = alt.layer(band, faint, dashed, line).properties(
        width=150, height=panel_height(data, 220)
    )
    legend = []
    if spread["n"].max() > 1:
        legend.append("line: mean over seeds; band: one standard deviation; faint: each seed")
    if len(methods) > 1 and BASELINE in methods:
        legend.append(f"dashed: mean of {BASELINE}")
    return finish(
        facet(panels, data, "distill_type", methods),
        f"{words(metric).capitalize()} by epoch",
        "; ".join([*legend, "scale not from 0"]),
    )


def loss_terms(table: pd.DataFrame) -> alt.Chart:
    """Each loss term's value, weighted value and share of the gradient: a column per method, a row
    per quantity, logs.

    With one setting the axis is the epoch; with several it is the setting, at the last epoch, so
    that what a weight does to its term can be seen at once. Shares under 0.01 % are drawn at 0.01
    %: such a term does next to nothing.

    Args:
        table: `tables.loss_terms`: setting, distill_type, epoch, term, quantity, value (share: a
            fraction).
    """
    import altair as alt

    data = beside_each_setting(
        table[(table["value"] > 0) | (table["quantity"] == "gradient share")]
    )
    share = data["quantity"] == "gradient share"
    data.loc[share, "value"] = 100 * data.loc[share, "value"].clip(lower=SMALLEST_SHARE)
    by_setting, width = data["setting"].nunique() > 1, 140
    if by_setting:
        data = data[data["epoch"] == data.groupby(KEYS)["epoch"].transform("max")]
        data, axis, name = setting_axis(data)
        width = max(30 * data["at"].nunique(), 120)
    methods = method_order(data["distill_type"])
    terms = [term for term in TERM_COLOURS if term in set(data["term"])]
    colour = alt.Color(
        "term:N",
        title="loss term",
        sort=terms,
        scale=alt.Scale(domain=terms, range=[TERM_COLOURS[term] for term in terms]),
    )
    quantities = [quantity for quantity in TERM_QUANTITIES if quantity in set(data["quantity"])]
    rows = []
    # Rows of their own, because a facet's panels share all scales or none.
    for quantity in quantities:
        mine, first, last = (
            data[data["quantity"] == quantity],
            quantity == quantities[0],
            quantity == quantities[-1],
        )
        domain = (
            (100 * SMALLEST_SHARE, 100)
            if quantity == "gradient share"
            else (mine["value"].min() / 1.3, mine["value"].max() * 1.3)
        )
        x = axis.copy() if by_setting else epoch_axis(data["epoch"])
        x.title = (name if by_setting else "epoch") if last else None
        y = alt.Y("value:Q", title=TERM_QUANTITIES[quantity], **log_axis(*domain))
        lines = (
            alt.Chart().mark_line(point={"size": 36}, strokeWidth=2).encode(x=x, y=y, color=colour)
        )
        rows.append(
            lines.properties(width=width, height=150).facet(
                data=mine,
                column=alt.Column(
                    "distill_type:N",
                    title=None,
                    sort=methods,
                    header=alt.Header() if first else None,
                ),
            )
        )
    return finish(
        alt.vconcat(*rows, spacing=8),
        f"Loss terms {'at the last epoch, by setting' if by_setting else 'by epoch'}",
        "mean over seeds; task and kd in nats per token, hidden and attention are squared errors; "
        "shares under 0.01 % are drawn at 0.01 %",
    )
