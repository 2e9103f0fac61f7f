"""Attention maps, computed from a layer's queries and keys, and packed as a cache stores them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Arguments of an attention module that change its map in a way that `attention_map` lacks.
UNKNOWN_TO_MAPS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias on positions",
}


@dataclass
class Attention:
    """The queries and keys from which an attention layer's map is computed.

    Attributes:
        query: (B, H, T, head_dim), after position encoding.
        key: (B, H_kv, T, head_dim), after position encoding.
        mask: (B or 1, 1, T, T), bool (True: may see) or additive; None for plain causal attention.
        scaling: usually head_dim ** -0.5.
        softcap: c of c * tanh(s / c), applied to the scaled scores s (Gemma 2); None: not.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None

    def example(self, b: int, first_query: int, last_query: int) -> Attention:
        """Example b's query rows [first_query, last_query) and their keys, as a batch of one."""
        rows = slice(first_query, last_query)
        mask = (
            None if self.mask is None else self.mask[b % len(self.mask), None, :, rows, :last_query]
        )
        return Attention(
            self.query[b, None, :, rows],
            self.key[b, None, :, :last_query],
            mask,
            self.scaling,
            self.softcap,
        )

    def map(self) -> Tensor:
        """(B, H, T, T) float32 probabilities, head by head."""
        return attention_map(self.query, self.key, self.mask, self.scaling, self.softcap)

    def cap_slope(self) -> Tensor:
        """(B, H, T, T) derivative of the capped scores by the scaled ones, 1 - tanh^2."""
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        scores = (self.query @ key.transpose(-1, -2)).float()
        return 1 - torch.tanh(scores * (self.scaling / self.softcap)) ** 2


def attention_map(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """softmax(scaling q k^T) over the keys that a query may see (Vaswani et al. 2017, eq. 1).

    Args:
        query: (B, H, Q, head_dim), the last Q of the K positions.
        key: (B, H_kv, K, head_dim); grouped-query heads are repeated.
        mask, scaling, softcap: as in `Attention`, for these Q rows and K keys.

    Returns:
        (B, H, Q, K) float32; rows sum to 1. A row whose bool mask hides every key (left padding) is
        all zeros.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(-1, -2)).float()
    if softcap is not None:
        scores, scaling = softcap * torch.tanh(scores * (scaling / softcap)), 1.0
    if mask is None:  # additive: filling by a boolean mask takes three times as long
        rows, columns = scores.shape[-2:]
        mask = torch.full((rows, columns), -torch.inf, device=scores.device)
        mask.triu_(columns - rows + 1)
    if mask.dtype == torch.bool:
        return torch.nan_to_num(scores.mul_(scaling).masked_fill_(~mask, -torch.inf).softmax(-1))
    return torch.add(mask, scores, alpha=scaling).softmax(-1)


def causal_places(first_query: int, last_query: int, device: torch.device | None = None) -> Tensor:
    """Flat places of the causal entries in query rows [first_query, last_query) of a map."""
    rows, columns = torch.tril_indices(
        last_query - first_query, last_query, offset=first_query, device=device
    )
    return rows * last_query + columns


def causal_slice(first_query: int, last_query: int) -> tuple[int, int]:
    """Start and end of query rows [first_query, last_query) in a packed triangle."""
    return first_query * (first_query + 1) // 2, last_query * (last_query + 1) // 2


def encode_map(rows: Tensor, dtype: torch.dtype) -> Tensor:
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


def decode_map(packed: Tensor, first_query: int, last_query: int) -> Tensor:
    """Probabilities of query rows [first_query, last_query) that `encode_map` stored.

    A row of uint8 is divided by its sum, since its entries were rounded one by one.

    Args:
        packed: (H, P), the part of the triangle that `causal_slice` gives.

    Returns:
        (H, last_query - first_query, last_query) float32; 0 above the diagonal.
    """
    heads, shape = len(packed), (last_query - first_query, last_query)
    rows = torch.zeros(heads, shape[0] * shape[1], device=packed.device)
    values = packed.float().div_(255).square_() if packed.dtype == torch.uint8 else packed.float()
    rows = rows.index_copy_(1, causal_places(first_query, last_query, packed.device), values).view(
        heads, *shape
    )
    return rows.div_(rows.sum(-1, keepdim=True)) if packed.dtype == torch.uint8 else rows
