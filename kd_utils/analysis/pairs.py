"""Two methods paired by seed and by example, and the uncertainty of their differences over both.

The tests of `stats` are over seeds, on the validation examples of this run. The hierarchical
bootstrap here says whether a difference would also hold on other examples of the same tasks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy

from kd_utils.analysis import stats
from kd_utils.analysis.tables import planned_trials, setting_items
from kd_utils.data.tasks import task_order

DRAWS = 2000


class Pairs(NamedTuple):
    """The trials of two methods in one setting, paired by seed.

    Attributes:
        row: the values of `PAIR_COLUMNS`: the setting, the names of the methods, and the numbers of
            seeds for which both trials were planned and are done.
        seeds: (S,) seeds for which both trials are done.
        correct, baseline_correct: (S, N) whether each example was answered correctly, 0 or 1.
    """

    row: dict[str, Any]
    seeds: list[int]
    correct: np.ndarray
    baseline_correct: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """(S, N) of -1, 0, 1."""
        return self.correct - self.baseline_correct


class Answers:
    """Whether each done trial answered each validation example correctly.

    Args:
        results: the table of `run_folder.collect`.
        predictions: the table of `run_folder.predictions`.

    Attributes:
        trials: the table of `tables.planned_trials`.
        tasks: (N,) task of each example.
        metrics: "macro", "micro" and the tasks, in the project's order.

    Raises:
        ValueError: the trials did not answer the same examples, so they cannot be compared by
            example.
    """

    def __init__(self, results: pd.DataFrame, predictions: pd.DataFrame) -> None:
        self.trials = planned_trials(results)
        correct = predictions.pivot(index="trial", columns="example_id", values="correct")
        missing = correct.isna().sum(axis=1)
        if missing.any():
            raise ValueError(
                f"trials did not answer the same examples: {missing.idxmax()} lacks "
                f"{missing.max()} of {correct.shape[1]}; run the sweep again, which repeats trials "
                f"that used other data"
            )
        self._correct = correct.astype(float)
        task_of = predictions.drop_duplicates("example_id").set_index("example_id")["task"]
        self.tasks = task_of.loc[correct.columns].to_numpy()
        self.metrics = ["macro", "micro", *task_order(self.tasks)]

    def weights(self, metrics: list[str]) -> np.ndarray:
        """(N, K): the examples' weights in each metric."""
        return np.stack([example_weights(self.tasks, m) for m in metrics], axis=1)

    def pairs(self, method: str, baseline: str) -> Iterator[Pairs]:
        """The pairs of two methods in every setting."""
        for row, both in matches(self.trials, method, baseline):
            done = both[both["done"] & both["done_baseline"]]
            correct = [
                np.ascontiguousarray(self._correct.loc[done[column]])
                for column in ("trial", "trial_baseline")
            ]
            yield Pairs(row | {"pairs": len(done)}, done["seed"].tolist(), *correct)


def matches(
    trials: pd.DataFrame, method: str, baseline: str
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Every setting in which both methods have trials: settings match if they agree in the keys
    that both methods use.

    Yields:
        setting, method, baseline and planned (number of seeds); the planned trials of both methods
        side by side, by seed (the baseline's columns end in `_baseline`).
    """
    settings = sorted(trials["setting"].unique(), key=len, reverse=True)
    order = dict.fromkeys(key for setting in settings for key in setting_items(setting))
    by_setting, baseline_by_setting = (
        trials[trials["distill_type"] == name].groupby("setting", sort=False)
        for name in (method, baseline)
    )
    for setting, rows in by_setting:
        for baseline_setting, baseline_rows in baseline_by_setting:
            items, baseline_items = setting_items(setting), setting_items(baseline_setting)
            shared = items.keys() & baseline_items.keys()
            if all(items[key] == baseline_items[key] for key in shared):
                # In the grid's order of keys, because settings are compared as text.
                either = items | baseline_items
                text = ", ".join(f"{key}={either[key]}" for key in order if key in either)
                both = rows.merge(baseline_rows, on="seed", suffixes=("", "_baseline"))
                row = {"setting": text, "method": method, "baseline": baseline}
                yield row | {"planned": len(both)}, both


def example_weights(tasks: Sequence[str], metric: str) -> np.ndarray:
    """The weight of each example in a metric: accuracy is the sum of weight times correct.

    Args:
        tasks: task of each example.
        metric: "micro" (over examples), "macro" (mean over tasks) or a task.
    """
    tasks = pd.Series(tasks)
    counts = tasks.map(tasks.value_counts())
    if metric == "micro":
        return np.full(len(tasks), 1 / len(tasks))
    if metric == "macro":
        return (1 / (tasks.nunique() * counts)).to_numpy()
    if not (tasks == metric).any():
        raise ValueError(
            f"no example of task {metric!r}: choose micro, macro or one of "
            f"{', '.join(sorted(tasks.unique()))}"
        )
    return np.where(tasks == metric, 1 / counts, 0.0)


def hierarchical_errors(
    difference: np.ndarray,
    tasks: np.ndarray,
    weights: np.ndarray,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """Standard errors of mean paired differences over seeds and examples, by a hierarchical
    bootstrap.

    A draw takes S seeds with replacement and, within each task, as many examples as the task has;
    the same examples for all seeds, since all trials answer the same ones (the pigeonhole bootstrap
    of crossed factors, Owen 2007). Two corrections follow. Draws from 7 seeds vary too little:
    sqrt(S / (S - 1)). Resampling both ways counts an answer's own noise, the residual of seeds x
    examples, three times: two of them are subtracted. No error is smaller than the error over seeds
    alone, and it equals that error where examples do not differ.

    Args:
        difference: (S, N) correct minus the baseline's correct, of -1, 0, 1; a row per seed, a
            column per example.
        tasks: (N,) task of each example.
        weights: (N, K) of `example_weights`, a column per metric.
        draws: number of resamples.
        seed: seed of the resampling.

    Returns:
        (K,) in the unit of `difference`; NaN with fewer than two seeds.
    """
    seeds = len(difference)
    if seeds < 2:
        return np.full(weights.shape[1], np.nan)
    rng = np.random.default_rng(seed)
    # (draws, N)
    means = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds @ difference
    total, excess = np.zeros((draws, weights.shape[1])), np.zeros(weights.shape[1])
    for task in sorted(set(tasks)):
        chosen = tasks == task
        count = chosen.sum()
        # Drawing N of N examples gives each a count; the sum over the counts is all that is needed.
        counts = rng.multinomial(count, np.full(count, 1 / count), draws)
        total += means[:, chosen] * counts @ weights[chosen]
        # The noise that the draws contain beyond once (see above), by second moments of weights.
        centred = difference[:, chosen] - difference[:, chosen].mean(axis=0)
        residual = centred - centred.mean(axis=1, keepdims=True)
        variance = (residual**2).sum() / ((seeds - 1) * max(count - 1, 1))
        noise = variance * (weights[chosen] ** 2).sum(axis=0) / seeds
        excess += noise * (seeds / (seeds - 1) * ((2 - 1 / seeds) * (2 - 1 / count) - 1) - 1)
    over_seeds = (difference @ weights).var(axis=0, ddof=1) / seeds
    return np.sqrt(np.maximum(total.var(axis=0, ddof=1) * seeds / (seeds - 1) - excess, over_seeds))


def hierarchical_interval(
    centre: float,
    error: float,
    difference: np.ndarray,
    tasks: np.ndarray,
    weights: np.ndarray,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of a mean paired difference: centre +- (t(S - 1) error + `unseen_discordance`).

    With 7 seeds the bootstrap draws' own percentiles cover 87 %; Student's t with the draws' error
    covers 95 %.

    Args:
        centre: the mean difference.
        error: of `hierarchical_errors`.
        difference, tasks: as in `hierarchical_errors`.
        weights: (N,) of the metric.
        level: of confidence.
    """
    seeds = len(difference)
    if seeds < 2:
        return np.nan, np.nan
    half = scipy.stats.t.ppf((1 + level) / 2, seeds - 1) * error
    half += unseen_discordance(difference, tasks, weights, level)
    return float(centre - half), float(centre + half)


def hierarchical_p(centre: float, error: float, seeds: int) -> float:
    """Two-sided p of no difference over seeds and examples, by the same t; 1 where nothing differs
    at all.
    """
    if seeds < 2:
        return np.nan
    if error > stats.ROUNDING:
        return float(2 * scipy.stats.t.sf(abs(centre) / error, seeds - 1))
    return float(abs(centre) < stats.ROUNDING)


def unseen_discordance(
    difference: np.ndarray, tasks: np.ndarray, weights: np.ndarray, level: float
) -> float:
    """How far two methods may differ on tasks where no example was answered differently.

    If none of N examples was answered differently, the share of such examples may still be 1 - (1 -
    level)^(1 / N) (the exact form of the rule of three), although resampling finds no variance.
    Tasks with a difference contribute 0.
    """
    share = 0.0
    for task in sorted(set(tasks)):
        chosen = tasks == task
        if not np.any(difference[:, chosen]):
            share += weights[chosen].sum() * (1 - (1 - level) ** (1 / chosen.sum()))
    return float(share)


def interaction_p_rows(differences: np.ndarray, errors: np.ndarray) -> float:
    """p of no method x task interaction over seeds and examples: Hotelling's T^2 with the examples'
    variance added.

    Args:
        differences: (S, K) as in `interaction_p`.
        errors: (K,) of `hierarchical_errors`, per task. Where an error exceeds the one over seeds,
            the rest is due to the examples, and examples of different tasks are independent.

    Returns:
        p, from F with K - 1 and S - K + 1 degrees of freedom; NaN with too few seeds for that.
    """
    seeds, tasks = differences.shape
    if tasks < 2 or seeds < tasks + 1:
        return np.nan
    over_seeds = np.cov(differences, rowvar=False) / seeds
    covariance = over_seeds + np.diag(np.maximum(errors**2 - np.diag(over_seeds), 0))
    contrast = np.eye(tasks)[:-1] - np.eye(tasks)[1:]
    centre = contrast @ differences.mean(axis=0)
    if np.abs(centre).max() < stats.ROUNDING:
        return 1.0
    inverse = np.linalg.pinv(contrast @ covariance @ contrast.T, rcond=1e-9, hermitian=True)
    squared, free = centre @ inverse @ centre, tasks - 1
    return float(
        scipy.stats.f.sf(squared * (seeds - free) / ((seeds - 1) * free), free, seeds - free)
    )


def detectable(sd: float, error: float, n: int, family: int) -> float:
    """The difference that both tests find with power 0.8 at Holm's first step: the larger of what
    each needs.
    """
    if n < 2:
        return np.nan
    t, norm = scipy.stats.t, scipy.stats.norm
    over_rows = error * (t.ppf(1 - stats.ALPHA / family / 2, n - 1) + norm.ppf(stats.POWER))
    return max(stats.smallest_detectable(sd, n, stats.ALPHA / family), float(over_rows))
