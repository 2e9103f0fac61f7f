"""One comparison over several worlds: other teachers, other initial students, maybe other rows.

Seeds are nested in worlds: the seeds of one world share its teacher and its initial student, so
they are averaged first, and a world is one value. The examples may be shared by all worlds, belong
to one world each, or anything between.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from kd_utils.analysis import stats
from kd_utils.analysis.pairs import example_weights, hierarchical_p, unseen


class World(NamedTuple):
    """Two methods in one world.

    Attributes:
        difference: (S, N) as in `pairs.Pairs`: method minus baseline by seed and example.
        tasks: (N,) task of each example.
        examples: (N,) id of each example. Examples of two worlds with one id are one example.
    """

    difference: np.ndarray
    tasks: Sequence[str]
    examples: Sequence[str]


def over_worlds(
    worlds: Sequence[World],
    metric: str = "macro",
    level: float = 0.95,
    informed: Sequence[str] = (),
) -> dict[str, Any]:
    """The mean difference over worlds, and whether it would hold in other worlds, for other seeds
    and on other examples.

    Args:
        worlds: with the same tasks; each mean counts the same, however many seeds it has.
        metric, informed: as in `pairs.example_weights`.
        level: of confidence.

    Returns:
        worlds, seeds (in all); difference; sd (n - 1, of the worlds' means), sd_seeds (within
        worlds, pooled), share_worlds (the part of one pair's variance that is due to its world and
        to the examples, which its seeds share: one-way random effects, at least 0), these two NaN
        with one seed each; error (of the difference); low, high (centre +- (t(W - 1) error + the
        unseen part), as `pairs.hierarchical_interval`); p (exact sign flips over worlds, on these
        examples), p_rows (over worlds, seeds and examples); smallest_p, what so many worlds allow.
        NaN with fewer than two worlds.

    Raises:
        ValueError: the worlds have other tasks.
    """
    if len({frozenset(world.tasks) for world in worlds}) > 1:
        raise ValueError("the worlds have different tasks: compare worlds that have the same ones")
    weights = [example_weights(world.tasks, informed)[metric] for world in worlds]
    by_seed = [world.difference @ weight for world, weight in zip(worlds, weights)]
    means = np.round([values.mean() for values in by_seed], 12)
    n, freedom = len(worlds), sum(len(values) - 1 for values in by_seed)
    squares = sum(((values - values.mean()) ** 2).sum() for values in by_seed)
    found = stats.interval(means)
    within = squares / freedom if freedom else np.nan
    between = np.maximum(found["sd"] ** 2 - within * np.mean([1 / len(v) for v in by_seed]), 0.0)
    error = _error(worlds, weights, found["sd"])
    half = scipy.stats.t.ppf((1 + level) / 2, n - 1) * error + _unseen(worlds, weights, level)
    return {
        "worlds": n,
        "seeds": sum(map(len, by_seed)),
        "difference": found["mean"],
        "sd": found["sd"],
        "sd_seeds": float(np.sqrt(within)),
        "share_worlds": between / (between + within) if between + within else np.nan,
        "error": error,
        "low": found["mean"] - half,
        "high": found["mean"] + half,
        "p": stats.sign_flip_p(means),
        "p_rows": hierarchical_p(found["mean"], error, n) if n > 1 else np.nan,
        "smallest_p": stats.smallest_p(n),
    }


def _error(worlds: Sequence[World], weights: Sequence[np.ndarray], sd: float) -> float:
    """Standard error of the mean over worlds, seeds and examples.

    The worlds' means vary by world, seeds and each world's own examples, all of which s^2 / W has.
    Examples that worlds share make their means alike, which s^2 cannot see: the mean's variance is
    s^2 / W plus the average covariance of two worlds' means. Within a task that is the covariance
    of two worlds' differences over the examples that they share, times the products of weights.
    """
    ids = np.concatenate([np.asarray(world.examples) for world in worlds])
    names, codes = np.unique(ids, return_inverse=True)
    at = np.split(codes, np.cumsum([len(world.examples) for world in worlds])[:-1])
    shape = (len(names), len(worlds))
    there, values, weight = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for column, (rows, world) in enumerate(zip(at, worlds)):
        there[rows, column] = 1
        values[rows, column] = world.difference.mean(axis=0)
        weight[rows, column] = weights[column]
    task_of: np.ndarray = np.empty(len(names), dtype=object)
    task_of[codes] = np.concatenate([np.asarray(world.tasks) for world in worlds])
    pairs = len(worlds) * (len(worlds) - 1)
    shared = sum(
        (_covariance(values[rows], there[rows]) * (weight[rows].T @ weight[rows])).sum()
        for rows in (task_of == task for task in sorted(set(worlds[0].tasks)))
    )
    return float(np.sqrt(sd**2 / len(worlds) + max(shared / pairs, 0.0))) if pairs else np.nan


def _covariance(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(W, W) covariances (n - 1) of columns over the rows that both have; 0 where those are fewer
    than two, and of a column with itself.

    Args:
        values: (N, W), 0 where a column has no such row.
        there: (N, W), whether it has, 0 or 1.
    """
    common, sums = there.T @ there, values.T @ there
    products = values.T @ values - sums * sums.T / np.maximum(common, 1)
    return np.where((common > 1) & ~np.eye(len(common), dtype=bool), products, 0.0) / np.maximum(
        common - 1, 1
    )


def _unseen(worlds: Sequence[World], weights: Sequence[np.ndarray], level: float) -> float:
    """What the examples of tasks without any difference cannot exclude (`pairs.unseen`)."""
    half = 0.0
    for task in sorted(set(worlds[0].tasks)):
        chosen = [np.asarray(world.tasks) == task for world in worlds]
        if not any(world.difference[:, at].any() for world, at in zip(worlds, chosen)):
            ids = [np.asarray(world.examples)[at] for world, at in zip(worlds, chosen)]
            count = len(np.unique(np.concatenate(ids)))
            half += unseen(weights[0][chosen[0]].sum(), count, level)
    return half
