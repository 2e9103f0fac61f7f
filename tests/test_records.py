"""Records: whole or not there, found when damaged, and read back as tables."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kd_utils import records
from kd_utils.environment import environment
from kd_utils.records import RecordError
from kd_utils.sealed import write_sealed

PREDICTIONS = pd.DataFrame({"example_id": ["a", "b"], "task": ["sst2", "gsm8k"], "correct": [True, False],
                            "loglikelihoods": [[-1.5, -0.25], None], "generated": [None, "It is 4.\n#### 4"]})


def metrics_of(method="attention", seed=3, accuracy=0.5, config_hash="c" * 16, cache="k" * 64):
    epochs = [{"epoch": e, "train_loss": 1 / e, "validation_accuracy": accuracy, "validation_loss": 2.0, "seconds": 9.0}
              for e in (1, 2)]
    return {"config": {"distill_type": method, "seed": seed}, "config_hash": config_hash, "epochs": epochs,
            "cache": {"name": "toy-2026-01-01-00000000", "content_hash": cache}, **environment(),
            "started": "2026-01-01T00:00:00+00:00", "seconds": {"total": 21.5}, "peak_memory_mb": 300.0,
            "final": epochs[-1]}


def write_notebook(path: Path, about: dict, outputs=(), execution_count=1):
    cells = [{"cell_type": "markdown", "source": "# Title", "metadata": {}},
             {"cell_type": "code", "source": "", "metadata": {}, "outputs": [], "execution_count": None},
             {"cell_type": "code", "source": ["1 + 1"], "metadata": {}, "outputs": list(outputs),
              "execution_count": execution_count}]
    notebook = {"cells": cells, "metadata": {"kd_utils": about}, "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, notebook, "metadata.kd_utils")


def write_trial(run_dir: Path, method="attention", seed=3, **values) -> str:
    trial = records.trial_name(method, seed)
    records.write_record(run_dir / "trials" / trial, metrics_of(method, seed, **values), PREDICTIONS)
    record = records.read_record(run_dir / "trials" / trial)
    write_notebook(run_dir / "trials" / f"{trial}.ipynb",
                   {"config_hash": record["config_hash"], "record": record["checksums"]["sha256"]})
    return trial


@pytest.fixture
def run_dir(tmp_path):
    """A whole run of 2 methods x 2 seeds."""
    planned = []
    for method in ("black_box", "attention"):
        for seed in (0, 1):
            trial = write_trial(tmp_path, method, seed, accuracy=0.25 + seed / 2)
            planned.append({"trial": trial, "swept": {"distill_type": method, "seed": seed}, "config_hash": "c" * 16})
    for stage in records.STAGES:
        write_notebook(tmp_path / f"{stage}.ipynb", {})
    plan = {"format": 1, "cache": {"name": "n", "content_hash": "k" * 64}, "trials": planned}
    write_sealed(tmp_path / records.PLAN, plan, "checksums")
    records.collect(tmp_path).to_csv(tmp_path / records.SUMMARY, index=False)
    return tmp_path


def test_trial_names():
    assert records.trial_name("attention", 3) == "attention_seed3"
    assert records.trial_name("attention", 3, temperature=4, alpha=0.5) == "attention_seed3_alpha=0.5_temperature=4"
    assert records.trial_name("combined", 0, student="../a b") == "combined_seed0_student=..-a-b"


def test_report_epoch_writes_lines_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("KD_PROGRESS", raising=False)
    records.report_epoch({"epoch": 1})
    monkeypatch.setenv("KD_PROGRESS", str(tmp_path / "p.jsonl"))
    records.report_epoch({"epoch": 1, "loss": np.float32(0.5)})
    records.report_epoch({"epoch": 2, "loss": float("nan")})
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": None}]
    assert "NaN" not in lines[1]


def test_trials_that_started_or_rounded_otherwise_are_named(tmp_path, monkeypatch):
    alike = [{"student": {"fingerprint": "a"}, "precision": "torch.float32"}] * 2
    monkeypatch.setattr(records, "done_records", lambda run_dir: alike)
    assert records._check_alike(tmp_path) == []
    other = [*alike, {"student": {"fingerprint": "b"}, "precision": "torch.bfloat16"}]
    monkeypatch.setattr(records, "done_records", lambda run_dir: other)
    assert [problem.split(":")[0] for problem in records._check_alike(tmp_path)] == [
        "trials differ in student", "trials differ in precision"]


def test_a_record_reads_back_as_written(tmp_path):
    records.write_record(tmp_path / "t", metrics_of(accuracy=np.float32(0.75)), PREDICTIONS)
    metrics = records.read_record(tmp_path / "t")
    assert metrics["format"] == 1 and metrics["final"]["validation_accuracy"] == 0.75
    assert set(metrics["checksums"]) == {"predictions.parquet", "sha256"}
    read = pd.read_parquet(tmp_path / "t" / "predictions.parquet")
    assert read["loglikelihoods"][0].tolist() == [-1.5, -0.25] and read["generated"][1] == "It is 4.\n#### 4"
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_new_record_replaces_the_old_one(tmp_path):
    records.write_record(tmp_path / "t", metrics_of(accuracy=0.1), PREDICTIONS)
    records.write_record(tmp_path / "t", metrics_of(accuracy=0.2), PREDICTIONS)
    assert records.read_record(tmp_path / "t")["final"]["validation_accuracy"] == 0.2
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan")])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, bad):
    records.write_record(tmp_path / "t", metrics_of(accuracy=0.1), PREDICTIONS)
    with pytest.raises(RecordError, match=r"epochs\[0\]: validation_accuracy is (nan|inf)"):
        records.write_record(tmp_path / "t", metrics_of(accuracy=bad), PREDICTIONS)
    assert records.read_record(tmp_path / "t")["final"]["validation_accuracy"] == 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_an_incomplete_record_is_refused(tmp_path):
    metrics = metrics_of()
    del metrics["cache"]
    with pytest.raises(RecordError, match="no cache"):
        records.write_record(tmp_path / "t", metrics, PREDICTIONS)
    with pytest.raises(RecordError, match="no predictions"):
        records.write_record(tmp_path / "t", metrics_of(), PREDICTIONS[:0])
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    records.write_record(tmp_path / "t", metrics_of(accuracy=0.1), PREDICTIONS)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="No space"):
        records.write_record(tmp_path / "t", metrics_of(accuracy=0.2), PREDICTIONS)
    assert records.read_record(tmp_path / "t")["final"]["validation_accuracy"] == 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("name", ["trials/attention_seed0/metrics.json", "trials/attention_seed0/predictions.parquet",
                                  "trials/attention_seed0.ipynb", "sweep.json", "results_summary.csv",
                                  "01_prepare_data.ipynb", "04_analyse_results.ipynb"])
def test_any_changed_byte_is_found(run_dir, name):
    path = run_dir / name
    whole = path.read_bytes()
    # 25 places over the file, each with another bit
    for number, at in enumerate(np.linspace(0, len(whole) - 1, 25).astype(int)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << number % 8)]) + whole[at + 1:])
        assert any(Path(name).name.split(".")[0] in line or "attention_seed0" in line
                   for line in records.check_run(run_dir)), f"byte {at} of {name}"
    for damaged in (whole[:-1], whole + b" ", b"", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert records.check_run(run_dir)
    path.unlink()
    assert any("missing" in line or "No such file" in line for line in records.check_run(run_dir))
    path.write_bytes(whole)
    assert records.check_run(run_dir) == []


def test_a_whole_run_has_no_problems(run_dir):
    assert records.check_run(run_dir) == []
    assert records.count_done(run_dir) == (4, 4)


def test_check_names_what_is_wrong(run_dir):
    write_trial(run_dir, "combined", 0)
    (run_dir / "trials" / "black_box_seed0.ipynb").unlink()
    write_notebook(run_dir / "02_cache_teacher.ipynb", {}, execution_count=None)
    write_notebook(run_dir / "04_analyse_results.ipynb", {},
                   outputs=[{"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []}])
    assert records.check_run(run_dir) == [
        "black_box_seed0: broken: black_box_seed0.ipynb: No such file or directory",
        "02_cache_teacher.ipynb: cell 3 was not run",
        "04_analyse_results.ipynb: cell 3 ended with KeyError: 'x'",
        "trials/combined_seed0 belongs to no planned trial",
        "trials/combined_seed0.ipynb belongs to no planned trial",
        "results_summary.csv does not say what the records say: run the sweep again to write it anew"]


def test_check_of_other_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        records.check_run(tmp_path / "none")
    assert "sweep.json is missing" in records.check_run(tmp_path)[0]


def test_status_says_why_a_trial_is_not_done(run_dir):
    trials = run_dir / "trials"

    def status(config_hash="c" * 16, cache_hash=None, trial="attention_seed0"):
        return records.trial_status(run_dir, trial, config_hash, cache_hash)

    assert status() == ("done", "") == status(cache_hash="k" * 64)
    assert status("d" * 16) == ("stale", f"config changed: the record has {'c' * 16}, the plan {'d' * 16}")
    assert status(cache_hash="l" * 64).why.startswith("teacher cache changed")
    assert status(trial="combined_seed9") == ("missing", "")
    old = trials / "attention_seed0.ipynb"
    (trials / "attention_seed1.ipynb").replace(old)
    assert status() == ("stale", "the notebook is of another execution than metrics.json")
    write_notebook(trials / "attention_seed0.failed.ipynb", {"failure": "ValueError: loss is nan"})
    assert status() == ("failed", "ValueError: loss is nan")
    (trials / "attention_seed0.failed.ipynb").write_text("{}")
    assert status() == ("failed", "attention_seed0.failed.ipynb does not say why")


def test_collect_has_a_row_per_planned_trial(run_dir):
    (run_dir / "trials" / "black_box_seed1" / "predictions.parquet").unlink()
    write_notebook(run_dir / "trials" / "black_box_seed1.failed.ipynb", {"failure": "KeyError: 1"})
    table = records.collect(run_dir)
    assert table.columns.tolist() == [
        "trial", "config/distill_type", "config/seed", "status", "why", "epoch", "train_loss", "validation_accuracy",
        "validation_loss", "seconds", "peak_memory_mb", "config_hash"]
    assert table["status"].tolist() == ["done", "failed", "done", "done"]
    assert table["seconds"].tolist()[0] == 21.5, "of the whole trial, not of its last epoch"
    assert np.isnan(table["validation_accuracy"][1])
    means = table.groupby("config/distill_type")["validation_accuracy"].agg(["mean", "count"])
    assert means.loc["attention"].tolist() == [0.5, 2] and means.loc["black_box"].tolist() == [0.25, 1]


def test_a_stale_trial_gives_no_value(run_dir):
    write_trial(run_dir, "attention", 1, cache="other", accuracy=0.99)
    row = records.collect(run_dir).set_index("trial").loc["attention_seed1"]
    assert row["status"] == "stale" and np.isnan(row["validation_accuracy"])
    assert 0.99 not in [r["final"]["validation_accuracy"] for r in records.done_records(run_dir)]


def test_collect_without_a_plan_reads_what_is_there(tmp_path):
    assert len(records.collect(tmp_path)) == 0
    records.write_record(tmp_path / "trials" / "attention_seed3", metrics_of(), PREDICTIONS)
    table = records.collect(tmp_path)
    assert table[["trial", "config/distill_type", "config/seed", "status"]].values.tolist() == [
        ["attention_seed3", "attention", 3, "done"]]
    (tmp_path / "trials" / "attention_seed3" / "predictions.parquet").write_bytes(b"")
    assert records.collect(tmp_path)["status"].tolist() == ["broken"]


def test_predictions_of_all_trials_in_one_table(run_dir):
    table = records.predictions(run_dir)
    assert table.columns.tolist()[:4] == ["trial", "distill_type", "seed", "example_id"]
    assert len(table) == 8 and table.groupby(["distill_type", "seed"]).size().tolist() == [2] * 4
    with pytest.raises(RecordError, match="no trial of none is done"):
        records.predictions(run_dir / "none")
