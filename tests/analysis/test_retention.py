"""Retention: above chance, relative to the teacher, and silent where the teacher knows nothing."""

import numpy as np
import pandas as pd
import pytest

from kd_utils.analysis import tables
from kd_utils.analysis.retention import retention, uninformed_tasks, with_informed
from kd_utils.analysis.words import formatting

ROWS = {"sst2": 200, "mmlu": 80, "gsm8k": 30}


def results(**accuracies: list[float]) -> pd.DataFrame:
    n = len(next(iter(accuracies.values())))
    return pd.DataFrame(
        [
            {
                "trial": f"black_box_seed{s}",
                "config/distill_type": "black_box",
                "config/seed": s,
                "status": "done",
                **{f"validation_accuracy/{task}": values[s] for task, values in accuracies.items()},
            }
            for s in range(n)
        ]
    )


def teacher(**accuracies: float) -> dict[str, float]:
    return {f"validation_accuracy/{task}": value for task, value in accuracies.items()}


def test_by_hand_with_its_interval():
    table = retention(
        results(sst2=[0.7, 0.8], gsm8k=[0.2, 0.2]), teacher(sst2=0.9, gsm8k=0.4)
    ).set_index("task")
    assert table.loc["sst2", "retention"] == pytest.approx((0.75 - 0.5) / 0.4)
    assert table.loc["gsm8k", "retention"] == pytest.approx(0.5) == table.loc["gsm8k", "low"]
    # mean 0.75, half = 12.7062 * 0.0707107 / sqrt(2), over 0.4
    assert table.loc["sst2", "high"] == pytest.approx((0.25 + 12.7062 * 0.05) / 0.4, rel=1e-4)
    assert formatting.retention(table.reset_index()).columns.tolist() == [
        "sst2 (teacher 90.0, chance 50)",
        "gsm8k (teacher 40.0, chance 0)",
    ]


def test_a_student_below_chance_retains_less_than_nothing():
    table = retention(results(sst2=[0.4]), teacher(sst2=0.9))
    assert table["retention"].item() == pytest.approx(-0.25)


@pytest.mark.parametrize("task, accuracy", [("mmlu", 0.2875), ("sst2", 0.53), ("gsm8k", 1 / 30)])
def test_a_teacher_at_chance_has_nothing_to_retain(task, accuracy):
    known = teacher(**{task: accuracy})
    table = retention(results(**{task: [0.9, 0.9]}), known, uninformed_tasks(known, ROWS))
    assert np.isnan(table["retention"].item()) and formatting.retention(table).iloc[0, 0] == "–"


def test_a_task_that_is_not_known_is_shown_and_its_retention_is_not():
    table = retention(results(sst2=[0.7, 0.8], riddles=[0.4, 0.5]), teacher(sst2=0.9, riddles=0.6))
    assert table["task"].tolist() == ["sst2", "riddles"]
    assert table[["chance", "retention"]].iloc[1].isna().all() and table["teacher"][1] == 0.6
    shown = formatting.retention(table).iloc[0]
    assert shown["riddles (teacher 60.0, chance not known)"] == "not known"
    assert shown["sst2 (teacher 90.0, chance 50)"].startswith("62 [")


def test_a_task_that_the_teacher_did_not_answer_has_no_retention():
    shown = formatting.retention(retention(results(sst2=[0.7], mmlu=[0.5]), teacher(sst2=0.9)))
    assert shown["mmlu (teacher not known, chance 25)"].tolist() == ["not known"]


def test_the_tasks_on_which_the_teacher_has_nothing_to_hand_on():
    known = teacher(sst2=0.9, mmlu=0.2875, gsm8k=1 / 30)
    assert uninformed_tasks(known, ROWS) == ["mmlu", "gsm8k"]
    # What is not known is not said to be nothing.
    assert uninformed_tasks(teacher(sst2=0.9), ROWS | {"riddles": 9}) == []


@pytest.mark.parametrize("on_validation", [0.25, 0.9])
def test_held_out_rows_decide_what_a_teacher_knows_and_no_validation_row(on_validation):
    known = teacher(sst2=on_validation, mmlu=on_validation)
    known |= {"held_out_accuracy/sst2": 0.9, "held_out_rows/sst2": 20.0}
    known |= {"held_out_accuracy/mmlu": 0.3, "held_out_rows/mmlu": 20.0}
    assert uninformed_tasks(known, ROWS) == ["mmlu"]
    # 30 % of 400 rows are more than a quarter, of 20 rows they may be chance.
    assert uninformed_tasks(known | {"held_out_rows/mmlu": 400.0}, ROWS) == []


def test_their_mean_is_left_to_the_others_and_is_no_task():
    table = with_informed(results(sst2=[0.7], mmlu=[0.5], gsm8k=[0.1]), ["sst2", "gsm8k"])
    assert table["validation_accuracy/informed"].tolist() == pytest.approx([0.4])
    assert tables.tasks_of(table) == ["sst2", "mmlu", "gsm8k"]
    both = with_informed(teacher(sst2=0.9, gsm8k=0.5), ["sst2", "gsm8k"])
    assert both["validation_accuracy/informed"] == pytest.approx(0.7)
    assert "mean of informed tasks" in formatting.glance(table, both)
    assert with_informed(table, []) is table
