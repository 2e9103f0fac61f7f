"""Figures of cut students: drawn without an error, with what they are to show in them."""

import numpy as np
import pandas as pd
import pytest

from kd_utils.figures import cut_plots, plots


def drawn(chart):
    """The chart's specification, after it was drawn as a picture."""
    assert len(plots.show(chart).data) > 3000
    return chart.to_dict()


def of(kind, layers, units):
    random = np.random.default_rng(len(kind))
    return pd.DataFrame(
        [(kind, layer, unit, random.random()) for layer in layers for unit in range(units)],
        columns=["kind", "layer", "index", "score"],
    )


def test_importance_has_a_panel_for_each_kind_of_unit():
    scores = pd.concat(
        [of("layers", [1, 2, 3], 1), of("width", [0], 12), of("heads", [1, 2, 3], 4),
         of("mlp", [1, 2, 3], 9)]
    )  # fmt: skip
    panels = drawn(cut_plots.importance(scores))["hconcat"]
    assert {panel["title"] for panel in panels} == set(cut_plots.NAMES.values())


def test_agreement_and_the_cost_of_a_cut():
    table = pd.DataFrame(
        {
            "rows": [10, 20] * 2,
            "kind": ["mlp"] * 2 + ["heads"] * 2,
            "rank_correlation": [0.5, 0.6, 0.7, 0.9],
        }
    )
    drawn(cut_plots.agreement(table))
    before = pd.DataFrame({"start": ["whole", "a", "a", "b"], "loss": [0.1, 1.0, 2.0, 3.0]})
    assert "0.100" in str(drawn(cut_plots.step_zero(before))["title"])


RETAINED = pd.DataFrame(
    {
        "start": ["pruned minitron"] * 2 + ["random"] * 2,
        "distill_type": "black_box",
        "setting": "",
        "ratio": [2.0, 10.0] * 2,
        "accuracy": [0.95, 0.78, 0.87, 0.48],
        "accuracy_low": [0.93, 0.75, 0.85, 0.45],
        "accuracy_high": [0.97, 0.8, 0.9, 0.5],
        "raw": [0.98, 0.8, 0.9, 0.5],
        "raw_low": [0.96, 0.7, 0.8, 0.4],
        "raw_high": [0.99, 0.9, 0.95, np.nan],
        "teacher": 0.97,
        "non_embedding": [1e6, 2e5] * 2,
        "bytes": [4e6, np.nan] * 2,
    }
)


def test_the_frontier_has_a_panel_for_each_size_and_no_interval_below_the_points():
    sizes = {"non_embedding": "parameters", "bytes": "bytes"}
    chart = drawn(cut_plots.frontier(RETAINED, sizes))
    assert len(chart["hconcat"]) == 2
    rows = next(iter(chart["datasets"].values()))
    first = next(row for row in rows if row.get("ratio") == 2.0)
    assert first["percent"] == pytest.approx(95)
    assert first["percent_low"] < first["percent"] < first["percent_high"]


def test_bands_are_drawn_beside_the_points():
    chart = drawn(cut_plots.retention_bands(RETAINED, {2: (0.95, 0.99), 10: (0.8, 0.9)}, 1.25))
    boxes = next(layer for layer in chart["layer"] if layer["mark"]["type"] == "rect")
    rows = chart["datasets"][boxes["data"]["name"]]
    assert [row["low"] for row in rows] == [95, 80] and rows[0]["to"] == 2.5
    colours = str(chart["layer"][1]["encoding"]["color"])
    assert cut_plots.COLOURS["pruned minitron + black_box"] in colours
