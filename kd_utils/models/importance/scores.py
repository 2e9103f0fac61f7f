"""Scores from the sums: which units matter, and whether other rows would say the same.

The scores are Minitron's (Muralidharan et al. 2024, arXiv:2407.14679, section 2.2). X (B, T, n), an
activation, is averaged over a row's tokens as mean |X|, then over rows by the L2 norm:

- for a channel of the residual stream X is the output of each norm before attention and MLP; the
  scores of all norms are added up, since there is one stream;
- for a query head of a layer X is the input of `o_proj`, its channels joined by the L2 norm;
- for a neuron of a layer's MLP X is the input of `down_proj`;
- the score of a layer is its Block Influence, 1 - mean cos(input, output) (Men et al. 2024,
  ShortGPT, arXiv:2403.03853).
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import pandas as pd

from kd_utils.models.importance.sums import (
    ATTENTION_NORM,
    GROUPS,
    HEADS,
    INPUT_NORM,
    LAYERS,
    MLP,
    ROWS,
    SUMS,
)


class Scores(NamedTuple):
    """The importance of every unit, higher for those that matter more.

    Attributes:
        layers: (L,) Block Influence.
        width: (d,); heads: (L, H); mlp: (L, n).
    """

    layers: np.ndarray
    width: np.ndarray
    heads: np.ndarray
    mlp: np.ndarray


def tidy(found: Scores) -> pd.DataFrame:
    """The scores as a table: kind, layer (from 1; 0 for the one residual stream), index, score."""
    parts = []
    for kind, values in zip(Scores._fields, found, strict=True):
        by_layer = np.atleast_2d(values if kind != "layers" else values[:, None])
        first = 0 if kind == "width" else 1
        for layer, of_layer in enumerate(by_layer, first):
            about = {"kind": kind, "layer": layer, "index": np.arange(len(of_layer))}
            parts.append(pd.DataFrame(about | {"score": of_layer}))
    return pd.concat(parts, ignore_index=True)


def scores(table: pd.DataFrame, groups: Collection[int] = range(GROUPS)) -> Scores:
    """The scores from a table of sums.

    Args:
        groups: the groups of rows that count.
    """
    sums = table[[SUMS[group] for group in groups]].sum(axis=1)
    rows = sums[table["kind"] == ROWS].item()

    def per_layer(kind: str) -> np.ndarray:
        chosen = table["kind"] == kind
        by_layer = sums[chosen].groupby(table.loc[chosen, "layer"])
        return np.stack([part.to_numpy() for _, part in by_layer])

    norms = np.concatenate([per_layer(INPUT_NORM), per_layer(ATTENTION_NORM)])
    return Scores(
        layers=1 - per_layer(LAYERS)[:, 0] / rows,
        width=np.sqrt(norms / rows).sum(axis=0),
        heads=np.sqrt(per_layer(HEADS) / rows),
        mlp=np.sqrt(per_layer(MLP) / rows),
    )


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """How well rankings from disjoint training rows agree, by the number of rows.

    Returns:
        Columns `rows`, `kind` and `rank_correlation`: Spearman's, between the scores from 1, 2 and
        4 groups of rows and those from the four groups that are none of them; of heads and neurons
        the mean over layers.
    """
    half, counts = GROUPS // 2, table.loc[table["kind"] == ROWS, SUMS].iloc[0]
    columns = ["rows", "kind", "rank_correlation"]
    if not counts.iloc[half:].sum():  # too few rows
        return pd.DataFrame(columns=columns)
    others, found = scores(table, range(half, GROUPS)), []
    for size in (size for size in (1, 2, 4) if counts.iloc[:size].sum()):
        few = scores(table, range(size))
        for kind, a, b in zip(Scores._fields, few, others, strict=True):
            if np.shape(a)[-1] < 2:  # a single unit has no rank
                continue
            pairs = zip(np.atleast_2d(a), np.atleast_2d(b), strict=True)
            mean = np.mean([_rank_correlation(x, y) for x, y in pairs])
            found.append((int(counts.iloc[:size].sum()), kind, mean))
    return pd.DataFrame(found, columns=columns)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(pd.Series(a).rank(), pd.Series(b).rank())[0, 1])
