"""Figures over trials: valid charts with the data they claim to show, that render to a picture for
1 and 7 seeds.
"""

import numpy as np
import pandas as pd
import pytest

from kd_utils.analysis import comparisons, questions, stats, tables
from kd_utils.config.trial import METHODS
from kd_utils.evaluation import calibration
from kd_utils.figures import curve_plots, plots, result_plots

TASKS = ("sst2", "mmlu", "gsm8k")
TRAINED = list(METHODS)[1:]
WHITE_BOX = list(questions.WHITE_BOX)
TEACHER = {"validation_accuracy": 0.9, **{f"validation_accuracy/{task}": 0.9 for task in TASKS}}
GAMMAS = [f"gamma_hidden={value}" for value in (10, 0.1, 1)]


def accuracies(seeds: int, methods=METHODS, setting="") -> pd.DataFrame:
    noise = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {
                "setting": setting,
                "distill_type": method,
                "seed": seed,
                "task": task,
                "accuracy": noise.uniform(0.4, 0.6),
            }
            for method in methods
            for seed in range(1 if method == "untrained" else seeds)
            for task in TASKS
        ]
    )


def swept_accuracies(seeds: int) -> pd.DataFrame:
    return pd.concat(
        [
            accuracies(seeds, ["task_only", "black_box"]),
            *(accuracies(seeds, ["hidden_state"], setting) for setting in GAMMAS),
        ],
        ignore_index=True,
    )


def curves(seeds: int, methods=TRAINED, epochs: int = 3, swept=None) -> pd.DataFrame:
    def epoch(number: int, seed: int) -> dict:
        return {
            "epoch": number,
            "validation_accuracy": 0.1 * number + 0.01 * seed,
            "validation_loss": 2 / number,
            **{f"train_loss/{term}": 0.5 / number for term in ("task", "kd", "attention")},
            **{f"weight/{term}": 0.1 for term in ("task", "kd", "attention")},
            "grad_share/task": 0.6,
            "grad_share/kd": 0.4,
            "grad_share/attention": 0.0,
        }

    return tables.learning_curves(
        {
            "config": {"distill_type": method, "seed": seed},
            "swept": swept or {},
            "epochs": [epoch(number, seed) for number in range(1, epochs + 1)],
        }
        for method in methods
        for seed in range(seeds)
    )


def terms(seeds: int, **other) -> pd.DataFrame:
    return tables.loss_terms(curves(seeds, **other))


def swept_terms(seeds: int) -> pd.DataFrame:
    return pd.concat(
        [
            terms(seeds, methods=["black_box"]),
            *(
                terms(seeds, methods=["hidden_state"], swept={"gamma_hidden": g})
                for g in (10, 0.1, 1)
            ),
        ]
    )


def differences(seeds: int, settings=("",)) -> tuple[pd.DataFrame, pd.DataFrame]:
    keys = [
        (metric, setting, method)
        for setting in settings
        for method in WHITE_BOX
        for metric in ("macro", "micro", "sst2")
    ]
    points = pd.DataFrame(
        [
            {
                "metric": metric,
                "setting": setting,
                "distill_type": method,
                "baseline": "black_box",
                "seed": seed,
                "difference": 0.01 * seed,
            }
            for metric, setting, method in keys
            for seed in range(seeds)
        ]
    )
    known = seeds > 1
    compared = pd.DataFrame(
        [
            {
                "question": question,
                "metric": metric,
                "setting": setting,
                "method": method,
                "baseline": "black_box",
                "difference": 0.03,
                "low": 0.01 if known else np.nan,
                "high": 0.05 if known else np.nan,
                "outcome": "not tested"
                if not known
                else "better"
                if metric == "macro"
                else "undecided",
            }
            for metric, setting, method in keys
            for question in ("white_box", "teacher")
        ]
    )
    return points, compared


def predictions(seeds: int, **columns) -> pd.DataFrame:
    noise = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {
                "distill_type": method,
                "seed": seed,
                "task": task,
                "correct": bool(noise.integers(2)),
                "loglikelihoods": None if task == "gsm8k" else noise.normal(size=2) * 2,
                **columns,
            }
            for method in METHODS
            for seed in range(seeds)
            for task in TASKS
            for _ in range(30)
        ]
    )


def rows_of(chart) -> list[dict]:
    return [row for rows in chart.to_dict()["datasets"].values() for row in rows]


@pytest.fixture(scope="module", params=[1, 7], ids=["one seed", "seven seeds"])
def seeds(request) -> int:
    return request.param


FIGURES = {
    "accuracy": lambda seeds: result_plots.accuracy_by_task(accuracies(seeds), TEACHER),
    "accuracy without black box": lambda seeds: result_plots.accuracy_by_task(
        accuracies(seeds, ["attention", "new"])
    ),
    "accuracy by setting": lambda seeds: result_plots.accuracy_by_task(swept_accuracies(seeds)),
    "differences": lambda seeds: result_plots.differences_from_baseline(*differences(seeds)),
    "differences by setting": lambda seeds: result_plots.differences_from_baseline(
        *differences(seeds, ["a=1", "a=2"])
    ),
    "curves": lambda seeds: curve_plots.learning_curves(curves(seeds), "validation_accuracy"),
    "one epoch": lambda seeds: curve_plots.learning_curves(
        curves(seeds, ["attention"], 1), "validation_loss"
    ),
    "terms": lambda seeds: curve_plots.loss_terms(terms(seeds)),
    "terms by setting": lambda seeds: curve_plots.loss_terms(swept_terms(seeds)),
    "swept": lambda seeds: result_plots.swept(swept_accuracies(seeds)),
    "swept keys": lambda seeds: result_plots.swept(
        pd.concat(
            [accuracies(seeds, ["attention"], "a=1"), accuracies(seeds, ["combined"], "a=1, b=2")]
        )
    ),
    "reliability": lambda seeds: result_plots.reliability_diagram(
        calibration.reliability_by_method(predictions(seeds))
    ),
}


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
def test_figures_render_to_a_small_picture(figure, seeds):
    image = plots.show(figure(seeds))
    assert image.data.startswith(b"\x89PNG") and 3_000 < len(image.data) < 60_000


def test_accuracy_has_a_point_per_trial_and_task_and_the_interval_of_stats():
    table = accuracies(7)
    rows = rows_of(result_plots.accuracy_by_task(table, TEACHER))
    assert len(rows) == len(table) == (len(TRAINED) * 7 + 1) * 3
    mine = [r for r in rows if r["distill_type"] == "attention" and r["task"] == "mmlu"]
    expected = stats.interval([r["percent"] for r in mine])
    assert mine[0]["low"] == pytest.approx(expected["low"]) and mine[0]["high"] == pytest.approx(
        expected["high"]
    )
    black_box = [
        r["percent"] for r in rows if r["distill_type"] == "black_box" and r["task"] == "mmlu"
    ]
    assert mine[0]["baseline"] == pytest.approx(np.mean(black_box))
    assert {r["teacher"] for r in rows} == {90}


def test_one_trial_has_a_mean_in_the_middle_and_no_interval():
    for rows in (
        rows_of(result_plots.accuracy_by_task(accuracies(1))),
        [
            r
            for r in rows_of(result_plots.accuracy_by_task(accuracies(7)))
            if r["distill_type"] == "untrained"
        ],
    ):
        assert all(
            r["low"] is None and r["high"] is None and r["mean"] == pytest.approx(r["percent"])
            for r in rows
        )
        assert {r["slot"] for r in rows} == {0.5}


def test_seeds_stand_in_one_order_in_every_method():
    rows = rows_of(result_plots.accuracy_by_task(accuracies(3, TRAINED)))
    assert {(r["seed"], round(r["slot"], 3)) for r in rows} == {(0, 0.167), (1, 0.5), (2, 0.833)}


def test_no_rule_without_what_it_stands_for():
    with_both = result_plots.accuracy_by_task(accuracies(2), TEACHER).to_dict()["title"]["subtitle"]
    with_none = result_plots.accuracy_by_task(accuracies(2, ["attention"])).to_dict()["title"][
        "subtitle"
    ]
    assert "dashed" in with_both and "dotted" in with_both
    assert "dashed" not in with_none and "dotted" not in with_none


def test_further_settings_get_a_row_of_panels_with_the_references_in_each():
    chart = result_plots.accuracy_by_task(swept_accuracies(2)).to_dict()
    rows = rows_of(result_plots.accuracy_by_task(swept_accuracies(2)))
    assert chart["facet"]["row"]["field"] == "panel_row"
    assert {(r["panel_row"], r["setting"]) for r in rows} == set(enumerate(GAMMAS))
    for setting in GAMMAS:
        mine = [r for r in rows if r["setting"] == setting]
        assert {r["distill_type"] for r in mine} == {"task_only", "black_box", "hidden_state"}
        assert len(mine) == 3 * 2 * 3 and all(r["baseline"] is not None for r in mine)


def test_differences_have_a_point_per_pair_the_interval_given_and_the_margin():
    rows = rows_of(result_plots.differences_from_baseline(*differences(7), margin=0.02))
    assert len(rows) == 3 * 3 * 7 and {r["metric"] for r in rows} == {
        "mean of tasks",
        "all examples",
        "sst2",
    }
    assert {(r["mean"], r["low"], r["high"]) for r in rows} == {(3, 1, 5)}
    assert {(r["margin_low"], r["margin_high"]) for r in rows} == {(-2, 2)}
    assert sorted(r["points"] for r in rows if r["metric"] == "sst2")[-3:] == pytest.approx(
        [6, 6, 6]
    )
    words = [(r["metric"], r["word"]) for r in rows if r["word"]]
    assert words == [("mean of tasks", "better")] * 3


@pytest.mark.parametrize(
    "chart",
    [
        result_plots.accuracy_by_task(accuracies(2, ["attention", "new"])),
        result_plots.differences_from_baseline(*differences(2)),
        curve_plots.learning_curves(curves(2), "validation_loss"),
        result_plots.swept(swept_accuracies(2)),
        result_plots.reliability_diagram(calibration.reliability_by_method(predictions(1))),
    ],
    ids=["accuracy", "differences", "curves", "swept", "reliability"],
)
def test_a_method_has_one_colour_in_every_figure_and_no_two_share_one(chart):
    colours = method_colours(chart.to_dict())
    assert colours.items() >= plots.COLOURS.items() and len(set(colours.values())) == len(colours)


def method_colours(spec) -> dict[str, str]:
    """The first colour scale over `distill_type` in a chart's spec."""
    if isinstance(spec, dict):
        if spec.get("field") == "distill_type" and "range" in spec.get("scale", {}):
            return dict(zip(spec["scale"]["domain"], spec["scale"]["range"], strict=True))
        spec = list(spec.values())
    found = [method_colours(part) for part in spec] if isinstance(spec, list) else []
    return next((colours for colours in found if colours), {})


def test_swept_has_every_trial_at_its_value_and_the_others_as_rules():
    table = pd.concat(
        [swept_accuracies(7), accuracies(7, ["hidden_state"], GAMMAS[0]).assign(task="macro")[::3]]
    )
    rows = rows_of(result_plots.swept(table))
    assert len(rows) == 5 * 7 * 3 + 7 and "mean of tasks" in {r["task"] for r in rows}
    assert {(r["distill_type"], r["at"]) for r in rows if r["reference"] is not None} == {
        ("task_only", "–"),
        ("black_box", "–"),
    }
    [mean] = {
        r["reference"] for r in rows if r["distill_type"] == "black_box" and r["task"] == "mmlu"
    }
    mine = table.query("distill_type == 'black_box' and task == 'mmlu'")["accuracy"]
    assert mean == pytest.approx(100 * mine.mean())
    assert all(0 < r["slot"] < 1 for r in rows)
    # Two stand at the left, side by side; one at each value, in the middle.
    assert {(r["distill_type"], r["centre"]) for r in rows} == {
        ("task_only", 0.25),
        ("black_box", 0.75),
        ("hidden_state", 0.5),
    }


def test_a_trial_that_is_not_done_leaves_no_point():
    table = swept_accuracies(2)
    table.loc[0, "accuracy"] = np.nan
    assert len(rows_of(result_plots.swept(table))) == len(table) - 1


def title(chart) -> str:
    return chart.to_dict()["title"]["text"]


def test_a_figure_without_data_says_why():
    assert "swept only methods and seeds" in title(result_plots.swept(accuracies(2)))
    pairs = comparisons.Answers(*one_method())
    nothing = result_plots.differences_from_baseline(
        comparisons.differences(pairs), comparisons.compare(pairs)
    )
    assert "No pair of trials" in title(nothing)
    untrained = tables.learning_curves([])
    assert "No trained student" in title(curve_plots.learning_curves(untrained, "validation_loss"))
    assert "No trained student" in title(curve_plots.loss_terms(tables.loss_terms(untrained)))
    assert plots.show(nothing).data.startswith(b"\x89PNG")


def one_method() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Results and predictions of a run with one trial."""
    trial = {"trial": "a", "config/distill_type": "attention", "config/seed": 0, "status": "done"}
    prediction = {"trial": "a", "example_id": "e", "task": "sst2", "correct": True}
    return pd.DataFrame([trial]), pd.DataFrame([prediction])


def test_reliability_pools_seeds_and_counts_every_answer():
    table = calibration.reliability_by_method(predictions(7))
    assert list(table) == [
        "task",
        "distill_type",
        "low",
        "high",
        "n",
        "confidence",
        "accuracy",
        "error",
    ]
    assert set(table["task"]) == {"sst2", "mmlu"}
    assert table.groupby(["task", "distill_type"])["n"].sum().eq(7 * 30).all()
    mine = calibration.confidences(predictions(7)).query(
        "task == 'mmlu' and distill_type == 'attention'"
    )
    [error] = table.query("task == 'mmlu' and distill_type == 'attention'")["error"].unique()
    assert error == pytest.approx(
        calibration.expected_calibration_error(mine["confidence"], mine["correct"])
    )
    rows = rows_of(result_plots.reliability_diagram(table))
    assert len(rows) == len(table) and max(r["accuracy"] for r in rows) <= 100
    assert sum(r["error"] is not None for r in rows) == 2 * len(METHODS)


def test_reliability_keeps_settings_apart():
    two = pd.concat([predictions(1, setting="a=1"), predictions(1, setting="a=2")])
    table = calibration.reliability_by_method(two)
    assert set(table["setting"]) == {"a=1", "a=2"}
    assert {r["row"] for r in rows_of(result_plots.reliability_diagram(table))} == {
        "sst2, a=1",
        "sst2, a=2",
        "mmlu, a=1",
        "mmlu, a=2",
    }


def test_no_choices_give_no_bins_and_no_diagram():
    table = calibration.reliability_by_method(predictions(1).query("task == 'gsm8k'"))
    assert table.empty
    assert "No task with choices" in title(result_plots.reliability_diagram(table))
