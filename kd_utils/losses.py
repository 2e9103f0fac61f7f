"""The loss, L = alpha L_task + beta L_KD + gamma_hidden L_hidden + gamma_attention L_attention.

Each term is a sum over its elements divided by one normaliser. The default normaliser is the number of elements
given; pass the whole batch's number when the batch is split, and the split changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .signals import Attention, decode_map


def task_cross_entropy(student_logits: Tensor, targets: Tensor, normaliser: int | None = None) -> Tensor:
    """L_task = - sum_t log q(target_t) / normaliser.

    Args:
        student_logits: (N, V) at the positions that predict the answer's tokens.
        targets: (N,) the tokens that follow.
        normaliser: number of answer tokens in the whole batch.

    Returns:
        Scalar, nats per answer token.
    """
    total = F.cross_entropy(student_logits.float(), targets, reduction="sum")
    return total / (normaliser or max(len(targets), 1))


def forward_kl_top_k(student_logits: Tensor, top_logits: Tensor, top_ids: Tensor, log_mass: Tensor,
                     temperature: float) -> Tensor:
    """T^2 KL per token over the teacher's top k tokens and one bucket for all the rest.

    The rest's mass is exact: `log_mass` is the log-sum-exp of ALL the teacher's logits / T. Merging tokens into a
    bucket can only lower a KL (data processing inequality), so this is a lower bound of `kd_loss`, equal to it
    where the student is proportional to the teacher within the rest; 0 when the two agree.

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
    student_rest, teacher_rest = _log_rest(student), _log_rest(teacher)
    inside = (teacher.exp() * (teacher - student)).sum(-1)
    return temperature**2 * (inside + teacher_rest.exp() * (teacher_rest - student_rest))


def _log_rest(log_probs: Tensor) -> Tensor:
    """log(1 - sum exp(log_probs)), kept finite where float32 leaves the rest no mass."""
    mass = log_probs.exp().sum(-1).clamp(max=1 - 1e-6)
    return torch.log1p(-mass)


def kd_loss(student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor,
            temperature: float, normaliser: int | None = None, *, chunk_tokens: int = 512) -> Tensor:
    """L_KD = sum over tokens of T^2 KL(p || q) / normaliser, p = softmax(h_t W_t^T / T), q = softmax(h_s W_s^T / T).

    The KL runs over the whole vocabulary. Hinton et al. 2015, section 2: T^2 keeps the gradient's size independent of
    T. The teacher's entropy is in, so the value is 0 when the two agree, at every T.

    Both sides' logits exist for `chunk_tokens` tokens at a time. The gradient is worked out beside the value, in the
    forward pass (Liger Kernel's way, Hsu et al. 2024), so no (N, V) tensor is kept and none is computed twice.

    Args:
        student_hidden: (N, d_s); student_head: (V, d_s).
        teacher_hidden: (N, d_t), any float dtype; teacher_head: (V, d_t). No gradient goes to the teacher.
        temperature: T > 0.
        normaliser: number of distilled tokens in the whole batch.

    Returns:
        Scalar, nats per token times T^2.
    """
    total = _SummedKL.apply(student_hidden, student_head, teacher_hidden, teacher_head, temperature, chunk_tokens,
                            torch.is_grad_enabled())
    return total / (normaliser or max(len(student_hidden), 1))


class _SummedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, temperature: float,
                chunk_tokens: int, wants_gradient: bool) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradients = (torch.empty_like(hidden), torch.zeros_like(head)) if wants_gradient else None
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            student_log = F.log_softmax((hidden[rows] @ head.T).float().div_(temperature), dim=-1)
            logits = teacher[rows].to(teacher_head.dtype) @ teacher_head.T
            teacher_log = F.log_softmax(logits.float().div_(temperature), dim=-1)
            teacher_probs = teacher_log.exp()
            total += temperature**2 * teacher_log.sub_(student_log).mul_(teacher_probs).sum()
            if gradients:  # of T^2 KL with respect to the student's logits: T (q - p)
                slope = student_log.exp_().sub_(teacher_probs).mul_(temperature).to(hidden.dtype)
                gradients[0][rows] = slope @ head
                gradients[1].add_(slope.T @ hidden[rows])
        if gradients:
            ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, slope: Tensor):
        hidden, head = ctx.saved_tensors
        return slope * hidden, slope * head, None, None, None, None, None


def hidden_mse(projected_student: Tensor, teacher_hidden: Tensor, normaliser: int | None = None) -> Tensor:
    """L_hidden = sum over tokens of ||P h_s - h_t||^2 / d_t, / normaliser (FitNets, Romero et al. 2015, eq. 3).

    Args:
        projected_student: (N, d_t) `projector(student_hidden)`.
        teacher_hidden: (N, d_t).
        normaliser: number of distilled tokens in the whole batch.

    Returns:
        Scalar, mean over tokens and width.
    """
    total = F.mse_loss(projected_student.float(), teacher_hidden.float(), reduction="sum")
    return total / ((normaliser or max(len(teacher_hidden), 1)) * teacher_hidden.shape[-1])


def attention_mse(student: Attention, teacher_maps: list[Tensor], queries: list[tuple[int, int]],
                  normaliser: int | None = None) -> Tensor:
    """L_attention: mean squared error between causal maps, head by head (after TinyBERT, Jiao et al. 2020).

    TinyBERT compares scores; these are probabilities. Padding and the upper triangle do not count in the mean. Maps
    exist for one example at a time: as in `kd_loss`, the gradient is worked out in the forward pass.

    Args:
        student: the last layer's queries and keys.
        teacher_maps: per example, the causal entries of the query rows that count, as `signals.encode_map` stores them.
        queries: per example, those rows as a slice of positions.
        normaliser: number of entries in the whole batch, over examples and heads; or of query rows over examples and
            heads, which sums over a row's keys.

    Returns:
        Scalar, mean over entries (or, with the other normaliser, over rows).

    Raises:
        ValueError: the head counts differ.
    """
    if teacher_maps and student.query.shape[1] != len(teacher_maps[0]):
        raise ValueError(f"teacher has {len(teacher_maps[0])} heads, student {student.query.shape[1]}: maps are "
                         "compared head by head, so choose a student with the teacher's number of heads")
    total = _SummedMapError.apply(student.query, student.key, student, teacher_maps, queries, torch.is_grad_enabled())
    return total / (normaliser or max(sum(teacher.numel() for teacher in teacher_maps), 1))


class _SummedMapError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, student: Attention, teacher_maps: list[Tensor],
                queries: list[tuple[int, int]], wants_gradient: bool) -> Tensor:
        total = torch.zeros((), device=query.device)
        slopes = (torch.zeros_like(query), torch.zeros_like(key)) if wants_gradient else None
        for b, (teacher, (first, last)) in enumerate(zip(teacher_maps, queries, strict=True)):
            part = student.example(b, first, last)
            probs = part.map()[0]  # (H, Q, K)
            error = decode_map(teacher, first, last).sub_(probs)  # its sign changes nothing before `backward`
            total += torch.dot(error.view(-1), error.view(-1))
            if slopes:  # through the softmax: P * (E - sum_k E P), then through q k^T
                slope = error.sub_((error * probs).sum(-1, keepdim=True)).mul_(probs).to(query.dtype)
                groups = query.shape[1] // key.shape[1]
                slopes[0][b, :, first:last] = slope @ part.key[0].repeat_interleave(groups, dim=0)
                per_head = slope.transpose(-1, -2) @ part.query[0]  # (H, K, head_dim)
                slopes[1][b, :, :last] = per_head.unflatten(0, (-1, groups)).sum(1)
        if slopes:
            ctx.save_for_backward(*slopes)
            ctx.factor = -2 * student.scaling  # d error^2 = 2 error; error here is teacher minus student
        return total

    @staticmethod
    def backward(ctx, slope: Tensor):
        query, key = ctx.saved_tensors
        slope = ctx.factor * slope
        return slope * query, slope * key, None, None, None, None


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """L: each term times its weight."""
    return sum(weights[name] * term for name, term in terms.items())
