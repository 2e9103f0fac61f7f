"""What the figures of two tokenizations draw."""

import numpy as np
import pytest

from kd_utils.figures.alignment_plots import merged_maps, token_groups
from kd_utils.figures.plots import show
from kd_utils.tokens.alignment import align

TEXT = "naïve film"  # 11 bytes
TEACHER, STUDENT = (
    np.array([0, 2, 3, 4, 6, 11, 11]),
    np.array([6, 11, 11]),
)  # begin na Ã ¯ ve film end; naïve film end


def test_groups_have_one_colour_and_tokens_lie_on_their_bytes():
    groups = align(TEACHER, STUDENT)
    chart = token_groups(TEXT, TEACHER, STUDENT, groups)
    data = chart.data
    teacher, student = (data[data["side"] == side] for side in ("teacher", "student"))
    assert student["piece"].tolist() == ["naïve", "·film"] and student["colour"].tolist() == [0, 1]
    assert teacher[["start", "end"]].to_numpy().tolist() == [
        [0, 2],
        [2, 3],
        [3, 4],
        [4, 6],
        [6, 11],
    ]
    assert teacher["colour"].tolist() == [0, 0, 0, 0, 1]
    assert show(chart).data.startswith(b"\x89PNG")


def test_a_long_text_is_cut():
    ends = np.arange(1, 501)
    chart = token_groups("a" * 500, ends, ends, align(ends, ends))
    assert len(chart.data) == 2 * 90 and "the first 90 of 500 bytes" in chart.title.subtitle


def test_both_maps_are_drawn_and_rows_of_both_sum_to_one():
    groups = align(TEACHER, STUDENT)
    rows = np.tril(np.ones((7, 7)))
    rows /= rows.sum(-1, keepdims=True)
    chart = merged_maps(
        rows, ["begin", "na", "?", "?", "ve", " film", "end"], groups, TEXT, TEACHER
    )
    before, after = (panel.data for panel in chart.hconcat)
    assert len(before) == 28 and len(after) == 6
    assert after.groupby("query")["weight"].sum().to_numpy() == pytest.approx(1, abs=1e-4)
    assert after.loc[(after["query"] == 1) & (after["key"] == 0), "weight"].item() == pytest.approx(
        5 / 6, abs=1e-4
    )
    assert show(chart).data.startswith(b"\x89PNG")


def test_a_map_that_merging_does_not_change_is_drawn_once():
    ends = np.arange(1, 4)
    chart = merged_maps(np.eye(3), ["a", "b", "c"], align(ends, ends), "abc", ends)
    assert len(chart.hconcat) == 1 and "does not change the map" in chart.title.subtitle
