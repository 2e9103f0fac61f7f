"""Tables over trials: values worked by hand, settings, curves, and what happens when trials are few
or not there.
"""

import numpy as np
import pandas as pd
import pytest

from kd_utils.analysis import tables
from kd_utils.analysis.words import formatting

BLACK_BOX = {0: 0.50, 1: 0.60, 2: 0.70}
ATTENTION = {0: 0.52, 1: 0.60, 2: 0.76}  # differences 0.02, 0.00, 0.06


def results(
    values: dict[str, dict[int, float]], metric: str = "validation_accuracy"
) -> pd.DataFrame:
    """A results table with every trial done."""
    return pd.DataFrame(
        [
            {
                "trial": f"{method}_seed{seed}",
                "config/distill_type": method,
                "config/seed": seed,
                "status": "done",
                metric: value,
            }
            for method, of_seed in values.items()
            for seed, value in of_seed.items()
        ]
    )


def row(table: pd.DataFrame, method: str) -> pd.Series:
    [found] = [r for _, r in table.iterrows() if r["distill_type"] == method]
    return found


def test_failed_and_missing_trials_are_counted_and_never_used():
    table = results({"black_box": BLACK_BOX, "attention": ATTENTION})
    table.loc[table["trial"] == "attention_seed2", "status"] = (
        "failed"  # its value stays there, and must not count
    )
    table.loc[table["trial"] == "black_box_seed0", ["status", "validation_accuracy"]] = [
        "missing",
        np.nan,
    ]
    summary = tables.summary_table(table, "validation_accuracy")
    got = row(summary, "attention")
    assert (got["planned"], got["n"]) == (3, 2) and got["mean"] == pytest.approx(0.56)
    assert (
        tables.coverage(table)
        == "4 of 6 trials are done; 1 failed: attention_seed2; 1 missing: black_box_seed0."
    )


def test_values_that_are_not_finite_are_left_out_of_n():
    got = row(
        tables.summary_table(
            results({"black_box": {0: 1.0, 1: np.inf, 2: np.nan}}, "validation_loss"),
            "validation_loss",
        ),
        "black_box",
    )
    assert (got["planned"], got["n"], got["mean"]) == (3, 1, 1.0)


def test_methods_stand_in_the_projects_order_and_unknown_ones_last():
    assert tables.method_order(["mine", "combined", "black_box", "combined", "task_only"]) == [
        "task_only",
        "black_box",
        "combined",
        "mine",
    ]
    table = results({"mine": {0: 0.1}, "combined": {0: 0.2}, "black_box": {0: 0.3}})
    assert list(tables.summary_table(table, "validation_accuracy")["distill_type"]) == [
        "black_box",
        "combined",
        "mine",
    ]


def test_the_same_trial_twice_is_an_error():
    table = results({"black_box": BLACK_BOX})
    with pytest.raises(ValueError, match="two rows for black_box, seed 0"):
        tables.summary_table(pd.concat([table, table]), "validation_accuracy")


def test_unknown_metric_and_nothing_done_are_errors_that_say_so():
    table = results({"black_box": BLACK_BOX})
    with pytest.raises(ValueError, match="no column 'validation_loss'.*validation_accuracy"):
        tables.summary_table(table, "validation_loss")
    with pytest.raises(ValueError, match="no trial is done.*0 of 3.*3 missing: black_box_seed0"):
        tables.summary_table(table.assign(status="missing"), "validation_accuracy")


def test_per_task_is_a_row_per_trial_and_task():
    table = results({"black_box": BLACK_BOX, "attention": ATTENTION}, "validation_accuracy/sst2")
    table["validation_accuracy/mmlu"] = 0.25
    table["validation_accuracy/macro"] = table["validation_accuracy/gsm8k_flexible"] = 0.9
    table["validation_accuracy/unknown_flexible"] = 0.9
    table.loc[0, "status"] = "failed"
    assert tables.tasks_of(table) == ["sst2", "mmlu"]
    long = tables.per_task(table)
    assert len(long) == 5 * 2 and set(long["task"]) == {"sst2", "mmlu"}
    assert (
        long.query("task == 'sst2' and distill_type == 'attention' and seed == 2")[
            "accuracy"
        ].item()
        == 0.76
    )


def record(
    method: str, seed: int, losses: list[float], swept: dict | None = None, **terms: float
) -> dict:
    epochs = [
        {
            "epoch": number,
            "validation_loss": loss,
            **{f"grad_share/{k}": v for k, v in terms.items()},
        }
        for number, loss in enumerate(losses, 1)
    ]
    return {
        "config": {"distill_type": method, "seed": seed},
        "epochs": epochs,
        "swept": {"distill_type": method, "seed": seed} | (swept or {}),
    }


def test_learning_curves_and_their_spread():
    curves = tables.learning_curves(
        [
            record("black_box", 0, [2.0, 1.0]),
            record("black_box", 1, [4.0, 1.0]),
            record("combined", 0, [3.0, 2.0]),
        ]
    )
    assert (
        list(curves.columns) == ["setting", "distill_type", "seed", "epoch", "validation_loss"]
        and len(curves) == 6
    )
    spread = tables.curve_spread(curves, "validation_loss").set_index(["distill_type", "epoch"])
    first = spread.loc[("black_box", 1)]  # mean 3, sd sqrt(2)
    assert (first["n"], first["mean"]) == (2, 3.0)
    assert (first["low"], first["high"]) == (pytest.approx(3 - 2**0.5), pytest.approx(3 + 2**0.5))
    assert spread.loc[("combined", 1), "mean"] == 3.0 and np.isnan(
        spread.loc[("combined", 1), "low"]
    )
    swept = tables.learning_curves([record("black_box", 0, [1.0], {"temperature": 2.0})])
    assert set(swept["setting"]) == {"temperature=2"}


def test_curves_are_of_held_out_rows_and_in_older_records_of_validation_rows():
    older = tables.learning_curves([record("black_box", 0, [2.0, 1.0])])
    assert tables.while_training(older, "loss") == "validation_loss"
    newer = record("black_box", 0, [2.0, 1.0])
    for row in newer["epochs"]:
        row["held_out_loss"] = row["validation_loss"]
    del newer["epochs"][0]["validation_loss"]
    curves = tables.learning_curves([newer])
    assert tables.while_training(curves, "loss") == "held_out_loss"
    assert tables.curve_spread(curves, "held_out_loss")["mean"].tolist() == [2.0, 1.0]


def test_the_untrained_student_has_no_curve():
    untrained = record("untrained", 0, [1.0])
    untrained["epochs"][0]["epoch"] = 0
    assert set(
        tables.learning_curves([untrained, record("black_box", 0, [1.0])])["distill_type"]
    ) == {"black_box"}
    assert tables.learning_curves([untrained]).empty


def test_loss_terms_have_value_weighted_value_and_share():
    one = record("attention", 0, [1.0], task=0.5, attention=0.1)
    two = record("attention", 1, [1.0], task=0.5, attention=0.3)
    for trial, value in ((one, 0.02), (two, 0.04)):
        trial["epochs"][0] |= {
            "train_loss/task": 1.0,
            "train_loss/attention": value,
            "weight/task": 1.0,
            "weight/attention": 10.0,
        }
    found = tables.loss_terms(
        tables.learning_curves([one, two, record("black_box", 0, [1.0], task=1.0)])
    )
    values = found.set_index(["distill_type", "term", "quantity"])["value"]
    assert values[("attention", "attention", "value")] == pytest.approx(0.03)
    assert values[("attention", "attention", "weighted value")] == pytest.approx(0.3)
    assert values[("attention", "attention", "gradient share")] == pytest.approx(0.2)
    # Older records have no weights and this one no values: its share is there all the same, the
    # rest is left out.
    assert set(found[found["distill_type"] == "black_box"]["quantity"]) == {"gradient share"}
    with pytest.raises(ValueError, match="no column grad_share/TERM"):
        tables.loss_terms(tables.learning_curves([record("black_box", 0, [1.0])]))


def test_gradient_shares_are_those_of_each_settings_last_epoch():
    records = [
        record("black_box", 0, [1.0], {"epochs": 1}, task=0.25, kd=0.75),
        record("black_box", 0, [1.0, 0.5], {"epochs": 2}, task=0.5, kd=0.5),
    ]
    records[1]["epochs"][0]["grad_share/kd"] = 0.0  # of an earlier epoch
    shown = formatting.gradient_shares(tables.loss_terms(tables.learning_curves(records)))
    assert shown["kd"].to_dict() == {("black_box", "epochs=1"): 75, ("black_box", "epochs=2"): 50}


def test_a_method_that_does_not_use_a_swept_key_has_no_setting():
    table = pd.concat(
        [
            results({"black_box": {0: 0.5}}),
            *(
                results({"attention": {0: 0.6}}).assign(**{"config/gamma_attention": gamma})
                for gamma in (1.0, 10.0)
            ),
        ]
    )
    summary = tables.summary_table(table, "validation_accuracy")
    assert summary[["distill_type", "setting"]].values.tolist() == [
        ["black_box", ""],
        ["attention", "gamma_attention=1"],
        ["attention", "gamma_attention=10"],
    ]
    assert formatting.summary(summary).index.names == ["metric", "setting", "method"]


def test_glance_has_every_method_and_the_teacher_in_per_cent():
    table = results({"black_box": BLACK_BOX, "untrained": {0: 0.25}})
    for column in ("validation_accuracy/macro", "validation_accuracy/sst2"):
        table[column] = table["validation_accuracy"]
    shown = formatting.glance(
        table,
        {
            "validation_accuracy": 0.9,
            "validation_accuracy/macro": 0.9,
            "validation_accuracy/sst2": 0.987,
        },
    )
    assert shown.index.tolist() == ["untrained", "black_box", "teacher"]
    assert shown.loc["black_box"].to_dict() == {
        "n": "3 of 3",
        "mean of tasks": "60.0 ± 10.0",
        "all examples": "60.0 ± 10.0",
        "sst2": "60.0 ± 10.0",
    }
    assert shown.loc["untrained", "sst2"] == "25.0" and shown.loc["teacher", "sst2"] == "98.7"
    swept = pd.concat([table.assign(**{"config/temperature": t}) for t in (1.0, 4.0)])
    assert formatting.glance(swept, {}).loc[("", "teacher"), "sst2"] == "–"


def test_trials_that_do_not_use_a_key_stand_beside_each_of_its_values():
    table = pd.DataFrame(
        {"setting": ["", "a=1", "a=2", "b=5", "a=1, b=5", "a=2, b=5"], "trial": range(6)}
    )
    spread = tables.beside_each_setting(table)
    assert spread.groupby("setting")["trial"].apply(list).to_dict() == {
        "a=1, b=5": [0, 1, 3, 4],
        "a=2, b=5": [0, 2, 3, 5],
    }
    alone = table[table["setting"] == ""]
    assert tables.beside_each_setting(alone).equals(alone)
