"""Questions asked of worlds: worlds as pairs, seeds averaged first."""

import numpy as np
import pandas as pd
import pytest

from kd_utils.analysis import comparisons as of_seeds
from kd_utils.analysis import tables
from kd_utils.analysis.pairs import Answers
from kd_utils.figures import world_plots
from kd_utils.worlds import comparisons
from kd_utils.worlds.statistics import World, over_worlds

METHODS = ("task_only", "teacher_answers", "black_box", "combined")
TASKS = np.repeat(["sst2", "mmlu"], [60, 40])


def world_of(number, effect=0.2, seeds=3, methods=METHODS):
    """Results and predictions of a world, where each method is right on more rows than the one
    before it.
    """
    rng = np.random.default_rng(number)
    results, predictions = [], []
    for step, method in enumerate(methods):
        for seed in range(seeds):
            trial = f"{method}_seed{seed}"
            correct = rng.random(len(TASKS)) < 0.4 + effect * step
            ids = [f"w{number}-{i}" for i in range(len(TASKS))]
            predictions.append(
                pd.DataFrame({"trial": trial, "example_id": ids, "task": TASKS, "correct": correct})
            )
            by_task = pd.Series(correct).groupby(TASKS).mean()
            results.append(
                {
                    "world": str(number),
                    "trial": trial,
                    "config/distill_type": method,
                    "config/seed": seed,
                    "status": "done",
                    "validation_accuracy": correct.mean(),
                    "validation_accuracy/macro": by_task.mean(),
                    **{f"validation_accuracy/{task}": by_task[task] for task in ("sst2", "mmlu")},
                }
            )
    return pd.DataFrame(results), pd.concat(predictions, ignore_index=True)


def several(count=7, **settings):
    worlds = [world_of(number, **settings) for number in range(count)]
    results = pd.concat([table for table, _ in worlds], ignore_index=True)
    answers = {str(n): Answers(table, rows) for n, (table, rows) in enumerate(worlds)}
    return results, answers


def test_a_comparison_is_over_worlds_whose_seeds_are_averaged():
    _, answers = several()
    table = comparisons.compare(answers)
    assert list(table) == of_seeds.COLUMNS
    row = table[(table["question"] == "teacher") & (table["metric"] == "macro")].iloc[0]
    members = [next(of.pairs([("black_box", "task_only")])) for of in answers.values()]
    found = over_worlds(
        [World(p.difference, of.tasks, of.examples) for of, p in zip(answers.values(), members)]
    )
    for key in ("difference", "low", "high", "p", "p_rows", "smallest_p"):
        assert row[key] == pytest.approx(found[key])
    assert (row["planned"], row["pairs"], row["outcome"]) == (7, 7, "better")
    assert row["p"] == 2 / 128 and row["difference_sd"] == pytest.approx(found["sd"])
    means = [(p.correct @ of.weights(["macro"])).mean() for of, p in zip(answers.values(), members)]
    assert row["sd"] == pytest.approx(np.std(means, ddof=1))


def test_nothing_is_found_where_nothing_is():
    table = comparisons.compare(several(effect=0.0)[1])
    assert not table["outcome"].isin(["better", "worse"]).any()


def test_five_worlds_can_show_nothing_however_large_the_effect():
    table = comparisons.compare(several(5)[1])
    assert set(table["outcome"]) <= {"undecided", "equivalent"}
    assert (table["p"] >= 0.0625).all() and np.isinf(table["detectable"]).all()


def test_a_world_that_lacks_a_method_does_not_count_for_it():
    results, answers = several()
    short, rows = world_of(6, methods=METHODS[:3])
    answers["6"] = Answers(short, rows)
    table = comparisons.compare(answers)
    pairs = table[table["metric"] == "macro"].groupby("question")["pairs"].first()
    assert pairs["white_box"] == 6 and pairs["teacher"] == 7


def test_a_comparison_that_is_done_in_no_world_still_counts_in_its_family():
    worlds = {}
    for number in range(6):
        results, rows = world_of(number, methods=("black_box", "attention", "hidden_state"))
        lost = results["config/distill_type"] == "hidden_state"
        results.loc[lost, "status"] = "failed"
        rows = rows[~rows["trial"].isin(results.loc[lost, "trial"])]
        worlds[str(number)] = Answers(results, rows)
    table = comparisons.compare(worlds, planned=7)
    white_box = table[(table["question"] == "white_box") & (table["metric"] == "macro")]
    found = white_box.set_index("method")[["planned", "pairs", "family", "outcome"]]
    assert found.loc["hidden_state"].tolist() == [7, 0, 2, "not tested"]
    assert found.loc["attention", ["planned", "pairs", "family"]].tolist() == [7, 6, 2]
    assert white_box.set_index("method").loc["attention", "p_holm"] == pytest.approx(4 / 64)


def test_a_run_without_any_pair_has_an_empty_table_of_spreads():
    worlds = {"1": Answers(*world_of(1, methods=("task_only",)))}
    assert comparisons.compare(worlds).empty
    spread = comparisons.spread(worlds)
    assert spread.empty and "share_worlds" in spread


def test_worlds_with_other_tasks_are_refused():
    _, answers = several(2)
    results, rows = world_of(1)
    answers["1"] = Answers(results, rows[rows["task"] == "sst2"])
    with pytest.raises(ValueError, match="the worlds have different tasks"):
        comparisons.compare(answers)


def test_in_the_table_by_world_a_world_is_a_seed():
    results, _ = several(3)
    results.loc[0, "status"] = "failed"
    results.loc[
        results["world"].eq("2") & results["config/distill_type"].eq("combined"), "status"
    ] = "missing"
    table = comparisons.results_by_world(results)
    assert len(table) == 3 * len(METHODS) and "world" not in table
    tables.planned_trials(table)  # no trial is there twice
    first = table[table["config/distill_type"] == "task_only"].iloc[0]
    two = results[(results["world"] == "0") & (results["config/distill_type"] == "task_only")][1:]
    expected = two["validation_accuracy/macro"].mean()
    assert first["validation_accuracy/macro"] == pytest.approx(expected)
    combined = table[table["config/distill_type"] == "combined"]
    assert combined["status"].tolist() == ["done", "done", "missing"]
    assert combined["config/seed"].tolist() == [0, 1, 2]
    columns = [key for key in table if key.startswith("validation_accuracy/")]
    assert columns == [key for key in results if key.startswith("validation_accuracy/")]


def test_the_spread_tells_worlds_from_seeds():
    rng = np.random.default_rng(0)
    pairs = rng.normal(0, 0.05, (50, 1)) + rng.normal(0, 0.02, (50, 3))
    ids = np.arange(len(TASKS)).astype(str)

    def found(seeds):
        differences = (
            np.repeat(of_world[:, None], len(TASKS), axis=1) for of_world in pairs[:, :seeds]
        )
        return over_worlds([World(values, TASKS, ids) for values in differences])

    three, alone = found(3), found(1)
    assert three["sd_seeds"] == pytest.approx(np.sqrt(pairs.var(axis=1, ddof=1).mean()))
    assert three["sd"] == pytest.approx(pairs.mean(axis=1).std(ddof=1))
    assert three["share_worlds"] == pytest.approx(0.05**2 / (0.05**2 + 0.02**2), abs=0.1)
    assert np.isnan(alone["sd_seeds"]) and np.isnan(alone["share_worlds"])


def test_the_table_of_spreads_has_each_comparison_once():
    _, answers = several(3)
    table = comparisons.spread(answers)
    assert not table.duplicated(["comparison", "setting"]).any() and set(table["worlds"]) == {3}
    overall = comparisons.compare(answers).query("metric == 'macro' and question == 'teacher'")
    row = table[table["comparison"] == "black_box minus task_only"].iloc[0]
    assert row["sd_worlds"] == pytest.approx(overall["difference_sd"].item())
    assert 0 <= row["share_worlds"] <= 1 and row["sd_seeds"] > 0


def test_the_figure_has_a_row_for_each_world_and_one_for_all():
    _, answers = several(3)
    table = comparisons.compare(answers)
    overall = table[table["metric"] == "macro"]
    chart = world_plots.differences_by_world(comparisons.differences(answers), overall)
    drawn = pd.DataFrame(next(iter(chart.to_dict()["datasets"].values())))
    assert list(dict.fromkeys(drawn["world"])) == ["0", "1", "2", world_plots.ALL]
    logits = drawn[drawn["comparison"] == "black_box minus task_only"]
    assert len(logits) == 3 * 3 + 1  # once, though two questions ask it
    mean = logits.loc[logits["world"] == world_plots.ALL, "difference"].item()
    assert mean == pytest.approx(100 * overall["difference"].iloc[0])
