"""Floors of the measurements, and the parameter file for a GPU."""

import pytest

from kd_utils.config.parameter_files import load_parameters, notebook_config
from kd_utils.speed import floors


def test_floors_say_what_is_missed():
    table = floors.against_floors(
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
        floors._seconds("-c", "raise SystemExit('no reason')")
