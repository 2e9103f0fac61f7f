"""The forward pass of a decoder, teacher or student, with the signals that are distilled.

Where no map is asked for, the model computes attention, or what it has in its place, as it does
anyway. For maps attention runs fused (SDPA), except in families that soft-cap their scores. Queries
and keys are kept for the layers that are asked for; maps are computed from them for one example, or
a few short ones, at a time, so that training builds no (B, H, T, T) tensor of long rows. Layers are
numbered from 1 to L, by their output.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_utils.models.attention_maps import (
    IMPLEMENTATION,
    NO_MAPS,
    Attention,
    compare_map,
    keeps_queries,
    relative_difference,
)


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


def attention_module(layer: nn.Module) -> nn.Module | None:
    """The attention module of a decoder layer; None for a layer without, such as a state space."""
    found = (
        module
        for module in layer.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
    )
    return next(found, None)


def text_model(model: nn.Module) -> nn.Module:
    """What turns token ids into the final hidden state; of a model that sees pictures, the text."""
    nested = model.config.get_text_config() is not model.config
    body = model.get_decoder() if nested else model.base_model
    return getattr(model, "model", model) if body is model else body  # Llama 4 names it wrongly


def size_of(config: Any, name: str) -> int | None:
    """A size by its name in the text model's part of a configuration; None: there is none.

    Of one that differs from layer to layer, the largest.
    """
    config = config.get_text_config()
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to tell one number
        value = [getattr(layer, name) for layer in config.per_layer_config]
    return max(value) if isinstance(value, list | tuple) else value


def layer_count(model: nn.Module) -> int:
    """How many layers the text model has, by its configuration; else a ValueError."""
    if (count := size_of(model.config, "num_hidden_layers")) is None:
        raise ValueError(
            f"{type(model).__name__} does not say in its configuration how many layers it has: it "
            "can be neither teacher nor student, choose another model"
        )
    return count


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of the text model's layers, with or without attention; else a ValueError."""
    total, parts = layer_count(model), ("Attention", "Norm", "FFN")
    for module in text_model(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            if not type(module[0]).__name__.endswith(parts):  # XLM has a list of each part
                return module
    raise ValueError(
        f"{type(model).__name__} has no list of {total} layers, so nothing of single layers can be "
        f"captured: set hidden_layers to 'last'; where maps are asked for, {NO_MAPS}"
    )


def _no_maps(model: nn.Module, why: str) -> ValueError:
    return ValueError(f"{type(model).__name__} {why}, so its maps cannot be captured: {NO_MAPS}")


NO_INTERFACE = "does not use transformers' attention interface"


def _attend_with(model: nn.Module, implementation: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

    AttentionInterface.register(IMPLEMENTATION, keeps_queries)
    AttentionMaskInterface.register(IMPLEMENTATION, masking_utils.sdpa_mask)
    model.set_attn_implementation(implementation)
    if text_model(model).config._attn_implementation != implementation:
        raise _no_maps(model, NO_INTERFACE)


def attention_modules(model: nn.Module, numbers: Collection[int]) -> dict[int, Any]:
    """The attention modules of these layers, whose maps can be captured as far as can be seen.

    The model is not run, and may be on the `meta` device.

    Raises:
        ValueError: a layer has no attention, or the model does not take our attention function.
    """
    layers = decoder_layers(model)
    attends = [number for number, layer in enumerate(layers, 1) if attention_module(layer)]
    if not attends:
        raise _no_maps(model, "has no attention that transformers could hand over")
    if lacking := sorted({*numbers} - {*attends}):
        raise ValueError(
            f"layer {lacking[0]} of {type(model).__name__} has no attention, so it has no map: "
            f"choose attention_layers among {', '.join(map(str, attends))}; or, {NO_MAPS}"
        )
    if (usual := text_model(model).config._attn_implementation) != IMPLEMENTATION:
        _attend_with(model, IMPLEMENTATION)
        _attend_with(model, usual)
    return {number: attention_module(layers[number - 1]) for number in numbers}


def _switch_attention(
    model: nn.Module, attending: Collection[Any], hidden_of: Callable[[], Tensor]
) -> None:
    """From now on the model's attention modules call `keeps_queries`, which is tried first.

    A family may hand its attention function what must not be ignored. Its maps would be wrong, and
    they would be compared all the same.

    Args:
        attending: the modules whose maps are wanted.
        hidden_of: computes the final hidden state of a small batch.

    Raises:
        ValueError: the hidden state changes, or a map is not what weighs the values.
    """
    differences: list[Tensor] = []  # of the maps
    if (usual := text_model(model).config._attn_implementation) == IMPLEMENTATION:
        return
    training = [module for module in model.modules() if module.training]
    model.eval()  # without dropout
    try:
        with torch.no_grad():
            expected = hidden_of()
            _attend_with(model, IMPLEMENTATION)
            for module in attending:
                module.keep = partial(compare_map, differences)
            changed = relative_difference(hidden_of(), expected)
        if len(differences) < len(attending):
            raise _no_maps(model, NO_INTERFACE)
        if expected.is_meta:  # a device without values
            return
        half = expected.dtype != torch.float32 or torch.is_autocast_enabled(expected.device.type)
        wrong = not changed <= (5e-2 if half else 1e-3)
        if wrong or not torch.stack(differences).max() <= 1e-3:
            raise _no_maps(
                model, "computes attention in a way that a map of queries and keys lacks"
            )
    except BaseException:
        _attend_with(model, usual)
        raise
    finally:
        for module in attending:
            module.keep = None
        for module in training:
            module.training = True


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
        ValueError: there is no such layer, its attention cannot be captured, or the model's forward
            pass gives something else than it is asked for.
    """
    total, width = layer_count(model), size_of(model.config, "hidden_size")
    for number in (*hidden_layers, *map_layers):
        if not 1 <= number <= total:
            raise ValueError(
                f"layer {number}: {type(model).__name__} has {total} layers, numbered from 1"
            )
    inner = {*hidden_layers} - {total}
    layers = decoder_layers(model) if inner else nn.ModuleList()
    attending = attention_modules(model, map_layers) if map_layers else {}
    if map_layers:
        few = input_ids[:1], None if attention_mask is None else attention_mask[:1]
        _switch_attention(model, attending.values(), lambda: _final_hidden(model, *few))
    states: dict[int, Tensor] = {}
    attentions: dict[int, Attention] = {}
    hooks = [
        layers[number - 1].register_forward_hook(partial(_keep_state, states, number))
        for number in inner
    ]
    try:
        for number, module in attending.items():
            module.keep = partial(_keep_attention, attentions, number)
        hidden = states[total] = _final_hidden(model, input_ids, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
        for module in attending.values():
            module.keep = None
    if len(attentions) < len(attending):
        raise _no_maps(model, NO_INTERFACE)
    for number in hidden_layers:
        what, sizes = f"hidden state of layer {number}", (*input_ids.shape, width)
        remedy = "use distill_type 'black_box', and signals 'top_k' if it is the teacher"
        require_shape(model, what, states.get(number), sizes, remedy)
    batch, length = input_ids.shape
    for number, found in attentions.items():
        heads = size_of(model.config, "num_attention_heads")
        for what, part, count in (("queries", found.query, heads), ("keys", found.key, None)):
            what = f"{what} of layer {number}"
            require_shape(model, what, part, (batch, count, length, None), NO_MAPS)
    return Signals(hidden, states, attentions)


def _final_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T, d) after the last norm."""
    output = text_model(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)
    require_shape(model, "final hidden state", hidden, (*input_ids.shape, None))
    return hidden


def _keep_attention(
    kept: dict[int, Attention], number: int, found: Attention, _value: Tensor, _attend: Any
) -> None:
    kept[number] = found


def _keep_state(
    states: dict[int, Tensor], number: int, _layer: nn.Module, _args: tuple, output: Any
) -> None:
    states[number] = output[0] if isinstance(output, tuple | list) else output


def require_shape(
    model: nn.Module, what: str, found: Any, expected: tuple[int | None, ...], remedy: str = ""
) -> None:
    """Check a part of a forward pass before it is indexed; None stands for any size.

    Args:
        remedy: how the error ends.

    Raises:
        ValueError: it is no tensor, or has another shape.
    """
    shape = tuple(found.shape) if isinstance(found, Tensor) else ()
    if len(shape) != len(expected) or any(b not in (None, a) for a, b in zip(shape, expected)):
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(
            f"{type(model).__name__}: the {what} has the shape {shape or type(found).__name__}, "
            f"expected ({sizes}){remedy and ': '}{remedy}"
        )
