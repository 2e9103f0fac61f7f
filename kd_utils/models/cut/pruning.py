"""Structured pruning: a plain model of the units that are kept, all layers in one shape.

Muralidharan et al. 2024 (Minitron, arXiv:2407.14679), section 2. The kept rows and columns are
copied as they are; the gains of the norms too, although the mean square that they follow is then
taken over fewer channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kd_utils.models.cut.sizes import Sizes, cut_config, head_dim
from kd_utils.models.cut.slots import StoredModel, empty_model, slot_of


class Units(NamedTuple):
    """The units that are kept, counted from 0, in the order that they are to have.

    Attributes:
        layers: decoder layers of the source, rising.
        width: channels of the residual stream, the same everywhere.
        heads, mlp: query heads, and neurons of the MLP, of each kept layer. The heads of one
            key/value head are neighbours, in the order of the key/value heads.
    """

    layers: list[int]
    width: list[int]
    heads: list[list[int]]
    mlp: list[list[int]]

    @property
    def sizes(self) -> Sizes:
        return Sizes(len(self.layers), len(self.heads[0]), len(self.mlp[0]), len(self.width))


def pruned(source: StoredModel, units: Units) -> torch.nn.Module:
    """The model of these units: float32, in eval mode, of the source's class.

    One weight of the source is in memory at a time. Where nothing is dropped, the result equals
    the source to the bit.
    """
    model = empty_model(cut_config(source.config, units.sizes, units.layers))
    size = head_dim(source.config)
    for key, weight in model.state_dict().items():
        layer, name = slot = slot_of(key)
        kept, stored = {"width": units.width}, key
        if layer is not None:
            kept |= {"heads": units.heads[layer], "mlp": units.mlp[layer]}
            stored = f"model.layers.{units.layers[layer]}.{name}"
        weight.copy_(_slice(source.read(stored), slot.axes, kept, size))
    return model


def _slice(
    weight: Tensor, axes: tuple[str | None, ...], kept: dict[str, list[int]], size: int
) -> Tensor:
    """The kept entries along each axis; a head is `size` entries."""
    for axis, kind in enumerate(axes):
        if kind in kept:
            index = torch.tensor(kept[kind])
            if kind == "heads":
                index = (index[:, None] * size + torch.arange(size)).flatten()
            weight = weight.index_select(axis, index)
    return weight
