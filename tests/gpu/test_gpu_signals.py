"""The forward pass on the device: captured maps against eager attention, a training step against
the CPU's, answers that are generated and scored.
"""

from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial

import pandas as pd
import pytest
import torch
from references import NEAR, error
from tiny import all_terms, eager_signals, example_rows, tiny_llama, tiny_model, tiny_tokenizer
from transformers import masking_utils

from kd_utils.data.tasks import find_task
from kd_utils.distill.batches import split_batch
from kd_utils.distill.meter import Meter
from kd_utils.distill.training import loss_terms, seed_step, weighted_sum
from kd_utils.evaluation.generation import generate_answers
from kd_utils.evaluation.replies import choice_loglikelihoods
from kd_utils.models.devices import amp_dtype, autocast, choose_device
from kd_utils.models.output_head import OutputHead, output_head, require_known_head
from kd_utils.models.signals import forward_signals
from kd_utils.teacher.extraction import signal_function, stored_lm_head

WEIGHTS = {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}
LENGTHS = [40, 17, 63, 8]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_maps_are_those_of_eager_attention(device, kv_heads, padding, precision):
    """Of a padded batch: on the right without a mask, on the left with one."""
    model = tiny_llama(kv_heads=kv_heads, layers=3).to(device, getattr(torch, precision))
    width = max(LENGTHS)
    ids = torch.randint(3, 97, (len(LENGTHS), width), device=device)
    lengths = torch.tensor(LENGTHS, device=device)[:, None]
    places = torch.arange(width, device=device)[None]
    mask = (places >= width - lengths if padding == "left" else places < lengths).long()
    with torch.no_grad():
        signals = forward_signals(
            model, ids, mask if padding == "left" else None, hidden_layers=[1], map_layers=[1, 2, 3]
        )
        maps, hidden = eager_signals(model, ids, mask)
    real = mask.bool()
    assert signals.attentions[2].key.shape[1] == kv_heads
    for layer, captured in signals.attentions.items():
        found = captured.map()
        assert found.dtype == torch.float32 and found.device == ids.device
        for b in range(len(LENGTHS)):
            rows = found[b][:, real[b]]
            assert error(rows, maps[layer - 1][b][:, real[b]]) <= NEAR[precision]
            sums = rows.sum(-1)
            torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
    assert error(signals.hidden[real], hidden[-1][real]) <= NEAR[precision]
    assert error(signals.layers[1][real], hidden[1][real]) <= NEAR[precision]


@contextmanager
def no_waits(device):
    """Whatever makes the host wait for a GPU raises; transformers alone may wait, once in a forward
    pass, to ask whether positions are packed. On a CPU it is rehearsed: no decision by a value.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        else:
            patch.setattr(torch.Tensor, "__bool__", lambda _: pytest.fail("the host would wait"))
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def step(device, precision, *, micro=2, context=nullcontext):
    """One optimiser step as notebook 03 takes it; the loss, and what the parameters moved by."""
    teacher = tiny_llama(width=48, layers=3)
    rows = list(signal_function(teacher, signals="white_box")(example_rows(LENGTHS)))
    student = tiny_llama(seed=1).to(device).train()
    teachers = [all_terms(OutputHead(stored_lm_head(teacher).to(device))).to(device)]
    parameters = [*student.parameters(), *teachers[0].parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1.0)  # its step is the gradient, unlike AdamW's
    total = torch.zeros((), device=device)
    before = [parameter.detach().clone() for parameter in parameters]
    measure = Meter(None, [], datetime.now(UTC))
    forward_signals(student, before[0].new_ones(1, 3).long(), map_layers=[2])  # tries its maps
    with context():
        seed_step(0, 0)
        for batch in split_batch(rows, micro, device=device):
            with autocast(device, precision):
                signals = forward_signals(student, batch.input_ids, map_layers=[2])
                head, names = output_head(student), tuple(WEIGHTS)
                terms = loss_terms(signals, head, batch=batch, terms=names, teachers=teachers)
                loss = weighted_sum(terms, WEIGHTS)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        measure.step(norm, terms)
    measure.stop_training()
    assert {value.dtype for value in [*terms.values(), loss, norm, *parameters]} == {torch.float32}
    assert {value.device for value in (loss, norm)} == {parameters[0].device}
    moved = [(new.detach() - old).flatten() for new, old in zip(parameters, before)]
    return total, torch.cat(moved)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_is_that_of_the_cpu(device, precision):
    """Losses, weights and gradients are float32 under autocast too."""
    found, expected = step(device, precision), step(torch.device("cpu"), "float32")
    assert error(found[0], expected[0]) <= NEAR[precision]
    assert error(found[1], expected[1]) <= NEAR[precision]


def test_a_training_step_does_not_wait_for_the_device(device):
    """The first step may: libraries are loaded, and memory is taken. A student's first pass may
    wait, too: it tries whether its maps can be captured.
    """
    for context in (nullcontext, partial(no_waits, device)):
        step(device, "bfloat16", context=context)


def test_the_teacher_does_not_wait_for_the_device(device):
    run = signal_function(tiny_llama().to(device), signals="white_box")
    rows = example_rows(LENGTHS)
    list(run(rows))
    with no_waits(device):
        started = run(rows)
    assert len(list(started)) == len(rows)


def test_a_gpu_by_its_number(device):
    """The last card takes a step by its number; one beyond it is refused in one line."""
    if device.type == "cpu":
        named, message = "cpu", "^device = 'cuda:99', but torch sees no GPU here"
        if torch.cuda.is_available():  # a rehearsal on a machine with a GPU
            message = "^device = 'cuda:99', but torch sees "
    else:
        named = f"cuda:{torch.cuda.device_count() - 1}"
        message = r"^device = 'cuda:99', but torch sees \d+ GPUs? here, numbered f"
    with torch.cuda.device(device if device.type == "cuda" else -1):  # the current one afterwards
        chosen = choose_device(named)
        on_it = step(chosen, "float32")
    assert str(chosen) == named and {str(tensor.device) for tensor in on_it} == {named}
    assert error(on_it[0], step(device, "float32")[0]) <= NEAR["float32"]
    with pytest.raises(ValueError, match=message) as refused:
        choose_device("cuda:99")
    assert "\n" not in str(refused.value)


def test_float32_means_float32(device):
    """TF32 keeps 10 bits of the factors, an error near 3e-4."""
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    a, b = torch.randn(2, 300, 300, device=device)
    assert error(a @ b, a.cpu().double() @ b.cpu().double()) <= 5e-6
    assert amp_dtype(device, "float32") == torch.float32
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    assert amp_dtype(device, "auto") == half
    with autocast(device, "auto"):
        assert (a @ b).dtype == half


PROMPTS = [
    "Question: Tom has 12 apples.\nAnswer:",
    "Answer:",
    "Question: How many apples has Tom if he buys 30?\n",
]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generated_answers_are_those_of_the_cpu_token_by_token(device, batch_size):
    """Prompts of unequal length, padded on the left, in float32."""
    tokenizer = tiny_tokenizer(begin=True)
    answers = [
        generate_answers(
            tiny_model(tokenizer).to(where),
            tokenizer,
            PROMPTS,
            stop_strings=find_task("gsm8k").generation.stop_strings,
            batch_size=batch_size,
            max_new_tokens=30,
        )
        for where in (device, "cpu")
    ]
    assert answers[0] == answers[1] and len(set(answers[0])) == 3


def test_scores_of_choices_are_those_of_the_cpu(device):
    tokenizer = tiny_tokenizer(begin=True)
    choices = [[" A", " B", " C"], [" positive", " negative"], [" 12 apples", " 30"]]
    table = pd.DataFrame({"prompt": PROMPTS, "choices": choices})
    found, expected = (
        choice_loglikelihoods(tiny_model(tokenizer).to(where), tokenizer, table, batch_size=2)
        for where in (device, "cpu")
    )
    for ours, wanted in zip(found, expected, strict=True):
        assert ours == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_logits_are_rebuilt_from_hidden_states(device, precision):
    """In bfloat16 too, in which 02 holds a teacher on a GPU: the operations are the model's own."""
    model = tiny_llama(width=64, vocab=997).to(device, getattr(torch, precision))
    ids = torch.randint(3, 997, (4, 33), device=device)
    assert require_known_head(model, ids) <= 1e-5
