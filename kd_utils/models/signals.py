"""The forward pass of a decoder, teacher or student, with the signals that are distilled.

Attention runs fused (SDPA), except in families that soft-cap their scores. Queries and keys are
kept for the layers that are asked for; maps are computed from them one example at a time, so that
training builds no (B, H, T, T) tensor. Layers are numbered from 1 to L, by their output.
"""

from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_utils.models.attention_maps import UNKNOWN_TO_MAPS, Attention

# Without "sdpa" in the name: transformers refuses such names to families that soft-cap.
IMPLEMENTATION = "keeps_queries"


class Signals(NamedTuple):
    """The signals of one forward pass of a model with layers 1 to L.

    Attributes:
        hidden: (B, T, d) final hidden state, after the last norm; `output_head` gives the logits.
        layers: layer -> (B, T, d) hidden state after it, before any further norm, for the layers
            that were asked for, and L, whose state is `hidden`.
        attentions: layer -> its queries and keys, for the layers that were asked for.
    """

    hidden: Tensor
    layers: dict[int, Tensor]
    attentions: dict[int, Attention]


def _keeps_queries(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
):
    """The attention function that transformers calls in every layer, after `_switch_attention`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name, meaning in UNKNOWN_TO_MAPS.items():
        if kwargs.get(name) is not None:  # SDPA would drop sinks without a word
            raise ValueError(
                f"{type(module).__name__} uses {meaning}, which are not captured: as a teacher, "
                "set signals to 'top_k' and teacher_epochs to 0; it cannot be a student"
            )
    softcap = kwargs.get("softcap")
    if keep := getattr(module, "keep", None):
        keep(Attention(query, key, mask, kwargs.get("scaling") or query.shape[-1] ** -0.5, softcap))
    attend = sdpa_attention_forward if softcap is None else _softcapped_attention
    return attend(module, query, key, value, mask, **kwargs)


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


def attention_module(layer: nn.Module) -> nn.Module | None:
    """The attention module of a decoder layer; None for a layer without, such as a state space."""
    found = (
        module
        for module in layer.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
    )
    return next(found, None)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers: the list whose members have attention; else a ValueError."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(attention_module(layer) for layer in module):
            return module
    raise _not_captured(model)


def _not_captured(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} does not use transformers' attention interface, so its maps "
        "cannot be captured: use a decoder of transformers >= 5 (Llama, Mistral, Qwen, Gemma, ...)"
    )


def _switch_attention(model: nn.Module) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    if model.config._attn_implementation != IMPLEMENTATION:
        AttentionInterface.register(IMPLEMENTATION, _keeps_queries)
        AttentionMaskInterface.register(IMPLEMENTATION, masking_utils.sdpa_mask)
        model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise _not_captured(model)


def forward_signals(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    hidden_layers: Collection[int] = (),
    map_layers: Collection[int] = (),
) -> Signals:
    """One forward pass of a causal LM, without its `lm_head`.

    Batches padded on the right need no `attention_mask`: causal attention never sees the padding,
    and SDPA has its fastest kernel without a mask.

    Args:
        model: a `transformers` causal LM.
        input_ids: (B, T) int64.
        attention_mask: (B, T), 1 for real tokens; needed for left padding only.
        hidden_layers, map_layers: whose hidden states, and whose queries and keys, are kept; the
            final hidden state always is.

    Raises:
        ValueError: there is no such layer, or its attention cannot be captured.
    """
    _switch_attention(model)
    layers = decoder_layers(model)
    for number in (*hidden_layers, *map_layers):
        if not 1 <= number <= len(layers):
            raise ValueError(
                f"layer {number}: {type(model).__name__} has {len(layers)} layers, numbered from 1"
            )
    attending: dict[int, Any] = {n: attention_module(layers[n - 1]) for n in map_layers}
    if lacking := [number for number, module in attending.items() if module is None]:
        raise ValueError(
            f"layer {lacking[0]} of {type(model).__name__} has no attention, so it has no map: "
            "choose other attention_layers"
        )
    states: dict[int, Tensor] = {}
    attentions: dict[int, Attention] = {}
    hooks = [
        layers[number - 1].register_forward_hook(partial(_keep_state, states, number))
        for number in {*hidden_layers} - {len(layers)}
    ]
    try:
        for number, module in attending.items():
            module.keep = partial(attentions.__setitem__, number)
        hidden = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
        for module in attending.values():
            module.keep = None
    if len(attentions) < len(attending):
        raise _not_captured(model)
    states[len(layers)] = hidden  # after the last norm
    return Signals(hidden, states, attentions)


def _keep_state(
    states: dict[int, Tensor], number: int, _layer: nn.Module, _args: tuple, output: Any
) -> None:
    states[number] = output[0] if isinstance(output, tuple) else output
