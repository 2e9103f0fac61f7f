"""The pictures that records keep, the look that figures share, and the figures of the data and of
the teacher.
"""

import json
import struct
import zlib

import altair as alt
import numpy as np
import pandas as pd
import pytest
import vl_convert

from kd_utils.config.trial import METHODS
from kd_utils.figures import panels, plots


def data_of(chart) -> list[dict]:
    [rows] = chart.to_dict()["datasets"].values()
    return rows


def lengths() -> pd.DataFrame:
    return pd.DataFrame(
        {"task": ["sst2"] * 6000 + ["gsm8k"] * 3, "tokens": [30] * 6000 + [1, 511, 700]}
    )


def test_show_gives_an_image_and_no_javascript():
    from IPython.core.formatters import DisplayFormatter

    bundle, _ = DisplayFormatter().format(plots.show(plots.token_lengths(lengths(), 512)))
    assert set(bundle) == {"image/png", "text/plain"}


def test_packing_keeps_the_picture_and_a_valid_file():
    whole = vl_convert.vegalite_to_png(plots.token_lengths(lengths(), 512).to_dict())
    packed = plots._packed(whole, 256)
    assert len(packed) < 0.3 * len(whole)
    chunks = {name: (body, crc) for name, body, crc in png_chunks(packed)}
    assert list(chunks)[0] == b"IHDR" and list(chunks)[-1] == b"IEND"
    assert all(zlib.crc32(name + body) == crc for name, (body, crc) in chunks.items())
    original = b"".join(body for name, body, _ in png_chunks(whole) if name == b"IDAT")
    width, height = struct.unpack(">II", chunks[b"IHDR"][0][:8])
    filtered = np.frombuffer(zlib.decompress(original), np.uint8).reshape(height, -1)[:, 1:]
    pixels = np.cumsum(filtered.reshape(height, width, 4), axis=1, dtype=np.uint8)[..., :3]
    palette = np.frombuffer(chunks[b"PLTE"][0], np.uint8).reshape(-1, 3)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"][0]), np.uint8).reshape(height, -1)
    error = np.abs(palette[lines[:, 1:]].astype(int) - pixels)
    assert (error > 0).mean() < 0.02 and error.max() < 32


def test_packing_leaves_a_png_of_another_kind_as_it_is():
    whole = vl_convert.vegalite_to_png(plots.token_lengths(lengths(), 512).to_dict())
    grey = whole[:24] + bytes([8, 0]) + whole[26:]
    assert plots._packed(grey, 256) == grey


def png_chunks(png: bytes):
    at = 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        yield (
            png[at + 4 : at + 8],
            png[at + 8 : at + 8 + size],
            int.from_bytes(png[at + 8 + size : at + 12 + size], "big"),
        )
        at += 12 + size


def test_every_method_has_a_colour_of_its_own():
    assert list(plots.COLOURS) == list(METHODS)
    scale = plots.method_colour(["attention", "new", "newer"]).to_dict()["scale"]
    colours = dict(zip(scale["domain"], scale["range"], strict=True))
    assert (
        colours["attention"] == plots.COLOURS["attention"]
        and len(set(colours.values())) == len(METHODS) + 2
    )


def test_an_axis_of_one_key_has_its_numbers_in_order_and_names_as_they_came():
    def axis(*settings):
        data, x, name = panels.setting_axis(pd.DataFrame({"setting": settings}))
        return data["at"].tolist(), x.to_dict()["scale"]["domain"], name

    assert axis("g=10", "", "g=0.5") == (["10", "–", "0.5"], ["–", "0.5", "10"], "g")
    assert axis("t=whole", "t=answer")[1:] == (["whole", "answer"], "t")
    assert axis("a=1", "", "b=2")[1:] == (["–", "a=1", "b=2"], None)


def test_a_log_axis_is_labelled_in_wide_and_in_narrow_ranges():
    def ticks(low, high):
        return plots.log_axis(low, high)["axis"].to_dict()["values"]

    assert ticks(0.01, 100) == [0.01, 0.1, 1, 10, 100]
    assert ticks(0.3, 8) == [0.5, 1, 2, 5] and ticks(0.35, 0.65) == [0.4, 0.5, 0.6]


def test_lengths_histogram_counts_every_example_once():
    chart = plots.token_lengths(lengths(), max_length=512)
    rows = data_of(chart)
    assert sum(r["examples"] for r in rows) == 6003 and len(rows) == 2 * 40
    assert max(r["high"] for r in rows) > 700 and plots.show(chart).data.startswith(b"\x89PNG")


def test_heatmap_draws_the_causal_half_with_its_tokens():
    size = 5
    chart = plots.attention_heatmap(
        np.tril(np.full((size, size), 0.2)), ["The", "Ġfilm", "▁is", "Ċ", '"']
    )
    rows = data_of(chart)
    assert len(rows) == size * (size + 1) // 2 and all(r["key"] <= r["query"] for r in rows)
    labels = chart.to_dict()["encoding"]["x"]["axis"]["labelExpr"]
    assert json.loads(labels.removesuffix("[datum.value]")) == ["The", "·film", "·is", "\\n", '"']
    assert plots.show(chart).data.startswith(b"\x89PNG")


def test_heatmap_of_a_long_text_shows_its_beginning():
    size = plots.LONGEST_MAP + 20
    chart = plots.attention_heatmap(np.tril(np.ones((size, size))), ["word"] * size)
    assert len(data_of(chart)) == plots.LONGEST_MAP * (plots.LONGEST_MAP + 1) // 2
    assert f"the first {plots.LONGEST_MAP} of {size} tokens" in chart.to_dict()["title"]["subtitle"]


def test_heatmap_refuses_a_map_that_does_not_fit_its_tokens():
    with pytest.raises(ValueError, match=r"\(2, 3, 3\).*2 tokens"):
        plots.attention_heatmap(np.zeros((2, 3, 3)), ["a", "b"])


def test_a_panel_without_data_keeps_its_place_and_moves_no_other():
    """As of `attention` where hidden_layers was swept: behind it panels stood at names of other
    methods.
    """
    methods, settings = ["black_box", "hidden_state", "attention"], ["b=1", "b=2", "a=1", "a=2"]
    drawn = {
        (setting, method)
        for setting in settings
        for method in methods
        if method == "black_box" or setting.startswith("b") == (method == "hidden_state")
    }
    data = pd.DataFrame(
        [
            {"setting": setting, "distill_type": method, "value": methods.index(method)}
            for setting, method in sorted(drawn)
        ]
    )
    data = data.sort_values("setting", key=lambda names: names.map(settings.index), kind="stable")
    points = alt.Chart().mark_circle().encode(y="value:Q", color=plots.method_colour(methods))
    chart = panels.facet(points, data, "distill_type", methods)

    def groups(item, name):
        here = item["items"] if item.get("name") == name else []
        return here + [found for inner in item.get("items", []) for found in groups(inner, name)]

    cells = groups(vl_convert.vegalite_to_scenegraph(chart.to_dict())["scenegraph"], "cell")
    cells = sorted(cells, key=lambda cell: (cell.get("y", 0), cell.get("x", 0)))
    marks = [
        [
            mark["fill"]
            for mark in [*groups(cell, "child_marks"), *groups(cell, "child_layer_0_marks")]
            if mark.get("opacity")
        ]
        for cell in cells
    ]
    assert marks == [
        [plots.COLOURS[method]] if (setting, method) in drawn else []
        for setting in settings
        for method in methods
    ]
