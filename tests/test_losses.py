"""Each term against torch's own functions, hand-worked values, and under splitting."""

import math

import pytest
import torch
import torch.nn.functional as F

from kd_utils.losses import (attention_mse, forward_kl_top_k, hidden_mse, kd_loss, task_cross_entropy,
                             weighted_sum)


def forward_kl(student, teacher, temperature):
    """`kd_loss` of each token alone, with logits given as hidden states: the head is the identity."""
    head = torch.eye(student.shape[-1])
    return torch.stack([kd_loss(s[None], head, t[None], head, temperature) for s, t in zip(student, teacher)])


def by_torch(student, teacher, temperature):
    return F.kl_div(F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1),
                    reduction="none").sum(-1) * temperature**2


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float() * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_forward_kl_equals_torch_and_is_zero_at_identity(temperature):
    student, teacher = logits(7, 13), logits(7, 13, seed=1)
    expected = by_torch(student, teacher, temperature)
    torch.testing.assert_close(forward_kl(student, teacher, temperature), expected, atol=1e-5, rtol=1e-4)
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
    """T^2 is in: for small logits the gradient is that of a quadratic, whatever T (Hinton et al. 2015, eq. 4)."""
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
    torch.testing.assert_close(forward_kl_top_k(student, top.values, top.indices, mass, temperature),
                               forward_kl(student, teacher, temperature), atol=1e-4, rtol=1e-3)
    few = teacher.topk(3)
    assert forward_kl_top_k(teacher, few.values, few.indices, mass, temperature).abs().max() < 1e-4
    assert (forward_kl_top_k(student, few.values, few.indices, mass, temperature)
            <= forward_kl(student, teacher, temperature) + 1e-4).all()


def test_top_k_keeps_the_rest_in_the_gradient():
    """Renormalising the top k would give no gradient at student = teacher's top k; the rest bucket does."""
    teacher = torch.tensor([[3.0, 2.0, 1.0, 1.0, 1.0]])
    student = torch.tensor([[3.0, 2.0, -5.0, -5.0, -5.0]], requires_grad=True)
    top = teacher.topk(2)
    forward_kl_top_k(student, top.values, top.indices, teacher.logsumexp(-1), 1.0).sum().backward()
    assert student.grad.abs().max() > 0.05


def test_task_cross_entropy_equals_torch():
    student, targets = logits(5, 11), torch.tensor([1, 4, 0, 10, 3])
    torch.testing.assert_close(task_cross_entropy(student, targets), F.cross_entropy(student, targets))
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


def test_attention_mse_by_hand_and_refusal_of_unequal_heads():
    student, teacher = [torch.tensor([[1.0, 0.5, 0.5]])], [torch.tensor([[1.0, 0.9, 0.1]])]
    assert attention_mse(student, teacher).item() == pytest.approx(2 * 0.16 / 3)
    with pytest.raises(ValueError, match="teacher has 2 heads, student 1"):
        attention_mse(student, [torch.ones(2, 3)])


@pytest.mark.parametrize("parts", [[4, 5], [1, 8], [3, 3, 3]])
def test_splitting_a_batch_changes_nothing(parts):
    student, teacher, targets = logits(9, 11), logits(9, 11, seed=1), torch.arange(9)

    def terms(rows, normaliser=None):
        n = normaliser or {}
        return [task_cross_entropy(student[rows], targets[rows], n.get("tokens")),
                hidden_mse(student[rows], teacher[rows], n.get("tokens")),
                attention_mse([student[rows].T], [teacher[rows].T], n.get("entries")),
                kd_loss(student[rows], torch.eye(11), teacher[rows], torch.eye(11), 2.0, n.get("tokens"))]

    whole = torch.stack(terms(slice(0, 9)))
    rows = torch.arange(9).split(parts)
    split = torch.stack([torch.stack(terms(r, {"tokens": 9, "entries": 99})) for r in rows]).sum(0)
    torch.testing.assert_close(split, whole)


def test_weighted_sum():
    assert weighted_sum({"task": torch.tensor(2.0), "kd": torch.tensor(3.0)}, {"task": 1.0, "kd": 0.5}) == 3.5
