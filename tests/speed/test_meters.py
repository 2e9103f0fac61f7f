"""Clocks, peak memory, goals. No time is tested beyond the sleeps that are in it."""

import time

import pytest
import torch

from kd_utils.config.parameter_files import load_parameters, notebook_config
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


def test_floors_say_what_is_missed():
    table = meters.against_goals(
        {"data_wait_share": 0.06, "speedup_vs_naive": 16.0, "other": 1.0},
        {"data_wait_share": 0.0, "speedup_vs_naive": 40.0},
    )
    assert table["key"].tolist() == ["data_wait_share", "speedup_vs_naive"]
    assert table["met"].tolist() == [False, True]
    assert table["margin"].tolist() == [pytest.approx(0.5), 2.0]
    assert table["limit"].tolist() == [0.0, 40.0]


def test_the_bench_file_is_for_a_gpu_and_builds():
    config = notebook_config(
        "05_measure_speed", load_parameters("papermill_params/bench-llama2.yaml")
    )
    assert config.shapes == "llama2" and config.sweep_trials == 0


def test_a_failing_command_is_reported_with_the_end_of_its_output():
    with pytest.raises(RuntimeError, match="the toy sweep failed: .*no reason"):
        meters._seconds("-c", "raise SystemExit('no reason')")
