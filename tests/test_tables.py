"""Tables over trials: values worked by hand, pairing by seed, and what happens when trials are few or not there."""

import numpy as np
import pandas as pd
import pytest

from kd_utils import stats

BLACK_BOX = {0: 0.50, 1: 0.60, 2: 0.70}
ATTENTION = {0: 0.52, 1: 0.60, 2: 0.76}  # differences 0.02, 0.00, 0.06


def results(values: dict[str, dict[int, float]], metric: str = "validation_accuracy") -> pd.DataFrame:
    """A results table with every trial done."""
    return pd.DataFrame([{"trial": f"{method}_seed{seed}", "config/distill_type": method, "config/seed": seed,
                          "status": "done", metric: value}
                         for method, of_seed in values.items() for seed, value in of_seed.items()])


def row(table: pd.DataFrame, method: str) -> pd.Series:
    [found] = [r for _, r in table.iterrows() if r["distill_type"] == method]
    return found


def test_interval_worked_by_hand():
    # sd = sqrt(5 / 3); half = t(0.975, 3) sd / sqrt(4) = 3.182446 * 1.290994 / 2
    got = stats.interval([1, 2, 3, 4])
    assert got["n"] == 4 and got["mean"] == 2.5
    assert got["sd"] == pytest.approx(1.290994, abs=1e-6)
    assert (got["low"], got["high"]) == (pytest.approx(0.445739, abs=1e-5), pytest.approx(4.554261, abs=1e-5))


def test_interval_of_one_value_has_no_spread_and_of_none_no_mean():
    one, none = stats.interval([0.7]), stats.interval([np.nan])
    assert one["n"] == 1 and one["mean"] == 0.7 and np.isnan([one["sd"], one["low"], one["high"]]).all()
    assert none["n"] == 0 and np.isnan(none["mean"])


def test_interval_of_equal_values_has_no_width():
    got = stats.interval([0.5, 0.5, 0.5])
    assert got["sd"] == 0 and got["low"] == got["high"] == 0.5


def test_differences_pair_by_seed_and_not_by_position():
    shuffled = results({"attention": ATTENTION, "black_box": BLACK_BOX}).sample(frac=1, random_state=1)
    got = row(stats.summary_table(shuffled, "validation_accuracy"), "attention")
    # mean 0.08 / 3, sd 0.0305505, half = t(0.975, 2) sd / sqrt(3) = 4.302653 * 0.0305505 / 1.732051
    assert got["pairs"] == 3 and got["unpaired"] == 0
    assert got["difference"] == pytest.approx(0.0266667, abs=1e-6)
    assert got["difference_sd"] == pytest.approx(0.0305505, abs=1e-6)
    assert got["difference_low"] == pytest.approx(0.0266667 - 0.0758914, abs=1e-6)
    assert got["difference_high"] == pytest.approx(0.0266667 + 0.0758914, abs=1e-6)


def test_baselines_own_row_has_no_difference():
    got = row(stats.summary_table(results({"black_box": BLACK_BOX, "attention": ATTENTION}), "validation_accuracy"),
              "black_box")
    assert got["mean"] == pytest.approx(0.6) and got["sd"] == pytest.approx(0.1)
    assert np.isnan(got["difference"]) and got["pairs"] == 0 and got["unpaired"] == 0


def test_failed_and_missing_trials_are_counted_and_never_used():
    table = results({"black_box": BLACK_BOX, "attention": ATTENTION})
    table.loc[table["trial"] == "attention_seed2", "status"] = "failed"  # its value stays there, and must not count
    table.loc[table["trial"] == "black_box_seed0", ["status", "validation_accuracy"]] = ["missing", np.nan]
    summary = stats.summary_table(table, "validation_accuracy")
    got = row(summary, "attention")
    assert (got["planned"], got["n"], got["pairs"], got["unpaired"]) == (3, 2, 1, 2)
    assert got["mean"] == pytest.approx(0.56) and got["difference"] == pytest.approx(0.0)
    assert np.isnan([got["difference_sd"], got["difference_low"], got["difference_high"]]).all()
    assert stats.coverage(table) == "4 of 6 trials are done; 1 failed: attention_seed2; 1 missing: black_box_seed0."
    [line] = stats.reading(summary)
    assert line.endswith("over 1 paired seed, which gives no interval; 2 unpaired left out.")


def test_values_that_are_not_finite_are_left_out_of_n():
    got = row(stats.summary_table(results({"black_box": {0: 1.0, 1: np.inf, 2: np.nan}}, "validation_loss"),
                                  "validation_loss"), "black_box")
    assert (got["planned"], got["n"], got["mean"]) == (3, 1, 1.0)


def test_without_a_baseline_there_is_no_difference():
    summary = stats.summary_table(results({"attention": ATTENTION}), "validation_accuracy")
    assert row(summary, "attention")["pairs"] == 0
    assert stats.reading(summary) == ["validation_accuracy: attention minus black_box: no seed has both trials; "
                                      "3 unpaired left out."]


def test_methods_stand_in_the_projects_order_and_unknown_ones_last():
    assert stats.method_order(["task_only", "combined", "black_box", "combined", "attention"]) == [
        "black_box", "attention", "combined", "task_only"]
    table = results({"task_only": {0: 0.1}, "combined": {0: 0.2}, "black_box": {0: 0.3}})
    assert list(stats.summary_table(table, "validation_accuracy")["distill_type"]) == [
        "black_box", "combined", "task_only"]


def test_other_swept_keys_are_settings_and_pair_within_themselves():
    cold = results({"black_box": {0: 0.5, 1: 0.5}, "attention": {0: 0.6, 1: 0.6}}).assign(**{"config/temperature": 1.0})
    hot = results({"black_box": {0: 0.1, 1: 0.1}, "attention": {0: 0.4, 1: 0.4}}).assign(**{"config/temperature": 4})
    summary = stats.summary_table(pd.concat([cold, hot]), "validation_accuracy")
    attention = summary[summary["distill_type"] == "attention"].set_index("setting")["difference"]
    assert attention.to_dict() == {"temperature=1": pytest.approx(0.1), "temperature=4": pytest.approx(0.3)}
    assert stats.display_table(summary).index.names == ["metric", "setting", "method"]


def test_the_same_trial_twice_is_an_error():
    table = results({"black_box": BLACK_BOX})
    with pytest.raises(ValueError, match="two rows for black_box, seed 0"):
        stats.summary_table(pd.concat([table, table]), "validation_accuracy")


def test_unknown_metric_and_nothing_done_are_errors_that_say_so():
    table = results({"black_box": BLACK_BOX})
    with pytest.raises(ValueError, match="no column 'validation_loss'.*validation_accuracy"):
        stats.summary_table(table, "validation_loss")
    with pytest.raises(ValueError, match="no trial is done.*0 of 3.*3 missing: black_box_seed0"):
        stats.summary_table(table.assign(status="missing"), "validation_accuracy")


def test_per_task_is_a_row_per_trial_and_task():
    table = results({"black_box": BLACK_BOX, "attention": ATTENTION}, "validation_accuracy/sst2")
    table["validation_accuracy/mmlu"] = 0.25
    table["validation_accuracy/macro"] = table["validation_accuracy/gsm8k_flexible"] = 0.9
    table.loc[0, "status"] = "failed"
    assert stats.tasks_of(table) == ["sst2", "mmlu"]
    long = stats.per_task(table)
    assert len(long) == 5 * 2 and set(long["task"]) == {"sst2", "mmlu"}
    assert long.query("task == 'sst2' and distill_type == 'attention' and seed == 2")["accuracy"].item() == 0.76


def record(method: str, seed: int, losses: list[float], **share: float) -> dict:
    epochs = [{"epoch": number, "validation_loss": loss, **{f"grad_share/{k}": v for k, v in share.items()}}
              for number, loss in enumerate(losses, 1)]
    return {"config": {"distill_type": method, "seed": seed, "temperature": 2.0}, "epochs": epochs}


def test_learning_curves_and_their_spread():
    curves = stats.learning_curves([record("black_box", 0, [2.0, 1.0]), record("black_box", 1, [4.0, 1.0]),
                                    record("combined", 0, [3.0, 2.0])])
    assert list(curves.columns) == ["setting", "distill_type", "seed", "epoch", "validation_loss"] and len(curves) == 6
    spread = stats.curve_spread(curves, "validation_loss").set_index(["distill_type", "epoch"])
    first = spread.loc[("black_box", 1)]  # mean 3, sd sqrt(2)
    assert (first["n"], first["mean"]) == (2, 3.0)
    assert (first["low"], first["high"]) == (pytest.approx(3 - 2**0.5), pytest.approx(3 + 2**0.5))
    assert spread.loc[("combined", 1), "mean"] == 3.0 and np.isnan(spread.loc[("combined", 1), "low"])
    assert set(stats.learning_curves([record("black_box", 0, [1.0])], ["temperature"])["setting"]) == {"temperature=2"}
    with pytest.raises(ValueError, match="no trial has an epoch"):
        stats.learning_curves([])


def test_gradient_shares_are_means_over_seeds_of_the_terms_a_method_has():
    curves = stats.learning_curves([record("black_box", 0, [1.0], task=0.6, kd=0.4),
                                    record("attention", 0, [1.0], task=0.5, kd=0.4, attention=0.1),
                                    record("attention", 1, [1.0], task=0.5, kd=0.2, attention=0.3)])
    shares = stats.gradient_shares(curves).set_index(["distill_type", "term"])["share"]
    assert shares[("attention", "attention")] == pytest.approx(0.2)
    assert ("black_box", "attention") not in shares.index


def test_reading_and_display_table_show_points_and_nats():
    accuracy = stats.summary_table(results({"black_box": BLACK_BOX, "attention": ATTENTION}), "validation_accuracy")
    assert stats.reading(accuracy) == ["validation_accuracy: attention minus black_box: +2.7 points [-4.9, +10.3] over "
                                       "3 paired seeds."]
    shown = stats.display_table(accuracy).loc[("validation_accuracy", "attention")]
    assert (shown["n"], shown["mean"], shown["minus black box"]) == ("3 of 3", "62.7", "+2.7")
    loss = stats.summary_table(results({"black_box": {0: 1.0}, "attention": {0: 0.5}}, "validation_loss"),
                               "validation_loss")
    assert "-0.500 nats per token over 1 paired seed, which gives no interval" in stats.reading(loss)[0]
    assert stats.display_table(loss).loc[("validation_loss", "attention"), "sd"] == "–"


def test_gap_to_the_teacher_for_the_metrics_it_has():
    summary = stats.summary_table(results({"black_box": BLACK_BOX}), "validation_accuracy")
    got = stats.against_teacher(summary, {"validation_accuracy": 0.9, "validation_accuracy/sst2": 1.0})
    assert len(got) == 1 and got["gap"].item() == pytest.approx(-0.3)
    assert stats.against_teacher(summary, {}).empty


def make_run(runs, name: str) -> None:
    folder = runs / name / "trials" / "black_box_seed0"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")


def test_find_run_prefers_the_sweeps_own_folder_then_the_latest_record(tmp_path):
    (tmp_path / "toy" / "trials" / ".black_box_seed0.partial-1").mkdir(parents=True)
    (tmp_path / "toy" / "trials" / ".black_box_seed0.partial-1" / "metrics.json").write_text("{}")
    for name in ("2025-01-02-toy", "2024-12-31-toy", "2025-09-09-smol", "not-a-toy"):
        make_run(tmp_path, name)
    assert stats.find_run("toy", runs=tmp_path).name == "2025-01-02-toy"  # toy/ has no whole trial yet
    make_run(tmp_path, "toy")
    assert stats.find_run("toy", runs=tmp_path).name == "toy"
    assert stats.find_run("toy", str(tmp_path / "not-a-toy"), tmp_path).name == "not-a-toy"
    with pytest.raises(FileNotFoundError, match="no run of 'llama2'.*2025-09-09-smol.*sweep it"):
        stats.find_run("llama2", runs=tmp_path)
    with pytest.raises(FileNotFoundError, match="no run folder nowhere.*2025-09-09-smol"):
        stats.find_run("toy", "nowhere", tmp_path)
