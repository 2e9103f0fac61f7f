"""A decoder's distillable signals: final hidden state, final-layer attention map, logits from the hidden state.

Teacher and student go through the same function. Every layer runs fused attention (SDPA); the last layer computes
its map beside the fused kernel, so that the other layers never build a (T, T) matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

IMPLEMENTATION = "sdpa_with_map"


@dataclass
class Signals:
    """What one forward pass gives.

    Attributes:
        hidden: (B, T, d) final hidden state, after the model's last norm: times `lm_head` it is the logits.
        attention_map: (B, H, T, T) float32 probabilities of the last layer, head by head; None if not asked for.
    """

    hidden: Tensor
    attention_map: Tensor | None


def attention_map(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(scaling q k^T) over the keys that a query may see (Vaswani et al. 2017, eq. 1, without the values).

    Args:
        query: (B, H, T, head_dim).
        key: (B, H_kv, T, head_dim); grouped-query heads are repeated.
        mask: (B or 1, 1, T, T), bool (True: may see) or additive; None for plain causal attention.
        scaling: usually head_dim ** -0.5.

    Returns:
        (B, H, T, T) float32; rows sum to 1. A row whose mask hides every key (left padding) is all zeros.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask.dtype == torch.bool:
        return torch.nan_to_num(scores.masked_fill(~mask, -torch.inf).softmax(-1))
    return (scores + mask).softmax(-1)


def _sdpa_with_map(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if getattr(module, "captures_map", False):
        module.captured_map = attention_map(query, key, mask, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    return output, None


def capture_layer(model: nn.Module) -> nn.Module:
    """Switch `model` to attention that can capture, and return its last layer's attention module.

    Raises:
        ValueError: the model does not route its attention through `transformers.AttentionInterface`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != IMPLEMENTATION:
        AttentionInterface.register(IMPLEMENTATION, _sdpa_with_map)
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
        want_map: also return the last layer's attention map.
    """
    layer = capture_layer(model)
    layer.captures_map = want_map
    try:
        output = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        captured = getattr(layer, "captured_map", None)
    finally:
        layer.captures_map, layer.captured_map = False, None
    return Signals(output.last_hidden_state, captured)


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


def pack_causal(maps: Tensor, length: int, first_query: int = 0, last_query: int | None = None) -> Tensor:
    """One example's real causal entries, row by row: row i gives its keys 0..i.

    Args:
        maps: (H, T, T) of one right-padded example.
        length: its number of real tokens n.
        first_query, last_query: the query rows to keep, as a slice; all of the real ones by default.

    Returns:
        (H, P); P = n (n + 1) / 2 for all rows.
    """
    rows, columns = torch.tril_indices(length, length, device=maps.device)
    entries = slice(*causal_slice(length, first_query, last_query))
    return maps[:, rows[entries], columns[entries]]


def causal_slice(length: int, first_query: int = 0, last_query: int | None = None) -> tuple[int, int]:
    """Where the query rows [first_query, last_query) stand in a packed triangle: row i starts at i (i + 1) / 2."""
    last_query = length if last_query is None else last_query
    return first_query * (first_query + 1) // 2, last_query * (last_query + 1) // 2
