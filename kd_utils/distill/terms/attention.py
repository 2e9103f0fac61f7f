"""L_attention: the student's attention maps against the teacher's."""

from collections import Counter
from collections.abc import Iterator
from typing import Self

import torch

from kd_utils.distill.targets import Maps, Targets
from kd_utils.distill.teacher_terms import LayerTerm, TermSetup, register
from kd_utils.models.attention_maps import Attention, decode_map
from kd_utils.models.signals import Signals, size_of

#: Neighbours of one length are compared together, up to so many entries of their maps.
ENTRIES = 2**18


@register
class AttentionMaps(LayerTerm):
    """Mean squared error of attention maps, head by head or through a mix of the teacher's heads.

    Args:
        pairs, teacher_layers: as in `LayerTerm`.
        heads: how many heads the teacher has.
        mix: as `head_mix` gives it; None: head by head.
        learned: `mix` is where training starts; rows stay positive and sum to 1.
        normaliser: what squared errors are divided by: the maps' "entries" (a mean over all), or
            their "queries" (summed over a row's keys, averaged over rows and heads).
    """

    name = kind = "attention"

    def __init__(
        self,
        pairs: list[tuple[int, int]],
        teacher_layers: int,
        heads: int,
        mix: torch.Tensor | None = None,
        *,
        learned: bool = False,
        normaliser: str = "entries",
    ) -> None:
        super().__init__(pairs, teacher_layers)
        self.heads, self.normaliser = heads, normaliser
        self.mixing = (
            torch.nn.Parameter(torch.log(mix + 0.01)) if learned and mix is not None else None
        )
        self.register_buffer("fixed_mix", None if learned else mix, persistent=False)

    @classmethod
    def of(cls, setup: TermSetup) -> Self:
        config, pairs = setup.config, setup.pairs("attention", setup.config.attention_layers)
        heads, student_heads = (
            setup.shape["num_attention_heads"],
            size_of(setup.student, "num_attention_heads"),
        )
        if student_heads is None:
            raise ValueError(
                f"the student ({setup.student.model_type}) has no attention heads, so it has no "
                "maps: use distill_type 'hidden_state' or 'black_box'"
            )
        return cls(
            pairs,
            setup.shape["num_hidden_layers"],
            heads,
            head_mix(config.head_mapping, student_heads, heads),
            learned=config.head_mapping == "learned",
            normaliser=config.attention_normaliser,
        )

    @property
    def mix(self) -> torch.Tensor | None:
        """As `head_mix` gives it, or as it was trained."""
        return self.fixed_mix if self.mixing is None else self.mixing.softmax(-1)

    def count(self, whole: Counter[str]) -> int:
        return self.heads * whole[self.normaliser]

    def compare(
        self, k: int, signals: Signals, layer: int, targets: Targets, column: str
    ) -> torch.Tensor:
        return attention_mse(
            signals.attentions[layer], targets.maps[column], self.count(targets.whole), self.mix
        )

    def about(self) -> str:
        mix = self.mix
        heads = "head by head" if mix is None else f"{mix.shape[1]} heads mixed to {mix.shape[0]}"
        return f"{super().about()}, {heads}"


def head_mix(mapping: str, student_heads: int, teacher_heads: int) -> torch.Tensor | None:
    """(H_student, H_teacher) rows that sum to 1: the mix of teacher heads for each student head.

    "mean_groups" averages neighbouring heads of the teacher in as many groups as the student has
    heads, as adaptive average pooling does: groups may overlap, and a student with more heads sees
    a head several times. "learned" starts from there. "none" gives None: head by head.

    Raises:
        ValueError: the head counts differ and no mapping was chosen.
    """
    if mapping == "none":
        if student_heads != teacher_heads:
            raise ValueError(
                f"teacher has {teacher_heads} heads, student {student_heads}, and maps are "
                "compared head by head: set head_mapping to 'mean_groups' (the teacher's heads "
                "averaged in groups) or 'learned' (a trained mix of them)"
            )
        return None
    return torch.nn.AdaptiveAvgPool1d(student_heads)(torch.eye(teacher_heads)).T.contiguous()


def attention_mse(
    student: Attention, maps: Maps, normaliser: int | None = None, mix: torch.Tensor | None = None
) -> torch.Tensor:
    """L_attention: mean squared error between causal maps (after TinyBERT, Jiao et al. 2020).

    TinyBERT compares scores; these are probabilities. Padding and the upper triangle do not count.
    Maps exist for one example at a time, or for a few short ones; as in `kd_loss`, the gradient is
    computed in the forward pass. Where tokens differ, both maps are first merged by groups
    (`targets.Merge`).

    Args:
        student: the layer's queries and keys.
        maps: the teacher's, with the query rows of the student that they belong to.
        normaliser: number of entries, or of query rows, in the whole batch, over examples and the
            teacher's heads; None: entries of `maps`.
        mix: (H_student, H_teacher) rows that sum to 1, as `head_mix` gives them; it may be trained.
            The sum counts as one over the teacher's heads.

    Returns:
        Scalar, mean over entries (or, with the other normaliser, over rows).

    Raises:
        ValueError: the head counts differ and there is no mix.
    """
    heads = len(maps.packed[0]) if maps.packed else student.query.shape[1]
    if mix is None and student.query.shape[1] != heads:
        raise ValueError(
            f"teacher has {heads} heads, student {student.query.shape[1]}, and maps are compared "
            "head by head: set head_mapping to 'mean_groups' or 'learned'"
        )
    total = _SummedMapError.apply(
        student.query, student.key, mix, student, maps, torch.is_grad_enabled()
    )
    if mix is not None:
        total = total * (heads / student.query.shape[1])
    return total / (normaliser or max(sum(teacher.numel() for teacher in maps.packed), 1))


class _SummedMapError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        query: torch.Tensor,
        key: torch.Tensor,
        mix: torch.Tensor | None,
        student: Attention,
        maps: Maps,
        wants_gradient: bool,
    ) -> torch.Tensor:
        total = torch.zeros((), device=query.device)
        leaves = (query, key) if mix is None else (query, key, mix)
        slopes = [torch.zeros_like(leaf) for leaf in leaves] if wants_gradient else []
        for alike in _neighbours_alike(maps, query.shape[1]):
            (first, last), merge = maps.student_rows[alike.start], maps.merges[alike.start]
            part = student.examples(alike, first, last)
            probs = part.map()  # (n, H, Q, K)
            packed = _together(maps.packed[alike])
            teacher, merged = decode_map(packed, *maps.teacher_rows[alike.start]), probs
            del packed
            if merge:
                teacher, merged = merge[0].apply(teacher), merge[1].apply(probs)
            target = teacher if mix is None else _mixed(mix, teacher)
            error = target.sub_(merged)  # the sign changes nothing before `backward`
            total += torch.dot(error.view(-1), error.view(-1))
            if slopes:  # through the softmax: P * (E - sum_k E P), then through q k^T
                if mix is not None:
                    slopes[2].sub_(_slope_of_mix(error, teacher))
                error = merge[1].spread(error, last - first) if merge else error
                slope = error.sub_((error * probs).sum(-1, keepdim=True)).mul_(probs)
                slope = (slope if part.softcap is None else slope * part.cap_slope()).to(
                    query.dtype
                )
                groups = query.shape[1] // key.shape[1]
                for_query = slope @ part.key.repeat_interleave(groups, dim=1)
                per_head = slope.transpose(-1, -2) @ part.query  # (n, H, K, head_dim)
                slopes[0][alike, :, first:last] = for_query
                slopes[1][alike, :, :last] = per_head.unflatten(1, (-1, groups)).sum(2)
        if slopes:
            ctx.save_for_backward(*slopes)
            ctx.scaling = student.scaling
        return total

    @staticmethod
    def backward(ctx, slope: torch.Tensor):
        query, key, *mix = ctx.saved_tensors
        slope = -2 * slope  # d error^2 = 2 error; error here is teacher minus student
        for_mix = slope * mix[0] if mix else None
        return slope * ctx.scaling * query, slope * ctx.scaling * key, for_mix, None, None, None


def _neighbours_alike(maps: Maps, student_heads: int) -> Iterator[slice]:
    """Examples that follow one another with the same rows, not to be merged, as many as `ENTRIES`
    allows; else an example alone. A batch has its rows in the order of their length.
    """
    rows, start = list(zip(maps.teacher_rows, maps.student_rows, strict=True)), 0
    for b in range(1, len(rows) + 1):
        heads = max(student_heads, len(maps.packed[start]))
        entries = heads * max((last - first) * last for first, last in rows[start])
        alike = b < len(rows) and rows[b] == rows[start]
        if not alike or any(maps.merges[start : b + 1]) or (b + 1 - start) * entries > ENTRIES:
            yield slice(start, b)
            start = b


def _together(packed: list[torch.Tensor]) -> torch.Tensor:
    """(n, H, P) packed maps of one size; an example alone, perhaps a large one, is not copied."""
    if len(packed) == 1:
        return packed[0][None]
    with torch.autocast(packed[0].device.type, enabled=False):  # it joins no float16
        return torch.stack(packed)


def _mixed(mix: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """(n, H_t, Q, K) -> (n, H_s, Q, K), in float32: autocast would round maps to 8 bits."""
    with torch.autocast(mix.device.type, enabled=False):
        return (mix @ maps.flatten(2)).unflatten(-1, maps.shape[2:])


def _slope_of_mix(error: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """(H_s, H_t), summed over examples, queries and keys; in float32 likewise."""
    with torch.autocast(maps.device.type, enabled=False):
        return (error.flatten(2) @ maps.flatten(2).mT).sum(0)
