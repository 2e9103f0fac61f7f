"""Figures of cut students: which units matter, what a cut costs, and accuracy against size."""

from collections.abc import Sequence

import altair as alt
import pandas as pd

from kd_utils.figures import plots

#: Colours of the common kinds of students; others get further ones.
COLOURS = {
    "pruned minitron + black_box": "#0072b2",
    "pruned minitron + task_only": "#56b4e9",
    "random + black_box": "#d55e00",
    "svd weights + black_box": "#009e73",
    "pruned random + black_box": "#e69f00",
    "pruned lowest + black_box": "#a50f15",
    "pruned minitron rounds=3 + black_box": "#6a51a3",
}

#: A student's start and method, as figures and tables name it.
KIND = "kind of student"

NAMES = {
    "layers": "decoder layers",
    "heads": "query heads",
    "mlp": "MLP neurons",
    "width": "residual channels",
}


def with_kind(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the column `KIND`, of its `start`, `distill_type` and `setting`."""
    kind = table["start"] + " + " + table["distill_type"]
    return table.assign(
        **{KIND: kind + (", " + table["setting"]).where(table["setting"] != "", "")}
    )


def kind_colour(kinds: Sequence[str]) -> alt.Color:
    """Colour by kind of student, with a legend of these kinds alone."""
    legend = alt.Legend(labelLimit=300, values=list(kinds))
    return plots.colour(KIND, kinds, COLOURS, title=None, legend=legend)


def importance(scores: pd.DataFrame) -> alt.HConcatChart:
    """Which units matter: Block Influence of each layer, the heads' scores as a map, and the scores
    of neurons and channels in falling order.

    Args:
        scores: of `models.importance.scores.tidy`.
    """
    data = scores.assign(score=scores["score"].astype(float))
    layers = data[data["kind"] == "layers"].assign(index=0)
    heads = data[data["kind"] == "heads"].assign(head=lambda table: table["index"] + 1)
    top = heads.groupby("layer")["score"].transform("max")
    heads = heads.assign(share=heads["score"] / top)
    ranked = data[data["kind"].isin(["mlp", "width"])].copy()
    of_layer = ranked.groupby(["kind", "layer"])["score"]
    ranked["rank"] = of_layer.rank(ascending=False, method="first") / of_layer.transform("size")
    ranked["share"] = ranked["score"] / of_layer.transform("max")
    ranked["units"] = ranked["kind"].map(NAMES)
    bars = (
        alt.Chart(layers, title="decoder layers", width=150, height=180)
        .mark_bar(color="#0072b2")
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("score:Q", title="Block Influence, 1 - mean cos"),
        )
    )
    cells = (
        alt.Chart(heads, title="query heads", height=180, width=22 * heads["head"].nunique())
        .mark_rect()
        .encode(
            x=alt.X("head:O", title="head", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("layer:O", title="layer"),
            color=alt.Color(
                "share:Q", title="of the layer's largest", scale=alt.Scale(scheme="viridis")
            ),
        )
    )
    curves = [
        alt.Chart(part, title=name, width=150, height=180)
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("rank:Q", title="share of units, best first", axis=alt.Axis(format="%")),
            y=alt.Y("share:Q", title="score, of the largest"),
            detail="layer:N",
            color=alt.Color(
                "layer:O", scale=alt.Scale(scheme="viridis"), legend=None if name != NAMES["mlp"]
                else alt.Legend(title="layer"),
            ),
        )
        for name, part in ranked.groupby("units", sort=False)
    ]  # fmt: skip
    chart = alt.hconcat(bars, cells, *curves).resolve_scale(color="independent")
    return plots.finish(chart, "Which units matter", "scores from the training rows")


def agreement(table: pd.DataFrame) -> alt.LayerChart:
    """Do other rows rank the units alike? Spearman's correlation by the number of rows.

    Args:
        table: of `models.importance.scores.agreement`.
    """
    data = table.assign(units=table["kind"].map(NAMES))
    log = alt.Scale(type="log", nice=False, padding=12)
    base = alt.Chart(data, width=320, height=160).encode(
        x=alt.X("rows:Q", title="training rows (log)", scale=log),
        y=alt.Y("rank_correlation:Q", title="rank correlation", scale=alt.Scale(zero=False)),
        color=plots.colour("units", list(NAMES.values()), {}, title=None),
    )  # fmt: skip
    return plots.finish(
        base.mark_line(strokeWidth=1.5) + base.mark_circle(size=45, opacity=1),
        "Do other rows rank the units alike?",
        "each against four groups of rows, half of all, that it shares none with",
    )


def step_zero(table: pd.DataFrame) -> alt.Chart:
    """What a cut costs before any training: the loss of each kind of student, a point a draw.

    Args:
        table: start, loss (nats per answer token); the first row is the uncut model's.
    """
    order = list(dict.fromkeys(table["start"]))
    whole = table["loss"].iloc[0]
    points = alt.Chart(table, width=420, height=22 * len(order)).encode(
        y=alt.Y("start:N", title=None, sort=order),
        x=alt.X(
            "loss:Q",
            title="loss of the held-out answers, nats a token (log)",
            scale=alt.Scale(type="log", nice=False, padding=14),
        ),
    )
    rule = alt.Chart(table.head(1)).mark_rule(strokeDash=[4, 3], color="#7f7f7f").encode(x="loss:Q")
    return plots.finish(
        rule + points.mark_circle(size=60, opacity=0.8, color="#0072b2"),
        "One cut, before it is trained",
        f"dashed: the uncut model, {whole:.3f}; several points: several random draws",
    )


def frontier(table: pd.DataFrame, sizes: dict[str, str]) -> alt.HConcatChart:
    """Accuracy against size: each kind of student a line, each size a point with its interval over
    trials; the teacher a dashed line.

    Args:
        table: of `analysis.compression.retained.retained`, and further columns of sizes.
        sizes: column -> its title, a panel each.
    """
    data = with_kind(table)
    for end in ("", "_low", "_high"):
        data[f"percent{end}"] = 100 * data[f"accuracy{end}"]
    kinds = list(dict.fromkeys(data[KIND]))
    panels = []
    y = alt.Y("percent:Q", title="accuracy (%)", scale=alt.Scale(zero=False, padding=8))
    for column, title in sizes.items():
        base = alt.Chart(data.dropna(subset=[column])).encode(
            x=alt.X(
                f"{column}:Q",
                title=f"{title} (log)",
                scale=alt.Scale(type="log", nice=False, padding=12),
                axis=alt.Axis(format="~s"),
            ),
            color=kind_colour(kinds),
        )
        teacher = alt.Chart(data.head(1)).mark_rule(strokeDash=[4, 3], color="#7f7f7f")
        panels.append(
            alt.layer(
                teacher.transform_calculate(top="100 * datum.teacher").encode(y="top:Q"),
                *_with_bars(base, y, "percent"),
                width=230,
                height=200,
            )
        )
    return plots.finish(
        alt.hconcat(*panels),
        "Accuracy against size",
        "mean of tasks; bars: 95 % over validation rows and trials; dashed: the teacher. The axis "
        "does not start at 0.",
    )


def _with_bars(base: alt.Chart, y: alt.Y, name: str) -> tuple[alt.Chart, ...]:
    """The intervals NAME_low to NAME_high, a line through the points, and the points."""
    return (
        base.mark_rule(opacity=0.6).encode(y=f"{name}_low:Q", y2=f"{name}_high:Q"),
        base.mark_line(strokeWidth=1.5).encode(y=y),
        base.mark_circle(size=45, opacity=1).encode(y=y),
    )


def retention_bands(
    table: pd.DataFrame, bands: dict[int, Sequence[float]], near: float
) -> alt.LayerChart:
    """Retention against the ratio of sizes, beside the figures that are expected.

    Args:
        table: of `analysis.compression.retained.retained`.
        bands: ratio -> from and to, fractions (`retained.BANDS`).
        near: a band is for ratios within this factor of its own.
    """
    data = with_kind(table)
    shown = pd.DataFrame(
        [
            {"from": ratio / near, "to": ratio * near, "low": 100 * low, "high": 100 * high}
            for ratio, (low, high) in bands.items()
        ]
    )
    data[["raw", "raw_low", "raw_high"]] *= 100
    kinds = list(dict.fromkeys(data[KIND]))
    x = alt.X(
        "ratio:Q",
        title="times smaller than the teacher, without embeddings (log)",
        scale=alt.Scale(type="log", nice=False, padding=12),
    )
    y = alt.Y("raw:Q", title="retention (%)", scale=alt.Scale(zero=False, padding=8))
    base = alt.Chart(data).encode(x=x, color=kind_colour(kinds))
    boxes = (
        alt.Chart(shown)
        .mark_rect(color="#e69f00", opacity=0.25)
        .encode(x="from:Q", x2="to:Q", y="low:Q", y2="high:Q")
    )
    chart = alt.layer(
        boxes,
        *_with_bars(base, y, "raw"),
        width=460,
        height=260,
    )
    return plots.finish(
        chart,
        "Retention against size",
        "student's accuracy over the teacher's; bars: 95 % over rows and trials; boxes: the "
        "expected figures. The axis does not start at 0.",
    )
