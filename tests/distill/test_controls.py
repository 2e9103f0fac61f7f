"""The controls: signals of another row (`shuffled`), and uniform uncertainty (`label_smoothing`)."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_teacher_terms import DEFAULTS, VOCABULARY, make_cache, terms_of_cache
from tiny import all_terms, example_rows, tiny_llama

from kd_utils.config.trial import TrialConfig
from kd_utils.data.other_rows import other_rows
from kd_utils.distill.batches import TrialData, collate, split_batch
from kd_utils.distill.logit_losses import Shared
from kd_utils.distill.teacher_terms import TeacherTerms
from kd_utils.distill.terms.smoothing import Smoothing, epsilon_of, smoothed_entropy
from kd_utils.distill.training import loss_terms, weighted_sum
from kd_utils.models.attention_maps import decode_map
from kd_utils.models.output_head import OutputHead, output_head
from kd_utils.models.signals import forward_signals
from kd_utils.teacher.extraction import signal_function, stored_lm_head

WEIGHTS = {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}
CPU = torch.device("cpu")
TEACHER = tiny_llama(width=48, layers=3)
STUDENT = tiny_llama(seed=1)


def config(method, **changes):
    return TrialConfig(**{**DEFAULTS, "distill_type": method, **changes})


def signals_of_student(batch):
    return forward_signals(STUDENT, batch.input_ids, map_layers=[2])


# --- signals of another row


def shuffled_batch(lengths, other_lengths, **options):
    """Examples, with the teacher's signals of other examples."""
    rows = list(signal_function(TEACHER, signals="white_box")(example_rows(other_lengths, seed=7)))
    return rows, collate(example_rows(lengths), [rows], other_rows=True, **options)


@pytest.mark.parametrize("distill_tokens", ["all", "answer"])
@pytest.mark.parametrize(("student_length", "teacher_length"), [(6, 9), (9, 6), (6, 6)])
def test_the_last_positions_are_compared_and_a_maps_surplus_is_its_first_groups(
    student_length, teacher_length, distill_tokens
):
    """By hand: the last k positions of both sides, the longer map's first columns added up."""
    [row], batch = shuffled_batch([student_length], [teacher_length], distill_tokens=distill_tokens)
    terms = all_terms(OutputHead(stored_lm_head(TEACHER)))
    k = min(student_length, teacher_length)
    signals = signals_of_student(batch)
    found = loss_terms(
        signals, output_head(STUDENT), batch=batch, terms=tuple(WEIGHTS), teachers=[terms]
    )
    answer = max(student_length // 3, 1)
    chosen = slice(None) if distill_tokens == "all" else slice(k - 1 - answer, k - 1)
    student = signals.hidden[0, -k:][chosen]
    teacher = torch.from_numpy(row.signals["hidden"].astype(np.float32))[-k:][chosen]
    log_q = (student @ STUDENT.lm_head.weight.T / 2).log_softmax(-1)
    p = (teacher @ TEACHER.lm_head.weight.T / 2).softmax(-1)
    kl = 4 * torch.nn.functional.kl_div(log_q, p, reduction="sum") / len(student)
    torch.testing.assert_close(found["kd"], kl, atol=1e-4, rtol=1e-3)
    error = (terms["hidden"].projectors[0](student) - teacher).square().mean()
    torch.testing.assert_close(found["hidden"], error)

    def last(map_of_all, n):  # (H, n, n) -> (H, k, k)
        groups = map_of_all[:, n - k :, n - k :].clone()
        groups[:, :, 0] += map_of_all[:, n - k :, : n - k].sum(-1)
        torch.testing.assert_close(groups.sum(-1), torch.ones(4, k), atol=2e-3, rtol=0)
        return groups[:, chosen]

    stored = torch.from_numpy(row.signals["attention"].copy())
    maps = last(decode_map(stored, 0, teacher_length), teacher_length)
    errors = (maps - last(signals.attentions[2].map()[0], student_length)).square()
    entries = torch.ones(k, k).tril()[chosen].sum()
    torch.testing.assert_close(found["attention"], errors.sum() / (4 * entries), rtol=1e-3, atol=0)
    [targets] = batch.teachers
    assert targets.single is None and targets.whole["places"] == len(student)


def test_a_short_row_leaves_answer_positions_without_a_partner():
    """Of the last 5 positions that predict the answer, a row of 3 tokens has two partners."""
    _, batch = shuffled_batch([15], [3], distill_tokens="answer")
    assert batch.predicting.tolist() == [9, 10, 11, 12, 13]
    assert batch.teachers[0].places.tolist() == [12, 13]


def test_other_rows_need_no_text_in_common_and_no_vocabulary():
    """The rows have no byte ends, and the teacher's ids 40 to 96 are the student's 0 to 56."""
    _, batch = shuffled_batch([6, 8, 5], [7, 5, 9])
    pieces = Shared.of(torch.arange(40, 97), torch.arange(57), 97, 97)
    terms = all_terms(OutputHead(stored_lm_head(TEACHER)), shared=pieces)
    values = loss_terms(
        signals_of_student(batch),
        output_head(STUDENT),
        batch=batch,
        terms=tuple(WEIGHTS),
        teachers=[terms],
    )
    assert all(value > 0 for value in values.values())


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_of_other_rows_change_nothing(size):
    rows = list(signal_function(TEACHER, signals="white_box")(example_rows([7, 5, 9], seed=7)))
    gradients = []
    for micro in (3, size):
        student = tiny_llama(seed=1)
        terms = all_terms(OutputHead(stored_lm_head(TEACHER)))
        for batch in split_batch(example_rows([6, 8, 5]), micro, [rows], other_rows=True):
            signals = forward_signals(student, batch.input_ids, map_layers=[2])
            values = loss_terms(
                signals,
                output_head(student),
                batch=batch,
                terms=tuple(WEIGHTS),
                teachers=[terms],
            )
            weighted_sum(values, WEIGHTS).backward()
        gradients.append([p.grad for p in [*student.parameters(), *terms.parameters()]])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


class Rows(dict):
    """As a cache: rows by id, and the ids of each split."""

    splits = {
        "train": [f"row{k}" for k in range(11)],
        "validation": [f"row{k}" for k in range(11, 14)],
    }


LENGTHS = [5, 9, 4, 12, 7, 7, 4, 10, 6, 8, 5, 6, 9, 7]
CACHED = list(signal_function(TEACHER, signals="white_box")(example_rows(LENGTHS)))


ROWS = Rows({row.example_id: row for row in CACHED})


def data(method, cache=ROWS):
    rows = example_rows(LENGTHS)
    tables = {
        split: pd.DataFrame(
            {"example_id": ids, "task": [f"task{int(i[3:]) % 2}" for i in ids], "labelled": True}
        )
        for split, ids in Rows.splits.items()
    }
    return TrialData(
        SimpleNamespace(tables=tables, train=tables["train"]),
        {"train": rows[:11], "validation": rows[11:]},
        [cache],
        config(method, batch_size=4, micro_batch_size=4),
        CPU,
    )


def test_a_trial_trains_on_other_rows_signals_and_is_measured_with_its_own():
    shuffled, combined = data("shuffled"), data("combined")
    tasks = {i: f"task{int(i[3:]) % 2}" for i in Rows.splits["train"]}
    others = other_rows(tasks, {row.example_id: len(row.tokens) for row in CACHED}, seed=0)
    plan = shuffled._plan(1)
    assert plan == combined._plan(1)
    for ids, [batch], [own] in zip(
        plan, shuffled.steps(range(3)), combined.steps(range(3)), strict=True
    ):
        assert torch.equal(batch.input_ids, own.input_ids)
        assert torch.equal(batch.targets, own.targets)
        kept = 0
        for i in ids:
            other = CACHED[int(others[i][3:])].signals["hidden"]
            k = min(len(other), len(CACHED[int(i[3:])].tokens))
            np.testing.assert_array_equal(
                batch.teachers[0].signals["hidden"][kept : kept + k], other[-k:]
            )
            kept += k
        assert kept == len(batch.teachers[0].places)
    [(batch, _)], [(own, _)] = (trial.batches("validation") for trial in (shuffled, combined))
    np.testing.assert_array_equal(
        batch.teachers[0].signals["hidden"], own.teachers[0].signals["hidden"]
    )


def test_the_task_loss_of_a_first_step_is_that_of_combined_to_the_bit():
    values = []
    for method in ("shuffled", "combined"):
        [batch] = next(iter(data(method).steps(range(3))))
        terms = all_terms(OutputHead(stored_lm_head(TEACHER)))
        values.append(
            loss_terms(
                signals_of_student(batch),
                output_head(STUDENT),
                batch=batch,
                terms=tuple(WEIGHTS),
                teachers=[terms],
            )
        )
    assert torch.equal(values[0]["task"], values[1]["task"])
    assert all(values[0][name] != values[1][name] for name in ("kd", "hidden", "attention"))


def test_a_cache_without_maps_is_refused_as_for_every_method(tmp_path):
    cache = make_cache(tmp_path / "c", TEACHER, signals="top_k")
    with pytest.raises(ValueError, match="holds 'top_k' without 'hidden': add hidden to `signals`"):
        terms_of_cache(cache, STUDENT, VOCABULARY, config("shuffled"))


# --- uniform smoothing


@pytest.mark.parametrize("pieces", [2, 97, 32_000])
@pytest.mark.parametrize("entropy", [1e-6, 0.05, 0.3, 0.6])
def test_the_smoothed_target_has_the_entropy_that_was_asked_for(entropy, pieces):
    epsilon = epsilon_of(entropy, pieces)
    target = torch.full((pieces,), epsilon / pieces, dtype=torch.float64)
    target[0] += 1 - epsilon
    assert torch.special.entr(target).sum().item() == pytest.approx(entropy, rel=1e-6)
    assert smoothed_entropy(epsilon, pieces) == pytest.approx(entropy, rel=1e-9)


def test_the_ends_of_smoothing():
    assert epsilon_of(0.0, 97) == 0
    assert epsilon_of(math.log(97), 97) == epsilon_of(9.0, 97) == 1
    assert epsilon_of(math.log(97) - 1e-6, 97) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("distill_tokens", ["all", "answer"])
def test_smoothing_is_torchs_at_the_places_of_the_logits_term_that_a_token_follows(distill_tokens):
    rows, found = example_rows([5, 9, 4]), []
    batch = collate(rows, [None], distill_tokens=distill_tokens)
    compared = set(collate(CACHED[:3], distill_tokens=distill_tokens).teachers[0].places.tolist())
    ends = {4, 9 + 8, 18 + 3} if distill_tokens == "all" else set()
    assert set(batch.teachers[0].places.tolist()) == compared - ends
    term = Smoothing(1.2, 97)
    for by_torch in (False, True):
        student = tiny_llama(seed=1)
        signals = forward_signals(student, batch.input_ids)
        if by_torch:
            starts = [0 if distill_tokens == "all" else row.answer_start - 1 for row in rows]
            logits = torch.cat(
                [
                    output_head(student).logits(h[s:n])
                    for h, s, n in zip(signals.hidden, starts, (4, 8, 3))
                ]
            )
            tokens = np.concatenate([row.tokens[s + 1 :] for row, s in zip(rows, starts)])
            loss = torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(tokens).long(), label_smoothing=term.epsilon
            )
        else:
            teachers = [TeacherTerms([term])]
            named = dict(batch=batch, terms=("task", "smoothing"), teachers=teachers)
            loss = loss_terms(signals, output_head(student), **named)["smoothing"]
        loss.backward()
        found.append((loss.detach(), [p.grad for p in student.parameters()]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_smoothing_does_not_depend_on_micro_batches():
    values = []
    for size in (1, 3):
        parts = split_batch(example_rows([5, 9, 4]), size, [None])
        teachers = [TeacherTerms([Smoothing(1.2, 97)])]
        values.append(
            sum(
                loss_terms(
                    forward_signals(STUDENT, part.input_ids),
                    output_head(STUDENT),
                    batch=part,
                    terms=("smoothing",),
                    teachers=teachers,
                )["smoothing"]
                for part in parts
            )
        )
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("distill_tokens", ["all", "answer"])
def test_the_teachers_entropy_comes_from_its_cache(tmp_path, distill_tokens):
    teacher = tiny_llama(width=48, layers=3)
    chosen = config("label_smoothing", distill_tokens=distill_tokens)
    cache = make_cache(tmp_path / "c", teacher, teacher="m")
    terms = terms_of_cache(cache, STUDENT, VOCABULARY, chosen)
    exact, spread = [], []
    for row in example_rows([5, 9]):
        with torch.no_grad():
            logits = teacher(torch.tensor(row.tokens[None]).long()).logits[0]
        first = 0 if distill_tokens == "all" else row.answer_start - 1
        probs = logits.softmax(-1)[first:-1]
        exact += torch.special.entr(probs).sum(-1).tolist()
        top, ids = probs.topk(8)
        rest = (1 - top.sum(-1, keepdim=True)) / (97 - 8)
        evenly = rest.expand_as(probs).scatter(1, ids, top)
        spread += torch.special.entr(evenly).sum(-1).tolist()
    smoothing = terms["smoothing"]
    assert smoothing.entropy == pytest.approx(np.mean(exact), rel=1e-3)
    assert smoothed_entropy(smoothing.epsilon, 97) == pytest.approx(smoothing.entropy)
    assert smoothing.numbers() == {
        "smoothing/epsilon": smoothing.epsilon,
        "smoothing/teacher_entropy": smoothing.entropy,
    }
    assert f"mean entropy of m over 2 training rows: {smoothing.entropy:.4g}" in terms.about()
    assert not cache["row0"].signals, "no signal is read batch by batch"
    # A top-k cache has the largest logits and the mass of the rest, whose entropy is bounded.
    top_k = make_cache(tmp_path / "k", teacher, signals="top_k", teacher="m")
    bound = terms_of_cache(top_k, STUDENT, VOCABULARY, chosen)
    assert bound["smoothing"].entropy == pytest.approx(np.mean(spread), rel=1e-4)
    assert np.mean(spread) > np.mean(exact)
    assert "an upper bound" in bound.about()


def test_a_trial_with_smoothing_reads_no_row_of_the_cache():
    class Unread(Rows):
        def __getitem__(self, key):
            raise AssertionError(f"{key} was read")

    trial = data("label_smoothing", cache=Unread())
    for ids, [batch], [own] in zip(
        trial._plan(1), trial.steps(range(3)), data("combined").steps(range(3)), strict=True
    ):
        assert torch.equal(batch.input_ids, own.input_ids) and len(ids) == len(batch.lengths)
        assert batch.teachers[0].whole["places"] == sum(batch.lengths) - len(ids)
