"""Attention maps: queries and keys are kept, maps computed from them, and packed for a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Without "sdpa" in the name: transformers refuses such names to families that soft-cap.
IMPLEMENTATION = "keeps_queries"

#: What can be done with a model that has no maps.
NO_MAPS = (
    "as a student, use distill_type 'hidden_state' or 'black_box'; as a teacher, set signals to "
    "'top_k hidden' or 'top_k'"
)

#: Arguments of an attention module that change its map in a way that `Attention.map` lacks.
UNKNOWN_TO_MAPS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias on positions",
}


@dataclass
class Attention:
    """The queries and keys from which an attention layer's map is computed.

    Attributes:
        query: (B, H, Q, head_dim), after position encoding: the last Q of K positions.
        key: (B, H_kv, K, head_dim), after position encoding; heads of a group share one.
        mask: (B or 1, 1, Q, K), bool (True: may see) or additive; None for plain causal attention.
        scaling: usually head_dim ** -0.5.
        softcap: c of c * tanh(s / c), applied to the scaled scores s (Gemma 2); None: not.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None = None

    def example(self, b: int, first_query: int, last_query: int) -> Attention:
        """Example b's query rows [first_query, last_query) and their keys, as a batch of one."""
        return self.examples(slice(b, b + 1), first_query, last_query)

    def examples(self, which: slice, first_query: int, last_query: int) -> Attention:
        """The query rows [first_query, last_query) of these examples, and their keys."""
        rows, mask = slice(first_query, last_query), self.mask
        if mask is not None:
            mask = mask[which if len(mask) > 1 else slice(1), :, rows, :last_query]
        key = self.key[which, :, :last_query]
        return replace(self, query=self.query[which, :, rows], key=key, mask=mask)

    def _scores(self) -> torch.Tensor:
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        return (self.query @ key.transpose(-1, -2)).float()

    def map(self) -> torch.Tensor:
        """softmax(scaling q k^T) over the keys that a query may see (Vaswani et al. 2017, eq. 1).

        Returns:
            (B, H, Q, K) float32 for the last Q of K positions; rows sum to 1. A row whose bool mask
            hides every key (left padding) is all zeros.
        """
        scores, scaling, mask = self._scores(), self.scaling, self.mask
        if self.softcap is not None:
            scores, scaling = self.softcap * torch.tanh(scores * (scaling / self.softcap)), 1.0
        if mask is None:  # additive: filling by a boolean mask takes three times as long
            rows, columns = scores.shape[-2:]
            mask = torch.full((rows, columns), -torch.inf, device=scores.device)
            mask.triu_(columns - rows + 1)
        if mask.dtype == torch.bool:
            scores = scores.mul_(scaling).masked_fill_(~mask, -torch.inf)
            return torch.nan_to_num(scores.softmax(-1))
        return torch.add(mask, scores, alpha=scaling).softmax(-1)

    def cap_slope(self) -> torch.Tensor:
        """(B, H, Q, K) derivative of the capped scores by the scaled ones, 1 - tanh^2."""
        assert self.softcap is not None
        return 1 - torch.tanh(self._scores() * (self.scaling / self.softcap)) ** 2


def keeps_queries(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
):
    """The attention function that transformers calls in every layer after a model was switched.

    A module with an attribute `keep` hands it the `Attention`, the values, and the function that
    attends as this call does. The arguments have transformers' names, since some families pass the
    mask by name.

    Raises:
        ValueError: the family changes its maps in a way that `Attention.map` lacks.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name, meaning in UNKNOWN_TO_MAPS.items():
        if kwargs.get(name) is not None:  # SDPA would drop sinks without a word
            raise ValueError(
                f"{type(module).__name__} uses {meaning}, so its maps cannot be captured: {NO_MAPS}"
            )
    softcap = kwargs.get("softcap")
    attend = sdpa_attention_forward if softcap is None else _softcapped_attention
    if keep := getattr(module, "keep", None):
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        found = Attention(query, key, attention_mask, scaling, softcap)
        keep(found, value, partial(attend, module, **kwargs))
    return attend(module, query, key, value, attention_mask, **kwargs)


def _softcapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
):
    """Gemma 2's eager attention, with an additive mask: SDPA has no soft-capping."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    if mask is None and query.shape[2] > 1:
        mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril_()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(
            ~mask, torch.finfo(query.dtype).min
        )
    return eager_attention_forward(module, query, key, value, mask, **kwargs)


def relative_difference(found: Tensor, expected: Tensor) -> Tensor:
    """||found - expected|| / ||expected||, a scalar; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return torch.tensor(torch.inf, device=expected.device)
    return (found - expected).float().norm() / expected.float().norm().clamp(min=1e-30)


def compare_map(
    differences: list[Tensor], found: Attention, value: Tensor, attend: Callable[..., Any]
) -> None:
    """Add how far map times values is from what the attention function gives, both in float32.

    In bfloat16 large scores are rounded so coarsely that every family would differ.
    """
    mask = found.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    with torch.autocast(value.device.type, enabled=False):
        exact = replace(found, query=found.query.float(), key=found.key.float(), mask=mask)
        output = attend(exact.query, exact.key, value.float(), mask)[0]  # (B, T, H, d_v)
        weights = exact.map()
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1).float()
        seen = weights.sum(-1).gt(0)[..., None]  # not of a row of padding
        product, output = (weights @ value) * seen, output.transpose(1, 2) * seen
    differences.append(relative_difference(product, output))


def causal_places(
    first_query: int, last_query: int, device: torch.device | None = None
) -> torch.Tensor:
    """Flat places of the causal entries in query rows [first_query, last_query) of a map."""
    rows, columns = torch.tril_indices(
        last_query - first_query, last_query, offset=first_query, device=device
    )
    return rows * last_query + columns


def causal_slice(first_query: int, last_query: int) -> tuple[int, int]:
    """Start and end of query rows [first_query, last_query) in a packed triangle."""
    return first_query * (first_query + 1) // 2, last_query * (last_query + 1) // 2


def encode_map(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One example's map as a cache stores it: the causal entries, row by row.

    Args:
        rows: (H, n, n) probabilities.
        dtype: float16 stores p; uint8 stores round(255 sqrt(p)), which is finest near 0.

    Returns:
        (H, n (n + 1) / 2) of `dtype`.
    """
    places = causal_places(0, rows.shape[-1], rows.device)
    packed = (rows if dtype == torch.uint8 else rows.to(dtype)).flatten(1).index_select(1, places)
    return packed.sqrt_().mul_(255).round_().to(dtype) if dtype == torch.uint8 else packed


def decode_map(packed: torch.Tensor, first_query: int, last_query: int) -> torch.Tensor:
    """Probabilities of query rows [first_query, last_query) that `encode_map` stored.

    A row of uint8 is divided by its sum, since its entries were rounded one by one.

    Args:
        packed: (..., H, P), the part of the triangle that `causal_slice` gives.

    Returns:
        (..., H, last_query - first_query, last_query) float32; 0 above the diagonal.
    """
    values = packed.float().div_(255).square_() if packed.dtype == torch.uint8 else packed.float()
    places = causal_places(first_query, last_query, packed.device)
    sizes = *packed.shape[:-1], last_query - first_query, last_query
    rows = torch.zeros(sizes, device=packed.device)
    rows.view(*packed.shape[:-1], -1).index_copy_(-1, places, values)
    return rows.div_(rows.sum(-1, keepdim=True)) if packed.dtype == torch.uint8 else rows
