"""The figure of the published claim, drawn from its own summaries."""

from __future__ import annotations

import altair as alt
import pandas as pd

from kd_utils.analysis.tables import method_order
from kd_utils.figures.plots import finish, method_colour


def published_claim(means: pd.DataFrame, differences: pd.DataFrame) -> alt.HConcatChart:
    """The published means with their intervals, and what two tests give for the difference from
    black box.

    Args:
        means: of `published.means`: method, mean, low, high (per cent).
        differences: test (its name), method, difference, low, high (points), p.
    """
    methods = method_order(means["method"])
    differences = differences.assign(p=differences["p"].map("p = {:.3f}".format))
    left = _panel(means.rename(columns={"mean": "value"}), "accuracy (%)", methods)
    compared = [method for method in methods if method in set(differences["method"])]
    right = [
        _panel(rows.rename(columns={"difference": "value"}), f"{test} (points)", compared)
        for test, rows in differences.groupby("test", sort=False)
    ]
    return finish(
        alt.hconcat(left, *right),
        "The published means, and their differences from black_box",
        "tick: mean; bar: 95 % interval over the published 7 seeds; dashed: no difference",
    )


def _panel(data: pd.DataFrame, title: str, methods: list[str]) -> alt.LayerChart:
    """Ticks with their intervals, a row per method; with a rule at 0 and p where there is one."""
    data = data.rename(columns={"method": "distill_type"})
    y = alt.Y("distill_type:N", title=None, sort=methods)
    base = alt.Chart(data).encode(y=y, color=method_colour(methods))
    x = alt.X("low:Q", title=title, scale=alt.Scale(zero=False, padding=10))
    layers = [
        base.mark_bar(size=20, opacity=0.3).encode(x=x, x2="high:Q"),
        base.mark_tick(size=20, thickness=2.5).encode(x="value:Q"),
    ]
    if "p" in data:
        zero = alt.Chart().mark_rule(strokeDash=[4, 3]).encode(x=alt.datum(0))
        words = base.mark_text(dy=-16, fontSize=10).encode(x="value:Q", text="p:N")
        layers += [zero, words]
    return alt.layer(*layers).properties(width=190, height=48 * len(methods))
