"""Clocks and peak memory. No time is tested beyond the sleeps that are in it."""

import time

import torch

from kd_utils.speed import meters


def test_alternate_takes_turns_and_warms_up():
    order = []
    table = meters.alternate(
        {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.01))}, 3
    )
    assert order == ["a", "b"] * 4 and list(table.columns) == ["a", "b"] and len(table) == 3
    assert (table["b"] >= 0.01).all()


def test_alternate_without_warm_up_measures_the_first_round():
    order = []
    table = meters.alternate({"a": lambda: order.append("a")}, 2, warm_up=False)
    assert order == ["a", "a"] and len(table) == 2


def test_laps_are_summed_by_part():
    laps = meters.Laps()
    for part in ("read", "step", "read"):
        time.sleep(0.01)
        laps.lap(part)
    assert list(laps.seconds) == ["read", "step"]
    assert laps.seconds["read"] >= 0.02 and laps.seconds["step"] >= 0.01


def test_peak_memory_sees_what_was_freed_again():
    assert 90 < meters.peak_mb(lambda: torch.ones(25 * 2**20)) < 130
    assert meters.peak_mb(lambda: None) < 20
