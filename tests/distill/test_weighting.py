"""Weights that are set by shares of the gradient: what they reach, when, and after a restart."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_training import cached, terms_of_teacher
from tiny import tiny_llama

from kd_utils.config.parameter_files import notebook_config
from kd_utils.distill.batches import collate
from kd_utils.distill.training import gradient_norms, gradient_shares, loss_terms
from kd_utils.distill.weighting import Weighting, weights_by_shares
from kd_utils.models.output_head import output_head
from kd_utils.models.signals import forward_signals

FIXED = {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}
BATCH = collate(cached([5, 9, 4]))


def weighing(student, steps=40, **changes):
    values = {"distill_type": "combined", "weighting": "share", "hidden_share": 0.2}
    values |= {"warmup_ratio": 0.0, **changes}
    data = SimpleNamespace(
        config=notebook_config("03_train_student", values),
        total_steps=steps,
        device=torch.device("cpu"),
        probe=lambda: BATCH,
    )
    signals_of = partial(forward_signals, student, map_layers=[2])
    terms_of = partial(loss_terms, teachers=[terms_of_teacher()], terms=tuple(data.config.weights))
    return Weighting(data, student, signals_of, terms_of)


def at(step, rows=()):
    """What a weighting asks of a trial's meter."""
    return SimpleNamespace(global_step=step, rows=rows)


def test_weights_by_hand():
    """The rest is 1 * 3 + 0.5 * 2 = 4, which is 80 % of 5: 0.75 is 15 % of it, 0.25 is 5 %."""
    norms = {"task": 3.0, "kd": 2.0, "hidden": 0.5, "attention": 1e-3}
    found = weights_by_shares(norms, FIXED, {"hidden": 0.15, "attention": 0.05})
    assert found == pytest.approx({"task": 1.0, "kd": 0.5, "hidden": 1.5, "attention": 250.0})
    alone = weights_by_shares({**norms, "attention": 0.0}, FIXED, {"hidden": 0.2, "attention": 0.0})
    assert alone["attention"] == 0 and alone["hidden"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ({"attention": 0.0}, "gradient of 'attention' .* norm 0, .*: set attention_share to 0, or"),
        ({"hidden": float("nan")}, "gradient of 'hidden' .* norm nan, .*: set hidden_share to 0"),
        ({"kd": float("inf")}, "gradient of the terms without a share .* norm inf"),
        ({"task": 0.0, "kd": 0.0}, "gradient of the terms without a share .*: raise alpha or beta"),
    ],
)
def test_a_gradient_that_no_weight_helps_is_named(norms, message):
    norms = {"task": 3.0, "kd": 2.0, "hidden": 0.5, "attention": 1e-3, **norms}
    with pytest.raises(ValueError, match=f"^the {message}[^\n]*'fixed'$"):
        weights_by_shares(norms, FIXED, {"hidden": 0.1, "attention": 0.1})


def test_the_terms_have_their_shares_when_the_weights_are_set():
    student = tiny_llama(seed=1, attention_dropout=0.5).train()
    setting = weighing(student)
    assert setting.before_step(at(0)) == FIXED and setting.step == 1  # warm-up: none
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    weights = setting.before_step(at(1))
    assert torch.equal(torch.rand(1), drawn) and student.training, "training goes on undisturbed"
    assert all(parameter.grad is None for parameter in student.parameters())
    student.eval()
    terms = setting.terms_of(setting.signals_of(BATCH.input_ids), output_head(student), batch=BATCH)
    shares = gradient_shares(terms, weights, student)
    assert shares["grad_share/hidden"] == pytest.approx(0.2, rel=1e-3)
    assert shares["grad_share/attention"] == pytest.approx(0.1, rel=1e-3)
    assert (weights["task"], weights["kd"]) == (FIXED["task"], FIXED["kd"])
    assert gradient_norms(terms, student)["hidden"] > 0


def test_they_are_set_once_and_a_restart_has_them_to_the_bit():
    student = tiny_llama(seed=1)
    setting = weighing(student, steps=400, warmup_ratio=0.05)
    assert setting.step == 20 and setting.before_step(at(19)) == FIXED
    weights = setting.before_step(at(20))
    with torch.no_grad():
        student.lm_head.weight.mul_(2)
    assert setting.before_step(at(21)) == setting.weights == weights != FIXED
    row = json.loads(json.dumps({f"weight/{name}": value for name, value in weights.items()}))
    again = weighing(student, steps=400, warmup_ratio=0.05)
    assert again.before_step(at(40, [row])) == weights
    # Back to a state before they were set, as after an interrupt: fixed again, and set again.
    assert setting.before_step(at(10)) == FIXED
    assert setting.before_step(at(20)) != weights


@pytest.mark.parametrize(
    ("steps", "warmup_ratio", "step"), [(1000, 0.0, 10), (40, 0.0, 1), (1000, 0.05, 50)]
)
def test_when_they_are_set(steps, warmup_ratio, step):
    assert weighing(tiny_llama(), steps, warmup_ratio=warmup_ratio).step == step


@pytest.mark.parametrize(("steps", "warmup_ratio"), [(1, 0.0), (10, 1.0)])
def test_a_training_that_ends_before_is_refused(steps, warmup_ratio):
    with pytest.raises(ValueError, match="leaves no step to use them: raise epochs or lower"):
        weighing(tiny_llama(), steps, warmup_ratio=warmup_ratio)
    assert weighing(tiny_llama(), steps, weighting="fixed").before_step(at(1)) == FIXED


def test_a_method_without_such_terms_keeps_its_weights():
    setting = weighing(tiny_llama(), distill_type="black_box")
    assert setting.before_step(at(5)) == {"task": 1.0, "kd": 0.5}
