"""A decoder's distillable signals: final hidden state, final-layer attention map, logits from the hidden state.

Teacher and student go through the same function. Every layer runs fused attention (SDPA); of the last layer the queries
and keys are kept, from which its map is computed example by example: no (B, H, T, T) tensor is built in training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

IMPLEMENTATION = "sdpa_keeps_queries"


@dataclass
class Attention:
    """What an attention layer's map is computed from.

    Attributes:
        query: (B, H, T, head_dim); key: (B, H_kv, T, head_dim), both after position encoding.
        mask: (B or 1, 1, T, T), bool (True: may see) or additive; None for plain causal attention.
        scaling: usually head_dim ** -0.5.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float

    def example(self, b: int, first_query: int, last_query: int) -> Attention:
        """Example b's query rows [first_query, last_query) and the keys that they can see, as a batch of one."""
        rows = slice(first_query, last_query)
        mask = None if self.mask is None else self.mask[b % len(self.mask), None, :, rows, :last_query]
        return Attention(self.query[b, None, :, rows], self.key[b, None, :, :last_query], mask, self.scaling)

    def map(self) -> Tensor:
        """(B, H, T, T) float32 probabilities, head by head."""
        return attention_map(self.query, self.key, self.mask, self.scaling)


@dataclass
class Signals:
    """What one forward pass gives.

    Attributes:
        hidden: (B, T, d) final hidden state, after the model's last norm: times `lm_head` it is the logits.
        attention: the last layer's queries and keys; None if its map was not asked for.
    """

    hidden: Tensor
    attention: Attention | None


def attention_map(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(scaling q k^T) over the keys that a query may see (Vaswani et al. 2017, eq. 1, without the values).

    Args:
        query: (B, H, Q, head_dim), the last Q of the K positions.
        key: (B, H_kv, K, head_dim); grouped-query heads are repeated.
        mask: (B or 1, 1, Q, K), bool (True: may see) or additive; None for plain causal attention.
        scaling: usually head_dim ** -0.5.

    Returns:
        (B, H, Q, K) float32; rows sum to 1. A row whose bool mask hides every key (left padding) is all zeros.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(-1, -2)).float()
    if mask is None:  # added and scaled in one pass: filling by a boolean mask takes three times as long
        rows, columns = scores.shape[-2:]
        mask = torch.full((rows, columns), -torch.inf, device=scores.device).triu_(columns - rows + 1)
    if mask.dtype == torch.bool:
        return torch.nan_to_num(scores.mul_(scaling).masked_fill_(~mask, -torch.inf).softmax(-1))
    return torch.add(mask, scores, alpha=scaling).softmax(-1)


def _sdpa_keeps_queries(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if getattr(module, "keeps_queries", False):
        module.kept = Attention(query, key, mask, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def capture_layer(model: nn.Module) -> nn.Module:
    """Switch `model` to attention that can capture, and return its last layer's attention module.

    Raises:
        ValueError: the model does not route its attention through `transformers.AttentionInterface`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != IMPLEMENTATION:
        AttentionInterface.register(IMPLEMENTATION, _sdpa_keeps_queries)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        model.set_attn_implementation(IMPLEMENTATION)
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]
    if not layers or model.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(f"{type(model).__name__} does not use transformers' attention interface, so its maps cannot "
                         "be captured: use a decoder of transformers >= 5 (Llama, Mistral, Qwen, Gemma, ...)")
    return max(layers, key=lambda layer: layer.layer_idx)


def forward_signals(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *,
                    want_map: bool = True) -> Signals:
    """One forward pass of a causal LM, without its `lm_head`.

    Batches padded on the right need no `attention_mask`: causal attention keeps real tokens from ever seeing the
    padding behind them, and without a mask SDPA keeps its fastest kernel.

    Args:
        model: a `transformers` causal LM.
        input_ids: (B, T) int64.
        attention_mask: (B, T), 1 for real tokens; needed for left padding only.
        want_map: also keep what the last layer's attention map is computed from.
    """
    layer = capture_layer(model)
    layer.keeps_queries = want_map
    try:
        output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        kept = getattr(layer, "kept", None)
    finally:
        layer.keeps_queries, layer.kept = False, None
    return Signals(output.last_hidden_state, kept)


def lm_head_weight(model: nn.Module) -> Tensor:
    """(V, d) weight of the output layer, tied or not.

    Raises:
        ValueError: the head has a bias, which hidden state times weight would lose.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{type(model).__name__}'s lm_head has a bias: set signals to 'top_k'")
    return head.weight


@torch.no_grad()
def require_linear_head(model: nn.Module, input_ids: Tensor, *, tolerance: float = 1e-5) -> float:
    """Check that hidden state times `lm_head` is what the model itself gives as logits.

    Losses and cache rely on it. It is one and the same matrix product, so rounding explains next to nothing.

    Args:
        model: a causal LM.
        input_ids: (B, T), right-padded.
        tolerance: largest relative difference ||z - h W^T|| / ||z||.

    Returns:
        The relative difference.

    Raises:
        ValueError: the head does more than a matrix product (soft-capping, scaling).
    """
    logits = model(input_ids=input_ids, use_cache=False).logits.float()
    rebuilt = (forward_signals(model, input_ids, want_map=False).hidden @ lm_head_weight(model).T).float()
    difference = float((logits - rebuilt).norm() / logits.norm())
    if not difference <= tolerance:
        raise ValueError(f"{type(model).__name__}: hidden state times lm_head differs from its logits by "
                         f"{difference:.2%}: its head does more than a matrix product (soft-capping or scaling). As a "
                         "teacher it can be cached with signals set to 'top_k' and teacher_epochs to 0; it cannot be "
                         "fine-tuned or be a student here")
    return difference


def causal_places(first_query: int, last_query: int, device: torch.device | None = None) -> Tensor:
    """Flat places of the causal entries among the query rows [first_query, last_query) over keys 0..last_query - 1."""
    rows, columns = torch.tril_indices(last_query - first_query, last_query, offset=first_query, device=device)
    return rows * last_query + columns


def causal_slice(first_query: int, last_query: int) -> tuple[int, int]:
    """Where the query rows [first_query, last_query) stand in a packed triangle: row i starts at i (i + 1) / 2."""
    return first_query * (first_query + 1) // 2, last_query * (last_query + 1) // 2


def encode_map(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """One example's map as a cache stores it: the causal entries, row by row (row i gives its keys 0..i).

    Args:
        rows: (H, n, n) probabilities.
        dtype: float16 keeps them as they are; uint8 keeps round(255 sqrt(p)), which is finest near 0.

    Returns:
        (H, n (n + 1) / 2) of `dtype`.
    """
    places = causal_places(0, rows.shape[-1], rows.device)
    packed = (rows if dtype == torch.uint8 else rows.to(dtype)).flatten(1).index_select(1, places)
    return packed.sqrt_().mul_(255).round_().to(dtype) if dtype == torch.uint8 else packed


def decode_map(packed: Tensor, first_query: int, last_query: int) -> Tensor:
    """Query rows [first_query, last_query) as `encode_map` stored them, back as probabilities.

    A row of uint8 is divided by its sum, so that it sums to 1 again: its entries were rounded one by one.

    Args:
        packed: (H, P), the part of the triangle that `causal_slice` names.

    Returns:
        (H, last_query - first_query, last_query) float32; 0 above the diagonal.
    """
    heads, shape = len(packed), (last_query - first_query, last_query)
    rows = torch.zeros(heads, shape[0] * shape[1], device=packed.device)
    values = packed.float().div_(255).square_() if packed.dtype == torch.uint8 else packed.float()
    rows = rows.index_copy_(1, causal_places(first_query, last_query, packed.device), values).view(heads, *shape)
    return rows.div_(rows.sum(-1, keepdim=True)) if packed.dtype == torch.uint8 else rows
