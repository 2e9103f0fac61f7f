"""Logits across vocabularies against torch on whole matrices, and values by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from kd_utils.distill.logit_losses import Shared, kd_loss, uld_loss
from kd_utils.distill.terms.kd import outcome_kl, span_log_probs
from kd_utils.models.output_head import OutputHead


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shared(teacher, student, teacher_size, student_size):
    return Shared.of(torch.tensor(teacher), torch.tensor(student), teacher_size, student_size)


def bucketed(log_probs, ids):
    """(N, K + 1): the pieces `ids`, then the log of all the rest."""
    rest = torch.ones(log_probs.shape[-1], dtype=torch.bool)
    rest[ids] = False
    return torch.cat([log_probs[:, ids], log_probs[:, rest].logsumexp(-1, keepdim=True)], dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "heads",
    [
        (OutputHead, OutputHead),
        (lambda w: OutputHead(w, 0.25), lambda w: OutputHead(w, 2.0, 3.0)),
        (lambda w: OutputHead(w, cap=2.0), OutputHead),
    ],
)
def test_kl_over_shared_pieces_and_a_rest_equals_torch_with_gradients(temperature, heads):
    pieces = shared([4, 0, 7, 2], [1, 5, 0, 3], 9, 7)
    teacher_head, student_head = heads[0](random(9, 6)), random(7, 4, seed=1)
    theirs, results = random(40, 6, seed=2), []
    for by_torch in (True, False):
        ours, weight = random(40, 4, seed=3).requires_grad_(), student_head.clone().requires_grad_()
        head = heads[1](weight)
        if by_torch:
            q = bucketed((head.logits(ours) / temperature).log_softmax(-1), pieces.student)
            p = bucketed(
                (teacher_head.logits(theirs) / temperature).log_softmax(-1), pieces.teacher
            )
            loss = temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")
        else:
            loss = kd_loss(
                ours, head, theirs, teacher_head, temperature, shared=pieces, chunk_tokens=16
            )
        loss.backward()
        results.append((loss.detach(), ours.grad, weight.grad))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def biased(size, seed, *how):
    """A head with a bias as large as its logits."""
    return OutputHead(random(size, 4, seed=seed), *how, bias=3 * random(size, seed=seed + 1))


@pytest.mark.parametrize("how", [(), (2.0, 3.0)])
@pytest.mark.parametrize("across", [False, True])
def test_the_loss_of_heads_with_a_bias_equals_torch_with_gradients(across, how):
    teacher = biased(9 if across else 7, 1)
    pieces = shared([4, 0, 7, 2], [1, 5, 0, 3], 9, 7) if across else None
    theirs, results = random(40, 4, seed=2), []
    for by_torch in (True, False):
        hidden, head = random(40, 4, seed=3).requires_grad_(), biased(7, 4, *how)
        leaves = (hidden, head.weight.requires_grad_(), head.bias.requires_grad_())
        if by_torch:
            logits = [(hidden @ head.weight.T + head.bias) * head.scale, theirs @ teacher.weight.T]
            if head.cap:
                logits[0] = head.cap * torch.tanh(logits[0] / head.cap)
            logits[1] = logits[1] + teacher.bias
            q, p = ((side / 2).log_softmax(-1) for side in logits)
            if pieces:
                q, p = bucketed(q, pieces.student), bucketed(p, pieces.teacher)
            loss = 4 * F.kl_div(q, p, log_target=True, reduction="batchmean")
        else:
            loss = kd_loss(hidden, head, theirs, teacher, 2.0, shared=pieces, chunk_tokens=16)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    assert results[0][-1].abs().max() > 0.1
    assert kd_loss(theirs, teacher, theirs, teacher, 2.0).abs() < 1e-5


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_does_not_train_gets_no_gradient_and_changes_no_other(frozen):
    """Over several chunks, and over none: a batch may have no place that is compared."""
    for rows in (40, 0):
        theirs, gradients = random(rows, 6, seed=2), []
        for kept in ("", frozen):
            ours, head = random(rows, 4, seed=3), {"weight": random(7, 4), "bias": random(7)}
            parts = {"hidden": ours, **head}
            for name, part in parts.items():
                part.requires_grad_(name != kept)
            loss = kd_loss(ours, OutputHead(**head), theirs, random(7, 6), 2.0, chunk_tokens=16)
            loss.backward()
            gradients.append({name: part.grad for name, part in parts.items()})
        assert gradients[1].pop(frozen) is None
        if rows:
            assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[1])


def test_a_groups_probability_and_uld_count_a_bias():
    hidden, head, teacher = random(5, 4).requires_grad_(), biased(7, 1), biased(9, 5)
    head.bias.requires_grad_()
    logits = (hidden @ head.weight.T + head.bias) / 2
    targets, span = torch.tensor([0, 3, 6, 1, 2]), torch.arange(5)
    log = span_log_probs(hidden, head, targets, span, 5, 2.0)
    by_torch = -F.cross_entropy(logits, targets, reduction="none")
    theirs = ((hidden.detach() @ teacher.weight.T + teacher.bias) / 2).softmax(-1)
    sides = [side.sort(-1, descending=True)[0] for side in (logits.softmax(-1), theirs)]
    uld = (F.pad(sides[0], (0, 2)) - sides[1]).abs().sum(-1).mean()
    found = uld_loss(hidden, head, hidden.detach(), teacher, 2.0)
    for one, other in ((log.sum(), by_torch.sum()), (found, uld)):
        torch.testing.assert_close(one, other)
        gradients = (
            torch.autograd.grad(side, [hidden, head.bias], retain_graph=True)
            for side in (one, other)
        )
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_shared_pieces_by_hand():
    """Teacher 1/2 1/4 1/4 (the last unshared), student 1/4 1/4 1/2: shared 1/2 and 1/4, rests 1/4
    and 1/2.
    """
    teacher, student = (
        torch.tensor([values]).log() for values in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])
    )
    loss = kd_loss(
        student, torch.eye(3), teacher, torch.eye(3), 1.0, shared=shared([0, 1], [0, 1], 3, 3)
    )
    assert loss.item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)


def test_a_rest_on_one_side_only():
    teacher, student = random(5, 4), random(5, 3, seed=1).requires_grad_()
    # The student has no piece to put the rest on: KL over the shared pieces, renormalised.
    loss = kd_loss(
        student, torch.eye(3), teacher, torch.eye(4), 1.0, shared=shared([0, 1, 2], [2, 0, 1], 4, 3)
    )
    p = teacher[:, :3].log_softmax(-1)
    q = student.log_softmax(-1)[:, [2, 0, 1]]
    torch.testing.assert_close(loss, F.kl_div(q, p, log_target=True, reduction="batchmean"))
    # The teacher gives none of it any mass: the student's is pushed down, and nothing is infinite.
    loss = kd_loss(
        teacher.requires_grad_(),
        torch.eye(4),
        student.detach(),
        torch.eye(3),
        1.0,
        shared=shared([0, 1, 2], [0, 1, 2], 3, 4),
    )
    loss.backward()
    assert loss.isfinite() and (teacher.grad[:, 3] > 0).all()


def test_a_vocabulary_in_another_order_changes_nothing():
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    ours, theirs, head, teacher = (
        random(9, 5),
        random(9, 6, seed=1),
        random(17, 5, seed=2),
        random(17, 6, seed=3),
    )
    direct = kd_loss(ours, head, theirs, teacher, 2.0)
    permuted = kd_loss(
        ours, head, theirs, teacher[order], 2.0, shared=Shared.of(torch.arange(17), order, 17, 17)
    )
    torch.testing.assert_close(permuted, direct, atol=1e-6, rtol=1e-6)


def test_mass_that_a_head_gives_ids_without_a_piece_is_counted():
    """Output rows beyond the tokenizer's pieces belong to the rest: masses are those of the whole
    softmax.
    """
    head, hidden = torch.zeros(8, 3), torch.zeros(2, 3)  # every id 1/8
    loss = kd_loss(
        hidden, torch.zeros(4, 3), hidden, head, 1.0, shared=shared([0, 1, 2], [0, 1, 2], 8, 4)
    )
    assert loss.item() == pytest.approx(
        3 / 8 * math.log(1 / 2) + 5 / 8 * math.log((5 / 8) / (1 / 4)), abs=1e-6
    )


def test_several_teachers_are_one_whose_probabilities_are_mixed():
    ours, head = random(9, 5).requires_grad_(), random(11, 5, seed=1)
    theirs, heads = (
        [random(9, d, seed=d) for d in (4, 6)],
        [OutputHead(random(11, d, seed=10 + d)) for d in (4, 6)],
    )
    mixed = kd_loss(ours, head, theirs, heads, 2.0, mixture=[0.3, 0.7])
    probs = [(each.logits(hidden) / 2).softmax(-1) for each, hidden in zip(heads, theirs)]
    by_torch = 4 * F.kl_div(
        (ours @ head.T / 2).log_softmax(-1), 0.3 * probs[0] + 0.7 * probs[1], reduction="batchmean"
    )
    torch.testing.assert_close(mixed, by_torch, atol=1e-5, rtol=1e-4)
    # The weighted sum of single KLs has the same gradient.
    summed = 0.3 * kd_loss(ours, head, theirs[0], heads[0], 2.0) + 0.7 * kd_loss(
        ours, head, theirs[1], heads[1], 2.0
    )
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, ours)[0] for loss in (mixed, summed)), atol=1e-5, rtol=1e-4
    )
    assert summed > mixed


def test_a_groups_probability_is_the_chain_rules():
    hidden, head = random(5, 3).requires_grad_(), random(7, 3, seed=1)
    targets, span = torch.tensor([0, 3, 6, 1, 2]), torch.tensor([0, 0, 1, 2, 2])
    log = (hidden @ head.T / 2).log_softmax(-1)[torch.arange(5), targets]
    expected = torch.stack([log[0] + log[1], log[2], log[3] + log[4]])
    torch.testing.assert_close(span_log_probs(hidden, head, targets, span, 3, 2.0), expected)


def test_span_kl_is_that_of_two_outcomes():
    student, teacher = torch.tensor([[0.2], [0.9]]).log(), torch.tensor([[0.5], [0.9]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    assert outcome_kl(student, teacher, 2.0).tolist() == pytest.approx([4 * by_hand, 0.0], abs=1e-5)
    ours, theirs = torch.tensor([[0.0], [-60.0]], requires_grad=True), torch.tensor([[-60.0], [0]])
    sure = outcome_kl(ours, theirs, 1.0)
    assert sure.isfinite().all()


def test_uld_compares_sorted_probabilities_whatever_their_ids():
    ours, head = random(300, 5).requires_grad_(), random(7, 5, seed=1)
    theirs, teacher = random(300, 6, seed=2), random(9, 6, seed=3)
    loss = uld_loss(ours, head, theirs, teacher, 2.0)
    p = F.pad((ours @ head.T / 2).softmax(-1).sort(-1, descending=True)[0], (0, 2))
    q = (theirs @ teacher.T / 2).softmax(-1).sort(-1, descending=True)[0]
    torch.testing.assert_close(loss, (p - q).abs().sum(-1).mean())
    torch.testing.assert_close(
        *(
            torch.autograd.grad(each, ours, retain_graph=True)[0]
            for each in (loss, (p - q).abs().sum(-1).mean())
        )
    )
    order = torch.randperm(7)
    assert uld_loss(ours, head, ours.detach(), head[order], 1.0) < 1e-5


def test_a_groups_logits_are_not_kept_for_the_backward_pass():
    hidden, head = random(1500, 8).requires_grad_(), random(4000, 8, seed=1)
    kept, span, targets = [], torch.arange(1500) // 2, torch.arange(1500)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        total = span_log_probs(hidden, head, targets, span, 750, 2.0).sum()
    assert max(kept) <= head.numel() and sum(kept) < 1500 * 4000 / 10
    [gradient] = torch.autograd.grad(total, hidden)
    whole = -F.cross_entropy(hidden @ head.T / 2, targets, reduction="sum")
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, hidden)[0])
