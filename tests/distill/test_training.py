"""Batches, terms, splitting, pairing: what the loop in notebook 03 relies on."""

import json
import traceback
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import all_terms, example_rows, late_copy, tiny_llama

from kd_utils.config.parameter_files import notebook_config
from kd_utils.distill.batches import TrialData, collate, epoch_batches, prefetched, split_batch
from kd_utils.distill.meter import Mean, Meter
from kd_utils.distill.schedules import stretches
from kd_utils.distill.terms.hidden import make_projector
from kd_utils.distill.training import (
    gradient_shares,
    loss_terms,
    seed_step,
    split_losses,
    weighted_sum,
)
from kd_utils.models.devices import autocast, mixed_seed
from kd_utils.models.output_head import OutputHead, output_head, trained_parameters
from kd_utils.models.signals import forward_signals
from kd_utils.speed.step import cosine, exact_rows
from kd_utils.teacher.extraction import signal_function

TEACHER = tiny_llama(width=48, layers=3)
HEAD = TEACHER.lm_head.weight.detach()
ALL = {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}


def cached(lengths, seed=0, signals="white_box"):
    run = signal_function(TEACHER, signals=signals, top_k=20, temperatures=[1.0, 2.0])
    return list(run(example_rows(lengths, seed=seed)))


def terms_of_teacher(projector=None, *, head=HEAD, normaliser="entries", **kd):
    teacher_terms = all_terms(
        head if head is None else OutputHead(head), attention={"normaliser": normaliser}, **kd
    )
    teacher_terms["hidden"].projectors[0] = projector or make_projector(32, 48, 0)
    return teacher_terms


def terms_for(student, batch, projector=None, terms=tuple(ALL), **options):
    last = student.config.num_hidden_layers
    signals = forward_signals(student, batch.input_ids, map_layers=[last])
    teachers = [terms_of_teacher(projector, pairs=[(3, last)], **options)]
    return loss_terms(signals, output_head(student), batch=batch, terms=terms, teachers=teachers)


def test_collate_puts_answers_and_signals_where_they_belong():
    rows = cached([5, 8])
    batch = collate(rows)
    assert batch.input_ids.shape == (2, 8)
    assert batch.whole == {"answers": 3}
    assert batch.teachers[0].whole == {"places": 13, "entries": 15 + 36, "queries": 13}
    # row 0: 5 tokens, answer from 4 on; row 1: 8 tokens, answer from 6 on
    assert batch.predicting.tolist() == [3, 8 + 5, 8 + 6]
    assert batch.targets.tolist() == [rows[0].tokens[4], rows[1].tokens[6], rows[1].tokens[7]]
    [targets] = batch.teachers
    assert targets.places.tolist() == [*range(5), *range(8, 16)]
    assert targets.single is None and targets.spans is None
    np.testing.assert_array_equal(
        targets.signals["hidden"], np.concatenate([r.signals["hidden"] for r in rows])
    )


def test_answer_mode_looks_at_the_same_positions_with_all_signals():
    rows = cached([5, 8])
    batch = collate(rows, distill_tokens="answer")
    [targets] = batch.teachers
    assert targets.places.tolist() == batch.predicting.tolist()
    hidden = [row.signals["hidden"] for row in rows]
    np.testing.assert_array_equal(
        targets.signals["hidden"], np.concatenate([hidden[0][3:4], hidden[1][5:7]])
    )
    maps = targets.maps["attention"]
    assert [m.shape for m in maps.packed] == [(4, 4), (4, 6 + 7)]  # query rows 3 and 5, 6
    assert maps.student_rows == maps.teacher_rows == [(3, 4), (5, 7)]
    np.testing.assert_array_equal(maps.packed[1], rows[1].signals["attention"][:, 15:28])


def test_the_attention_term_is_a_mean_over_entries_or_a_mean_over_rows_of_sums():
    rows, student = cached([5, 8]), tiny_llama()
    values, counts = {}, {}
    answers = collate(rows, distill_tokens="answer").teachers[0].whole
    for normaliser in ("entries", "queries"):
        values[normaliser] = terms_for(student, collate(rows), normaliser=normaliser)["attention"]
        counts[normaliser] = terms_of_teacher(normaliser=normaliser)["attention"].count(answers)
    ratio = (values["queries"] / values["entries"]).item()
    assert ratio == pytest.approx((15 + 36) / (5 + 8), rel=1e-5)
    # Every row of every head counts once: of one example with one more token the sum per row grows,
    # the mean shrinks.
    assert counts["queries"] == 4 * (1 + 2)


def test_terms_are_zero_for_the_teacher_itself():
    """At student = teacher only the task term is left: every signal is compared at its own
    position.
    """
    identity = torch.nn.Linear(48, 48, bias=False)
    torch.nn.init.eye_(identity.weight)
    for mode in ("all", "answer"):
        terms = terms_for(TEACHER, collate(cached([5, 9, 4]), distill_tokens=mode), identity)
        assert (
            terms["kd"] < 1e-4
            and terms["hidden"] < 1e-5
            and terms["attention"] < 1e-6
            and terms["task"] > 0.5
        )


def test_padding_and_neighbours_are_inert():
    student, projector = tiny_llama(seed=1), make_projector(32, 48, 0)
    rows = cached([6, 12])
    alone = terms_for(student, collate(rows[:1]), projector)
    together = collate(rows)
    other = collate(rows[1:])
    for batch in (together, other):
        batch.whole = collate(rows[:1]).whole
        batch.teachers[0].whole = collate(rows[:1]).teachers[0].whole
    both, second = terms_for(student, together, projector), terms_for(student, other, projector)
    for name in ALL:
        torch.testing.assert_close(both[name], alone[name] + second[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_gradients_do_not_depend_on_the_micro_batch_size(size):
    rows, gradients = cached([5, 9, 4, 12, 7]), []
    for micro in (5, size):
        student, projector = tiny_llama(seed=1), make_projector(32, 48, 0)
        for batch in split_batch(rows, micro):
            weighted_sum(terms_for(student, batch, projector), ALL).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in [*student.parameters(), *projector.parameters()]])
        )
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_top_k_cache_trains_at_its_temperatures_only():
    batch = collate(cached([5, 9], signals="top_k"))
    student = tiny_llama(seed=1)
    top = terms_for(student, batch, terms=("task", "kd"), head=None, temperatures=[1.0, 2.0])
    full = terms_for(student, collate(cached([5, 9])), terms=("task", "kd"))
    assert 0 < top["kd"] <= full["kd"] + 1e-4 and top["kd"] > 0.3 * full["kd"]
    with pytest.raises(ValueError):
        terms_for(student, batch, terms=("kd",), head=None, temperatures=[1.0])


def test_epochs_are_permutations_fixed_by_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(5, 60, 203).tolist()
    one, again = epoch_batches(lengths, 8, 3, 1), epoch_batches(lengths, 8, 3, 1)
    assert (
        one == again
        and one != epoch_batches(lengths, 8, 4, 1)
        and one != epoch_batches(lengths, 8, 3, 2)
    )
    assert sorted(i for batch in one for i in batch) == list(range(203)) and max(map(len, one)) == 8
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in one)
    assert padded < 1.15 * sum(lengths)  # buckets: little padding


def test_a_stretch_begins_and_ends_inside_an_epoch_and_changes_no_order():
    rows = example_rows(np.random.default_rng(0).integers(5, 30, 21).tolist())
    values = {"distill_type": "task_only", "epochs": 3, "batch_size": 4, "micro_batch_size": 3}
    config = notebook_config("03_train_student", values)
    cache = SimpleNamespace(splits={"train": [row.example_id for row in rows]})
    table = pd.DataFrame({"example_id": cache.splits["train"], "labelled": True})
    prepared = SimpleNamespace(train=table, tables={"train": table})
    data = TrialData(prepared, {"train": rows}, [cache], config, torch.device("cpu"))
    by_length = sorted(rows, key=lambda row: (len(row.tokens), row.example_id))
    lengths = [len(row.tokens) for row in by_length]
    wanted = [
        [len(by_length[i].tokens) for i in batch]
        for epoch in (1, 2, 3)
        for batch in epoch_batches(lengths, 4, config.seed, epoch)
    ]
    assert data.total_steps == len(wanted) == 18
    for cuts in ([0, 18], [0, 5, 6, 11, 18], range(19)):
        found = [
            [length for part in parts for length in part.lengths]
            for stretch in (range(*pair) for pair in zip(cuts, cuts[1:]))
            for parts in data.steps(stretch)
        ]
        assert found == wanted
    assert list(data.steps(range(0))) == []


@pytest.mark.parametrize("long_answers", [False, True])
def test_the_rows_of_a_split_are_measured_in_batches_of_bounded_tokens(long_answers):
    rows = example_rows(np.random.default_rng(1).integers(5, 40, 61).tolist())
    if long_answers:  # short rows are answer but for a token, long ones have two
        rows = [
            replace(r, answer_start=1 if len(r.tokens) < 20 else len(r.tokens) - 2) for r in rows
        ]
    ids = [row.example_id for row in rows]
    config = notebook_config("03_train_student", {"distill_type": "task_only", "batch_size": 4})
    table = pd.DataFrame({"example_id": ids, "task": [f"of {i}" for i in ids], "labelled": True})
    prepared = SimpleNamespace(train=table, tables={"train": table, "validation": table})
    cache = SimpleNamespace(splits={"train": ids, "validation": ids})
    data = TrialData(prepared, {"validation": rows}, [cache], config, torch.device("cpu"))
    by_length = sorted(rows, key=lambda row: (len(row.tokens), row.example_id))
    found = list(data.batches("validation"))
    assert [task for _, tasks in found for task in tasks] == [
        f"of {row.example_id}" for row in by_length
    ]
    assert [n for batch, _ in found for n in batch.lengths] == [len(r.tokens) for r in by_length]
    assert max(batch.input_ids.numel() for batch, _ in found) <= 4 * len(by_length[-1].tokens)
    longest = max(len(row.tokens) - row.answer_start for row in rows)
    assert max(len(batch.targets) for batch, _ in found) <= 4 * longest
    *full, _ = [len(batch.lengths) for batch, _ in found]
    assert min(full) >= 4 and max(full) > 8


def test_a_step_is_seeded_as_torch_would_be_without_a_stack_trace(monkeypatch):
    torch.manual_seed(mixed_seed(3, 11))
    drawn = torch.rand(3)
    with monkeypatch.context() as patched:
        patched.setattr(traceback, "format_stack", lambda *_: pytest.fail("it takes its time"))
        seed_step(3, 11)
    assert torch.equal(drawn, torch.rand(3))


def test_a_gpu_in_use_is_seeded_too(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    seed_step(3, 11)
    assert seeds == [mixed_seed(3, 11)]


def test_dropout_is_the_same_whatever_was_drawn_before():
    student = tiny_llama(attention_dropout=0.5).train()
    ids, outputs = torch.randint(3, 97, (2, 9)), []
    for extra in (0, 7):
        torch.rand(extra)
        seed_step(3, 11)
        outputs.append(forward_signals(student, ids).hidden)
    assert torch.equal(*outputs)
    for other in ((3, 12), (4, 11)):
        seed_step(*other)
        assert not torch.equal(outputs[0], forward_signals(student, ids).hidden)


def test_projector_is_fixed_by_its_seed_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    first = make_projector(4, 6, seed=1).weight
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3)) and torch.equal(
        first, make_projector(4, 6, seed=1).weight
    )
    assert not torch.equal(first, make_projector(4, 6, seed=2).weight)


def test_gradient_shares_sum_to_one_and_follow_the_weights():
    student, batch = tiny_llama(seed=1), collate(cached([5, 9]))
    terms = terms_for(student, batch)
    shares = gradient_shares(terms, ALL, student)
    assert set(shares) == {f"grad_share/{name}" for name in ALL} and sum(
        shares.values()
    ) == pytest.approx(1)
    without = gradient_shares(terms, {**ALL, "kd": 0.0}, student)
    assert without["grad_share/kd"] == 0
    weighted_sum(terms, ALL).backward()  # the graph is kept
    assert student.lm_head.weight.grad is not None


@pytest.mark.parametrize("tied", [False, True])
def test_layers_alone_train_with_the_gradients_that_they_have_among_all(tied):
    batch, gradients, norms = collate(cached([5, 9])), [], []
    for trained in ("all", "layers"):
        student = tiny_llama(seed=1, tie_word_embeddings=tied)
        ends = {id(student.get_input_embeddings().weight), id(student.lm_head.weight)}
        parameters = trained_parameters(student, trained)
        assert ends.isdisjoint(map(id, parameters)) == (trained == "layers")
        assert len(parameters) == len(list(student.parameters())) - len(ends) * (
            trained == "layers"
        )
        terms = terms_for(student, batch)
        norms.append(gradient_shares(terms, ALL, student))
        weighted_sum(terms, ALL).backward()
        gradients.append([p.grad for p in student.parameters() if id(p) not in ends])
        if trained == "layers":
            assert student.get_input_embeddings().weight.grad is None
            assert student.lm_head.weight.grad is None
    for by_all, alone in zip(*gradients, strict=True):
        assert torch.equal(by_all, alone)
    assert norms[0] != norms[1]  # a share is of what trains


def test_validation_losses_do_not_depend_on_batches():
    student, rows = tiny_llama(seed=1), cached([5, 9, 4, 12, 7])
    teachers = [terms_of_teacher()]
    terms_of = partial(loss_terms, teachers=teachers, terms=tuple(ALL))
    results = []
    for size in (1, 2, 5):
        chunks = [
            (collate(rows[i : i + size]), ["sst2", "mmlu", "sst2", "mmlu", "sst2"][i : i + size])
            for i in range(0, 5, size)
        ]
        results.append(
            split_losses(
                "validation",
                student,
                chunks,
                partial(forward_signals, student, map_layers=[2]),
                terms_of,
                teachers,
            )
        )
    assert set(results[0]) == {
        "validation_loss",
        *(f"validation_loss/{t}" for t in ALL),
        "token_accuracy/sst2",
        "token_accuracy/mmlu",
    }
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-4)
    assert results[0]["validation_loss"] == results[0]["validation_loss/task"]
    signals_of = partial(forward_signals, student, map_layers=[2])
    held_out = split_losses("held_out", student, chunks, signals_of, terms_of, teachers)
    assert held_out == {
        key.replace("validation", "held_out"): value
        for key, value in results[-1].items()
        if "accuracy" not in key
    }


def test_mean_weighs_by_counts_and_adds_up_parts():
    mean = Mean()
    mean.add({"a": 6.0}, 2)
    mean.add({"a": torch.tensor(2.0)}, 2)
    assert mean.result("x/") == {"x/a": 2.0}
    steps = Mean()
    for value in (1.0, 2.0):
        steps.add({"loss": torch.tensor(value)}, 1 / 2)
    steps.add({"loss": torch.tensor(5.0)}, 1)
    assert steps.result()["loss"] == pytest.approx(4.0)


def test_a_student_learns_the_teacher_from_the_cache():
    student, projector = tiny_llama(seed=1), make_projector(32, 48, 0)
    batch, losses = collate(cached([5, 9, 4, 12])), []
    optimizer = torch.optim.AdamW([*student.parameters(), *projector.parameters()], lr=3e-3)
    for _ in range(40):
        terms = terms_for(student, batch, projector)
        weighted_sum(terms, {**ALL, "attention": 20.0}).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({name: term.item() for name, term in terms.items()})
    assert all(losses[-1][name] < 0.7 * losses[0][name] for name in ALL)


def test_prefetched_keeps_order_and_raises_in_place():
    assert list(prefetched(lambda i: i * i, range(20), depth=3)) == [i * i for i in range(20)]

    def fails(i):
        if i == 3:
            raise ValueError("row 3")
        return i

    seen = []
    with pytest.raises(ValueError, match="row 3"):
        for value in prefetched(fails, range(9)):
            seen.append(value)
    assert seen == [0, 1, 2]


def test_examples_without_signals_give_the_task_loss_alone():
    batch = collate([replace(row, signals={}) for row in cached([5, 9])])
    assert batch.teachers == []
    student = tiny_llama(seed=1)
    assert set(terms_for(student, batch, terms=("task",))) == {"task"}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("attention_dtype", ["float16", "uint8"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_caches_gradient_is_that_of_a_float32_teacher(temperature, attention_dtype, precision):
    """Of each term alone: the task term reads no cache, and is most of the sum."""
    rows, gradients = example_rows([20, 31, 12]), {}
    run = signal_function(TEACHER, signals="white_box", attention_dtype=attention_dtype)
    for side, examples in (("cache", list(run(rows))), ("exact", exact_rows(TEACHER, rows))):
        student, batch = tiny_llama(seed=1), collate(examples)
        with autocast(torch.device("cpu"), precision):
            terms = loss_terms(
                forward_signals(student, batch.input_ids, map_layers=[2]),
                output_head(student),
                batch=batch,
                terms=tuple(ALL),
                teachers=[terms_of_teacher(temperature=temperature)],
            )
        for name, loss in {**terms, "all": weighted_sum(terms, ALL)}.items():
            grads = torch.autograd.grad(
                loss, list(student.parameters()), retain_graph=True, allow_unused=True
            )
            gradients[side, name] = torch.cat([g.flatten() for g in grads if g is not None])
    for name in ("all", "kd", "hidden", "attention"):
        assert cosine(gradients["cache", name], gradients["exact", name]) > 0.999, name


def test_bfloat16_products_give_nearly_the_float32_gradient():
    batch, gradients = collate(cached([20, 31, 12])), {}
    for precision in ("float32", "bfloat16"):
        student = tiny_llama(seed=1)
        with autocast(torch.device("cpu"), precision):
            terms = terms_for(student, batch)
        for name, loss in terms.items():
            grads = torch.autograd.grad(
                loss, list(student.parameters()), retain_graph=True, allow_unused=True
            )
            gradients[precision, name] = torch.cat([g.flatten() for g in grads if g is not None])
    for name in terms:
        assert cosine(gradients["bfloat16", name], gradients["float32", name]) > 0.99, name


NAN, INF, ONE = (torch.tensor(value) for value in (float("nan"), float("inf"), 1.0))


@pytest.mark.parametrize(
    ("norm", "terms", "shown"),
    [
        (ONE, {"task": NAN, "kd": ONE}, "gradient norm 1, task loss nan, kd loss 1"),
        (ONE, {"task": ONE, "kd": -INF}, "gradient norm 1, task loss 1, kd loss -inf"),
        (INF, {"task": ONE}, "gradient norm inf, task loss 1"),
        (NAN, {"task": ONE}, "gradient norm nan, task loss 1"),
    ],
)
def test_a_step_that_is_not_finite_stops_at_the_next_step_or_at_the_stretchs_end(
    norm, terms, shown
):
    for stops in (lambda meter: meter.stop_training(), lambda meter: meter.step(ONE, {})):
        meter = Meter(None, [], datetime.now(UTC))
        for _ in range(5):
            meter.step(ONE, {"task": ONE})
        meter.step(norm, terms)  # not looked at yet: a GPU is not waited for
        with pytest.raises(
            FloatingPointError, match=f"^training diverged at step 5: {shown}; lower learning_rate"
        ):
            stops(meter)


def test_a_steps_numbers_are_read_when_the_gpu_has_copied_them(monkeypatch):
    monkeypatch.setattr("kd_utils.distill.meter.HostCopy", late_copy())
    meter = Meter(None, [], datetime.now(UTC))
    meter.step(ONE, {"task": ONE * torch.inf})
    with pytest.raises(FloatingPointError, match="at step 0: gradient norm 1, task loss inf; "):
        meter.stop_training()


def test_finite_steps_go_on_and_hold_no_graph():
    meter = Meter(None, [], datetime.now(UTC))
    meter.stop_training()
    weight = torch.ones(2, requires_grad=True)
    for _ in range(3):
        meter.step(weight.norm(), {"task": weight.sum() * 1e30})
        meter.stop_training()
    assert not any(value.requires_grad for value in meter._last_step.result().values())


def test_a_stretch_that_was_left_in_its_middle_is_not_counted():
    """By a meter whose first stretch was kept; the second is interrupted."""
    config = notebook_config("03_train_student", {"epochs": 3})
    kept = {}
    parts = [range(4), range(4, 9), range(9, 10)]

    def made():
        return Meter(config, parts, datetime.now(UTC), lambda: kept.get("state"))

    meter = made()

    def train(interrupted=None):
        for stretch in meter.stretches():
            for _ in stretch:
                if stretch == interrupted:
                    meter.step(INF, {"task": ONE})
                    return
                meter.step(ONE, {"task": ONE})
            meter.stop_training()
            meter.end_stretch({})
            kept.setdefault("state", json.loads(json.dumps(meter.state())))

    train(interrupted=parts[0])
    with pytest.raises(ValueError, match="^steps 1 to 4 were left in their middle, and no state"):
        train()
    meter = made()
    train(interrupted=parts[1])
    assert meter.global_step == 5 and meter.resumed_after is None
    train()
    assert [(row["step"], row["epoch"]) for row in meter.rows] == [(4, 1.2), (9, 2.7), (10, 3)]
    assert meter.global_step == 10 and meter.resumed_after == 1.2
    train()  # nothing is left to do
    assert meter.global_step == 10


@pytest.mark.parametrize(("method", "steps"), [("black_box", 10), ("untrained", 0)])
def test_validation_rows_are_measured_after_the_last_step_alone(method, steps):
    config = notebook_config("03_train_student", {"epochs": 2, "distill_type": method})
    meter = Meter(config, stretches(steps, 2), datetime.now(UTC))
    seen = {}
    for stretch in meter.stretches():
        for _ in stretch:
            meter.step(ONE, {"task": ONE})
        meter.stop_training()
        seen[stretch.stop] = meter.splits
        losses = {f"{split}_loss": 0.5 for split in meter.splits}
        meter.end_stretch(losses | {f"{split}_accuracy": 0.25 for split in meter.splits})
        assert (
            f"epoch {2 * stretch.stop / (steps or 1):g} of {2 if steps else 0} | " in meter.line()
        )
    assert seen.pop(steps) == ("held_out", "validation")
    assert set(seen) == ({5, 9} if steps else set()) and set(seen.values()) <= {("held_out",)}
    assert "held-out loss 0.500, accuracy 25.0 % | validation loss 0.500" in meter.line()
    assert meter.line().endswith(" 0 s left")
