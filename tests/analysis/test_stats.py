"""Statistics: against scipy and hand values, at their limits, and by simulation of what they
promise.
"""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from kd_utils.analysis import stats


def test_interval_worked_by_hand():
    # sd = sqrt(5 / 3); half = t(0.975, 3) sd / sqrt(4) = 3.182446 * 1.290994 / 2
    got = stats.interval([1, 2, 3, 4])
    assert got["n"] == 4 and got["mean"] == 2.5
    assert got["sd"] == pytest.approx(1.290994, abs=1e-6)
    assert (got["low"], got["high"]) == (
        pytest.approx(0.445739, abs=1e-5),
        pytest.approx(4.554261, abs=1e-5),
    )


def test_interval_of_one_value_has_no_spread_and_of_none_no_mean():
    one, none = stats.interval([0.7]), stats.interval([np.nan])
    assert (
        one["n"] == 1
        and one["mean"] == 0.7
        and np.isnan([one["sd"], one["low"], one["high"]]).all()
    )
    assert none["n"] == 0 and np.isnan(none["mean"])


def test_interval_of_equal_values_has_no_width():
    got = stats.interval([0.5, 0.5, 0.5])
    assert got["sd"] == 0 and got["low"] == got["high"] == 0.5


def test_sign_flips_are_exact_by_hand_and_agree_with_scipys_wilcoxon_at_the_extreme():
    assert (
        stats.sign_flip_p([1, 2, 3]) == 2 / 8
    )  # all positive: only the two extreme assignments of 8 are as far out
    assert stats.sign_flip_p([1, 2, -3]) == 1.0  # a mean of 0
    assert stats.sign_flip_p([3, 2, -1]) == 4 / 8  # |4|: itself, +++, and their mirror images
    assert stats.sign_flip_p([0.1] * 7) == stats.smallest_p(7) == 2 / 128
    assert stats.sign_flip_p([0, 0, 0, 0]) == 1.0
    assert np.isnan(stats.sign_flip_p([0.3])) and np.isnan(stats.sign_flip_p([np.nan, 1.0]))
    values = [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert stats.sign_flip_p(values) == scipy_stats.wilcoxon(values, mode="exact").pvalue


@pytest.mark.parametrize(
    "counts", [[-4, -9, 0, -3, -7, 0, -6], [3, 0, 1, -3, -3, 3, 0], [5, -5, 2, 2, -1, 0, 3]]
)
@pytest.mark.parametrize("examples", [3, 872, 3000, 3188])
def test_rounding_breaks_no_tie_between_assignments(counts, examples):
    """Accuracies are ratios of integers: the p of the counts, enumerated in integers, is the p of
    the accuracies.
    """
    flips = [
        abs(sum(c * s for c, s in zip(counts, signs)))
        for signs in itertools.product((1, -1), repeat=7)
    ]
    exact = np.mean([total >= abs(sum(counts)) for total in flips])
    base = np.random.default_rng(0).integers(0, examples, 7)
    accuracy, baseline = (base + counts) / examples, base / examples
    assert stats.sign_flip_p(accuracy - baseline) == exact


def test_equal_accuracies_are_no_interaction_whatever_the_rounding():
    rng = np.random.default_rng(0)
    for _ in range(40):
        a = rng.integers(0, [872, 1000, 1319], (7, 3)) / [872, 1000, 1319]
        assert stats.interaction_p((a + 0.1) - a - 0.1) == 1.0


def test_many_pairs_are_sampled_and_still_close_to_t():
    values = np.random.default_rng(0).normal(0.4, 1, 40)
    assert stats.sign_flip_p(values) == pytest.approx(
        scipy_stats.ttest_1samp(values, 0).pvalue, abs=0.01
    )


def test_holm_by_hand_and_a_comparison_that_could_not_be_made_still_counts():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = stats.holm([0.01, np.nan, 0.03])
    assert adjusted[[0, 2]] == pytest.approx([0.03, 0.06]) and np.isnan(adjusted[1])
    assert len(stats.holm([])) == 0
    for p in np.random.default_rng(0).uniform(0, 0.2, (4, 5)):
        assert stats.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_hedges_g_by_hand():
    # means 2 and 1, both sd 1, n 3: d = 1, correction 1 - 3 / (4 * 4 - 1) = 0.8
    assert stats.hedges_g([1, 2, 3], [0, 1, 2]) == pytest.approx(0.8)
    assert np.isnan(stats.hedges_g([1], [2])) and np.isnan(stats.hedges_g([1, 1], [2, 2]))
    assert np.isnan(stats.hedges_g([0.3] * 7, [0.1] * 7))  # whose standard deviation is rounding


def test_equivalence_needs_precision_and_not_a_large_p():
    rng = np.random.default_rng(1)
    base = rng.normal(0.8, 0.03, 7)
    close, noisy = base + rng.normal(0, 0.003, 7), base + rng.normal(0, 0.05, 7)
    assert stats.equivalence_p(close, base, 0.01) < 0.01
    assert stats.sign_flip_p(noisy - base) > 0.05 and stats.equivalence_p(noisy, base, 0.01) > 0.3
    assert (
        stats.equivalence_p(base + 0.02, base, 0.01) == 1.0
        and stats.equivalence_p(base, base, 0.01) == 0.0
    )
    assert np.isnan(stats.equivalence_p([0.5] * 4, [0.5] * 4, 0.01))  # four that agree show nothing
    # Two one-sided t tests by scipy.
    sides = [
        scipy_stats.ttest_1samp(noisy - base, bound, alternative=way).pvalue
        for bound, way in ((-0.01, "greater"), (0.01, "less"))
    ]
    assert stats.equivalence_p(noisy, base, 0.01) == pytest.approx(max(sides))


def test_spread_is_brown_and_forsythes_with_the_ratios_interval():
    values, base = [1.0, 2.0, 3.0, 4.0, 7.0], [0.0, 4.0, 8.0, 12.0, 24.0]
    found = stats.spread_comparison(values, base)
    assert found["sd_ratio"] == pytest.approx(0.25)
    # Brown-Forsythe is an analysis of variance of the distances from the medians.
    distances = [np.abs(np.array(v) - np.median(v)) for v in (values, base)]
    assert found["p_spread"] == pytest.approx(scipy_stats.f_oneway(*distances).pvalue)
    factor = np.sqrt(scipy_stats.f.ppf(0.975, 4, 4))
    assert (found["sd_ratio_low"], found["sd_ratio_high"]) == (
        pytest.approx(0.25 / factor),
        pytest.approx(0.25 * factor),
    )
    # Too few, or no spread but rounding.
    for few in ([1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [0.1 + 0.2, 0.3, 0.3, 0.3, 0.3]):
        assert np.isnan(list(stats.spread_comparison(few, base[: len(few)]).values())).all()
    # A ratio that the F test finds with power 0.8 in normal values.
    rng, ratio = np.random.default_rng(0), stats.detectable_ratio(7)
    f = rng.normal(0, ratio, (4000, 7)).var(axis=1, ddof=1) / rng.normal(0, 1, (4000, 7)).var(
        axis=1, ddof=1
    )
    assert np.mean(f > scipy_stats.f.ppf(0.975, 6, 6)) == pytest.approx(0.8, abs=0.02)


def test_what_few_pairs_can_find():
    assert stats.smallest_detectable(0.02, 5) == np.inf  # 2 / 2^5 = 0.0625
    assert (
        stats.smallest_detectable(0.02, 7, 0.05 / 4) == np.inf == stats.smallest_detectable(0.0, 5)
    )
    assert stats.smallest_p(20) == 2 / (stats.SIGN_FLIPS + 1)  # random flips give no less
    # All seven differences must have one sign at 0.05 / 3: Phi(d)^7 = 0.8
    assert stats.smallest_detectable(1, 7, 0.05 / 3) == pytest.approx(
        scipy_stats.norm.ppf(0.8 ** (1 / 7)), abs=0.04
    )
    assert stats.smallest_detectable(1, 40) == pytest.approx(0.454, abs=0.01)  # a paired t test's


def test_an_interaction_is_found_where_tasks_differ_and_not_where_all_gain_alike():
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 0.01, (7, 3))
    assert stats.interaction_p(noise + [0.0, 0.05, 0.1]) == stats.smallest_p(7)
    # A gain that is common to all tasks is no interaction.
    assert stats.interaction_p(noise + 0.1) == pytest.approx(stats.interaction_p(noise))
    assert stats.interaction_p(np.zeros((7, 3))) == 1.0
    assert np.isnan(stats.interaction_p(noise[:1])) and np.isnan(stats.interaction_p(noise[:, :1]))


# What follows simulates many experiments. Bounds are the promise plus three standard errors of the
# simulation itself.


def family(rng, experiments: int, effects=(0.0, 0.0, 0.0), noise=0.02) -> np.ndarray:
    """(experiments, 3) Holm-adjusted p of three methods against one baseline over 7 seeds, as
    `compare` tests them.

    Differences share the baseline's noise, so the comparisons depend on each other.
    """
    baseline = rng.normal(0, noise, (experiments, 7, 1))
    differences = rng.normal(0, noise, (experiments, 7, 3)) - baseline + np.array(effects)
    p = stats._sign_flip_p(differences.transpose(0, 2, 1).reshape(-1, 7)).reshape(-1, 3)
    assert stats.sign_flip_p(differences[0, :, 1]) == p[0, 1]
    return np.array([stats.holm(row) for row in p])


def test_without_an_effect_a_family_is_wrong_at_most_once_in_twenty():
    experiments = 4000
    wrong = (family(np.random.default_rng(0), experiments) < stats.ALPHA).any(axis=1).mean()
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / experiments)


def test_a_planted_effect_is_found_with_the_stated_power():
    experiments, noise = 2000, 0.02
    planted = stats.smallest_detectable(noise * np.sqrt(2), 7, stats.ALPHA / 3)
    found = (
        family(np.random.default_rng(1), experiments, (planted, 0, 0), noise)[:, 0] < stats.ALPHA
    ).mean()
    error = 3 * np.sqrt(0.8 * 0.2 / experiments)
    assert (
        stats.POWER - error <= found <= stats.POWER + error + 0.05
    )  # the others may let Holm go one step further


def test_without_an_interaction_it_is_found_at_most_once_in_twenty():
    experiments, rng = 400, np.random.default_rng(2)
    scale = np.array([0.005, 0.02, 0.08])  # tasks of very different spread
    wrong = np.mean(
        [
            stats.interaction_p(0.03 + rng.normal(0, scale, (7, 3))) < stats.ALPHA
            for _ in range(experiments)
        ]
    )
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / experiments)


def test_equivalence_is_claimed_at_most_once_in_twenty_at_the_margin():
    experiments, rng = 2000, np.random.default_rng(6)
    base = rng.normal(0.8, 0.02, (experiments, 7))
    values = base + 0.01 + rng.normal(0, 0.005, base.shape)
    wrong = np.mean([stats.equivalence_p(a, b, 0.01) < stats.ALPHA for a, b in zip(values, base)])
    assert wrong <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / experiments)


def test_better_than_the_best_needs_every_p_and_holm_over_settings_alone():
    p = [0.01, 0.03, 0.02, 0.04]
    assert stats.joint_holm(p, ["a"] * 4).tolist() == p
    # Two settings, whose largest p are 0.03 and 0.04: Holm gives 0.06 and 0.06.
    joint = stats.joint_holm(p, ["a", "a", "b", "b"])
    assert joint.tolist() == pytest.approx([0.02, 0.06, 0.04, 0.06])
    assert stats.joint_holm([0.01, np.nan, 0.01], ["a", "a", "b"])[[0, 2]] == pytest.approx(
        [0.02, 0.02]
    )
    assert np.isnan(stats.joint_holm([0.01, np.nan], ["a", "a"])[1])


def test_the_seeds_needed_are_the_fewest_that_detect_the_difference():
    needed = stats.seeds_needed(0.02, 0.03, 1)
    alpha = stats.ALPHA
    assert stats.smallest_detectable(0.02, needed, alpha) <= 0.03
    assert stats.smallest_detectable(0.02, needed - 1, alpha) > 0.03
    assert stats.seeds_needed(0.05, 0.03, 3) > stats.SIMULATED
    assert stats.seeds_needed(1.0, 0.03, 3) is None


@pytest.mark.parametrize("family", [1, 3, 8])
def test_more_pairs_detect_less(family):
    alpha = stats.ALPHA / family
    found = [stats.smallest_detectable(1.0, n, alpha) for n in range(stats.SIMULATED + 1, 100)]
    assert min(found) > 0 and (np.diff(found) < 0).all()
