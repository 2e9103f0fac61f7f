"""The figure of a comparison of several worlds."""

import altair as alt
import pandas as pd

from kd_utils.analysis import tables
from kd_utils.figures import plots

ALL = "all worlds"


def differences_by_world(differences: pd.DataFrame, compared: pd.DataFrame) -> alt.Chart:
    """Each comparison's differences: every seed a point in its world's row, each world's mean a
    tick, and below them the mean of all worlds with its interval.

    Args:
        differences: of `worlds.comparisons.differences`, of some questions.
        compared: of `worlds.comparisons.compare`, of the same questions and one metric.
    """
    keys = ["comparison", "setting"]
    joint = compared.assign(comparison=compared["method"] + " minus " + compared["baseline"])
    joint = joint.drop_duplicates(keys)[[*keys, "difference", "low", "high"]]
    data = pd.concat(
        [differences.drop_duplicates([*keys, "world", "seed"]), joint.assign(world=ALL)]
    )
    data[["difference", "low", "high"]] *= 100
    data["distill_type"] = data["comparison"].str.split(" minus ").str[0]
    worlds = list(dict.fromkeys(data["world"]))
    base = alt.Chart().encode(
        y=alt.Y("world:N", title="world", scale=alt.Scale(domain=worlds)),
        color=plots.method_colour(tables.method_order(data["distill_type"])),
    )
    x = alt.X("difference:Q", title="points", scale=alt.Scale(zero=True, padding=8))
    chart = alt.layer(
        alt.Chart().mark_rule(strokeDash=[4, 3], color="#7f7f7f").encode(x=alt.datum(0)),
        base.transform_filter("isValid(datum.low)")
        .mark_bar(size=12, opacity=0.35)
        .encode(x="low:Q", x2="high:Q"),
        base.transform_filter("isValid(datum.seed)").mark_circle(size=24, opacity=0.8).encode(x=x),
        base.mark_tick(size=16, thickness=2.5).encode(x="mean(difference):Q"),
        width=240,
        height=22 * len(worlds),
    )
    data["comparison"] = data["comparison"] + (", " + data["setting"]).where(
        data["setting"] != "", ""
    )
    order = list(dict.fromkeys(data["comparison"]))
    facet = alt.Facet("comparison:N", title=None, sort=order)
    return plots.finish(
        chart.facet(data=data, facet=facet, columns=3).resolve_scale(x="independent"),
        "Differences in each world",
        "point: one seed; tick: mean of a world, and of all worlds; bar: the 95 % interval over "
        "worlds, seeds and rows, not corrected. Scales differ.",
    )
