"""Two methods paired by seed and by example, and the uncertainty of their differences over both.

The tests of `stats` are over seeds, on the validation examples of this run. The hierarchical
bootstrap here says whether a difference would also hold on other examples of the same tasks.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy

from kd_utils.analysis import stats, tables
from kd_utils.data.tasks import task_order

DRAWS = 2000


class Pairs(NamedTuple):
    """The trials of two methods in one setting, paired by seed.

    Attributes:
        row: the values of `PAIR_COLUMNS`: the setting, the names of the methods, and the numbers of
            seeds for which both trials were planned and are done.
        seeds: (S,) seeds for which both trials are done.
        correct, baseline_correct: (S, N) whether each example was answered correctly, 0 or 1.
        difference: (S, N) correct minus baseline_correct: -1, 0 or 1.
    """

    row: dict[str, Any]
    seeds: list[int]
    correct: np.ndarray
    baseline_correct: np.ndarray
    difference: np.ndarray


class Answers:
    """Whether each done trial answered each validation example correctly.

    Args:
        results: the table of `run_folder.collect`.
        predictions: the table of `run_folder.predictions`.
        informed: the tasks of the metric "informed"; none: there is no such metric.

    Attributes:
        trials: the table of `tables.planned_trials`; informed: the argument.
        examples: (N,) their ids; tasks: (N,) task of each example.
        metrics: "macro", "micro", "informed" if asked for, and the tasks, in the project's order.

    Raises:
        ValueError: the trials did not answer the same examples.
    """

    def __init__(
        self, results: pd.DataFrame, predictions: pd.DataFrame, informed: Sequence[str] = ()
    ) -> None:
        self.trials, self.informed = tables.planned_trials(results), tuple(informed)
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
        self.examples = correct.columns.to_numpy()
        self.tasks = task_of.loc[correct.columns].to_numpy()
        self._weights = example_weights(self.tasks, informed)
        self.metrics = list(self._weights)

    def weights(self, metrics: Iterable[str]) -> np.ndarray:
        """(N, K): the examples' weights in each metric."""
        return np.stack([self._weights[metric] for metric in metrics], axis=1)

    def pairs(self, compared: Iterable[tuple[str, str]]) -> Iterator[Pairs]:
        """The pairs of each method and its baseline, in every setting."""
        for row, both in matches(self.trials, compared):
            done = both[both["done"] & both["done_baseline"]]
            seeds = done["seed"].tolist()
            correct, baseline = (
                np.ascontiguousarray(self._correct.loc[done[column]])
                for column in ("trial", "trial_baseline")
            )
            yield Pairs(row | {"pairs": len(seeds)}, seeds, correct, baseline, correct - baseline)


def matches(
    trials: pd.DataFrame, compared: Iterable[tuple[str, str]]
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Every setting in which a method and its baseline have trials: settings match if they agree in
    the keys that both use.

    Yields:
        setting, method, baseline and planned (number of seeds); the planned trials of both methods
        side by side, by seed (the baseline's columns end in `_baseline`).
    """
    settings = sorted(trials["setting"].unique(), key=len, reverse=True)
    order = dict.fromkeys(key for setting in settings for key in tables.setting_items(setting))
    arms = list(trials.groupby(["distill_type", "setting"], sort=False))
    for names, (arm, rows), (baseline_arm, baseline_rows) in product(compared, arms, arms):
        items, baseline_items = tables.setting_items(arm[1]), tables.setting_items(baseline_arm[1])
        either = items | baseline_items
        if names == (arm[0], baseline_arm[0]) and either == baseline_items | items:
            # In the grid's order of keys, because settings are compared as text.
            setting = ", ".join(f"{key}={either[key]}" for key in order if key in either)
            both = rows.merge(baseline_rows, on="seed", suffixes=("", "_baseline"))
            found = (setting, *names, len(both))
            yield dict(zip(("setting", "method", "baseline", "planned"), found)), both


def example_weights(tasks: Sequence[str], informed: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The weight (N,) of each example in the metrics "macro" (mean over tasks), "micro" (over
    examples), "informed" (mean over these tasks, if there are any) and every task: accuracy is the
    sum of weight times correct.
    """
    of_example = np.asarray(tasks)
    by_task = {task: of_example == task for task in task_order(tasks)}
    by_task = {task: chosen / chosen.sum() for task, chosen in by_task.items()}

    def mean_over(some: Sequence[str]) -> np.ndarray:
        return np.sum([by_task[task] for task in some], axis=0) / len(some)

    return {
        "macro": mean_over(list(by_task)),
        "micro": np.full(len(tasks), 1 / len(tasks)),
        **({tables.INFORMED: mean_over(informed)} if informed else {}),
        **by_task,
    }


def hierarchical_errors(
    difference: np.ndarray,
    tasks: np.ndarray,
    weights: np.ndarray,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """Standard errors of mean differences over seeds and examples, by a hierarchical bootstrap.

    A draw takes S seeds with replacement and, within each task, as many examples as the task has;
    the same examples for all seeds, since all trials answer the same ones (the pigeonhole bootstrap
    of crossed factors, Owen 2007). Two corrections follow. Draws from 7 seeds vary too little:
    sqrt(S / (S - 1)). Resampling both ways counts an answer's own noise, the residual of seeds x
    examples, three times: two of them are subtracted. No error is smaller than the error over seeds
    alone, and it equals that error where examples do not differ.

    Args:
        difference: (S, N) as in `Pairs`.
        tasks: (N,) task of each example.
        weights: (N, K) of `Answers.weights`, a column per metric.
        draws, seed: of the resampling.

    Returns:
        (K,) in the unit of `difference`; NaN with fewer than two seeds.
    """
    seeds = len(difference)
    if seeds < 2:
        return np.full(weights.shape[1], np.nan)
    in_task = [tasks == task for task in sorted(set(tasks))]
    sizes = tuple(int(chosen.sum()) for chosen in in_task)
    of_seeds, of_examples = _drawn(seeds, sizes, draws, seed)
    means = of_seeds / seeds @ difference  # (draws, N)
    total, excess = np.zeros((draws, weights.shape[1])), np.zeros(weights.shape[1])
    for chosen, counts in zip(in_task, of_examples):
        count = counts.shape[1]
        total += means[:, chosen] * counts @ weights[chosen]
        # The noise that the draws contain beyond once (see above), by second moments of weights.
        centred = difference[:, chosen] - difference[:, chosen].mean(axis=0)
        residual = centred - centred.mean(axis=1, keepdims=True)
        variance = (residual**2).sum() / ((seeds - 1) * max(count - 1, 1))
        noise = variance * (weights[chosen] ** 2).sum(axis=0) / seeds
        excess += noise * (seeds / (seeds - 1) * ((2 - 1 / seeds) * (2 - 1 / count) - 1) - 1)
    over_seeds = (difference @ weights).var(axis=0, ddof=1) / seeds
    return np.sqrt(np.maximum(total.var(axis=0, ddof=1) * seeds / (seeds - 1) - excess, over_seeds))


@lru_cache(maxsize=1)
def _drawn(
    seeds: int, examples: tuple[int, ...], draws: int, seed: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """How often each draw has each seed, (draws, S), and each example of each task, (draws, n).

    Drawing n of n gives each a count; the sum over the counts is all that is needed. Comparisons of
    the same numbers of rows have the same draws, and most of their time would go into them.
    """
    rng = np.random.default_rng(seed)
    of_seeds, *of_examples = (
        rng.multinomial(count, np.full(count, 1 / count), draws).astype(np.min_scalar_type(count))
        for count in (seeds, *examples)
    )
    return of_seeds, of_examples


def hierarchical_interval(
    centre: float,
    error: float,
    difference: np.ndarray,
    tasks: np.ndarray,
    weights: np.ndarray,
    level: float,
) -> tuple[float, float]:
    """Interval of a mean paired difference: centre +- (t(S - 1) error + the unseen part).

    With 7 seeds the bootstrap draws' own percentiles cover 87 %; Student's t with the draws' error
    covers 95 %. Resampling finds no variance in a task where none of its examples was answered
    differently: there is the unseen part (`unseen`), which is 0 for tasks with a difference.

    Args:
        centre: the mean difference.
        error: of `hierarchical_errors`, whose arguments are `difference` and `tasks`.
        weights: (N,) of the metric.
        level: of confidence.

    Returns:
        low, high; NaN with fewer than two seeds.
    """
    half = scipy.stats.t.ppf((1 + level) / 2, len(difference) - 1) * error
    half += sum(
        unseen(weights[chosen].sum(), chosen.sum(), level)
        for chosen in (tasks == task for task in sorted(set(tasks)))
        if not difference[:, chosen].any()
    )
    return float(centre - half), float(centre + half)


def unseen(weight: float, examples: int, level: float) -> float:
    """How far a task may move a mean, though none of its examples was answered differently: the
    share of such examples may be 1 - (1 - level)^(1 / N), the exact form of the rule of three.
    """
    return float(weight * (1 - (1 - level) ** (1 / examples)))


def hierarchical_p(centre: float, error: float, seeds: int) -> float:
    """Two-sided p of no difference, by the same t; 1 where nothing differs at all."""
    if error <= stats.ROUNDING:
        return float(abs(centre) < stats.ROUNDING)
    return float(2 * scipy.stats.t.sf(abs(centre) / error, seeds - 1))


def interaction_p_rows(differences: np.ndarray, errors: np.ndarray) -> float:
    """p of no method x task interaction over seeds and examples: Hotelling's T^2 with the examples'
    variance added, from F with K - 1 and S - K + 1 degrees of freedom; NaN with too few seeds.

    Args:
        differences: (S, K) as in `stats.interaction_p`.
        errors: (K,) of `hierarchical_errors`, per task. Where an error exceeds the one over seeds,
            the rest is due to the examples, and examples of different tasks are independent.
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
    ratio = squared * (seeds - free) / ((seeds - 1) * free)
    return float(scipy.stats.f.sf(ratio, free, seeds - free))


def detectable(sd: float, error: float, n: int, family: int) -> tuple[float, float]:
    """The differences that the tests find with power 0.8 at Holm's first step: over seeds on these
    examples, and over seeds and examples. Better and worse need the larger. NaN with fewer than two
    pairs.
    """
    alpha = stats.ALPHA / family
    errors = scipy.stats.t.ppf(1 - alpha / 2, n - 1) + scipy.stats.norm.ppf(stats.POWER)
    return stats.smallest_detectable(sd, n, alpha), float(error * errors)
