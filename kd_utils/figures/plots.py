"""The look that all figures share, `show`, and the figures of the data, of the teacher and of one
trial's training.

Trials draw with this module, so it imports nothing of the analysis: a change there leaves the
trials as they are.

A figure is a function that takes a tidy table and returns an `alt.Chart`. Every method has one
colour (Okabe and Ito's, which colour-blind readers can tell apart), and a loss term has the colour
of the method that adds it. Subtitles say so when an axis does not start at 0.
"""

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from IPython.display import Image

#: References and controls, with which the distillations are compared, have light or warm colours.
COLOURS = {
    "untrained": "#b3b3b3",
    "task_only": "#56b4e9",
    "teacher_answers": "#a6cee3",
    "label_smoothing": "#c9b458",
    "shuffled": "#d55e00",
    "black_box": "#4d4d4d",
    "hidden_state": "#0072b2",
    "attention": "#e69f00",
    "combined": "#009e73",
}

FURTHER_COLOURS = ("#6a51a3", "#8c6d1f", "#8dd3c7", "#a50f15")

TERM_COLOURS = {
    "task": "#a6a6a6",
    "smoothing": COLOURS["label_smoothing"],
    "kd": COLOURS["black_box"],
    "hidden": COLOURS["hidden_state"],
    "attention": COLOURS["attention"],
}

BINS = 40  # of the histogram of lengths, of equal width

LONGEST_MAP = 60

#: How a token is written on an axis: marks of a leading space as a dot, line ends as backslash n.
MARKS = str.maketrans({"Ġ": "·", "▁": "·", "Ċ": "\\n", "\n": "\\n", " ": "·"})

#: Arguments of `show` with which the picture of `trial_curves` takes 10 kB of a notebook.
SMALL: dict[str, Any] = {"scale": 1.0, "colours": 32}

#: Draws a chart's specification as a PNG; for a forked trial another process does it.
draw: Callable[..., bytes] = vl_convert.vegalite_to_png

#: Depth and colour type in a PNG's header; for a palette with what follows them.
RGBA, PALETTE = bytes([8, 6]), bytes([8, 3, 0, 0, 0])


def show(chart: alt.TopLevelMixin, scale: float = 1.5, colours: int = 256) -> Image:
    """The chart as a PNG image, for the last line of a cell.

    A notebook keeps this picture and no JavaScript, so GitHub, nbviewer and nbconvert show what
    JupyterLab shows. A picture takes about 5 to 40 kB of the record.

    Args:
        chart: any Altair chart.
        scale: pixels per unit of the chart; the picture is shown at the chart's own size.
        colours: of the picture's palette, at most 256; a heat map needs them all.
    """
    # Altair refuses more than 5,000 rows, for a browser's sake; here only the picture is kept.
    with alt.data_transformers.enable("default", max_rows=None):
        specification = chart.to_dict()
    png = _packed(draw(specification, scale=scale), colours)
    return Image(png, width=round(int.from_bytes(png[16:20], "big") / scale))


def token_lengths(lengths: pd.DataFrame, max_length: int) -> alt.Chart:
    """Histogram of tokens per example (prompt and answer), a panel per task; the rule is the
    longest kept, `max_length` tokens.

    `lengths` has task and tokens, a row per example. It is binned here, so the chart stays small.
    """
    edges = np.linspace(0, max(max_length, lengths["tokens"].max()) + 1, BINS + 1)
    parts = [
        pd.DataFrame({"task": task, "low": edges[:-1], "high": edges[1:]}).assign(
            examples=np.histogram(tokens, edges)[0], limit=max_length
        )
        for task, tokens in lengths.groupby("task", sort=False)["tokens"]
    ]
    x = alt.X("low:Q", bin="binned", title="tokens per example (prompt and answer)")
    panels = alt.layer(
        alt.Chart()
        .mark_bar(color="#0072b2", binSpacing=1)
        .encode(x=x, x2="high:Q", y=alt.Y("examples:Q", title="examples")),
        alt.Chart().mark_rule(strokeDash=[4, 3], color="#d55e00").encode(x="mean(limit):Q"),
        width=560,
        height=90,
    )
    row = alt.Row("task:N", title=None, sort=list(dict.fromkeys(lengths["task"])))
    chart = panels.facet(data=pd.concat(parts, ignore_index=True), row=row)
    return finish(
        chart.resolve_scale(y="independent"),
        "Tokens per example by task",
        f"dashed: the longest sequence kept, {max_length} tokens. The count axes differ.",
    )


def attention_heatmap(matrix: Any, tokens: Sequence[str]) -> alt.Chart:
    """One head's causal attention map: a row per query, a column per key, colour the weight
    (square-root scale).

    Args:
        matrix: (T, T) weights, rows sum to 1; the upper triangle is not drawn.
        tokens: T token strings. Of a longer text the first 60 are drawn; in a causal map the rest
            does not matter.
    """
    first = f"; the first {LONGEST_MAP} of {len(tokens)} tokens" * (len(tokens) > LONGEST_MAP)
    return finish(map_cells(matrix, tokens), "One head's attention map", "rows sum to 1" + first)


def map_cells(matrix: Any, tokens: Sequence[str]) -> alt.Chart:
    """The panel of `attention_heatmap`, without its titles."""
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
    scale = alt.Scale(type="sqrt", scheme="viridis", domain=[0, 1])
    side = size * max(11, min(24, 420 // size))
    return (
        alt.Chart(data, width=side, height=side)
        .mark_rect()
        .encode(
            x=alt.X("key:O", title="key (attended to)", axis=alt.Axis(labelAngle=-90, **axis)),
            y=alt.Y("query:O", title="query", axis=alt.Axis(**axis)),
            color=alt.Color("weight:Q", title="weight", scale=scale),
        )
    )


def trial_curves(rows: Sequence[Mapping[str, Any]]) -> alt.HConcatChart:
    """The learning curve of one trial: its loss terms in training and its held-out loss by epoch,
    and the accuracy on each task.

    Args:
        rows: of `metrics.json`: `epoch`, `train_loss/TERM`, `held_out_loss`,
            `held_out_accuracy/TASK`.
    """
    table = pd.DataFrame(rows).set_index("epoch")
    losses = table.filter(regex="^train_loss/").rename(columns=lambda key: key.split("/")[1])
    losses["task, held out"] = table["held_out_loss"]
    tasks = table.filter(regex="^held_out_accuracy/(?!macro|gsm8k_flexible)")
    tasks = 100 * tasks.rename(columns=lambda key: key.split("/")[1])
    known = TERM_COLOURS | {"task, held out": "#000000"}
    log = {"scale": alt.Scale(type="log", nice=False, padding=8), "axis": alt.Axis(format=".2~g")}
    linear = {"scale": alt.Scale(zero=False, padding=8)}
    chart = alt.hconcat(
        _trial_panel(losses[losses > 0], "loss, unweighted (log)", log, known),
        _trial_panel(tasks, "held-out accuracy (%)", linear, {}),
    )
    return finish(chart.resolve_scale(color="independent"), "Learning curve", "")


def _trial_panel(
    wide: pd.DataFrame, title: str, axis: dict[str, Any], known: Mapping[str, str]
) -> alt.Chart:
    data = wide.reset_index().melt("epoch").dropna()
    legend = alt.Legend(title=None, values=list(wide))
    return (
        alt.Chart(data, width=170, height=130)
        .mark_line(point={"size": 30}, strokeWidth=1.5)
        .encode(
            x=epoch_axis(data["epoch"]),
            y=alt.Y("value:Q", title=title, **axis),
            color=colour("variable", wide, known, legend=legend),
        )
    )


def colour(
    field: str, names: Iterable[str], known: Mapping[str, str] = COLOURS, **options: Any
) -> alt.Color:
    """A colour scale for a column on which the known names (name -> colour) always have their own
    colours, and other `names` get further ones. `options` are those of `alt.Color`.
    """
    further = [name for name in dict.fromkeys(names) if name not in known]
    colours = {**known, **dict(zip(further, cycle(FURTHER_COLOURS)))}
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color(f"{field}:N", scale=scale, **options)


def method_colour(methods: Iterable[str], legend: alt.Legend | None = None) -> alt.Color:
    """Colour by method (`distill_type`), the same in every figure."""
    return colour("distill_type", methods, legend=legend)


def epoch_axis(epochs: pd.Series) -> alt.X:
    """The share of the data seen, in epochs: about ten whole ones labelled (tenths where there are
    not two), with room beside the first and last point.
    """
    whole = range(math.ceil(epochs.min()), math.floor(epochs.max()) + 1)
    ticks = {"values": list(whole[:: len(whole) // 10 + 1])} if len(whole) > 1 else {"tickCount": 5}
    return alt.X(
        "epoch:Q",
        title="epoch",
        scale=alt.Scale(zero=False, nice=False, padding=12),
        axis=alt.Axis(**ticks, format="~g", grid=False),
    )


def log_axis(low: float, high: float) -> dict[str, Any]:
    """Scale and axis in logs, labelled at each power of 10, and between where there are few."""
    steps = (1,) if high / low > 100 else (1, 2, 5) if high / low > 10 else range(1, 10)
    ticks = [float(f"{step}e{power}") for power in range(-12, 7) for step in steps]
    return {
        "scale": alt.Scale(type="log", domain=[low, high], nice=False),
        "axis": alt.Axis(values=[tick for tick in ticks if low <= tick <= high], format="~g"),
    }


def sentence(text: str) -> alt.Chart:
    """A figure that only says why there is nothing to draw."""
    return finish(alt.Chart().mark_text().properties(width=400, height=1), text, "")


def finish(chart: Any, title: str, subtitle: str | list[str]) -> Any:
    """Title, one font and quiet grid: the same for all figures."""
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
    """A token as it can be read on an axis, cut to 14 characters."""
    token = token.translate(MARKS)
    return token if len(token) <= 14 else token[:13] + "…"


def _packed(png: bytes, most: int) -> bytes:
    """The picture with a palette of its most frequent colours, in about a sixth of the bytes.

    Rarer colours, which the smoothing of edges makes, become the nearest in the palette.
    """
    header, data, at = png[16:29], b"", 8
    while at < len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : end]
        at = end + 4
    width, height = struct.unpack(">II", header[:8])
    lines = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, -1)
    if header[8:10] != RGBA or (lines[:, 0] != 1).any():
        return png  # not what vl-convert writes: 4 bytes a pixel, minus those of the pixel before
    pixels = np.cumsum(lines[:, 1:].reshape(height, width, 4), axis=1, dtype=np.uint8)
    codes, places, counts = np.unique(
        pixels.view(np.uint32).ravel(), return_inverse=True, return_counts=True
    )
    colours = codes.view(np.uint8).reshape(-1, 4)[:, :3].astype(int)
    palette = colours[np.argsort(-counts, kind="stable")[:most]]
    nearest = ((colours[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1).astype(np.uint8)
    indices = np.pad(nearest[places].reshape(height, width), ((0, 0), (1, 0)))
    chunks = {
        b"IHDR": header[:8] + PALETTE,
        b"PLTE": palette.astype(np.uint8).tobytes(),
        b"IDAT": zlib.compress(indices.tobytes(), 9),
        b"IEND": b"",
    }
    return png[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )
