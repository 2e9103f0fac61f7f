"""Uncertainty over worlds, seeds in them and examples: by simulation, and where it must equal what
is known.
"""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kd_utils.analysis import stats
from kd_utils.analysis.pairs import example_weights, hierarchical_errors
from kd_utils.worlds.statistics import World, over_worlds

TASKS = np.repeat(["sst2", "mmlu", "gsm8k"], [50, 40, 30])

#: Which examples the worlds have: the same, own ones, or one task's in common.
SHARING = ("all", "none", "one task")


def ids(world: int, sharing: str) -> np.ndarray:
    numbers = np.arange(len(TASKS)).astype(str)
    return np.where(shared(sharing), numbers, np.char.add(f"{world}-", numbers))


def shared(sharing: str) -> np.ndarray:
    return {"all": TASKS != "", "none": TASKS == "", "one task": TASKS == "sst2"}[sharing]


def simulate(rng, sharing, worlds_sd, seeds_sd, rows_sd, noise_sd, worlds=7, seeds=3):
    """Worlds without an effect, in which everything varies that may."""
    rows = np.where(
        shared(sharing),
        rng.normal(0, rows_sd, len(TASKS)),
        rng.normal(0, rows_sd, (worlds, len(TASKS))),
    )
    of_worlds = rng.normal(0, worlds_sd, (worlds, 1, 1)) + rng.normal(
        0, seeds_sd, (worlds, seeds, 1)
    )
    noise = rng.normal(0, noise_sd, (worlds, seeds, len(TASKS)))
    difference = of_worlds + rows[:, None] + noise
    return [World(values, TASKS, ids(world, sharing)) for world, values in enumerate(difference)]


def rates(experiments, sharing, **spread):
    """How often the interval has the truth, and how often both tests find what is not there."""
    rng, hits, wrong = np.random.default_rng(7), 0, 0
    for _ in range(experiments):
        found = over_worlds(simulate(rng, sharing, **spread))
        hits += found["low"] <= 0 <= found["high"]
        wrong += max(found["p"], found["p_rows"]) < stats.ALPHA
    return hits / experiments, wrong / experiments


SPREADS = {
    "worlds": dict(worlds_sd=0.03, seeds_sd=0.01, rows_sd=0.05, noise_sd=0.2),
    "seeds": dict(worlds_sd=0.0, seeds_sd=0.05, rows_sd=0.0, noise_sd=0.1),
    "rows": dict(worlds_sd=0.005, seeds_sd=0.005, rows_sd=0.4, noise_sd=0.1),
    "noise": dict(worlds_sd=0.0, seeds_sd=0.0, rows_sd=0.0, noise_sd=0.5),
}


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("spread", SPREADS)
def test_over_worlds_intervals_cover_and_nothing_is_found_without_an_effect(sharing, spread):
    covered, wrong = rates(60, sharing, **SPREADS[spread])
    slack = 3 * np.sqrt(0.05 * 0.95 / 60)
    assert covered >= 0.95 - slack and wrong <= 0.05 + slack


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("spread", SPREADS)
def test_over_worlds_the_same_in_many_more_experiments(sharing, spread):
    covered, wrong = rates(2000, sharing, **SPREADS[spread])
    slack = 3 * np.sqrt(0.05 * 0.95 / 2000)
    assert covered >= 0.95 - slack and wrong <= 0.05 + slack


def test_signs_of_worlds_alone_are_fooled_by_rows_that_all_worlds_share():
    rng, fooled = np.random.default_rng(1), 0
    for _ in range(40):
        fooled += over_worlds(simulate(rng, "all", **SPREADS["rows"]))["p"] < stats.ALPHA
    assert fooled / 40 > 0.3


def test_an_effect_is_found_in_seven_worlds_and_cannot_be_in_five():
    worlds = simulate(np.random.default_rng(0), "none", **SPREADS["worlds"])
    moved = [world._replace(difference=world.difference + 0.2) for world in worlds]
    found = over_worlds(moved)
    assert found["p"] == 2 / 128 == found["smallest_p"] and found["p_rows"] < 0.01
    assert found["low"] < 0.2 < found["high"] and (found["worlds"], found["seeds"]) == (7, 21)
    assert over_worlds(moved[:5])["p"] == 0.0625


def test_with_rows_of_their_own_a_world_is_one_value():
    worlds = simulate(np.random.default_rng(2), "none", **SPREADS["rows"])
    weights = example_weights(TASKS)["macro"]
    means = [(world.difference @ weights).mean() for world in worlds]
    found, student = over_worlds(worlds), stats.interval(means)
    assert [found[key] for key in ("difference", "sd", "low", "high")] == pytest.approx(
        [student[key] for key in ("mean", "sd", "low", "high")], abs=1e-9
    )
    assert found["p_rows"] == pytest.approx(scipy_stats.ttest_1samp(means, 0).pvalue)


def test_with_shared_rows_the_error_is_the_bootstraps_of_worlds_and_rows():
    worlds = simulate(np.random.default_rng(3), "all", **SPREADS["rows"])
    means = np.stack([world.difference.mean(axis=0) for world in worlds])
    weights = example_weights(TASKS)["macro"][:, None]
    [error] = hierarchical_errors(means, TASKS, weights, draws=20_000)
    found = over_worlds(worlds)
    half = scipy_stats.t.ppf(0.975, 6) * error
    # The bootstrap counts the rows' variance 7 / 6 times, 8 % of the error, if all of it is theirs.
    assert 0.9 < (found["high"] - found["low"]) / 2 / half < 1.02


def test_the_order_of_examples_does_not_matter():
    worlds = simulate(np.random.default_rng(4), "all", **SPREADS["rows"])
    order = np.random.default_rng(5).permutation(len(TASKS))
    mixed = [
        World(w.difference[:, order], TASKS[order], np.asarray(w.examples)[order]) if at else w
        for at, w in enumerate(worlds)
    ]
    assert list(over_worlds(mixed).values()) == pytest.approx(list(over_worlds(worlds).values()))


def test_seeds_within_worlds_have_a_spread_of_their_own():
    worlds = simulate(np.random.default_rng(6), "none", 0.5, 0.02, 0.0, 0.0, worlds=50, seeds=9)
    assert over_worlds(worlds)["sd_seeds"] == pytest.approx(0.02, rel=0.1)
    single = [world._replace(difference=world.difference[:1]) for world in worlds]
    assert np.isnan(over_worlds(single)["sd_seeds"])


def test_what_was_never_seen_to_differ_may_still_differ_in_other_worlds():
    nothing = np.zeros((3, len(TASKS)))
    for sharing, factor in (("all", 1), ("none", 7)):
        found = over_worlds([World(nothing, TASKS, ids(w, sharing)) for w in range(7)], "gsm8k")
        assert found["high"] == pytest.approx(1 - 0.05 ** (1 / (30 * factor)))
        assert found["p"] == found["p_rows"] == 1.0


def test_one_world_has_no_interval_and_other_tasks_are_refused():
    [world] = simulate(np.random.default_rng(8), "all", **SPREADS["rows"], worlds=1)
    found = over_worlds([world])
    assert np.isnan([found[key] for key in ("sd", "low", "high", "p", "p_rows")]).all()
    other = World(world.difference, ["sst2"] * len(TASKS), world.examples)
    with pytest.raises(ValueError, match="the worlds have different tasks"):
        over_worlds([world, other])
