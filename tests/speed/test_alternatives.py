"""The alternatives do the same work as the code that is used, and say why one cannot be measured."""

import sys
from types import ModuleType

import pytest
import torch

from kd_utils.config.parameter_files import notebook_config
from kd_utils.distill import batches
from kd_utils.models import signals
from kd_utils.speed import alternatives, step, workload

SHAPE = workload.SHAPES["tiny"]


@pytest.fixture
def bench(tmp_path):
    teacher = workload.random_model(SHAPE["teacher"], sharpness=4.0)
    rows = workload.random_rows(14, 97)
    workload.write_sample(tmp_path, rows, teacher, batch_tokens=1000)
    config = notebook_config("05_measure_speed", {})
    return step.StepBench(SHAPE, rows, tmp_path, config, torch.device("cpu"))


class Liger(torch.nn.Module):
    """`LigerFusedLinearJSDLoss` with beta 0, as its documentation describes it."""

    scale = 1.0

    def __init__(self, weight_hard_loss, weight_soft_loss, beta, temperature, compiled):
        super().__init__()
        assert (weight_hard_loss, weight_soft_loss, beta) == (0.0, 1.0, 0.0) and not compiled
        self.temperature = temperature

    def forward(self, student, student_weight, teacher, teacher_weight, labels):
        assert labels.shape == student.shape[:1] and (labels >= 0).all()
        student_log = (student @ student_weight.T / self.temperature).log_softmax(-1)
        teacher_log = (teacher @ teacher_weight.T / self.temperature).log_softmax(-1)
        return self.scale * torch.nn.functional.kl_div(
            student_log, teacher_log, reduction="batchmean", log_target=True
        )


@pytest.fixture
def liger(monkeypatch):
    module = ModuleType("liger_kernel.chunked_loss")
    module.LigerFusedLinearJSDLoss = Liger
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", module)


def test_what_cannot_be_measured_is_told_in_one_line():
    def fails():
        raise RuntimeError("no\ncompiler")

    def lacks():
        import no_such_package  # noqa: F401

    assert alternatives.tried(fails) == "failed: RuntimeError: no compiler"
    assert alternatives.tried(lacks) == "not installed: No module named 'no_such_package'"


def test_both_kl_losses_are_timed_if_they_agree(bench, liger, monkeypatch):
    table = alternatives.kl_losses(bench, 5, 2)
    assert list(table.columns) == ["kd_loss", "Liger"] and table.shape == (2, 2)
    assert (table > 0).all(axis=None)
    monkeypatch.setattr(Liger, "scale", 1.1)
    with pytest.raises(AssertionError):
        alternatives.kl_losses(bench, 5, 1)


def test_compiled_layers_give_the_same_gradient_at_every_shape(bench):
    batches_of_rows = [bench.examples(rows, step.WEIGHTS) for rows in ([0, 1], [2, 3, 12])]
    wanted = [bench.gradient(examples, 2.0, "all") for examples in batches_of_rows]
    for layer in signals.decoder_layers(bench.student):
        layer.compile(dynamic=True, backend="eager")
    found = [bench.gradient(examples, 2.0, "all") for examples in batches_of_rows]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
    bench.plan = [[0, 1]]
    table = alternatives.compiled(bench, 1, "eager")
    assert list(table.columns) == ["eager", "compiled", "first"] and table.shape == (1, 3)
    assert all(layer._compiled_call_impl is None for layer in signals.decoder_layers(bench.student))


def test_budget_batches_hold_every_row_once_and_keep_the_budget(bench):
    plan = alternatives.budget_plan(bench.rows, 600)
    assert sorted(i for batch in plan for i in batch) == list(range(14))
    for batch in plan:
        made = batches.collate([bench.rows[i] for i in batch])
        assert made.input_ids.numel() <= 600
    assert max(map(len, plan)) > min(map(len, plan))
