"""The loss, L = alpha L_task + beta L_KD + gamma_hidden L_hidden + gamma_attention L_attention.

Each term is a sum over its elements divided by one normaliser. The default normaliser is the number
of elements given; pass the whole batch's number when the batch is split, and the split changes
nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_utils.distill.targets import Maps
from kd_utils.models.attention_maps import Attention, decode_map


def task_cross_entropy(
    student_logits: Tensor, targets: Tensor, normaliser: int | None = None
) -> Tensor:
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


def hidden_mse(
    projected_student: Tensor, teacher_hidden: Tensor, normaliser: int | None = None
) -> Tensor:
    """L_hidden = sum over tokens of ||P h_s - h_t||^2 / d_t, / normaliser (FitNets, Romero et al.
    2015, eq. 3).

    Args:
        projected_student: (N, d_t) `projector(student_hidden)`.
        teacher_hidden: (N, d_t).
        normaliser: number of distilled tokens in the whole batch.

    Returns:
        Scalar, mean over tokens and width.
    """
    total = F.mse_loss(projected_student.float(), teacher_hidden.float(), reduction="sum")
    return total / ((normaliser or max(len(teacher_hidden), 1)) * teacher_hidden.shape[-1])


def attention_mse(
    student: Attention, maps: Maps, normaliser: int | None = None, mix: Tensor | None = None
) -> Tensor:
    """L_attention: mean squared error between causal maps, head by head (after TinyBERT, Jiao et
    al. 2020).

    TinyBERT compares scores; these are probabilities. Padding and the upper triangle do not count
    in the mean. Maps exist for one example at a time: as in `kd_loss`, the gradient is worked out
    in the forward pass. Where the two sides' tokens differ, both maps are merged to groups first
    (`compared.Merge`).

    Args:
        student: the layer's queries and keys.
        maps: the teacher's, and which query rows of the student they belong to.
        normaliser: number of entries in the whole batch, over examples and the teacher's heads; or
            of query rows over examples and heads, which sums over a row's keys.
        mix: (H_student, H_teacher), rows that sum to 1: which mixture of the teacher's heads each
            head of the student is compared with; it may be trained. None: head by head. The sum
            counts as one over the teacher's heads.

    Returns:
        Scalar, mean over entries (or, with the other normaliser, over rows).

    Raises:
        ValueError: the head counts differ and there is no mix.
    """
    heads = len(maps.packed[0]) if maps.packed else student.query.shape[1]
    if mix is None and student.query.shape[1] != heads:
        raise ValueError(
            f"teacher has {heads} heads, student {student.query.shape[1]}, and maps are compared "
            f"head by "
            "head: set head_mapping to 'mean_groups' or 'learned'"
        )
    total = _SummedMapError.apply(
        student.query, student.key, mix, student, maps, torch.is_grad_enabled()
    )
    total = total * (heads / student.query.shape[1]) if mix is not None else total
    return total / (normaliser or max(sum(teacher.numel() for teacher in maps.packed), 1))


class _SummedMapError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        mix: Tensor | None,
        student: Attention,
        maps: Maps,
        wants_gradient: bool,
    ) -> Tensor:
        total = torch.zeros((), device=query.device)
        slopes = [torch.zeros_like(query), torch.zeros_like(key)] if wants_gradient else []
        if slopes and mix is not None:
            slopes.append(torch.zeros_like(mix))
        for b, (packed, theirs, (first, last), merge) in enumerate(
            zip(maps.packed, maps.teacher_rows, maps.student_rows, maps.merges, strict=True)
        ):
            part = student.example(b, first, last)
            probs = part.map()[0]  # (H, Q, K)
            teacher, compared = decode_map(packed, *theirs), probs
            if merge:
                teacher, compared = merge[0].apply(teacher), merge[1].apply(probs)
            target = teacher if mix is None else _in_float32("st,tqk->sqk", mix, teacher)
            error = target.sub_(compared)  # its sign changes nothing before `backward`
            total += torch.dot(error.view(-1), error.view(-1))
            if slopes:  # through the softmax: P * (E - sum_k E P), then through q k^T
                if mix is not None:
                    slopes[2].sub_(_in_float32("sqk,tqk->st", error, teacher))
                error = merge[1].spread(error, last - first) if merge else error
                slope = error.sub_((error * probs).sum(-1, keepdim=True)).mul_(probs)
                slope = (slope if part.softcap is None else slope * part.cap_slope()[0]).to(
                    query.dtype
                )
                groups = query.shape[1] // key.shape[1]
                slopes[0][b, :, first:last] = slope @ part.key[0].repeat_interleave(groups, dim=0)
                per_head = slope.transpose(-1, -2) @ part.query[0]  # (H, K, head_dim)
                slopes[1][b, :, :last] = per_head.unflatten(0, (-1, groups)).sum(1)
        if slopes:
            ctx.save_for_backward(*slopes)
            ctx.scaling = student.scaling
        return total

    @staticmethod
    def backward(ctx, slope: Tensor):
        query, key, *mix = ctx.saved_tensors
        slope = -2 * slope  # d error^2 = 2 error; error here is teacher minus student
        return (
            slope * ctx.scaling * query,
            slope * ctx.scaling * key,
            slope * mix[0] if mix else None,
            None,
            None,
            None,
        )


def _in_float32(equation: str, left: Tensor, right: Tensor) -> Tensor:
    """`einsum` of maps, which autocast would round to 8 bits."""
    with torch.autocast(left.device.type, enabled=False):
        return torch.einsum(equation, left, right)


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """L: each term times its weight."""
    return sum(weights[name] * term for name, term in terms.items())
