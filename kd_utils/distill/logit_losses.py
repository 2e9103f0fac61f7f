"""The losses of L_KD over whole next-token distributions, from hidden states and output layers."""

from typing import NamedTuple, Self

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from kd_utils.models.output_head import OutputHead, as_head


class Shared(NamedTuple):
    """Ids of the pieces that two vocabularies share, on the device.

    Attributes:
        teacher, student: (K,) int64, one to one.
        teacher_rest, student_rest: all other ids of each side.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    teacher_rest: torch.Tensor
    student_rest: torch.Tensor

    @classmethod
    def of(
        cls,
        teacher: torch.Tensor | np.ndarray,
        student: torch.Tensor | np.ndarray,
        teacher_size: int,
        student_size: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """From the shared ids and the numbers of output rows, some of which no id may use."""
        teacher_rest = np.setdiff1d(np.arange(teacher_size), teacher)
        student_rest = np.setdiff1d(np.arange(student_size), student)
        ids = (teacher, student, teacher_rest, student_rest)
        return cls(*(torch.as_tensor(side, device=device) for side in ids))


def kd_loss(
    student_hidden: torch.Tensor,
    student_head: OutputHead | torch.Tensor,
    teacher_hidden: torch.Tensor | list[torch.Tensor],
    teacher_head: OutputHead | torch.Tensor | list[OutputHead],
    temperature: float,
    normaliser: int | None = None,
    *,
    shared: Shared | None = None,
    mixture: list[float] | None = None,
    chunk_tokens: int = 512,
) -> torch.Tensor:
    """L_KD = sum over tokens of T^2 KL(softmax(z_t / T) || softmax(z_s / T)) / normaliser.

    T^2 keeps the size of the gradient independent of T (Hinton et al. 2015, section 2). The
    teacher's entropy is included: the value is 0 where the two agree.

    The KL runs over the whole vocabulary; with `shared`, over the pieces that both vocabularies
    have and one bucket for all others, whose mass is exact. That is KL(p' || q) as well, where p'
    spreads the teacher's rest over the student's other pieces as the student does. If the student
    has no other piece, p' is the teacher's distribution over the shared pieces.

    Logits exist for `chunk_tokens` tokens at a time. The gradient is computed in the forward pass
    (as in Liger Kernel, Hsu et al. 2024): no (N, V) tensor is kept or recomputed.

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
    heads = list(map(as_head, _listed(teacher_head)))
    teachers = list(zip(_listed(teacher_hidden), heads, mixture or [1.0], strict=True))
    head, limit = as_head(student_head), 2**25 // max(len(teacher.weight) for teacher in heads)
    options = temperature, shared, max(16, min(chunk_tokens, limit)), torch.is_grad_enabled()
    total = _SummedKL.apply(student_hidden, head.weight, head.bias, head, teachers, *options)
    return total / (normaliser or max(len(student_hidden), 1))


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value]


class _SummedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        head: OutputHead,
        teachers: list[tuple[torch.Tensor, OutputHead, float]],
        temperature: float,
        shared: Shared | None,
        chunk_tokens: int,
        wants_gradient: bool,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        _, trains_weight, trains_bias, *_ = ctx.needs_input_grad
        by_hidden, by_weight, by_bias = torch.empty_like(hidden), None, None
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = head.logits(hidden[rows])
            # Before `div_`, which changes the logits in place where they are float32.
            by_raw_logits = head.slope(logits)
            student_log = logits.float().div_(temperature).log_softmax(-1)
            parts = [
                _log_probs(teacher[rows], teacher_head, temperature, mixed)
                for teacher, teacher_head, mixed in teachers
            ]
            teacher_log = parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(0)
            if shared is not None:
                teacher_log = _over_student_pieces(teacher_log, student_log, shared)
            teacher_probs = teacher_log.exp()
            gap = teacher_log.sub_(student_log).mul_(teacher_probs)
            if shared is not None:
                gap.masked_fill_(teacher_probs == 0, 0)  # 0 log 0 = 0
            total += temperature**2 * gap.sum()
            if wants_gradient:  # of T^2 KL with respect to the student's logits: T (q - p)
                slope = student_log.exp_().sub_(teacher_probs).mul_(temperature)
                slope = slope if head.is_plain else slope * by_raw_logits
                rounded = slope.to(hidden.dtype)
                by_hidden[rows] = rounded @ weight
                if trains_weight:
                    by_weight = _added(by_weight, rounded.T @ hidden[rows], weight)
                if trains_bias:  # summed in float32
                    by_bias = _added(by_bias, slope.sum(0), bias)
        if wants_gradient:
            ctx.save_for_backward(by_hidden, by_weight, by_bias)
        return total

    @staticmethod
    def backward(ctx, slope: torch.Tensor):
        by_inputs = (None if part is None else slope * part for part in ctx.saved_tensors)
        return *by_inputs, None, None, None, None, None, None


def _added(total: torch.Tensor | None, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Add a chunk's gradient in place; the first is not added to zeros, which take their time."""
    return part.to(like.dtype) if total is None else total.add_(part)


def _log_probs(
    hidden: torch.Tensor, head: OutputHead, temperature: float, weight: float
) -> torch.Tensor:
    """log(weight softmax(z / T)), (n, V)."""
    hidden = hidden.to(head.weight.dtype)
    log_probs = head.logits(hidden).float().div_(temperature).log_softmax(-1)
    return log_probs if weight == 1.0 else log_probs + torch.tensor(weight).log()


def _over_student_pieces(
    teacher_log: torch.Tensor, student_log: torch.Tensor, shared: Shared
) -> torch.Tensor:
    """(n, V_s) log p' of `kd_loss`: the teacher's distribution over the student's pieces."""
    student_side = torch.full_like(student_log, -torch.inf)
    pieces = teacher_log.index_select(1, shared.teacher)
    if len(shared.teacher_rest) and len(shared.student_rest):
        rest = teacher_log.index_select(1, shared.teacher_rest).logsumexp(-1, keepdim=True)
        student_rest_log = student_log.index_select(1, shared.student_rest)
        student_rest_log = student_rest_log + (rest - student_rest_log.logsumexp(-1, keepdim=True))
        student_side.index_copy_(1, shared.student_rest, student_rest_log)
    elif len(shared.teacher_rest):
        pieces = pieces - pieces.logsumexp(-1, keepdim=True)
    return student_side.index_copy_(1, shared.student, pieces)


def uld_loss(
    student_hidden: torch.Tensor,
    student_head: OutputHead | torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: OutputHead | torch.Tensor,
    temperature: float,
    normaliser: int | None = None,
) -> torch.Tensor:
    """Universal logit distillation: sum over tokens of sum_k |p_(k) - q_(k)| / normaliser, both
    sorted by size (Boizard et al. 2024, eq. 3, with the distance in closed form).

    It needs no shared piece, and compares shapes only: equal distributions over different words
    are equal to it. The shorter vocabulary is padded with zeros.

    Args, returns: as `kd_loss`; between 0 and 2 per token.
    """
    heads = (as_head(student_head), as_head(teacher_head))
    wide = max(len(head.weight) for head in heads)
    total = torch.zeros((), device=student_hidden.device)

    def part(*hidden: torch.Tensor) -> torch.Tensor:
        logits = [
            head.logits(side.to(head.weight.dtype)).float() / temperature
            for head, side in zip(heads, hidden)
        ]
        ordered = [side.softmax(-1).sort(-1, descending=True)[0] for side in logits]
        student, teacher = (
            torch.nn.functional.pad(side, (0, wide - side.shape[-1])) for side in ordered
        )
        return (student - teacher.detach()).abs().sum()

    for start in range(0, len(student_hidden), 128):  # sorted again, and not kept
        chunk = (side[start : start + 128] for side in (student_hidden, teacher_hidden))
        total = total + checkpoint(part, *chunk, use_reentrant=False)
    return total / (normaliser or max(len(student_hidden), 1))
