"""A training step leaves its device at no point: no tensor is made on the CPU, and none is read.

The step runs on torch's device "meta", which has shapes and no values. There `.item()` and a copy
to the host fail, as they would make a GPU wait; `OneDevice` looks for what is made elsewhere.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import all_terms, example_rows, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_utils.distill.batches import split_batch
from kd_utils.distill.logit_losses import Shared
from kd_utils.distill.meter import Mean
from kd_utils.distill.teacher_terms import TeacherTerms
from kd_utils.distill.terms.kd import KD
from kd_utils.distill.training import loss_terms, seed_step, weighted_sum
from kd_utils.models.output_head import OutputHead, output_head
from kd_utils.models.signals import forward_signals
from kd_utils.teacher.extraction import signal_function, stored_lm_head
from kd_utils.teacher.preparation import next_token_loss
from kd_utils.tokens.encoding import Example

META = torch.device("meta")
WEIGHTS = {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}
TEACHER = tiny_llama(width=48, layers=3)
MIX = torch.full((4, 4), 0.25)


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices; a CPU's single number may meet a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors if tensor.ndim}
        assert len(kinds) < 2, f"{func} of tensors on {' and '.join(sorted(kinds))}"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def without_values(monkeypatch):
    """Two things that need values: autocast knows no such device, and transformers asks in each
    forward pass whether positions are packed, the one wait in a step that is not ours.
    """
    from transformers import masking_utils

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)


def rows(signals="white_box", other_tokens=False):
    """(the student's rows, the teacher's with signals); with `other_tokens` the teacher has two
    tokens where the student has one.
    """
    students = example_rows([6, 9, 4])
    teachers = students
    if other_tokens:
        for row in students:
            row.ends = 3 * np.arange(1, len(row.tokens) + 1, dtype=np.int32)
        teachers = [
            Example(
                row.example_id,
                np.insert(row.tokens, 1, 5),
                row.answer_start + 1,
                np.insert(row.ends, 1, row.ends[0] + 1).astype(np.int32),
            )
            for row in students
        ]
    run = signal_function(TEACHER, signals=signals, top_k=8, temperatures=[2.0])
    return students, list(run(teachers))


def step(terms, students, cached, copies=1, **options):
    """One optimiser step on "meta", as notebook 03 takes it; the last micro-batch's terms."""
    student = tiny_llama(seed=1).to(META).train()
    teachers = [terms.to(META)] * copies
    names = ("task", *terms)
    with OneDevice():
        seed_step(0, 0)
        for batch in split_batch(students, 2, [cached] * copies, device=META, **options):
            signals = forward_signals(student, batch.input_ids, map_layers=[2])
            values = loss_terms(
                signals, output_head(student), batch=batch, terms=names, teachers=teachers
            )
            weighted_sum(values, WEIGHTS).backward()
            Mean().add(values, 0.5)
        parameters = [*student.parameters(), *terms.parameters()]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        torch.optim.AdamW(parameters).step()
    assert {value.device for value in values.values()} == {META}
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert all(parameter.grad.device == META for parameter in student.parameters())
    return batch


def head():
    return OutputHead(stored_lm_head(TEACHER).to(META))


@pytest.mark.parametrize(
    "distill_tokens, other_tokens, mix",
    [
        ("all", False, {}),
        ("answer", False, {"mix": MIX}),
        ("answer", True, {}),
        ("all", True, {"mix": MIX, "learned": True}),
    ],
)
def test_a_step_with_all_terms_stays_on_its_device(distill_tokens, other_tokens, mix):
    pieces = Shared.of(torch.arange(40, 97), torch.arange(57), 97, 97, META)
    terms = all_terms(head(), attention=mix, shared=pieces if other_tokens else None)
    batch = step(terms, *rows(other_tokens=other_tokens), distill_tokens=distill_tokens)
    merged = batch.teachers[0].maps["attention"].merges[0] is not None
    assert merged == other_tokens


@pytest.mark.parametrize("other_tokens", [False, True])
def test_sorted_probabilities(other_tokens):
    step(TeacherTerms([KD(head(), 2.0, logit_loss="uld")]), *rows(other_tokens=other_tokens))


def test_the_largest_logits():
    step(TeacherTerms([KD(None, 2.0, temperatures=[2.0])]), *rows("top_k"))


def test_teachers_that_are_mixed():
    step(TeacherTerms([KD(head(), 2.0)], 0.5), *rows(), copies=2)


def test_fine_tuning_a_teacher():
    model = tiny_llama().to(META)
    with OneDevice():
        [batch] = split_batch(example_rows([6, 9]), 2, device=META)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        assert next_token_loss(logits, batch).device == META


@pytest.mark.parametrize(
    "breaks",
    [
        lambda x: x + torch.zeros(3),
        lambda x: x[torch.arange(2)],
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
    ],
)
def test_what_would_fail_or_wait_on_a_gpu_fails_here(breaks):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), OneDevice():
        breaks(torch.ones(3, device=META))
