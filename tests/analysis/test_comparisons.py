"""Comparisons: which trials meet, what is missing, what each outcome needs, and that no effect
gives no finding.
"""

import numpy as np
import pandas as pd
import pytest

from kd_utils.analysis import comparisons, questions, stats, tables
from kd_utils.analysis.comparisons import Answers
from kd_utils.analysis.pairs import example_weights
from kd_utils.analysis.words import formatting
from kd_utils.config.parameter_files import load_grid, load_parameters, notebook_config
from kd_utils.config.project_paths import ROOT
from kd_utils.sweep import planning

GRIDS = sorted((ROOT / "papermill_params").glob("grid*.yaml"))
TASKS = np.repeat(["sst2", "mmlu", "gsm8k"], 40)
METHODS = ("task_only", "black_box", "hidden_state", "attention", "combined")


def run(
    chances: dict[tuple, float],
    seeds: int = 7,
    swept: tuple[str, ...] = (),
    sure: float = 0.0,
    seed: int = 0,
):
    """A run's results and predictions: each arm (method, swept values...) answers an example
    rightly with its chance.

    Args:
        chances: arm -> chance; a swept value of None is a key that the method does not use.
        sure: share of the examples that all arms answer alike within a seed, so that little noise
            is left.
    """
    rng, rows, answers = np.random.default_rng(seed), [], []
    shared = rng.uniform(size=(seeds, len(TASKS)))
    for arm, chance in chances.items():
        method, *values = arm if isinstance(arm, tuple) else (arm,)
        for s in range(seeds):
            trial = f"{method}_{s}_{values}"
            own = np.where(
                np.arange(len(TASKS)) % 100 < 100 * sure, shared[s], rng.uniform(size=len(TASKS))
            )
            correct = own < chance
            rows.append(
                {
                    "trial": trial,
                    "config/distill_type": method,
                    "config/seed": s,
                    "status": "done",
                    **{f"config/{key}": value for key, value in zip(swept, values)},
                }
            )
            answers.append(
                pd.DataFrame(
                    {
                        "trial": trial,
                        "example_id": [f"e{i}" for i in range(len(TASKS))],
                        "task": TASKS,
                        "correct": correct,
                    }
                )
            )
    return pd.DataFrame(rows), pd.concat(answers, ignore_index=True)


def one(table: pd.DataFrame, **where) -> pd.Series:
    for key, value in where.items():
        table = table[table[key] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_every_question_has_its_family_on_every_metric():
    table = comparisons.compare(Answers(*run(dict.fromkeys(METHODS, 0.6))))
    assert table.groupby("question", sort=False).size().to_dict() == {
        "teacher": 5,
        "white_box": 15,
        "which": 5,
        "combining": 10,
    }
    assert table["metric"].unique().tolist() == ["macro", "micro", "sst2", "mmlu", "gsm8k"]
    white_box = table[(table["question"] == "white_box") & (table["metric"] == "macro")]
    assert white_box["p_holm"].tolist() == pytest.approx(stats.holm(white_box["p"]).tolist())
    assert (white_box["smallest_p"] == 3 * 2 / 128).all()


def test_the_numbers_are_those_of_the_accuracies_whatever_the_rows_order():
    results, predictions = run({"black_box": 0.5, "attention": 0.7})
    row = one(
        comparisons.compare(Answers(results, predictions.sample(frac=1, random_state=0))),
        question="white_box",
        metric="macro",
    )
    wide = predictions.assign(
        method=predictions["trial"].str.rsplit("_", n=2).str[0],
        seed=predictions["trial"].str.rsplit("_", n=2).str[1],
    )
    accuracy = (
        wide.groupby(["method", "seed", "task"])["correct"]
        .mean()
        .groupby(["method", "seed"])
        .mean()
    )
    differences = (accuracy["attention"] - accuracy["black_box"]).to_numpy()
    assert row["difference"] == pytest.approx(differences.mean()) and row[
        "difference_sd"
    ] == pytest.approx(differences.std(ddof=1))
    assert row["p"] == stats.sign_flip_p(differences) == 2 / 128
    assert row["low"] < row["low_90"] < row["difference"] < row["high_90"] < row["high"]
    tost = stats.equivalence_p(accuracy["attention"], accuracy["black_box"], 0.01)
    assert row["p_equivalence"] == pytest.approx(tost)
    found = comparisons.differences(Answers(results, predictions))
    assert found[found["metric"] == "macro"]["difference"].tolist() == pytest.approx(
        differences.tolist()
    )


def test_a_trial_that_is_not_done_takes_its_pair_along_and_is_counted():
    results, predictions = run({"black_box": 0.5, "attention": 0.7})
    results.loc[results["trial"] == "attention_2_[]", "status"] = "failed"
    predictions = predictions[predictions["trial"] != "attention_2_[]"]
    row = one(
        comparisons.compare(Answers(results, predictions)), question="white_box", metric="micro"
    )
    assert (row["planned"], row["pairs"], row["p"]) == (7, 6, 2 / 64)


@pytest.mark.parametrize("pairs", [0, 1])
def test_too_few_pairs_are_not_tested(pairs):
    results, predictions = run({"black_box": 0.5, "attention": 0.7}, seeds=3)
    gone = results["config/distill_type"].eq("attention") & (results["config/seed"] >= pairs)
    results.loc[gone, "status"] = "missing"
    predictions = predictions[~predictions["trial"].isin(results.loc[gone, "trial"])]
    row = one(
        comparisons.compare(Answers(results, predictions)), question="white_box", metric="macro"
    )
    assert row["pairs"] == pairs and row["outcome"] == "not tested" and np.isnan(row["p_holm"])


def test_without_any_pair_the_tables_are_empty():
    answers = Answers(*run({"black_box": 0.5}))
    assert comparisons.compare(answers).columns.tolist() == comparisons.COLUMNS
    assert comparisons.compare(answers).empty and comparisons.interactions(answers).empty
    assert (
        comparisons.differences(answers).empty
        and formatting.comparisons(comparisons.compare(answers)).empty
    )


def test_trials_of_other_examples_are_refused():
    results, predictions = run({"black_box": 0.5, "attention": 0.7})
    with pytest.raises(
        ValueError, match=r"did not answer the same examples: attention_1_\[\] lacks 1 of 120"
    ):
        Answers(
            results,
            predictions.drop(predictions[predictions["trial"] == "attention_1_[]"].index[0]),
        )


def test_settings_meet_where_they_agree():
    """black_box uses the temperature and not gamma: every gamma meets the black box of its own
    temperature.
    """
    chances = {
        ("black_box", 1.0, None): 0.5,
        ("black_box", 4.0, None): 0.9,
        ("task_only", None, None): 0.2,
    }
    chances |= {("hidden_state", t, g): 0.7 for t in (1.0, 4.0) for g in (0.1, 10.0)}
    answers = Answers(*run(chances, swept=("temperature", "gamma_hidden")))
    table = comparisons.compare(answers)
    white_box = table[(table["question"] == "white_box") & (table["metric"] == "macro")].set_index(
        "setting"
    )
    assert white_box.index.tolist() == [
        f"temperature={t}, gamma_hidden={g}" for t in (1, 4) for g in (0.1, 10)
    ]
    assert (white_box["difference"] > 0).tolist() == [True, True, False, False]
    teacher = table[(table["question"] == "teacher") & (table["metric"] == "macro")]
    assert (
        teacher["setting"].tolist() == ["temperature=1", "temperature=4"]
        and (teacher["difference"] > 0).all()
    )
    # Four comparisons in the family, so with 7 pairs nothing can be significant, and that is said.
    assert (white_box["smallest_p"] == 4 * 2 / 128).all() and np.isinf(
        white_box["detectable"]
    ).all()


def test_what_is_judged_by_rule():
    row = {
        "pairs": 7,
        "difference": 0.02,
        "p_holm": 0.04,
        "p_rows_holm": 0.04,
        "p_equivalence_holm": 0.9,
        "low_90": 0.01,
        "high_90": 0.03,
    }
    assert comparisons.judge(row, 0.01) == (False, "better")
    assert comparisons.judge(row | {"difference": -0.02}, 0.01) == (False, "worse")
    assert comparisons.judge(row | {"p_rows_holm": 0.06}, 0.01) == (False, "better on these rows")
    assert comparisons.judge(row | {"p_holm": 0.06}, 0.01) == (False, "undecided")
    close = row | {"p_holm": 0.3, "p_equivalence_holm": 0.01, "low_90": -0.004, "high_90": 0.008}
    assert comparisons.judge(close, 0.01) == (True, "equivalent")
    assert comparisons.judge(close | {"p_holm": 0.04}, 0.01) == (
        True,
        "better",
    )  # and by less than the margin
    assert comparisons.judge(close | {"high_90": 0.012}, 0.01) == (
        False,
        "undecided",
    )  # over other rows it may be more
    assert comparisons.judge(close | {"p_equivalence_holm": 0.06}, 0.01) == (False, "undecided")
    assert comparisons.judge(close | {"p_equivalence_holm": np.nan}, 0.01) == (False, "undecided")
    assert comparisons.judge(row | {"pairs": 1, "p_holm": np.nan}, 0.01) == (False, "not tested")


@pytest.mark.parametrize("examples, outcome", [(40, "undecided"), (400, "equivalent")])
def test_methods_that_answer_alike_are_equal_where_there_are_examples_enough(
    monkeypatch, examples, outcome
):
    monkeypatch.setattr("test_comparisons.TASKS", np.repeat(["sst2", "mmlu", "gsm8k"], examples))
    results, predictions = run(
        dict.fromkeys(("black_box", "hidden_state", "attention", "combined"), 0.6), sure=1.0
    )
    table = comparisons.compare(Answers(results, predictions))
    assert set(table["outcome"]) == {outcome} and table["equal"].all() == (outcome == "equivalent")
    interaction = comparisons.interactions(Answers(results, predictions))
    assert set(interaction["p"]) == {1.0} == set(interaction["p_rows"])


def test_two_seeds_and_a_task_that_nobody_solves_show_nothing():
    chances = dict.fromkeys(("black_box", "hidden_state", "attention", "combined"), 0.6)
    results, predictions = run(chances, seeds=2)
    predictions.loc[predictions["task"] == "gsm8k", "correct"] = False
    table = comparisons.compare(Answers(results, predictions))
    assert set(table["outcome"]) == {"undecided"} and table["p_spread"].isna().all()
    assert table["p_equivalence"].isna().all()


def test_with_two_swept_keys_a_family_keeps_together():
    chances = {("black_box", None, None): 0.5}
    chances |= {("hidden_state", h, None): 0.5 for h in (0.1, 1.0)} | {
        ("attention", None, a): 0.5 for a in (0.1, 1.0)
    }
    chances |= {("combined", h, a): 0.5 for h in (0.1, 1.0) for a in (0.1, 1.0)}
    table = comparisons.compare(Answers(*run(chances, swept=("gamma_hidden", "gamma_attention"))))
    combining = table[(table["question"] == "combining") & (table["metric"] == "macro")]
    assert combining["setting"].value_counts().to_dict() == {
        f"gamma_hidden={h}, gamma_attention={a}": 2 for h in (0.1, 1) for a in (0.1, 1)
    }
    assert set(combining["family"]) == {8}


@pytest.mark.parametrize(
    "grid",
    # Three seeds see whether a method rests, which is no comparison of methods; notebook 09
    # compares cuts and chains.
    [path for path in GRIDS if not path.stem.startswith(("grid-rest-", "grid-cut", "grid-chain"))],
    ids=lambda path: path.stem,
)
def test_every_grid_of_the_project_has_seeds_enough_to_find_something(grid):
    trials = planning.plan({}, load_grid(grid), "runs/x")
    planned = tables.planned_trials(
        pd.DataFrame(
            [
                {
                    "trial": trial.trial,
                    "status": "done",
                    **{f"config/{key}": value for key, value in trial.swept.items()},
                }
                for trial in trials
            ]
        )
    )
    reach = questions.reach(planned)
    if grid.stem == "grid-worlds":  # its pairs are worlds, and toy-worlds.yaml has seven
        reach["smallest_p"] = [stats.smallest_p(7, family) for family in reach["family"]]
    assert len(reach) and (reach["smallest_p"] < stats.ALPHA).all()


@pytest.mark.parametrize("grid", [path for path in GRIDS if "grid-rest-" in path.stem])
def test_a_grid_of_rest_has_its_experiments_epochs_and_twice_as_many(grid):
    name = grid.stem.removeprefix("grid-rest-")
    parameters = load_parameters(ROOT / "papermill_params" / f"{name}.yaml")
    epochs = notebook_config("03_train_student", parameters).epochs
    assert load_grid(grid)["epochs"] in ([epochs, 2 * epochs], [2 * epochs])
    assert len(load_grid(grid)["seed"]) >= 3
    assert planning.default_run_dir(parameters, grid) == ROOT / "runs" / f"{name}-rest"


REFERENCES = dict.fromkeys(questions.REFERENCES, 0.3)


def test_the_best_of_four_references_is_beaten_with_seven_seeds():
    """The largest p counts, and is not corrected: Holm's over four could show nothing."""
    answers = Answers(*run({"black_box": 0.9} | REFERENCES))
    table = comparisons.compare(answers)
    rows = table[(table["question"] == "references") & (table["metric"] == "macro")]
    assert set(rows["outcome"]) == {"better"} and set(rows["family"]) == {1}
    assert rows["p_holm"].tolist() == rows["p"].tolist() == [2 / 128] * 4
    reach = questions.reach(answers.trials).set_index("question")
    assert reach.loc["references", ["comparisons", "family", "smallest_p"]].tolist() == [
        4,
        1,
        1 / 64,
    ]
    assert reach.loc["controls", "smallest_p"] == 2 / 64


def test_a_loss_against_one_reference_is_one_of_four():
    """It is a finding about any of them, so with 7 seeds none can be shown."""
    table = comparisons.compare(Answers(*run({"black_box": 0.3} | REFERENCES | {"shuffled": 0.9})))
    row = one(table, question="references", metric="macro", baseline="shuffled")
    assert row["difference"] < 0 and row["p"] == 2 / 128 and row["p_holm"] == 4 * 2 / 128
    assert row["outcome"] == "undecided"


@pytest.mark.parametrize("shuffled, outcome", [(0.3, "better"), (0.9, "undecided")])
def test_a_white_box_signal_adds_if_it_beats_every_reference_too(shuffled, outcome):
    """One joint comparison for each of three methods: at 7 seeds each can be shown."""
    chances = {"black_box": 0.5, "combined": 0.9, "attention": 0.5, "hidden_state": 0.5}
    answers = Answers(*run(chances | REFERENCES | {"shuffled": shuffled}))
    table = comparisons.compare(answers)
    asked = table[(table["question"] == "white_box_references") & (table["metric"] == "macro")]
    assert set(asked["family"]) == {3} and len(asked) == 3 * 4
    rows = asked[asked["method"] == "combined"].set_index("baseline")
    assert rows.loc["shuffled", "outcome"] == outcome
    assert (
        one(table, question="white_box", metric="macro", method="combined")["outcome"] == "better"
    )
    reach = questions.reach(answers.trials).set_index("question")
    assert reach.loc["white_box_references", ["comparisons", "family"]].tolist() == [12, 3]
    assert reach.loc["white_box_references", "smallest_p"] == 3 / 64


def test_a_joint_question_with_one_reference_is_another_question():
    chances = {"black_box": 0.6, "task_only": 0.5}
    table = comparisons.compare(Answers(*run(chances, seeds=3)))
    assert set(table["question"]) == {"teacher"}
    assert questions.reach(Answers(*run(chances, seeds=3)).trials)["question"].tolist() == [
        "teacher"
    ]


def test_without_an_effect_over_the_best_reference_none_is_called_one():
    """Black box is as good as the best reference, and the others are far below."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        best, rest = rng.normal(0, 0.02, 7), rng.normal(0.3, 0.02, (3, 7))
        p = [stats.sign_flip_p(values) for values in (best, *rest)]
        wrong += (stats.joint_holm(p, [""] * 4) < stats.ALPHA).all()
    assert wrong / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_the_tasks_that_the_teacher_knows_have_a_mean_of_their_own():
    chances = {"black_box": 0.9, "task_only": 0.5}
    results, predictions = run(chances)
    table = comparisons.compare(Answers(results, predictions, ["sst2", "gsm8k"]))
    means = table.set_index("metric")["difference"]
    assert list(means.index) == ["macro", "micro", "informed", "sst2", "mmlu", "gsm8k"]
    assert means["informed"] == pytest.approx((means["sst2"] + means["gsm8k"]) / 2)
    assert questions.primary(table["metric"]) == "informed"
    assert questions.primary(["macro", "sst2"]) == "macro"


def test_both_detectable_differences_are_told_and_the_larger_counts():
    table = comparisons.compare(Answers(*run({"black_box": 0.5, "task_only": 0.5})))
    both = table[["detectable_seeds", "detectable_rows"]]
    assert table["detectable"].tolist() == both.max(axis=1).tolist()
    assert (both > 0).all(axis=None) and (
        table["detectable_seeds"] != table["detectable_rows"]
    ).all()


def test_any_metric_of_the_results_is_compared_over_seeds():
    results, _ = run({"black_box": 0.5, "attention": 0.5}, seeds=3)
    results["validation_loss"] = [1.0, 2.0, 3.0, 1.5, 2.5, 3.5]
    [row] = comparisons.compare_metrics(results, ["validation_loss"]).to_dict("records")
    assert (row["pairs"], row["difference"], row["low"], row["p"], row["p_holm"]) == (
        3,
        0.5,
        0.5,
        0.25,
        0.25,
    )


def test_the_interaction_sees_a_gain_on_one_task_only():
    results, predictions = run(dict.fromkeys(METHODS, 0.5), sure=0.9)
    better = predictions["trial"].str.startswith("attention") & predictions["task"].eq("sst2")
    predictions.loc[better, "correct"] = True
    table = comparisons.interactions(Answers(results, predictions)).set_index("method")
    assert table.loc["attention", "p_holm"] < 0.05 < table.loc["combined", "p_holm"]
    assert table.loc["attention", "p_rows_holm"] < 0.05 < table.loc["combined", "p_rows_holm"]
    assert table.loc["attention", "sst2"] == pytest.approx(0.5, abs=0.1)
    shown = formatting.comparisons(comparisons.compare(Answers(results, predictions)))
    assert shown.loc[("sst2", "attention"), "outcome"].tolist()[0] == "better"


def test_without_effects_whole_experiments_find_nothing_more_often_than_promised():
    """The real path, from predictions to outcomes: how often does a family on the primary metric
    find something.
    """
    experiments, wrong = 60, 0
    for seed in range(experiments):
        answers = Answers(
            *run(
                dict.fromkeys(("black_box", "hidden_state", "attention", "combined"), 0.6),
                seed=seed,
            )
        )
        weights = example_weights(answers.tasks)[questions.PRIMARY]
        p = [
            stats.sign_flip_p(p.difference @ weights)
            for p in answers.pairs(questions.QUESTIONS["white_box"])
        ]
        wrong += (stats.holm(p) < stats.ALPHA).any()
    assert wrong / experiments <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / experiments)


def test_the_planned_trials_are_the_tables():
    results, predictions = run({"black_box": 0.5})
    assert Answers(results, predictions).trials.equals(tables.planned_trials(results))
