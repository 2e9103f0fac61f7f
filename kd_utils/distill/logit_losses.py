"""L_KD: the student's next-token distributions against the teacher's, over one vocabulary or what
two share.
"""

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
    """Ids of the same piece in two vocabularies, on the device (`vocabulary.shared_pieces`).

    Attributes:
        teacher, student: (K,) int64, one to one; teacher_rest, student_rest: all other ids of each.
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
        """From the ids that are shared and the numbers of output rows (which may be more than there
        are pieces).
        """

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

    The KL runs over the whole vocabulary. Hinton et al. 2015, section 2: T^2 keeps the gradient's
    size independent of T. The teacher's entropy is in, so the value is 0 when the two agree, at
    every T.

    With `shared`, it runs over the pieces that both vocabularies have and one bucket for all
    others. The buckets' masses are exact. This is KL(p' || q) too: p' has the teacher's
    probabilities on the shared pieces, and its rest spread over the student's other pieces as the
    student spreads its own. Where the student has no other piece to put the rest on, the teacher's
    distribution is that over the shared pieces.

    Both sides' logits exist for `chunk_tokens` tokens at a time. The gradient is worked out beside
    the value, in the forward pass (Liger Kernel's way, Hsu et al. 2024), so no (N, V) tensor is
    kept and none is computed twice.

    Args:
        student_hidden: (N, d_s); student_head: (V_s, d_s) weight, or a `Head` that does more with
            it.
        teacher_hidden: (N, d_t), any float dtype; teacher_head: likewise. No gradient goes to the
            teacher. Lists of them: of several teachers of one vocabulary, whose probabilities are
                mixed.
        temperature: T > 0.
        normaliser: number of distilled tokens in the whole batch.
        shared: for a teacher of another vocabulary; None compares id by id.
        mixture: weights of several teachers, which sum to 1.

    Returns:
        Scalar, nats per token times T^2.
    """
    teachers = list(
        zip(
            _listed(teacher_hidden),
            map(_as_head, _listed(teacher_head)),
            mixture or [1.0],
            strict=True,
        )
    )
    head = _as_head(student_head)
    chunk_tokens = max(
        16, min(chunk_tokens, 2**25 // max(len(each.weight) for _, each, _ in teachers))
    )
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
            by_raw_logits = head.slope(
                logits
            )  # before `div_`, which is in place where logits are float32
            student_log = F.log_softmax(logits.float().div_(temperature), dim=-1)
            parts = [
                _log_probs(teacher[rows], its_head, temperature, weight)
                for teacher, its_head, weight in teachers
            ]
            teacher_log = parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(0)
            if shared is not None:
                teacher_log = _students_view(teacher_log, student_log, shared)
            teacher_probs = teacher_log.exp()
            no_mass = None if shared is None else teacher_log == -torch.inf
            gap = teacher_log.sub_(student_log).mul_(teacher_probs)
            total += (
                temperature**2 * (gap if shared is None else gap.masked_fill_(no_mass, 0)).sum()
            )  # 0 log 0 = 0
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


def _students_view(teacher_log: Tensor, student_log: Tensor, shared: Shared) -> Tensor:
    """(n, V_s) log p': the teacher's distribution as the student can have it (see `kd_loss`)."""
    view = torch.full_like(student_log, -torch.inf)
    pieces = teacher_log.index_select(1, shared.teacher)
    if len(shared.student_rest) == 0:
        pieces = pieces - pieces.logsumexp(-1, keepdim=True) if len(shared.teacher_rest) else pieces
    elif len(shared.teacher_rest):
        rest = teacher_log.index_select(1, shared.teacher_rest).logsumexp(-1, keepdim=True)
        others = student_log.index_select(1, shared.student_rest)
        view.index_copy_(
            1, shared.student_rest, others + (rest - others.logsumexp(-1, keepdim=True))
        )
    return view.index_copy_(1, shared.student, pieces)


def span_kl(student_log: Tensor, teacher_log: Tensor, temperature: float) -> Tensor:
    """T^2 KL per group of tokens between two outcomes: the group's text, and anything else.

    The text's probability is the chain rule's, the product over the group's tokens, each predicted
    at the position before it. Two tokenizations of one text have one such number each; whatever
    else they spell has no counterpart.

    Args:
        student_log, teacher_log: (M,) log-probability of each group's tokens, given what stands
            before them.

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
    """(M,) log-probability of each group: the sum over its tokens of log softmax(z / T) at the
    token.

    Args:
        hidden: (P, d) at the positions that predict a token; targets: (P,) those tokens.
        span: (P,) which of the `spans` groups each belongs to.
    """
    head, total = _as_head(head), torch.zeros(spans, device=hidden.device)

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head.logits(hidden.to(head.weight.dtype)).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    for start in range(0, len(hidden), 512):  # worked out again in the backward pass, and not kept
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
    sorted by size.

    Boizard et al. 2024, eq. 3 (with its Wasserstein distance in closed form). It needs no shared
    piece and knows none: two distributions of one shape over other words are alike to it. The
    shorter vocabulary is padded with zeros.

    Args, returns: as `kd_loss`; between 0 and 2 per token.
    """
    heads, total = (
        (_as_head(student_head), _as_head(teacher_head)),
        torch.zeros((), device=student_hidden.device),
    )

    def part(student: Tensor, teacher: Tensor) -> Tensor:
        probs = [
            (each.logits(h.to(each.weight.dtype)).float() / temperature)
            .softmax(-1)
            .sort(-1, descending=True)[0]
            for each, h in zip(heads, (student, teacher))
        ]
        wide = max(each.shape[-1] for each in probs)
        student, teacher = (F.pad(each, (0, wide - each.shape[-1])) for each in probs)
        return (student - teacher.detach()).abs().sum()

    for start in range(
        0, len(student_hidden), chunk_tokens
    ):  # sorted again in the backward pass, and not kept
        rows = slice(start, start + chunk_tokens)
        total = total + checkpoint(
            part, student_hidden[rows], teacher_hidden[rows], use_reentrant=False
        )
    return total / (normaliser or max(len(student_hidden), 1))


def forward_kl_top_k(
    student_logits: Tensor,
    top_logits: Tensor,
    top_ids: Tensor,
    log_mass: Tensor,
    temperature: float,
) -> Tensor:
    """T^2 KL per token over the teacher's top k tokens and one bucket for all the rest.

    The rest's mass is exact: `log_mass` is the log-sum-exp of ALL the teacher's logits / T. Merging
    tokens into a bucket can only lower a KL (data processing inequality), so this is a lower bound
    of `kd_loss`, equal to it where the student is proportional to the teacher within the rest; 0
    when the two agree.

    Args:
        student_logits: (N, V).
        top_logits: (N, k) the teacher's largest logits (not divided by T).
        top_ids: (N, k) their token ids, int64.
        log_mass: (N,) log sum_v exp(z_v / T) over the whole vocabulary, for this T.
        temperature: T > 0.

    Returns:
        (N,) nats, times T^2.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1).gather(-1, top_ids)
    teacher = top_logits.float() / temperature - log_mass.float()[:, None]
    student_rest, teacher_rest = log_rest(student), log_rest(teacher)
    inside = (teacher.exp() * (teacher - student)).sum(-1)
    return temperature**2 * (inside + teacher_rest.exp() * (teacher_rest - student_rest))


def log_rest(log_probs: Tensor) -> Tensor:
    """log(1 - sum exp(log_probs)), kept finite where float32 leaves the rest no mass."""
    mass = log_probs.exp().sum(-1).clamp(max=1 - 1e-6)
    return torch.log1p(-mass)
