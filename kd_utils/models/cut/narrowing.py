"""A narrower residual stream by one orthonormal basis: what the plan's `SVD_truncate` stands for.

A rank-r approximation of single matrices changes no shape. If one P (d, k), P^T P = I, is used by
whatever writes to the residual stream and whatever reads it, the result is a plain model of width
k. Heads, their size and the MLP's width stay. (SliceGPT, Ashkboos et al. 2024, has a basis for each
block, and so needs matrices between blocks, which no plain model has.)
"""

import math
from typing import Any

import torch
from torch import Tensor

from kd_utils.models.cut.sizes import head_dim, legal_width, sizes_of
from kd_utils.models.cut.slots import HEAD, Slot, StoredModel, empty_model, slot_of

#: The norm whose output the output layer reads.
FINAL_NORM = "model.norm.weight"

#: The norm whose output a weight reads.
NORMS = {
    "self_attn.q_proj.weight": "input_layernorm.weight",
    "self_attn.k_proj.weight": "input_layernorm.weight",
    "self_attn.v_proj.weight": "input_layernorm.weight",
    "mlp.gate_proj.weight": "post_attention_layernorm.weight",
    "mlp.up_proj.weight": "post_attention_layernorm.weight",
    HEAD: FINAL_NORM,
}


def narrow_config(config: Any, width: int, tied: bool = False) -> Any:
    """The config of a model of this width in a new object, with an output layer of its own or one
    that is `tied` to the embedding.

    Raises:
        ValueError: a width that the family does not have, with the nearest one; or `tied` of a
            source whose output layer is not.
    """
    if tied and not config.tie_word_embeddings:
        raise ValueError(
            "student_output = 'tied', but the source's output layer is one of its own, which the "
            "embedding cannot stand for: set it to 'own'"
        )
    legal_width(config, sizes_of(config), width, "student_width", exact=True)
    settings = {
        "head_dim": head_dim(config),
        "hidden_size": width,
        # Beside a mean square over fewer channels. Qwen3's norms of single heads have it too.
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / width,
        "tie_word_embeddings": tied,
    }
    return type(config).from_dict(config.to_dict() | settings)


def narrowed(source: StoredModel, basis: Tensor, tied: bool = False) -> torch.nn.Module:
    """The model whose residual stream is the source's in another basis: h' = h P.

    Every norm's gain is folded into the weights that read its output, W <- W diag(g), since a norm
    without gains commutes with a rotation. Readers become W P, the embedding E P, writers P^T W,
    and all gains sqrt(d / k): the mean square is then that over d channels, if h lies in the span
    of P. The embedding has no gain to fold, so a tied output layer becomes one of its own. Where it
    stays `tied`, the final norm keeps the mean of its gains instead, which is not exact.

    Args:
        basis: (d, k) P, with orthonormal columns. With k = d the model gives the source's logits
            up to rounding, unless `tied`.

    Returns:
        A float32 model in eval mode, of the source's class.
    """
    width, kept = basis.shape
    model = empty_model(narrow_config(source.config, kept, tied))
    for key, weight in model.state_dict().items():
        if tied and key == HEAD:
            continue  # the embedding's memory
        if slot_of(key).axes == ("width",) and key.endswith("norm.weight"):
            gain = source.read(key).float().mean().item() if tied and key == FINAL_NORM else 1.0
            weight.fill_(gain * math.sqrt(width / kept))
        else:
            weight.copy_(_in_basis(folded(source, key), slot_of(key), basis))
    return model


def _in_basis(weight: Tensor, slot: Slot, basis: Tensor) -> Tensor:
    """A weight for a residual stream in another basis; one that does not touch it is unchanged."""
    if slot.axes == ("width",):  # a bias
        return weight @ basis
    if slot.axes[0] == "width":
        return (weight.T @ basis).T
    return weight @ basis if slot.axes[-1] == "width" else weight


def folded(source: StoredModel, key: str) -> Tensor:
    """A weight in float32, with the gain of the norm before it folded in where there is one."""
    slot, weight = slot_of(key), source.read(key).float()
    if norm := NORMS.get(slot.name):
        layer = "" if slot.layer is None else f"model.layers.{slot.layer}."
        weight = weight * source.read(layer + norm).float()
    return weight
