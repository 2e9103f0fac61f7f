"""Each term against torch's own functions, hand-worked values, and under splitting."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kd_utils.distill.logit_losses import kd_loss
from kd_utils.distill.targets import Maps, Merge, _merge
from kd_utils.distill.terms import attention as terms_attention
from kd_utils.distill.terms.attention import attention_mse, head_mix
from kd_utils.distill.terms.hidden import hidden_mse
from kd_utils.distill.terms.kd import forward_kl_top_k
from kd_utils.distill.terms.task import Task
from kd_utils.distill.training import weighted_sum
from kd_utils.models.attention_maps import (
    Attention,
    causal_places,
    causal_slice,
    decode_map,
    encode_map,
)
from kd_utils.models.output_head import OutputHead
from kd_utils.models.signals import Signals


def forward_kl(student, teacher, temperature):
    """`kd_loss` of each token alone, with logits given as hidden states: the head is the
    identity.
    """
    head = torch.eye(student.shape[-1])
    return torch.stack(
        [kd_loss(s[None], head, t[None], head, temperature) for s, t in zip(student, teacher)]
    )


def by_torch(student, teacher, temperature):
    return (
        F.kl_div(
            F.log_softmax(student / temperature, -1),
            F.softmax(teacher / temperature, -1),
            reduction="none",
        ).sum(-1)
        * temperature**2
    )


def logits(*shape, seed=0):
    return (
        torch.randn(
            *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).float()
        * 3
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_forward_kl_equals_torch_and_is_zero_at_identity(temperature):
    student, teacher = logits(7, 13), logits(7, 13, seed=1)
    expected = by_torch(student, teacher, temperature)
    torch.testing.assert_close(
        forward_kl(student, teacher, temperature), expected, atol=1e-5, rtol=1e-4
    )
    assert forward_kl(student, student, temperature).abs().max() < 1e-5


def test_forward_kl_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL(p || q) = 3/4 ln(3/2) + 1/4 ln(1/2)
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert forward_kl(student, teacher, 1.0).item() == pytest.approx(by_hand, abs=1e-6)


def test_forward_kl_is_teacher_to_student():
    student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[9.0, 0.0, 0.0]])
    assert forward_kl(student, teacher, 1.0).item() == pytest.approx(math.log(3), abs=5e-3)
    assert forward_kl(teacher, student, 1.0).item() > 4


def test_gradient_scale_does_not_depend_on_temperature():
    """T^2 is in: for small logits the gradient is that of a quadratic, whatever T (Hinton et al.
    2015, eq. 4).
    """
    norms = []
    for temperature in (4.0, 16.0):
        student = (logits(3, 50) * 0.1).requires_grad_()
        forward_kl(student, logits(3, 50, seed=1) * 0.1, temperature).sum().backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_top_k_is_exact_when_k_is_the_vocabulary_less_one_and_zero_at_identity():
    student, teacher, temperature = logits(6, 9), logits(6, 9, seed=1), 2.0
    mass = (teacher / temperature).logsumexp(-1)
    top = teacher.topk(8)
    torch.testing.assert_close(
        forward_kl_top_k(student, top.values, top.indices, mass, temperature),
        forward_kl(student, teacher, temperature),
        atol=1e-4,
        rtol=1e-3,
    )
    few = teacher.topk(3)
    assert forward_kl_top_k(teacher, few.values, few.indices, mass, temperature).abs().max() < 1e-4
    assert (
        forward_kl_top_k(student, few.values, few.indices, mass, temperature)
        <= forward_kl(student, teacher, temperature) + 1e-4
    ).all()


def test_top_k_keeps_the_rest_in_the_gradient():
    """Renormalising the top k would give no gradient at student = teacher's top k; the rest bucket
    does.
    """
    teacher = torch.tensor([[3.0, 2.0, 1.0, 1.0, 1.0]])
    student = torch.tensor([[3.0, 2.0, -5.0, -5.0, -5.0]], requires_grad=True)
    top = teacher.topk(2)
    forward_kl_top_k(student, top.values, top.indices, teacher.logsumexp(-1), 1.0).sum().backward()
    assert student.grad.abs().max() > 0.05


def task_cross_entropy(student, targets, normaliser=None):
    """The term with logits given as hidden states: the head is the identity."""
    places, whole = torch.arange(len(targets)), {"answers": normaliser or max(len(targets), 1)}
    signals = Signals(student[None], {}, {})
    batch = SimpleNamespace(predicting=places, targets=targets, whole=whole)
    return Task()(signals, OutputHead(torch.eye(student.shape[-1])), batch)


def test_task_cross_entropy_equals_torch():
    student, targets = logits(5, 11), torch.tensor([1, 4, 0, 10, 3])
    torch.testing.assert_close(
        task_cross_entropy(student, targets), F.cross_entropy(student, targets)
    )
    assert task_cross_entropy(student[:0], targets[:0]) == 0


def test_kd_loss_from_hidden_states_equals_whole_logits_in_chunks_with_gradients():
    hidden, teacher, results = logits(23, 6), logits(23, 8, seed=1), []
    student_head, teacher_head = logits(31, 6, seed=2), logits(31, 8, seed=3)
    for chunk in (5, 1000, None):
        h, w = hidden.clone().requires_grad_(), student_head.clone().requires_grad_()
        if chunk is None:
            loss = by_torch(h @ w.T, teacher.half().float() @ teacher_head.T, 2.0).mean()
        else:
            loss = kd_loss(h, w, teacher.half(), teacher_head, 2.0, chunk_tokens=chunk)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    for result in results[:2]:
        torch.testing.assert_close(result, results[2], atol=1e-4, rtol=1e-4)


def test_kd_loss_of_the_teacher_itself_is_zero():
    hidden, head = logits(9, 8).half(), logits(17, 8, seed=1)
    assert kd_loss(hidden.float(), head, hidden, head, 2.0).abs() < 1e-6


def test_hidden_mse_equals_torch():
    a, b = logits(5, 7), logits(5, 7, seed=1)
    torch.testing.assert_close(hidden_mse(a, b), F.mse_loss(a, b))
    assert hidden_mse(a, a) == 0


def attention(batch=2, heads=4, kv_heads=2, tokens=6):
    return Attention(
        logits(batch, heads, tokens, 8), logits(batch, kv_heads, tokens, 8, seed=1), None, 0.35
    )


def teacher_maps(queries, heads=4, tokens=6, dtype=torch.float16):
    """Packed rows of random causal maps, one per example."""
    shown = torch.ones(tokens, tokens).tril().bool()
    maps = (
        logits(len(queries), heads, tokens, tokens, seed=2)
        .masked_fill(~shown, -torch.inf)
        .softmax(-1)
    )
    return [
        encode_map(rows[:, :last, :last], dtype)[:, slice(*causal_slice(first, last))]
        for rows, (first, last) in zip(maps, queries)
    ]


def maps_of(packed, queries):
    """A batch's maps of a teacher with the student's tokens."""
    return Maps(packed, queries, queries, [None] * len(packed))


def test_attention_mse_by_hand():
    flat = Attention(
        torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), None, 0.5
    )  # rows 1 | 1/2 1/2
    teacher = [torch.tensor([[1.0, 0.9, 0.1]])]
    assert attention_mse(flat, maps_of(teacher, [(0, 2)])).item() == pytest.approx(2 * 0.16 / 3)
    assert attention_mse(flat, maps_of([teacher[0][:, 1:]], [(1, 2)])).item() == pytest.approx(
        2 * 0.16 / 2
    )
    assert attention_mse(flat, maps_of([torch.tensor([[1.0, 0.5, 0.5]])], [(0, 2)])) == 0


ALIKE = [(0, 6), (0, 6), (0, 6), (2, 5), (2, 5), (0, 5)]  # neighbours are compared together


@pytest.mark.parametrize("queries", [[(0, 6), (0, 4)], [(3, 6), (1, 2)], ALIKE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
@pytest.mark.parametrize(
    "masks, softcap", [("none", None), ("one", None), ("one each", None), ("none", 1.5)]
)
def test_attention_mse_equals_torch_with_gradients(queries, dtype, masks, softcap):
    maps, results = teacher_maps(queries, dtype=dtype), []
    windows = [torch.ones(6, 6).tril().triu(-2 - b % 2).bool()[None] for b in range(len(queries))]
    mask = {"none": None, "one": windows[0][None], "one each": torch.stack(windows)}[masks]
    for by_torch in (True, False):
        student = attention(batch=len(queries))
        student.mask, student.softcap = mask, softcap
        student.query.requires_grad_(), student.key.requires_grad_()
        if by_torch:
            pairs = [
                (
                    student.map()[b, :, first:last, :last].flatten(1)[
                        :, causal_places(first, last)
                    ],
                    decode_map(maps[b], first, last).flatten(1)[:, causal_places(first, last)],
                )
                for b, (first, last) in enumerate(queries)
            ]
            loss = F.mse_loss(*(torch.cat(side, dim=1) for side in zip(*pairs)))
        else:
            loss = attention_mse(student, maps_of(maps, queries))
        (3 * loss).backward()
        results.append((loss.detach(), student.query.grad, student.key.grad))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def run_lengths(maps, student_heads):
    found = list(terms_attention._neighbours_alike(maps, student_heads))
    assert [i for run in found for i in range(run.start, run.stop)] == list(range(len(maps.packed)))
    return [run.stop - run.start for run in found]


@pytest.mark.parametrize("student_heads", [4, 2])
def test_examples_compared_together_give_what_each_gives_alone(student_heads, monkeypatch):
    maps, results = maps_of(teacher_maps(ALIKE), ALIKE), []
    start = None if student_heads == 4 else head_mix("mean_groups", 2, 4)
    for entries, lengths in ((terms_attention.ENTRIES, [3, 2, 1]), (2 * 4 * 6 * 6, [2, 1, 2, 1])):
        monkeypatch.setattr(terms_attention, "ENTRIES", entries)
        assert run_lengths(maps, student_heads) == lengths
        student = attention(len(ALIKE), student_heads)
        leaves = [student.query, student.key] + ([] if start is None else [start.clone()])
        for leaf in leaves:
            leaf.requires_grad_()
        loss = attention_mse(student, maps, mix=None if start is None else leaves[2])
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, atol=1e-7, rtol=1e-5)


def test_examples_whose_maps_are_merged_are_compared_one_by_one():
    merged = Merge(torch.arange(6), torch.arange(6), 6)
    maps = maps_of(teacher_maps(ALIKE[:3]), ALIKE[:3])
    maps.merges[1] = (merged, merged)
    assert run_lengths(maps, 4) == [1, 1, 1]


def test_more_heads_than_the_teacher_has_let_fewer_examples_be_compared_together(monkeypatch):
    monkeypatch.setattr(terms_attention, "ENTRIES", 2 * 4 * 6 * 6)
    assert run_lengths(maps_of(teacher_maps(ALIKE), ALIKE), 8) == [1, 1, 1, 2, 1]


def test_attention_mse_refuses_unequal_heads():
    with pytest.raises(
        ValueError, match="teacher has 2 heads, student 4.*set head_mapping to 'mean_groups'"
    ):
        attention_mse(attention(), maps_of(teacher_maps([(0, 6)], heads=2), [(0, 6)]))


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_attention_mse_of_merged_maps_and_mixed_heads_equals_torch_with_gradients(heads):
    """The teacher's 5 tokens and the student's 6 make 4 groups; queries of the last three are
    compared.
    """
    last = {"teacher": np.array([0, 1, 3, 4]), "student": np.array([0, 2, 3, 5])}
    merges = [
        tuple(
            _merge(last[side], last[side][1:], torch.device("cpu"))
            for side in ("teacher", "student")
        )
    ] * 2
    packed = teacher_maps([(0, 5), (0, 5)], heads=heads, tokens=5)
    whole = [decode_map(each, 0, 5) for each in packed]
    rows = [each[:, slice(*causal_slice(1, 5))] for each in packed]
    mixing, results = logits(4, heads, seed=5), []
    for by_torch in (True, False):
        student, mix = attention(), mixing.clone().requires_grad_()
        student.query.requires_grad_(), student.key.requires_grad_()
        if by_torch:

            def merged(maps, side):
                groups = torch.tensor(np.searchsorted(last[side], np.arange(maps.shape[-1])))
                return maps[..., last[side][1:], :] @ F.one_hot(groups).float()

            error = [
                merged(student.map()[b], "student")
                - torch.einsum("st,tqk->sqk", mix.softmax(-1), merged(whole[b], "teacher"))
                for b in range(2)
            ]
            loss = sum(each.square().sum() for each in error) / (
                2 * 4 * (2 + 3 + 4)
            )  # causal entries of rows 2 to 4
        else:
            maps = Maps(rows, [(1, 5)] * 2, [(2, 6)] * 2, merges)
            loss = attention_mse(student, maps, 2 * heads * (2 + 3 + 4), mix.softmax(-1))
        loss.backward()
        results.append((loss.detach(), student.query.grad, student.key.grad, mix.grad))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("parts", [[4, 5], [1, 8], [3, 3, 3]])
def test_splitting_a_batch_changes_nothing(parts):
    student, teacher, targets = logits(9, 11), logits(9, 11, seed=1), torch.arange(9)
    maps, spans = attention(batch=9), [(0, 3 + b % 4) for b in range(9)]
    packed = teacher_maps(spans)

    def terms(rows, normaliser=None):
        n = normaliser or {}
        return [
            task_cross_entropy(student[rows], targets[rows], n.get("tokens")),
            hidden_mse(student[rows], teacher[rows], n.get("tokens")),
            attention_mse(
                Attention(maps.query[rows], maps.key[rows], None, 0.35),
                maps_of(packed[rows], spans[rows]),
                n.get("entries"),
            ),
            kd_loss(
                student[rows], torch.eye(11), teacher[rows], torch.eye(11), 2.0, n.get("tokens")
            ),
        ]

    whole = torch.stack(terms(slice(0, 9)))
    ends = torch.tensor(parts).cumsum(0).tolist()
    entries = sum(part.numel() for part in packed)
    split = torch.stack(
        [
            torch.stack(terms(slice(end - size, end), {"tokens": 9, "entries": entries}))
            for end, size in zip(ends, parts)
        ]
    ).sum(0)
    torch.testing.assert_close(split, whole)


def test_weighted_sum():
    assert (
        weighted_sum({"task": torch.tensor(2.0), "kd": torch.tensor(3.0)}, {"task": 1.0, "kd": 0.5})
        == 3.5
    )
