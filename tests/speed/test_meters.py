"""Clocks, peak memory, goals. No time is tested beyond the sleeps that are in it."""

import time

import pytest
import torch

from kd_utils.config.parameter_files import load_parameters, notebook_config
from kd_utils.cost import work
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


def test_a_gpu_is_waited_for_before_the_first_lap_and_at_the_end_of_each(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    laps = meters.Laps("cuda:0")
    assert len(waits) == 1
    laps.lap("a")
    laps.lap("b")
    assert waits == [torch.device("cuda:0")] * 3
    meters.Laps("cpu").lap("a")
    assert len(waits) == 3


@pytest.mark.parametrize("kernel", ["keeps the peak", "keeps none"])
def test_peak_memory_sees_what_was_freed_again(kernel, monkeypatch, tmp_path):
    if kernel == "keeps none":
        monkeypatch.setattr(meters, "RESET_PEAK", tmp_path / "missing" / "file")
    # Held for a moment: without the kernel's own peak a thread looks now and then.
    held_a_moment = lambda: (torch.ones(25 * 2**20), time.sleep(0.1))
    assert 90 < meters.peak_mb(held_a_moment) < 130
    assert meters.peak_mb(lambda: None) < 20
    held = torch.ones(25 * 2**20)
    assert meters.peak_mb(lambda: None, all_held=True) > held.nbytes / 2**20


def test_peak_memory_of_a_gpu_is_of_torchs_allocations(monkeypatch):
    held = {"memory_allocated": 3 * 2**20, "max_memory_allocated": 10 * 2**20}
    for name, value in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    order = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: order.append(name))
    assert meters.peak_mb(lambda: order.append("work"), device="cuda") == 7
    assert meters.peak_mb(lambda: None, device="cuda", all_held=True) == 10
    assert order[:3] == ["empty_cache", "reset_peak_memory_stats", "work"]


def test_rates_are_amounts_by_seconds(monkeypatch):
    ticks = iter(range(0, 100, 2))
    monkeypatch.setattr(work.time, "perf_counter", lambda: next(ticks))
    assert work.matrix_rate(torch.device("cpu"), torch.float32) == 2048**3 / 2
    assert meters.memory_rate(torch.device("cpu")) == 2 * 4 * 2**25 / 2


def test_seconds_have_goals_for_the_papers_work_on_a_gpu_only():
    values = load_parameters("papermill_params/bench-llama2.yaml")
    config, gpu = notebook_config("05_measure_speed", values), torch.device("cuda")
    goals = meters.goals_for(config, gpu)
    assert goals["teacher_pass_s"] == ("<=", 60.0) and goals["trial_s"] == ("<=", 120.0)
    assert set(goals) - set(meters.GOALS) == {"teacher_pass_s", "trial_s"}
    assert meters.goals_for(config, torch.device("cpu")) == meters.GOALS
    for key, value in {"trial_rows": 700, "trial_epochs": 1, "shapes": "small"}.items():
        other = notebook_config("05_measure_speed", values | {key: value})
        assert meters.goals_for(other, gpu) == meters.GOALS
    table = meters.against_goals({"trial_s": 150.0}, {"trial_s": 50.0}, goals)
    assert table[["key", "met"]].to_numpy().tolist() == [["trial_s", False]]


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
    assert config.model_dump(include=set(meters.PAPERS_WORK)) == meters.PAPERS_WORK
    assert 0 < config.seconds < 240  # the whole notebook is to end within 4 minutes


def test_a_failing_command_is_reported_with_the_end_of_its_output():
    with pytest.raises(RuntimeError, match="the toy sweep failed: .*no reason"):
        meters.python_seconds("-c", "raise SystemExit('no reason')")
