"""The bench trains as notebook 03 does, on signals that are the teacher's own."""

import numpy as np
import pytest
import torch
from tiny import example_rows, tiny_llama

from kd_utils.config.parameter_files import notebook_config
from kd_utils.speed import step, workload
from kd_utils.teacher.extraction import signal_function

SHAPE = workload.SHAPES["tiny"]


@pytest.fixture(scope="module")
def teacher():
    return workload.random_model(SHAPE["teacher"], sharpness=4.0)


@pytest.fixture
def bench(teacher, tmp_path):
    rows = example_rows([6, 9, 14, 5])
    workload.write_sample(tmp_path, rows, teacher, batch_tokens=100)
    config = notebook_config("05_measure_speed", {"bench_batch_size": 2})
    return step.StepBench(SHAPE, rows, tmp_path, config, torch.device("cpu"))


def test_exact_rows_are_the_teachers_own_values():
    teacher, rows = tiny_llama(), example_rows([6, 9])
    run = signal_function(teacher, signals="white_box")
    for exact, stored in zip(step.exact_rows(teacher, rows), run(rows), strict=True):
        assert exact.signals["hidden"].dtype == exact.signals["attention"].dtype == np.float32
        np.testing.assert_allclose(stored.signals["hidden"], exact.signals["hidden"], atol=2e-3)
        np.testing.assert_allclose(
            stored.signals["attention"], exact.signals["attention"], atol=1e-3
        )


@pytest.mark.parametrize("method", step.METHODS)
def test_an_epoch_trains_the_student_and_what_its_terms_need(bench, method):
    parameters = [*bench.student.parameters(), *bench.projector.parameters()]
    before = [p.detach().clone() for p in parameters]
    seconds = bench.epoch(step.METHODS[method])
    parts = ["wait", "body", *step.METHODS[method], "backward", "clip and step"]
    assert list(seconds) == parts
    moved = [not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]
    students = len(list(bench.student.parameters()))
    assert all(moved[:students]) and all(p.grad is None for p in parameters)
    assert set(moved[students:]) == {"hidden" in step.METHODS[method]}


def test_terms_read_only_the_signals_that_they_need(bench):
    found = {
        method: set(bench.examples([0], terms)[0].signals or ())
        for method, terms in step.METHODS.items()
    }
    both = {"hidden", "attention"}
    assert found == {
        "task": set(),
        "black_box": {"hidden"},
        "hidden_state": {"hidden"},
        "attention": both,
        "combined": both,
    }


def test_restart_gives_the_same_student_also_after_a_fresh_epoch(bench):
    before = [p.detach().clone() for p in bench.student.parameters()]
    bench.epoch(step.METHODS["combined"])
    assert 0 <= bench.fresh_epoch_mb(step.METHODS["task"]) < 10  # not what was held before
    bench.restart(step.METHODS["task"])
    assert len(bench.parameters) == len(before)
    for old, new in zip(before, bench.student.parameters(), strict=True):
        torch.testing.assert_close(new, old, atol=0, rtol=0)


def test_the_compact_gradient_is_close_to_the_exact_one_and_not_equal(bench, teacher):
    cosines = step.gradient_cosines(bench, teacher, bench.rows, (1.0, 4.0))
    assert list(cosines.columns) == ["all", "kd", "hidden", "attention"]
    assert cosines.index.tolist() == [1.0, 4.0]
    assert (cosines > 0.99).all(axis=None) and (cosines < 1).any(axis=None)
    assert teacher.dtype == torch.float32


def test_a_gradient_is_the_weighted_sum_of_its_terms(bench):
    examples = bench.examples([0, 1], step.METHODS["combined"])
    bench.parameters = [bench.student.get_input_embeddings().weight]  # every term reaches these
    whole = bench.gradient(examples, 2.0, "all")
    parts = [weight * bench.gradient(examples, 2.0, term) for term, weight in step.WEIGHTS.items()]
    torch.testing.assert_close(whole, sum(parts))
