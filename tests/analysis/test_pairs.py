"""Uncertainty over seeds and examples: coverage, false findings and false equality, by simulation
and at the limits.
"""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kd_utils.analysis import stats
from kd_utils.analysis.pairs import (
    example_weights,
    hierarchical_errors,
    hierarchical_interval,
    hierarchical_p,
    interaction_p_rows,
)

TASKS = np.repeat(["sst2", "mmlu", "gsm8k"], [50, 40, 30])


def interval(difference, metric, level=0.95, tasks=TASKS, **options):
    weights = example_weights(tasks)[metric]
    [error] = hierarchical_errors(difference, tasks, weights[:, None], **options)
    centre = (difference @ weights).mean()
    return hierarchical_interval(centre, error, difference, tasks, weights, level)


def test_weights_make_accuracy_of_each_kind():
    correct = np.array([1, 1, 0, 1, 0], dtype=float)
    tasks = ["sst2", "sst2", "sst2", "mmlu", "mmlu"]
    for metric, value in {
        "micro": 3 / 5,
        "macro": (2 / 3 + 1 / 2) / 2,
        "sst2": 2 / 3,
        "mmlu": 1 / 2,
    }.items():
        assert correct @ example_weights(tasks)[metric] == pytest.approx(value)
    assert list(example_weights(tasks)) == ["macro", "micro", "sst2", "mmlu"]


def test_without_variance_over_examples_the_interval_is_students():
    of_seed = np.array([0.01, 0.03, -0.02, 0.05, 0.00, 0.02, 0.04])
    difference = np.repeat(of_seed[:, None], len(TASKS), axis=1)
    student = stats.interval(of_seed)
    assert interval(difference, "macro", draws=20_000) == pytest.approx(
        (student["low"], student["high"]), abs=4e-4
    )
    [error] = hierarchical_errors(
        difference, TASKS, example_weights(TASKS)["macro"][:, None], draws=20_000
    )
    p = scipy_stats.ttest_1samp(of_seed, 0).pvalue
    assert hierarchical_p(of_seed.mean(), error, 7) == pytest.approx(p, abs=0.002)


def test_examples_widen_the_interval_and_other_tasks_do_not_touch_it():
    rng = np.random.default_rng(0)
    difference = rng.normal(0, 0.01, (7, 1)) + rng.normal(0, 0.5, (1, len(TASKS)))
    of_seeds = stats.interval(difference @ example_weights(TASKS)["sst2"])
    low, high = interval(difference, "sst2")
    low_90, high_90 = interval(difference, "sst2", 0.9)
    assert high - low > 3 * (of_seeds["high"] - of_seeds["low"]) and low < low_90 < high_90 < high
    other = difference.copy()
    other[:, TASKS != "sst2"] = 9.0
    both = [
        hierarchical_errors(each, TASKS, example_weights(TASKS)["sst2"][:, None])
        for each in (difference, other)
    ]
    assert both[0] == pytest.approx(both[1])


def test_metrics_together_have_the_errors_that_they_have_alone():
    difference = np.random.default_rng(0).normal(0, 0.3, (7, len(TASKS)))
    weights = np.stack(
        [example_weights(TASKS)[metric] for metric in ("macro", "micro", "mmlu")], axis=1
    )
    together = hierarchical_errors(difference, TASKS, weights)
    assert together == pytest.approx(
        [hierarchical_errors(difference, TASKS, w[:, None])[0] for w in weights.T]
    )


def test_an_error_does_not_depend_on_what_was_compared_before():
    rng, weights = np.random.default_rng(5), example_weights(TASKS)["macro"][:, None]
    seven, five = (rng.integers(-1, 2, (seeds, len(TASKS))) for seeds in (7, 5))
    others = [(five, {}), (seven, {"seed": 1}), (seven, {"draws": 300}), (-seven, {})]
    first = hierarchical_errors(seven, TASKS, weights)
    for difference, options in others:
        hierarchical_errors(difference, TASKS, weights, **options)
        assert hierarchical_errors(seven, TASKS, weights) == first
    fewer = TASKS[:-1]
    hierarchical_errors(seven[:, :-1], fewer, example_weights(fewer)["macro"][:, None])
    assert hierarchical_errors(seven, TASKS, weights) == first
    assert hierarchical_errors(seven, TASKS, weights, seed=1) != first


def test_one_seed_has_no_interval_and_no_p():
    one = np.zeros((1, len(TASKS)))
    assert np.isnan(interval(one, "micro")).all() and np.isnan(hierarchical_p(0.0, np.nan, 1))


def test_what_was_never_seen_to_differ_may_still_differ():
    """30 examples without any difference leave room for 9.5 %: 1 - 0.05^(1/30). A task that has any
    is not widened.
    """
    nothing = np.zeros((7, len(TASKS)))
    assert interval(nothing, "gsm8k") == pytest.approx(
        (-(1 - 0.05 ** (1 / 30)), 1 - 0.05 ** (1 / 30))
    )
    assert interval(nothing, "macro")[1] == pytest.approx(
        np.mean([1 - 0.05 ** (1 / n) for n in (50, 40, 30)])
    )
    assert hierarchical_p(0.0, 0.0, 7) == 1.0
    nothing[2, TASKS == "gsm8k"] = 1.0
    error = hierarchical_errors(nothing, TASKS, example_weights(TASKS)["gsm8k"][:, None])
    half = scipy_stats.t.ppf(0.975, 6) * error[0]
    assert interval(nothing, "gsm8k") == pytest.approx((1 / 7 - half, 1 / 7 + half))


@pytest.mark.parametrize(
    "seeds_sd, examples_sd, noise_sd",
    [(0.03, 0.0, 0.0), (0.03, 0.3, 0.3), (0.0, 0.4, 0.01), (0.02, 0.0, 0.5), (0.0, 0.0, 0.5)],
)
@pytest.mark.parametrize("metric", ["macro", "sst2"])
def test_intervals_cover_95_per_cent(seeds_sd, examples_sd, noise_sd, metric):
    """Over new seeds and new examples, whichever of the two varies more; never less than
    promised.
    """
    experiments, rng, hits = 250, np.random.default_rng(5), 0
    for experiment in range(experiments):
        difference = (
            rng.normal(0, seeds_sd, (7, 1))
            + rng.normal(0, examples_sd, (1, len(TASKS)))
            + rng.normal(0, noise_sd, (7, len(TASKS)))
        )
        low, high = interval(difference, metric, draws=400, seed=experiment)
        hits += low <= 0 <= high
    assert hits / experiments >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / experiments)


def answers(rng, items, seeds, methods):
    """(methods, seeds, N) right or wrong: every method finds other items hard, and none is better
    over all items.
    """
    ease = rng.normal(0.5, 1, items) + rng.normal(0, 1, (methods, items))
    return rng.uniform(size=(methods, seeds, items)) < 1 / (1 + np.exp(-ease[:, None]))


@pytest.mark.parametrize("seeds", [7, 10])
def test_methods_that_differ_on_these_rows_only_are_not_called_better(seeds):
    """What flips of the seeds' signs alone get wrong, and the more often the more seeds there
    are.
    """
    experiments, rng, fooled, wrong = 200, np.random.default_rng(3), 0, 0
    weights = example_weights(TASKS)["micro"]
    for experiment in range(experiments):
        base, *others = answers(rng, len(TASKS), seeds, 4).astype(float)
        p, p_rows = [], []
        for other in others:
            [error] = hierarchical_errors(
                other - base, TASKS, weights[:, None], draws=400, seed=experiment
            )
            values = (other - base) @ weights
            p.append(stats.sign_flip_p(values))
            p_rows.append(hierarchical_p(values.mean(), error, seeds))
        on_these = stats.holm(p) < stats.ALPHA
        fooled += on_these.any()
        wrong += (on_these & (stats.holm(p_rows) < stats.ALPHA)).any()
    bound = 0.05 + 3 * np.sqrt(0.05 * 0.95 / experiments)
    assert wrong / experiments <= bound
    assert seeds == 7 or fooled / experiments > bound


def test_an_interaction_on_these_rows_only_is_not_called_one():
    experiments, rng, wrong = 200, np.random.default_rng(4), 0
    weights = np.stack([example_weights(TASKS)[task] for task in ("sst2", "mmlu", "gsm8k")], axis=1)
    for experiment in range(experiments):
        base, other = answers(rng, len(TASKS), 14, 2).astype(float)
        errors = hierarchical_errors(other - base, TASKS, weights, draws=400, seed=experiment)
        wrong += interaction_p_rows((other - base) @ weights, errors) < stats.ALPHA
    assert wrong / experiments <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / experiments)


def test_without_variance_over_examples_the_interaction_is_hotellings():
    differences = np.random.default_rng(6).normal([0, 0.02, 0.05], 0.02, (9, 3))
    errors = differences.std(axis=0, ddof=1) / 3
    contrasts = differences[:, :2] - differences[:, 1:]
    centre, covariance = contrasts.mean(axis=0), np.cov(contrasts, rowvar=False)
    squared = 9 * centre @ np.linalg.inv(covariance) @ centre
    expected = scipy_stats.f.sf(squared * 7 / (8 * 2), 2, 7)
    assert interaction_p_rows(differences, errors) == pytest.approx(expected)
    assert interaction_p_rows(differences, 3 * errors) > expected
    assert (
        np.isnan(interaction_p_rows(differences[:3], errors))
        and interaction_p_rows(np.zeros((7, 3)), errors) == 1.0
    )
