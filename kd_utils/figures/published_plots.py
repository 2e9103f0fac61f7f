"""The figure of the published claim, drawn from its own summaries."""

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
    tests = differences.groupby("test", sort=False)
    panels = [_panel(means, "mean", "accuracy (%)", methods)]
    panels += [_panel(rows, "difference", f"{test} (points)", methods) for test, rows in tests]
    return finish(
        alt.hconcat(*panels),
        "The published means, and their differences from black_box",
        "tick: mean or difference; bar: 95 % interval over the published 7 seeds; dashed: no "
        "difference",
    )


def _panel(data: pd.DataFrame, column: str, title: str, methods: list[str]) -> alt.LayerChart:
    """A tick with its interval per method; for differences also a rule at 0, and p."""
    data = data.rename(columns={"method": "distill_type"})
    base = alt.Chart(data).encode(
        y=alt.Y("distill_type:N", title=None, scale=alt.Scale(domain=methods)),
        color=method_colour(methods),
    )
    layers = [
        base.mark_bar(size=20, opacity=0.3).encode(
            x=alt.X("low:Q", title=title, scale=alt.Scale(zero=False, padding=12)), x2="high:Q"
        ),
        base.mark_tick(size=20, thickness=2.5).encode(x=f"{column}:Q"),
    ]
    if column == "difference":
        layers += [
            alt.Chart().mark_rule(strokeDash=[4, 3]).encode(x=alt.datum(0)),
            base.transform_calculate(words="'p = ' + format(datum.p, '.2g')")
            .mark_text(dy=19, fontSize=10, align="left", dx=4)
            .encode(x=f"{column}:Q", text="words:N"),
        ]
    return alt.layer(*layers, width=190, height=50 * len(methods))
