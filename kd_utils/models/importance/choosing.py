"""Which units a cut keeps: the most important ones, or those of a control."""

from typing import Any

import numpy as np

from kd_utils.models.cut.pruning import Units
from kd_utils.models.cut.sizes import Sizes, sizes_of
from kd_utils.models.importance.scores import Scores


def kept_units(config: Any, sizes: Sizes, scores: Scores) -> Units:
    """The units with the highest scores, in the order that they have in the source.

    Of the query heads that share a key/value head the same number is kept in each group.
    """
    layers = _highest(scores.layers, sizes.layers)
    groups = config.num_key_value_heads
    return Units(
        layers=layers,
        width=_highest(scores.width, sizes.width),
        heads=[_in_groups(scores.heads[layer], sizes.heads, groups) for layer in layers],
        mlp=[_highest(scores.mlp[layer], sizes.mlp) for layer in layers],
    )


def _highest(scores: np.ndarray, count: int) -> list[int]:
    """The places of the `count` highest scores, rising; of equal scores the first ones."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def _in_groups(scores: np.ndarray, count: int, groups: int) -> list[int]:
    size = len(scores) // groups
    return [
        group * size + place
        for group in range(groups)
        for place in _highest(scores[group * size :][:size], count // groups)
    ]


def random_scores(config: Any, seed: int) -> Scores:
    """Scores without any meaning, the same for one seed."""
    whole, random = sizes_of(config), np.random.default_rng(seed)
    shapes = (whole.layers,), (whole.width,), (whole.layers, whole.heads), (whole.layers, whole.mlp)
    return Scores(*(random.random(shape) for shape in shapes))


def reversed_scores(scores: Scores) -> Scores:
    """Scores by which the least important units are kept."""
    return Scores(*(-part for part in scores))
