"""The whole trial is notebook 03's training over the cache that the teacher's pass wrote."""

import numpy as np
import pytest
import torch

from kd_utils.config.parameter_files import notebook_config
from kd_utils.speed import progress, step, whole_trial, workload

SHAPE = workload.SHAPES["tiny"]
CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path):
    return notebook_config(
        "05_measure_speed", {"run_dir": str(tmp_path / "run"), "bench_batch_size": 2}
    )


@pytest.fixture
def bench(tmp_path, config):
    teacher = workload.random_model(SHAPE["teacher"], sharpness=4.0)
    rows = workload.random_rows(7, 97)
    found = whole_trial.teacher_pass(tmp_path / "cache", rows, teacher, batch_tokens=1000)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())
    assert found["teacher_pass_gb"] == on_disk / 1e9 and found["teacher_pass_s"] > 0
    weights_mb = sum(p.nbytes for p in teacher.parameters()) / 2**20
    assert found["teacher_pass_peak_mb"] > weights_mb
    return step.StepBench(SHAPE, rows, tmp_path / "cache", config, CPU, memory_bytes=2**20)


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(bench):
    plans = [bench.plan_of(epoch) for epoch in (1, 2)]
    assert plans[0] == bench.plan != plans[1]
    for plan in plans:
        assert sorted(i for batch in plan for i in batch) == list(range(7))


def test_the_cache_is_read_once_where_it_fits_into_memory(bench):
    terms = step.METHODS["combined"]
    [first], [second] = bench.examples([3], terms), bench.examples([3], terms)
    assert first is second
    [fewer] = bench.examples([3], step.METHODS["black_box"])
    assert set(fewer.signals) == {"hidden"}


def test_training_takes_the_steps_of_the_bench_and_fills_the_record(bench, config):
    for epoch in (1, 2):
        bench.epoch(step.METHODS["combined"], bench.plan_of(epoch))
    wanted = [p.detach().clone() for p in bench.parameters]
    bench.restart()
    record = progress.SpeedRecord(config, CPU)
    table = whole_trial.train(bench, 2, record)
    assert table["epoch"].tolist() == [1, 2] and table["train_loss/kd"].gt(0).all()
    assert record.measured["trial_s"] == pytest.approx(table["seconds"].sum())
    assert record.measured["trial_peak_mb"] > 0 and len(record.tables["epochs"]) == 2
    students = len(list(bench.student.parameters()))
    torch.testing.assert_close(
        [p.detach() for p in bench.parameters[:students]], wanted[:students], atol=1e-5, rtol=1e-4
    )


def test_a_time_limit_ends_the_training_after_an_epoch(bench, config, monkeypatch):
    record = progress.SpeedRecord(config, CPU)
    monkeypatch.setattr(progress.SpeedRecord, "has_time", False)
    table = whole_trial.train(bench, 3, record)
    assert len(table) == 1 and record.left_out == ["whole trial: epochs 2 to 3"]
    assert "trial_s" not in record.measured and record.measured["trial_tokens_per_s"] > 0


def test_a_batch_is_generated_to_its_last_token(bench):
    found = whole_trial.generate(bench, 3, 5)
    assert found["generation_prompts"] == 3 and found["generation_s"] > 0
    assert 0 < found["generation_tokens"] <= 15


def test_words_are_their_ids():
    tokenizer = whole_trial.number_tokenizer(50)
    assert tokenizer.encode("7 3 49") == [7, 3, 49]
    assert tokenizer.decode(np.array([7, 2, 12]), skip_special_tokens=True) == "7 12"
    assert tokenizer.eos_token_id == 2
