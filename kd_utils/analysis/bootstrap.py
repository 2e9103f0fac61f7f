"""Uncertainty over seeds and over validation examples at once: a hierarchical bootstrap of paired
differences.

The tests of `stats` are over seeds, on the validation examples that there are. Whether a difference
would hold on other examples of the same tasks too is answered here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kd_utils.analysis.stats import ROUNDING

DRAWS = 2000


def example_weights(tasks: Sequence[str], metric: str) -> np.ndarray:
    """Each example's weight in a metric: accuracy is the sum of weight times correct.

    Args:
        tasks: task of each example.
        metric: "micro" (over examples), "macro" (mean over tasks) or a task.
    """
    tasks = np.asarray(tasks)
    names, counts = np.unique(tasks, return_counts=True)
    if metric == "micro":
        return np.full(len(tasks), 1 / len(tasks))
    per_task = dict(zip(names, counts))
    if metric == "macro":
        return np.array([1 / (len(names) * per_task[task]) for task in tasks])
    if metric not in per_task:
        raise ValueError(
            f"no example of task {metric!r} (there are: {', '.join(names)}), micro and macro"
        )
    return np.where(tasks == metric, 1 / per_task[metric], 0.0)


def hierarchical_errors(
    difference: np.ndarray,
    tasks: Sequence[str],
    weights: np.ndarray,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """Standard errors of mean paired differences over seeds and examples, by a hierarchical
    bootstrap.

    A draw takes S seeds with replacement and, within each task, as many examples as it has; the
    same examples for all seeds, since all trials answer the same ones (the pigeonhole bootstrap of
    crossed factors, Owen 2007). Two
    corrections: sqrt(S / (S - 1)), because draws from 7 seeds vary too little; and an answer's own
    noise, which resampling both ways counts three times, is taken off twice (its size is the
    residual of seeds x examples). No error is smaller than that over seeds alone, and it equals
    that where examples do not differ.

    Args:
        difference: (S, N) correct minus baseline's correct, of -1, 0, 1; row a seed, column an
            example.
        tasks: (N,) task of each example.
        weights: (N, K) of `example_weights`, a column per metric.
        draws: resamples.
        seed: of the resampling.

    Returns:
        (K,) in the unit of `difference`; NaN with fewer than two seeds.
    """
    seeds, tasks = len(difference), np.asarray(tasks)
    if seeds < 2:
        return np.full(weights.shape[1], np.nan)
    rng = np.random.default_rng(seed)
    means = (
        rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds @ difference
    )  # (draws, N)
    total, excess = np.zeros((draws, weights.shape[1])), np.zeros(weights.shape[1])
    for task in sorted(set(tasks)):
        mine = tasks == task
        count = mine.sum()
        # Drawing N of N examples gives each a count; the sum over them is all that is needed.
        total += (
            means[:, mine]
            * rng.multinomial(count, np.full(count, 1 / count), draws)
            @ weights[mine]
        )
        # Of the variance due to noise, what the draws have beyond once (see above), by their
        # weights' second moments.
        centred = difference[:, mine] - difference[:, mine].mean(axis=0)
        residual = centred - centred.mean(axis=1, keepdims=True)
        noise = (
            (residual**2).sum()
            / ((seeds - 1) * max(count - 1, 1))
            * (weights[mine] ** 2).sum(axis=0)
            / seeds
        )
        excess += noise * (seeds / (seeds - 1) * ((2 - 1 / seeds) * (2 - 1 / count) - 1) - 1)
    of_seeds = (difference @ weights).var(axis=0, ddof=1) / seeds
    return np.sqrt(np.maximum(total.var(axis=0, ddof=1) * seeds / (seeds - 1) - excess, of_seeds))


def hierarchical_interval(
    centre: float, error: float, seeds: int, level: float = 0.95, unseen: float = 0.0
) -> tuple[float, float]:
    """Interval of a mean paired difference: centre +- (t(S - 1) error + unseen).

    With 7 seeds the bootstrap draws' own percentiles cover 87 %; Student's t with the draws' error
    covers 95 %.

    Args:
        error: of `hierarchical_errors`; seeds: S; level: of confidence; unseen: of
            `unseen_discordance`.
    """
    from scipy.stats import t

    half = t.ppf((1 + level) / 2, seeds - 1) * error + unseen if seeds > 1 else np.nan
    return float(centre - half), float(centre + half)


def hierarchical_p(centre: float, error: float, seeds: int) -> float:
    """Two-sided p of no difference over seeds and examples, by the same t; 1 where nothing differs
    at all.
    """
    from scipy.stats import t

    if seeds < 2:
        return np.nan
    return (
        float(2 * t.sf(abs(centre) / error, seeds - 1))
        if error > ROUNDING
        else float(abs(centre) < ROUNDING)
    )


def unseen_discordance(
    difference: np.ndarray, tasks: Sequence[str], weights: np.ndarray, level: float
) -> float:
    """How far two methods may differ that were never seen to answer differently on a task.

    Of N examples none was answered differently; the share of such examples may still be 1 - (1 -
    level)^(1 / N) (the exact form of the rule of three), where resampling sees no variance at all.
    0 for tasks that have any.
    """
    tasks, share = np.asarray(tasks), 0.0
    for task in sorted(set(tasks)):
        mine = tasks == task
        if not np.any(difference[:, mine]):
            share += weights[mine].sum() * (1 - (1 - level) ** (1 / mine.sum()))
    return float(share)


def interaction_p_rows(differences: np.ndarray, errors: np.ndarray) -> float:
    """p of no method x task interaction over seeds and examples: Hotelling's T^2 with the examples'
    variance added.

    Args:
        differences: (S, K) as in `interaction_p`.
        errors: (K,) of `hierarchical_errors`, per task; what they have beyond the error over seeds
            is the examples', and examples of different tasks are independent.

    Returns:
        p, from F with K - 1 and S - K + 1 degrees of freedom; NaN with too few seeds for that.
    """
    from scipy.stats import f

    differences = np.asarray(differences, dtype=float)
    seeds, tasks = differences.shape
    if tasks < 2 or seeds < tasks + 1:
        return np.nan
    of_seeds = np.cov(differences, rowvar=False) / seeds
    covariance = of_seeds + np.diag(np.maximum(np.asarray(errors) ** 2 - np.diag(of_seeds), 0))
    contrast = np.eye(tasks)[:-1] - np.eye(tasks)[1:]
    centre = contrast @ differences.mean(axis=0)
    if np.abs(centre).max() < ROUNDING:
        return 1.0
    squared = (
        centre
        @ np.linalg.pinv(contrast @ covariance @ contrast.T, rcond=1e-9, hermitian=True)
        @ centre
    )
    free = tasks - 1
    return float(f.sf(squared * (seeds - free) / ((seeds - 1) * free), free, seeds - free))
