"""What all figures share, their look and `show`, and the figures of the data and of the teacher.

A figure is a function that takes a tidy table and returns an `alt.Chart`; those over trials are in
`result_plots`. Every method has one colour (Okabe and Ito's, told apart by colour-blind readers),
and a loss term has the colour of the method that adds it. Axes say when they do not start at 0.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from kd_utils.analysis.tables import setting_items

if TYPE_CHECKING:
    import altair as alt

#: The references are quiet: no method of distilling, but what gives one its meaning.
COLOURS = {
    "untrained": "#b3b3b3",
    "task_only": "#56b4e9",
    "black_box": "#4d4d4d",
    "hidden_state": "#0072b2",
    "attention": "#e69f00",
    "combined": "#009e73",
}

FURTHER_COLOURS = ("#cc79a7", "#d55e00", "#8c6d1f", "#6a51a3")

TERM_COLOURS = {
    "task": "#a6a6a6",
    "kd": COLOURS["black_box"],
    "hidden": COLOURS["hidden_state"],
    "attention": COLOURS["attention"],
}

LONGEST_MAP = 60

#: Where methods stand that do not use the swept key.
NOT_USED = "–"


def show(chart: alt.TopLevelMixin, scale: float = 1.5) -> Any:
    """The chart as a PNG image for the last line of a cell.

    A notebook keeps this picture and no JavaScript, so GitHub, nbviewer and nbconvert show what
    JupyterLab shows. Of the chart's data only the pixels stay in the record: about 15 to 110 kB,
    and 400 of a grid with eight settings.

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


def token_lengths(lengths: pd.DataFrame, max_length: int, bins: int = 40) -> alt.Chart:
    """Histogram of tokens per example (prompt and answer), a panel per task; the rule is the
    longest kept.

    Args:
        lengths: task, tokens (int), a row per example. It is binned here, so the chart stays small.
        max_length: tokens.
        bins: bins of equal width from 0 to the longest example or `max_length`.
    """
    import altair as alt

    edges = np.histogram_bin_edges(
        [], bins, range=(0, max(max_length, lengths["tokens"].max()) + 1)
    )
    parts = []
    for task, group in lengths.groupby("task", sort=False):
        counts, _ = np.histogram(group["tokens"], edges)
        parts.append(
            pd.DataFrame(
                {
                    "task": task,
                    "low": edges[:-1],
                    "high": edges[1:],
                    "examples": counts,
                    "limit": max_length,
                }
            )
        )
    data = pd.concat(parts, ignore_index=True)
    bars = (
        alt.Chart()
        .mark_bar(color="#0072b2", binSpacing=1)
        .encode(
            x=alt.X("low:Q", bin="binned", title="tokens per example (prompt and answer)"),
            x2="high:Q",
            y=alt.Y("examples:Q", title="examples"),
        )
    )
    rule = alt.Chart().mark_rule(strokeDash=[4, 3], color="#d55e00").encode(x="mean(limit):Q")
    panels = alt.layer(bars, rule).properties(width=560, height=90)
    chart = panels.facet(
        data=data, row=alt.Row("task:N", title=None, sort=list(dict.fromkeys(lengths["task"])))
    )
    return finish(
        chart.resolve_scale(y="independent"),
        "Tokens per example by task",
        f"dashed: the longest sequence kept, {max_length} tokens. The count axes differ.",
    )


def attention_heatmap(matrix: Any, tokens: Sequence[str]) -> alt.Chart:
    """One head's causal attention map: a row per query, a column per key, colour the weight
    (square-root scale).

    Args:
        matrix: (T, T) weights, rows sum to 1 over the keys up to the query; the upper triangle is
            not drawn.
        tokens: T token strings. Of a longer text the first 60 are drawn; in a causal map the rest
            does not matter.
    """
    size = min(len(tokens), LONGEST_MAP)
    return finish(
        map_cells(matrix, tokens),
        "One head's attention map",
        "rows sum to 1"
        + (f"; the first {size} of {len(tokens)} tokens" if size < len(tokens) else ""),
    )


def map_cells(matrix: Any, tokens: Sequence[str]) -> alt.Chart:
    """The panel of `attention_heatmap`, without its titles."""
    import altair as alt

    matrix = np.asarray(matrix, dtype=float)
    if matrix.shape != (len(tokens), len(tokens)):
        raise ValueError(
            f"the map has shape {matrix.shape} and there are {len(tokens)} tokens: "
            "give one head's (T, T) map and its T tokens"
        )
    size = min(len(tokens), LONGEST_MAP)
    query, key = np.tril_indices(size)
    data = pd.DataFrame({"query": query, "key": key, "weight": matrix[query, key].round(5)})
    names = f"{json.dumps([visible(token) for token in tokens[:size]])}[datum.value]"
    axis = {"labelExpr": names, "labelOverlap": False, "ticks": False, "domain": False}
    cells = (
        alt.Chart(data)
        .mark_rect()
        .encode(
            x=alt.X("key:O", title="key (attended to)", axis=alt.Axis(labelAngle=-90, **axis)),
            y=alt.Y("query:O", title="query", axis=alt.Axis(**axis)),
            color=alt.Color(
                "weight:Q",
                title="weight",
                scale=alt.Scale(type="sqrt", scheme="viridis", domain=[0, 1]),
            ),
        )
    )
    cell = max(11, min(24, 420 // size))
    return cells.properties(width=cell * size, height=cell * size)


def method_colour(methods: Iterable[str], legend: Any = None) -> alt.Color:
    """Colour by method, the same in every figure whichever methods it has.

    Args:
        methods: those of the figure.
        legend: None where panels or axes name the methods, else `alt.Legend(values=methods)` or the
            like.
    """
    import altair as alt

    further = [method for method in methods if method not in COLOURS]
    colours = COLOURS | {
        m: FURTHER_COLOURS[i % len(FURTHER_COLOURS)] for i, m in enumerate(further)
    }
    return alt.Color(
        "distill_type:N",
        legend=legend,
        scale=alt.Scale(domain=list(colours), range=list(colours.values())),
    )


def facet(
    panels: alt.LayerChart | alt.Chart,
    data: pd.DataFrame,
    column: str,
    order: Sequence[str],
    row: str = "setting",
) -> alt.FacetChart:
    """A panel per value of `column`, in this order, and a row of them per value of `row`, unless
    all is one setting.
    """
    import altair as alt

    # Panels go by numbers with names for labels: by names in an order of their own, Vega lays those
    # that have no data first, and all others stand at wrong names.
    rows, columns = list(dict.fromkeys(data[row])), list(order)
    data = data.assign(
        panel_row=data[row].map(rows.index), panel_column=data[column].map(columns.index)
    )
    header = alt.Header(labelExpr=f"{json.dumps(columns)}[datum.value]")
    across = alt.Column("panel_column:O", title=None, header=header)
    if row == "setting" and len(rows) < 2:
        return panels.facet(data=data, column=across)
    # A row's name lies, with a line per swept key.
    names = alt.Header(
        labelAngle=0, labelAlign="left", labelExpr=f"split({json.dumps(rows)}[datum.value], ', ')"
    )
    return panels.facet(
        data=data, column=across, row=alt.Row("panel_row:O", title=None, header=names)
    )


def panel_height(data: pd.DataFrame, alone: int) -> int:
    """Pixels of a panel: of one that stands alone, or of one in a row per setting."""
    return alone if data["setting"].nunique() < 2 else round(0.6 * alone)


def setting_axis(data: pd.DataFrame) -> tuple[pd.DataFrame, alt.X, str | None]:
    """The rows with `at`, their place on an axis of settings; the axis; the key's name where one
    key was swept.

    With one key a place is its value, numbers in their order; with several it is the setting as it
    is.
    """
    import altair as alt

    settings = list(dict.fromkeys(data["setting"]))
    [*keys] = {key for setting in settings for key in setting_items(setting)}
    if len(keys) == 1:
        name = {
            setting: next(iter(setting_items(setting).values()), NOT_USED) for setting in settings
        }
        axis = alt.Axis(labelAngle=0)
    else:
        name = {setting: setting or NOT_USED for setting in settings}
        axis = alt.Axis(labelAngle=-35, labelLimit=260, labelExpr="split(datum.label, ', ')")
    order = sorted(settings, key=lambda setting: (setting != "", _number(name[setting])))
    scale = alt.Scale(
        domain=[name[setting] for setting in order], paddingInner=0.15, paddingOuter=0.075
    )
    return (
        data.assign(at=data["setting"].map(name)),
        alt.X("at:N", axis=axis, scale=scale),
        keys[0] if len(keys) == 1 else None,
    )


def _number(value: str) -> float:
    # Sorting is stable, so what is no number stays in the grid's order.
    try:
        return float(value)
    except ValueError:
        return 0.0


def epoch_axis(epochs: pd.Series, title: str | None = "epoch") -> alt.X:
    """Whole epochs only, at most about ten of them labelled, with room beside the first and the
    last point.
    """
    import altair as alt

    values = sorted(int(epoch) for epoch in epochs.unique())
    return alt.X(
        "epoch:Q",
        title=title,
        scale=alt.Scale(zero=False, nice=False, padding=12),
        axis=alt.Axis(values=values[:: len(values) // 10 + 1], format="d", grid=False),
    )


def log_axis(low: float, high: float) -> dict[str, Any]:
    """Scale and axis from low to high in logs, labelled at each power of 10, and between where
    there are few.
    """
    import altair as alt

    steps = (1,) if high / low > 100 else (1, 2, 5) if high / low > 10 else range(1, 10)
    ticks = [float(f"{step}e{power}") for power in range(-12, 7) for step in steps]
    return {
        "scale": alt.Scale(type="log", domain=[low, high], nice=False),
        "axis": alt.Axis(values=[tick for tick in ticks if low <= tick <= high], format="~g"),
    }


def panel_name(metric: str) -> str:
    """What a panel is headed with, for "macro", "micro" and tasks."""
    return {"macro": "mean of tasks", "micro": "all examples"}.get(metric, metric)


def words(metric: str) -> str:
    """A metric's key as words."""
    return metric.replace("_", " ").replace("/", ", ")


def finish(chart: Any, title: str, subtitle: str) -> Any:
    """Title, one font and quiet grid: the same for all figures."""
    import altair as alt

    return (
        chart.properties(
            title=alt.TitleParams(title, subtitle=subtitle, anchor="start"),
            background="white",
            padding=8,
        )
        .configure(font="sans-serif")
        .configure_axis(
            labelFontSize=11, titleFontSize=12, titleFontWeight="normal", gridColor="#ebebeb"
        )
        .configure_axisX(labelAngle=0)
        .configure_header(labelFontSize=13, labelFontWeight="bold")
        .configure_legend(labelFontSize=11, titleFontSize=12, titleFontWeight="normal")
        .configure_title(fontSize=14, subtitleFontSize=11, subtitleColor="#555555", offset=10)
        .configure_view(stroke="#d9d9d9")
    )


def visible(token: str) -> str:
    """A token as it can be read on an axis: marks of a leading space as a dot, line ends as
    backslash n.
    """
    for mark, shown in (("Ġ", "·"), ("▁", "·"), ("Ċ", "\\n"), ("\n", "\\n"), (" ", "·")):
        token = token.replace(mark, shown)
    return token if len(token) <= 14 else token[:13] + "…"


def _packed(png: bytes) -> bytes:
    """The same picture in about a third of the bytes: vl-convert deflates fast rather than well."""
    kept, pixels, start = [], b"", 8
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] == b"IDAT":
            pixels += png[start + 8 : end - 4]
        else:
            kept.append(png[start:end])
        start = end
    body = b"IDAT" + zlib.compress(zlib.decompress(pixels), 9)
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return b"".join([png[:8], *kept[:-1], chunk, kept[-1]])
