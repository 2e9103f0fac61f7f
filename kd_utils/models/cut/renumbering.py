"""What a model's config says by the number of a layer, said again for the layers that are kept."""

from collections.abc import Callable
from typing import Any


def renumbered(settings: dict[str, Any], kept: list[int], total: int) -> dict[str, Any]:
    """A config's settings for the layers `kept` (rising, from 0) of `total`.

    What is not known here stays as it is: `layers.keep_layers` compares the model that comes of it
    with the layers that were kept.
    """
    made = dict(settings)
    for name, value in settings.items():
        if value and (rule := _rule(name, value, total)):
            made[name] = rule(value, kept)
    if (step := settings.get("decoder_sparse_step") or 1) > 1:  # "every second layer" is lost
        dense = set(settings.get("mlp_only_layers") or ())
        dense |= {number for number in range(total) if (number + 1) % step}
        made |= {"mlp_only_layers": _numbers(dense, kept), "decoder_sparse_step": 1}
    return made


def _entries(value: Any, kept: list[int]) -> list[Any]:
    """Of a list with an entry a layer."""
    return [value[number] for number in kept]


def _numbers(value: Any, kept: list[int]) -> list[int]:
    """Of a collection of layers' numbers."""
    return [new for new, old in enumerate(kept) if old in value]


def _first(value: int, kept: list[int]) -> int:
    """Of a number of first layers."""
    return sum(number < value for number in kept)


def _attention_types(value: list, kept: list[int]) -> list:
    """Of GPT-Neo's pairs of a pattern and how often it is repeated."""
    return [[_entries([kind for kinds, times in value for kind in kinds * times], kept), 1]]


def _per_layer(value: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Of Gemma 4's settings of single layers, by number."""
    return {
        str(new): value[key] for new, old in enumerate(kept) for key in value if int(key) == old
    }


RULES: dict[str, Callable[[Any, list[int]], Any]] = {
    "activation_sparsity_pattern": _entries,
    "indexer_types": _entries,
    "intermediate_size": _entries,
    "attn_layer_indices": _numbers,
    "cross_attention_layers": _numbers,
    "full_attn_idxs": _numbers,
    "hybrid_layer_ids": _numbers,
    "local_layer_ids": _numbers,
    "mlp_only_layers": _numbers,
    "moe_layers": _numbers,
    "ple_layer_ids": _numbers,
    "first_k_dense_replace": _first,
    "max_window_layers": _first,
    "moe_layer_start_index": _first,
    "num_dense_layers": _first,
    "moe_layer_end_index": lambda value, kept: _first(value + 1, kept) - 1,
    "attention_types": _attention_types,
    "block_types": lambda value, kept: [value[number % len(value)] for number in kept],
    "per_layer_config": _per_layer,
}


def _rule(name: str, value: Any, total: int) -> Callable[[Any, list[int]], Any] | None:
    """How a setting is renumbered; None for one that is the same for all layers."""
    rule = RULES.get(name)
    if rule is None and "layer" in name:
        rule = _entries  # `layer_types`, SmolLM3's `no_rope_layers`
    one_for_all = rule is _entries and not (isinstance(value, list) and len(value) == total)
    return None if one_for_all else rule
