"""Figures: each function takes a tidy table and returns an `alt.Chart`; `show` gives the picture that a record keeps.

Every method has one colour (Okabe and Ito's, told apart by colour-blind readers). A loss term has the colour of the
method that adds it. Axes say when they do not start at 0.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .config import METHODS
from .stats import BASELINE, KEYS, curve_spread, gradient_shares, interval, is_accuracy, method_order

if TYPE_CHECKING:
    import altair as alt

COLOURS = {"black_box": "#4d4d4d", "hidden_state": "#0072b2", "attention": "#e69f00", "combined": "#009e73"}
FURTHER_COLOURS = ("#cc79a7", "#d55e00", "#56b4e9", "#8c6d1f")
TERM_COLOURS = {"task": "#a6a6a6", "kd": COLOURS["black_box"], "hidden": COLOURS["hidden_state"],
                "attention": COLOURS["attention"]}
SMALLEST_SHARE = 1e-4
LONGEST_MAP = 60


def show(chart: alt.TopLevelMixin, scale: float = 1.5) -> Any:
    """The chart as a PNG image for the last line of a cell.

    A notebook keeps this picture and no JavaScript, so GitHub, nbviewer and nbconvert show what JupyterLab shows. Of
    the chart's data only the pixels stay in the record: about 15 to 110 kB.

    Args:
        chart: any Altair chart.
        scale: pixels per unit of the chart; the picture is shown at the chart's own size.

    Returns:
        `IPython.display.Image` whose mimebundle has `image/png`.
    """
    import vl_convert
    from IPython.display import Image

    png = _packed(vl_convert.vegalite_to_png(chart.to_dict(), scale=scale))
    width = int.from_bytes(png[16:20], "big")
    return Image(png, format="png", width=round(width / scale))


def accuracy_by_task(table: pd.DataFrame) -> alt.Chart:
    """Accuracy by task and method: every seed a point, the mean a bar, its 95 % t interval over seeds behind.

    Seeds stand in the same order within each method, so pairs can be followed. The dashed rule is the black box's mean.

    Args:
        table: `stats.per_task`: setting, distill_type, seed, task, accuracy (fraction).
    """
    import altair as alt

    parts = [group.assign(percent=100 * group["accuracy"],
                          **{key: value for key, value in interval(100 * group["accuracy"]).items() if key != "n"})
             for _, group in table.groupby([*KEYS, "task"], sort=False)]
    data = pd.concat(parts, ignore_index=True)
    means = data[data["distill_type"] == BASELINE].groupby(["setting", "task"])["mean"].first().rename("baseline")
    data = data.join(means, on=["setting", "task"]).drop(columns=["accuracy", "sd"])

    methods = method_order(table["distill_type"])
    base = alt.Chart().encode(x=alt.X("distill_type:N", title=None, axis=alt.Axis(labelAngle=-35),
                                      scale=alt.Scale(domain=methods, paddingInner=0.25, paddingOuter=0.15)),
                              color=_method_colour(methods))
    y = alt.Y("percent:Q", title="validation accuracy (%)", scale=alt.Scale(zero=False, nice=True, padding=6))
    rule = alt.Chart().mark_rule(strokeDash=[4, 3], color=COLOURS[BASELINE]).encode(y="mean(baseline):Q")
    spread = base.mark_bar(size=40, opacity=0.22).encode(y=alt.Y("mean(low):Q"), y2="mean(high):Q")
    mean = base.mark_tick(size=40, thickness=2.5).encode(y="mean(mean):Q")
    points = base.mark_circle(size=32, opacity=0.9).encode(y=y, xOffset=_seed_offset(alt.XOffset))
    panels = alt.layer(spread, rule, mean, points).properties(width=55 * len(methods), height=240)
    tasks = list(dict.fromkeys(table["task"]))
    return _finish(_facet(panels, data, alt.Column("task:N", title=None, sort=tasks)).resolve_scale(y="independent"),
                   "Accuracy by task and method, one point per seed",
                   f"tick: mean; bar: its 95 % t interval over seeds; dashed: mean of {BASELINE}. Scales differ and do "
                   "not start at 0.")


def differences_from_baseline(differences: pd.DataFrame) -> alt.Chart:
    """Method minus black box within each seed: every pair a point, the mean and its 95 % t interval; the rule is 0.

    Args:
        differences: rows of `stats.paired_differences`, one or more accuracies: metric, setting, distill_type, seed,
            difference (fraction).
    """
    import altair as alt

    parts = [group.assign(points=100 * group["difference"],
                          **{key: value for key, value in interval(100 * group["difference"]).items() if key != "n"})
             for _, group in differences.groupby(["metric", *KEYS], sort=False)]
    data = pd.concat(parts, ignore_index=True).drop(columns=["difference", "sd"]).assign(zero=0)
    data["metric"] = data["metric"].map(_panel_name)
    methods = method_order(differences["distill_type"])
    base = alt.Chart().encode(y=alt.Y("distill_type:N", title=None, scale=alt.Scale(domain=methods)),
                              color=_method_colour(methods))
    x = alt.X("points:Q", title=f"minus {BASELINE} (points)")
    rule = alt.Chart().mark_rule(strokeDash=[4, 3], color=COLOURS[BASELINE]).encode(x="mean(zero):Q")
    spread = base.mark_bar(size=22, opacity=0.22).encode(x="mean(low):Q", x2="mean(high):Q")
    mean = base.mark_tick(size=22, thickness=2.5).encode(x="mean(mean):Q")
    points = base.mark_circle(size=28, opacity=0.9).encode(x=x, yOffset=_seed_offset(alt.YOffset))
    panels = alt.layer(spread, rule, mean, points).properties(width=165, height=34 * len(methods))
    order = list(dict.fromkeys(data["metric"]))
    return _finish(_facet(panels, data, alt.Column("metric:N", title=None, sort=order)),
                   f"Difference from {BASELINE} within each seed",
                   "point: one seed; tick: mean; bar: its 95 % t interval, not corrected for the number of comparisons")


def learning_curves(curves: pd.DataFrame, metric: str) -> alt.Chart:
    """One metric by epoch, a panel per method: mean over seeds with one standard deviation, each seed a faint line.

    The dashed line is the black box's mean, the same in every panel. Accuracies are drawn in per cent.

    Args:
        curves: `stats.learning_curves`: setting, distill_type, seed, epoch and metrics.
        metric: the column to draw, e.g. "validation_accuracy" or "validation_loss".
    """
    import altair as alt

    scale, title = (100, f"{_words(metric)} (%)") if is_accuracy(metric) else (1, f"{_words(metric)} (nats per token)")
    lines = curves[[*KEYS, "seed", "epoch", metric]].dropna(subset=[metric]).rename(columns={metric: "value"})
    lines["value"] *= scale
    spread = curve_spread(lines, "value")
    base = spread.loc[spread["distill_type"] == BASELINE].set_index(["setting", "epoch"])["mean"].rename("baseline")
    spread = spread.join(base, on=["setting", "epoch"])
    methods = method_order(lines["distill_type"])
    # A facet has one table: rows of seeds and rows of means stand in it together, each layer draws its own columns.
    data = pd.concat([lines.assign(row="seed"), spread.assign(row="mean")], ignore_index=True)

    x = _epoch(curves["epoch"])
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
    of_seed, of_mean = (alt.Chart().transform_filter(alt.datum.row == row).encode(x=x, color=_method_colour(methods))
                        for row in ("seed", "mean"))
    faint = of_seed.mark_line(opacity=0.35, strokeWidth=1, point={"size": 10, "opacity": 0.35}).encode(
        y=y, detail="seed:N")
    band = of_mean.mark_area(opacity=0.22).encode(y=alt.Y("low:Q"), y2="high:Q")
    line = of_mean.mark_line(strokeWidth=2.5, point={"size": 40}).encode(y="mean:Q")
    dashed = of_mean.mark_line(strokeDash=[4, 3], strokeWidth=1.5).encode(y="baseline:Q",
                                                                         color=alt.value(COLOURS[BASELINE]))
    panels = alt.layer(band, faint, dashed, line).properties(width=170, height=220)
    legend = []
    if spread["n"].max() > 1:
        legend.append("line: mean over seeds; band: one standard deviation; faint: each seed")
    if len(methods) > 1 and BASELINE in methods:
        legend.append(f"dashed: mean of {BASELINE}")
    return _finish(_facet(panels, data, alt.Column("distill_type:N", title=None, sort=methods)),
                   f"{_words(metric).capitalize()} by epoch", "; ".join([*legend, "scale not from 0"]))


def gradient_share(curves: pd.DataFrame) -> alt.Chart:
    """Each loss term's share of the gradient norm by epoch, a panel per method, mean over seeds, on a log scale.

    Shares under 0.01 % are drawn at 0.01 %: such a term does next to nothing.

    Args:
        curves: `stats.learning_curves` with columns `grad_share/TERM` (fractions).
    """
    import altair as alt

    data = gradient_shares(curves)
    data["percent"] = 100 * data["share"].clip(lower=SMALLEST_SHARE)
    methods = method_order(data["distill_type"])
    terms = [term for term in TERM_COLOURS if term in set(data["term"])]
    x = _epoch(data["epoch"])
    y = alt.Y("percent:Q", title="share of the gradient norm (%, log)",
              scale=alt.Scale(type="log", domain=[100 * SMALLEST_SHARE, 100]),
              axis=alt.Axis(values=[0.01, 0.1, 1, 10, 100], format="~g"))
    colour = alt.Color("term:N", title="loss term", sort=terms,
                       scale=alt.Scale(domain=terms, range=[TERM_COLOURS[term] for term in terms]))
    panels = alt.Chart().mark_line(point={"size": 40}, strokeWidth=2).encode(x=x, y=y, color=colour).properties(
        width=150, height=200)
    return _finish(_facet(panels, data, alt.Column("distill_type:N", title=None, sort=methods)),
                   "Share of the gradient norm by loss term",
                   "mean over seeds; under 0.01 % is drawn at 0.01 %")


def token_lengths(lengths: pd.DataFrame, max_length: int, bins: int = 40) -> alt.Chart:
    """Histogram of tokens per example (prompt and answer), a panel per task; the rule is the longest kept.

    Args:
        lengths: task, tokens (int), a row per example. It is binned here, so the chart stays small.
        max_length: tokens.
        bins: bins of equal width from 0 to the longest example or `max_length`.
    """
    import altair as alt

    edges = np.histogram_bin_edges([], bins, range=(0, max(max_length, lengths["tokens"].max()) + 1))
    parts = []
    for task, group in lengths.groupby("task", sort=False):
        counts, _ = np.histogram(group["tokens"], edges)
        parts.append(pd.DataFrame({"task": task, "low": edges[:-1], "high": edges[1:], "examples": counts,
                                   "limit": max_length}))
    data = pd.concat(parts, ignore_index=True)
    bars = alt.Chart().mark_bar(color="#0072b2", binSpacing=1).encode(
        x=alt.X("low:Q", bin="binned", title="tokens per example (prompt and answer)"), x2="high:Q",
        y=alt.Y("examples:Q", title="examples"))
    rule = alt.Chart().mark_rule(strokeDash=[4, 3], color="#d55e00").encode(x="mean(limit):Q")
    panels = alt.layer(bars, rule).properties(width=560, height=90)
    chart = panels.facet(data=data, row=alt.Row("task:N", title=None, sort=list(dict.fromkeys(lengths["task"]))))
    return _finish(chart.resolve_scale(y="independent"), "Tokens per example by task",
                   f"dashed: the longest sequence kept, {max_length} tokens. The count axes differ.")


def attention_heatmap(matrix: Any, tokens: Sequence[str]) -> alt.Chart:
    """One head's causal attention map: a row per query, a column per key, colour the weight (square-root scale).

    Args:
        matrix: (T, T) weights, rows sum to 1 over the keys up to the query; the upper triangle is not drawn.
        tokens: T token strings. Of a longer text the first 60 are drawn; in a causal map the rest does not matter.
    """
    import altair as alt

    matrix = np.asarray(matrix, dtype=float)
    if matrix.shape != (len(tokens), len(tokens)):
        raise ValueError(f"the map has shape {matrix.shape} and there are {len(tokens)} tokens: "
                         "give one head's (T, T) map and its T tokens")
    size = min(len(tokens), LONGEST_MAP)
    query, key = np.tril_indices(size)
    data = pd.DataFrame({"query": query, "key": key, "weight": matrix[query, key].round(5)})
    names = f"{json.dumps([_visible(token) for token in tokens[:size]])}[datum.value]"
    axis = {"labelExpr": names, "labelOverlap": False, "ticks": False, "domain": False}
    cells = alt.Chart(data).mark_rect().encode(
        x=alt.X("key:O", title="key (attended to)", axis=alt.Axis(labelAngle=-90, **axis)),
        y=alt.Y("query:O", title="query", axis=alt.Axis(**axis)),
        color=alt.Color("weight:Q", title="weight", scale=alt.Scale(type="sqrt", scheme="viridis", domain=[0, 1])))
    cell = max(11, min(24, 420 // size))
    return _finish(cells.properties(width=cell * size, height=cell * size), "One head's attention map",
                   "rows sum to 1" + (f"; the first {size} of {len(tokens)} tokens" if size < len(tokens) else ""))


def _method_colour(methods: Iterable[str]) -> alt.Color:
    """Colour by method, the same in every figure whichever methods it has; panels and axes name them, so no legend."""
    import altair as alt

    further = [method for method in methods if method not in COLOURS]
    colours = COLOURS | {m: FURTHER_COLOURS[i % len(FURTHER_COLOURS)] for i, m in enumerate(further)}
    return alt.Color("distill_type:N", legend=None,
                     scale=alt.Scale(domain=[*METHODS, *further], range=[colours[m] for m in (*METHODS, *further)]))


def _facet(panels: alt.LayerChart | alt.Chart, data: pd.DataFrame, column: alt.Column) -> alt.FacetChart:
    """A panel per column; a row per setting too where the grid swept more than method and seed."""
    import altair as alt

    if data["setting"].nunique() < 2:
        return panels.facet(data=data, column=column)
    return panels.facet(data=data, column=column, row=alt.Row("setting:N", title=None))


def _epoch(epochs: pd.Series) -> alt.X:
    """Whole epochs only, at most about ten of them labelled, with room beside the first and the last point."""
    import altair as alt

    values = sorted(int(epoch) for epoch in epochs.unique())
    return alt.X("epoch:Q", title="epoch", scale=alt.Scale(zero=False, nice=False, padding=12),
                 axis=alt.Axis(values=values[:: len(values) // 10 + 1], format="d", grid=False))


def _seed_offset(channel: type) -> Any:
    import altair as alt

    # Some room at both ends keeps the first and last seed inside their method's bar.
    return channel("seed:O", scale=alt.Scale(paddingOuter=0.8))


def _finish(chart: Any, title: str, subtitle: str) -> Any:
    """Title, one font and quiet grid: the same for all figures."""
    import altair as alt

    return (chart.properties(title=alt.TitleParams(title, subtitle=subtitle, anchor="start"), background="white",
                             padding=8)
            .configure(font="sans-serif")
            .configure_axis(labelFontSize=11, titleFontSize=12, titleFontWeight="normal", gridColor="#ebebeb")
            .configure_axisX(labelAngle=0)
            .configure_header(labelFontSize=13, labelFontWeight="bold")
            .configure_legend(labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
            .configure_title(fontSize=14, subtitleFontSize=11, subtitleColor="#555555", offset=10)
            .configure_view(stroke="#d9d9d9"))


def _panel_name(metric: str) -> str:
    return {"validation_accuracy": "all examples", "validation_accuracy/macro": "mean of tasks"}.get(
        metric, metric.split("/", 1)[-1])


def _words(metric: str) -> str:
    return metric.replace("_", " ").replace("/", ", ")


def _visible(token: str) -> str:
    """A token as it can be read on an axis: marks of a leading space as a dot, line ends as backslash n."""
    for mark, shown in (("Ġ", "·"), ("▁", "·"), ("Ċ", "\\n"), ("\n", "\\n"), (" ", "·")):
        token = token.replace(mark, shown)
    return token if len(token) <= 14 else token[:13] + "…"


def _packed(png: bytes) -> bytes:
    """The same picture in about a third of the bytes: vl-convert deflates fast rather than well."""
    kept, pixels, start = [], b"", 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start:start + 4], "big")
        if png[start + 4:start + 8] == b"IDAT":
            pixels += png[start + 8:end - 4]
        else:
            kept.append(png[start:end])
        start = end
    body = b"IDAT" + zlib.compress(zlib.decompress(pixels), 9)
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return b"".join([png[:8], *kept[:-1], chunk, kept[-1]])
