"""Attention maps, computed from a layer's queries and keys, and packed as a cache stores them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

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
        rows = slice(first_query, last_query)
        mask = (
            None if self.mask is None else self.mask[b % len(self.mask), None, :, rows, :last_query]
        )
        key = self.key[b, None, :, :last_query]
        return replace(self, query=self.query[b, None, :, rows], key=key, mask=mask)

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
        packed: (H, P), the part of the triangle that `causal_slice` gives.

    Returns:
        (H, last_query - first_query, last_query) float32; 0 above the diagonal.
    """
    values = packed.float().div_(255).square_() if packed.dtype == torch.uint8 else packed.float()
    places = causal_places(first_query, last_query, packed.device)
    rows = torch.zeros(len(packed), last_query - first_query, last_query, device=packed.device)
    rows.view(len(packed), -1).index_copy_(1, places, values)
    return rows.div_(rows.sum(-1, keepdim=True)) if packed.dtype == torch.uint8 else rows
