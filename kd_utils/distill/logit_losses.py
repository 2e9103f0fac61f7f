"""The losses of L_KD: how far two models' next-token distributions are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_utils.models.output_head import OutputHead
from kd_utils.tokens.vocabulary import SharedPieces


@dataclass(frozen=True)
class Shared:
    """Ids of the pieces that two vocabularies share, on the device.

    Attributes:
        teacher, student: (K,) int64, one to one.
        teacher_rest, student_rest: all other ids of each side.
    """

    teacher: Tensor
    student: Tensor
    teacher_rest: Tensor
    student_rest: Tensor

    @classmethod
    def of(
        cls,
        teacher: Tensor,
        student: Tensor,
        teacher_size: int,
        student_size: int,
        device: torch.device | str = "cpu",
    ) -> Shared:
        """From the shared ids and the numbers of output rows, some of which no id may use."""

        def rest(ids: Tensor, size: int) -> Tensor:
            left = torch.ones(size, dtype=torch.bool)
            left[ids] = False
            return left.nonzero()[:, 0].to(device)

        return cls(
            teacher.to(device),
            student.to(device),
            rest(teacher, teacher_size),
            rest(student, student_size),
        )


def with_output_rows(pieces: SharedPieces, teacher_size: int, student_size: int) -> SharedPieces:
    """The shared pieces that both models have an output row for."""
    kept = (pieces.teacher < teacher_size) & (pieces.student < student_size)
    return SharedPieces(pieces.teacher[kept], pieces.student[kept])


def kd_loss(
    student_hidden: Tensor,
    student_head: OutputHead | Tensor,
    teacher_hidden: Tensor | list[Tensor],
    teacher_head: OutputHead | Tensor | list[OutputHead],
    temperature: float,
    normaliser: int | None = None,
    *,
    shared: Shared | None = None,
    mixture: list[float] | None = None,
    chunk_tokens: int = 512,
) -> Tensor:
    """L_KD = sum over tokens of T^2 KL(p || q) / normaliser, p = softmax(z_t / T), q = softmax(z_s
    / T).

    Hinton et al. 2015, section 2: T^2 keeps the size of the gradient independent of T. The
    teacher's entropy is included, so the value is 0 where the two agree, at every T.

    The KL runs over the whole vocabulary; with `shared`, over the pieces that both vocabularies
    have and one bucket for all others, whose mass is exact. That is KL(p' || q) as well, where p'
    spreads the teacher's rest over the student's other pieces as the student does. If the student
    has no other piece, p' is the teacher's distribution over the shared pieces.

    Logits exist for `chunk_tokens` tokens at a time. The gradient is computed beside the value, in
    the forward pass (as in Liger Kernel, Hsu et al. 2024): no (N, V) tensor is kept or recomputed.

    Args:
        student_hidden: (N, d_s).
        student_head: an output layer, or its (V_s, d_s) weight.
        teacher_hidden: (N, d_t), any float dtype; several teachers of one vocabulary: a list.
        teacher_head: likewise. No gradient goes to the teacher.
        temperature: T > 0.
        normaliser: number of distilled tokens in the whole batch; None: N.
        shared: for a teacher of another vocabulary; None compares id by id.
        mixture: weights of several teachers, whose probabilities are mixed; they sum to 1.

    Returns:
        Scalar, nats per token times T^2.
    """
    heads = list(map(_as_head, _listed(teacher_head)))
    teachers = list(zip(_listed(teacher_hidden), heads, mixture or [1.0], strict=True))
    head, largest = _as_head(student_head), max(len(teacher.weight) for teacher in heads)
    chunk_tokens = max(16, min(chunk_tokens, 2**25 // largest))
    total = _SummedKL.apply(
        student_hidden,
        head.weight,
        head,
        teachers,
        temperature,
        shared,
        chunk_tokens,
        torch.is_grad_enabled(),
    )
    return total / (normaliser or max(len(student_hidden), 1))


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _as_head(head: OutputHead | Tensor) -> OutputHead:
    return head if isinstance(head, OutputHead) else OutputHead(head)


class _SummedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        head: OutputHead,
        teachers: list[tuple[Tensor, OutputHead, float]],
        temperature: float,
        shared: Shared | None,
        chunk_tokens: int,
        wants_gradient: bool,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradients = (torch.empty_like(hidden), torch.zeros_like(weight)) if wants_gradient else None
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = head.logits(hidden[rows])
            # Before `div_`, which changes the logits in place where they are float32.
            by_raw_logits = head.slope(logits)
            student_log = F.log_softmax(logits.float().div_(temperature), dim=-1)
            parts = [
                _log_probs(teacher[rows], teacher_head, temperature, mixed)
                for teacher, teacher_head, mixed in teachers
            ]
            teacher_log = parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(0)
            if shared is not None:
                teacher_log = _over_student_pieces(teacher_log, student_log, shared)
            teacher_probs = teacher_log.exp()
            no_mass = None if shared is None else teacher_log == -torch.inf
            gap = teacher_log.sub_(student_log).mul_(teacher_probs)
            gap = gap if shared is None else gap.masked_fill_(no_mass, 0)  # 0 log 0 = 0
            total += temperature**2 * gap.sum()
            if gradients:  # of T^2 KL with respect to the student's logits: T (q - p)
                slope = student_log.exp_().sub_(teacher_probs).mul_(temperature)
                slope = (slope if head.is_plain else slope * by_raw_logits).to(hidden.dtype)
                gradients[0][rows] = slope @ weight
                gradients[1].add_(slope.T @ hidden[rows])
        if gradients:
            ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, slope: Tensor):
        hidden, head = ctx.saved_tensors
        return slope * hidden, slope * head, None, None, None, None, None, None


def _log_probs(hidden: Tensor, head: OutputHead, temperature: float, weight: float = 1.0) -> Tensor:
    """log(weight softmax(z / T)), (n, V)."""
    log_probs = F.log_softmax(
        head.logits(hidden.to(head.weight.dtype)).float().div_(temperature), dim=-1
    )
    return log_probs if weight == 1.0 else log_probs + torch.tensor(weight).log()


def _over_student_pieces(teacher_log: Tensor, student_log: Tensor, shared: Shared) -> Tensor:
    """(n, V_s) log p' of `kd_loss`: the teacher's distribution over the student's pieces."""
    student_side = torch.full_like(student_log, -torch.inf)
    pieces = teacher_log.index_select(1, shared.teacher)
    if len(shared.student_rest) == 0:
        pieces = pieces - pieces.logsumexp(-1, keepdim=True) if len(shared.teacher_rest) else pieces
    elif len(shared.teacher_rest):
        rest = teacher_log.index_select(1, shared.teacher_rest).logsumexp(-1, keepdim=True)
        others = student_log.index_select(1, shared.student_rest)
        others = others + (rest - others.logsumexp(-1, keepdim=True))
        student_side.index_copy_(1, shared.student_rest, others)
    return student_side.index_copy_(1, shared.student, pieces)


def span_kl(student_log: Tensor, teacher_log: Tensor, temperature: float) -> Tensor:
    """T^2 KL per group of tokens between two outcomes: the group's text, and anything else.

    For a group of several tokens, only the probability of its text can be compared: the product
    over its tokens, each predicted at the position before it.

    Args:
        student_log, teacher_log: (M,) log-probability of each group's text.

    Returns:
        (M,) nats, times T^2; 0 where the two agree.
    """
    student_rest, teacher_rest = log_rest(student_log[:, None]), log_rest(teacher_log[:, None])
    text = teacher_log.exp() * (teacher_log - student_log)
    return temperature**2 * (text + teacher_rest.exp() * (teacher_rest - student_rest))


def span_log_probs(
    hidden: Tensor,
    head: OutputHead | Tensor,
    targets: Tensor,
    span: Tensor,
    spans: int,
    temperature: float,
) -> Tensor:
    """(M,) log-probability of each group: the sum over its tokens of log softmax(z / T).

    Args:
        hidden: (P, d) at the positions that predict a token.
        targets: (P,) those tokens.
        span: (P,) the number of the group that each token belongs to.
        spans: M.
        temperature: T.
    """
    head, total = _as_head(head), torch.zeros(spans, device=hidden.device)

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head.logits(hidden.to(head.weight.dtype)).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    for start in range(0, len(hidden), 512):  # recomputed in the backward pass, and not kept
        rows = slice(start, start + 512)
        total = total.index_add(
            0, span[rows], checkpoint(part, hidden[rows], targets[rows], use_reentrant=False)
        )
    return total


def uld_loss(
    student_hidden: Tensor,
    student_head: OutputHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: OutputHead | Tensor,
    temperature: float,
    normaliser: int | None = None,
    *,
    chunk_tokens: int = 128,
) -> Tensor:
    """Universal logit distillation: sum over tokens of sum_k |p_(k) - q_(k)| / normaliser, both
    sorted by size (Boizard et al. 2024, eq. 3, with the distance in closed form).

    It needs no shared piece, and compares shapes only: equal distributions over different words
    are equal to it. The shorter vocabulary is padded with zeros.

    Args, returns: as `kd_loss`; between 0 and 2 per token.
    """
    heads = (_as_head(student_head), _as_head(teacher_head))
    total = torch.zeros((), device=student_hidden.device)

    def part(student: Tensor, teacher: Tensor) -> Tensor:
        probs = [
            (head.logits(h.to(head.weight.dtype)).float() / temperature)
            .softmax(-1)
            .sort(-1, descending=True)[0]
            for head, h in zip(heads, (student, teacher))
        ]
        wide = max(side.shape[-1] for side in probs)
        student, teacher = (F.pad(side, (0, wide - side.shape[-1])) for side in probs)
        return (student - teacher.detach()).abs().sum()

    for start in range(0, len(student_hidden), chunk_tokens):  # sorted again, and not kept
        chunk = (side[start : start + chunk_tokens] for side in (student_hidden, teacher_hidden))
        total = total + checkpoint(part, *chunk, use_reentrant=False)
    return total / (normaliser or max(len(student_hidden), 1))


def log_rest(log_probs: Tensor) -> Tensor:
    """log(1 - sum exp(log_probs)), kept finite where float32 leaves the rest no mass."""
    mass = log_probs.exp().sum(-1).clamp(max=1 - 1e-6)
    return torch.log1p(-mass)
