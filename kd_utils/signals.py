"""A decoder's distillable signals: hidden states, attention maps, logits from the final hidden state.

Teacher and student go through the same function. Attention runs fused (SDPA), but for the families that soft-cap their
scores; of the layers asked for the queries and keys are kept, from which a map is computed example by example: no
(B, H, T, T) tensor is built in training. Layers are numbered 1..L, by the layer whose output it is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

IMPLEMENTATION = "keeps_queries"  # without "sdpa": transformers refuses names with it to the families that soft-cap

#: What an attention module may pass that changes its map in a way that `attention_map` does not know.
UNKNOWN_TO_MAPS = {"s_aux": "attention sinks", "sinks": "attention sinks", "position_bias": "a bias on positions"}


@dataclass
class Attention:
    """What an attention layer's map is computed from.

    Attributes:
        query: (B, H, T, head_dim); key: (B, H_kv, T, head_dim), both after position encoding.
        mask: (B or 1, 1, T, T), bool (True: may see) or additive; None for plain causal attention.
        scaling: usually head_dim ** -0.5.
        softcap: scaled scores s become softcap * tanh(s / softcap) before the mask (Gemma 2); None leaves them.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None

    def example(self, b: int, first_query: int, last_query: int) -> Attention:
        """Example b's query rows [first_query, last_query) and the keys that they can see, as a batch of one."""
        rows = slice(first_query, last_query)
        mask = None if self.mask is None else self.mask[b % len(self.mask), None, :, rows, :last_query]
        return Attention(self.query[b, None, :, rows], self.key[b, None, :, :last_query], mask, self.scaling,
                         self.softcap)

    def map(self) -> Tensor:
        """(B, H, T, T) float32 probabilities, head by head."""
        return attention_map(self.query, self.key, self.mask, self.scaling, self.softcap)

    def cap_slope(self) -> Tensor:
        """(B, H, T, T) derivative of the capped scores by the scaled ones, 1 - tanh^2."""
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        return 1 - torch.tanh((self.query @ key.transpose(-1, -2)).float() * (self.scaling / self.softcap)) ** 2


@dataclass
class Signals:
    """What one forward pass of a model with L = `layer_count` layers gives.

    Attributes:
        hidden: (B, T, d) final hidden state, after the model's last norm: `output_head` makes the logits from it.
        layers: layer number -> (B, T, d) hidden state after that layer, before any further norm; L's is `hidden`.
        attentions: layer number -> that layer's queries and keys.
        layer_count: L.
    """

    hidden: Tensor
    layers: dict[int, Tensor]
    attentions: dict[int, Attention]
    layer_count: int

    @property
    def attention(self) -> Attention | None:
        """The last layer's queries and keys; None if its map was not asked for."""
        return self.attentions.get(self.layer_count)

    def state(self, layer: int) -> Tensor:
        """(B, T, d) of one of the layers that were asked for, or the final one."""
        return self.hidden if layer == self.layer_count else self.layers[layer]


def attention_map(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float,
                  softcap: float | None = None) -> Tensor:
    """softmax(scaling q k^T) over the keys that a query may see (Vaswani et al. 2017, eq. 1, without the values).

    Args:
        query: (B, H, Q, head_dim), the last Q of the K positions.
        key: (B, H_kv, K, head_dim); grouped-query heads are repeated.
        mask: (B or 1, 1, Q, K), bool (True: may see) or additive; None for plain causal attention.
        scaling: usually head_dim ** -0.5.
        softcap: c of c tanh(scaling q k^T / c), which the softmax then takes (Gemma 2).

    Returns:
        (B, H, Q, K) float32; rows sum to 1. A row whose bool mask hides every key (left padding) is all zeros.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query @ key.transpose(-1, -2)).float()
    if softcap is not None:
        scores, scaling = softcap * torch.tanh(scores * (scaling / softcap)), 1.0
    if mask is None:  # added and scaled in one pass: filling by a boolean mask takes three times as long
        rows, columns = scores.shape[-2:]
        mask = torch.full((rows, columns), -torch.inf, device=scores.device).triu_(columns - rows + 1)
    if mask.dtype == torch.bool:
        return torch.nan_to_num(scores.mul_(scaling).masked_fill_(~mask, -torch.inf).softmax(-1))
    return torch.add(mask, scores, alpha=scaling).softmax(-1)


def _keeps_queries(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any):
    """The attention function that transformers calls in every layer."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name, meaning in UNKNOWN_TO_MAPS.items():
        if kwargs.get(name) is not None:  # SDPA would drop sinks without a word
            raise ValueError(f"{type(module).__name__} uses {meaning}, which are not captured here: as a teacher set "
                             "signals to 'top_k' and teacher_epochs to 0; it cannot be a student")
    softcap = kwargs.get("softcap")
    if getattr(module, "keeps_queries", False):
        module.kept = Attention(query, key, mask, kwargs.get("scaling") or query.shape[-1] ** -0.5, softcap)
    attend = sdpa_attention_forward if softcap is None else _softcapped_attention
    return attend(module, query, key, value, mask, **kwargs)


def _softcapped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                          **kwargs: Any):
    """Gemma 2's own eager attention, as SDPA has no soft-capping; it wants an additive mask, SDPA's is bool or None."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril_()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    return eager_attention_forward(module, query, key, value, mask, **kwargs)


def attention_module(layer: nn.Module) -> nn.Module | None:
    """The attention module within a decoder layer, or None (a layer of another kind, such as a state space)."""
    numbered = (module for module in layer.modules() if hasattr(module, "layer_idx"))
    return next((module for module in numbered if type(module).__name__.endswith("Attention")), None)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of the model's decoder layers: that whose members hold attention.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(attention_module(layer) for layer in module):
            return module
    raise _not_captured(model)


def layer_count(model: nn.Module) -> int:
    """L, how many decoder layers the model has."""
    return len(decoder_layers(model))


def _not_captured(model: nn.Module) -> ValueError:
    return ValueError(f"{type(model).__name__} does not use transformers' attention interface, so its maps cannot "
                      "be captured: use a decoder of transformers >= 5 (Llama, Mistral, Qwen, Gemma, ...)")


def _switch_attention(model: nn.Module) -> None:
    """Have `model` call `_keeps_queries` in its layers, if it does not yet.

    Raises:
        ValueError: the model does not route its attention through `transformers.AttentionInterface`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != IMPLEMENTATION:
        AttentionInterface.register(IMPLEMENTATION, _keeps_queries)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise _not_captured(model)


def forward_signals(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *,
                    hidden_layers: Collection[int] = (), map_layers: Collection[int] | None = None,
                    want_map: bool = True) -> Signals:
    """One forward pass of a causal LM, without its `lm_head`.

    Batches padded on the right need no `attention_mask`: causal attention keeps real tokens from ever seeing the
    padding behind them, and without a mask SDPA keeps its fastest kernel.

    Args:
        model: a `transformers` causal LM.
        input_ids: (B, T) int64.
        attention_mask: (B, T), 1 for real tokens; needed for left padding only.
        hidden_layers: numbers (1..L) of the layers whose hidden states are kept; the final one always is.
        map_layers: numbers of the layers of which is kept what their maps are computed from. None: the last one's.
        want_map: with `map_layers` None, whether the last one's is kept.

    Raises:
        ValueError: there is no such layer, or its attention cannot be captured.
    """
    _switch_attention(model)
    layers = decoder_layers(model)
    if map_layers is None:
        map_layers = (len(layers),) if want_map else ()
    for number in (*hidden_layers, *map_layers):
        if not 1 <= number <= len(layers):
            raise ValueError(f"layer {number}: {type(model).__name__} has {len(layers)} layers, numbered from 1")
    attending = {number: attention_module(layers[number - 1]) for number in map_layers}
    if lacking := [number for number, module in attending.items() if module is None]:
        raise ValueError(f"layer {lacking[0]} of {type(model).__name__} has no attention, so it has no map")
    states: dict[int, Tensor] = {}
    hooks = [layers[number - 1].register_forward_hook(partial(_keep_state, states, number))
             for number in set(hidden_layers)]
    try:
        for module in attending.values():
            module.keeps_queries, module.kept = True, None
        hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        attentions = {number: module.kept for number, module in attending.items()}
    finally:
        for hook in hooks:
            hook.remove()
        for module in attending.values():
            module.keeps_queries, module.kept = False, None
    if None in attentions.values():
        raise _not_captured(model)
    if len(layers) in states:
        states[len(layers)] = hidden  # after the last norm
    return Signals(hidden, states, attentions, len(layers))


def _keep_state(states: dict[int, Tensor], number: int, _layer: nn.Module, _args: tuple, output: Any) -> None:
    states[number] = output[0] if isinstance(output, tuple) else output


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
