"""The sweep: its command line, and one real run through Ray and papermill over stub notebooks."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from stubs import stub_project, sweep_in, write_plan

from kd_utils.__main__ import main
from kd_utils.records import run_folder
from kd_utils.sweep.display import Progress


def test_dry_run_writes_nothing_and_names_the_trials(stub_notebooks, monkeypatch, capsys):
    monkeypatch.chdir(stub_notebooks)  # a checkout that ran the toy has its models
    (stub_notebooks / "p.yaml").write_text("epochs: 1\nbuild: toy\n")
    before = sorted(stub_notebooks.rglob("*"))
    assert main(["sweep", str(stub_notebooks / "p.yaml"), "--only", "seed=6", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "combined_seed6                   missing" in shown
    assert (
        "question white_box: comparisons 3, pairs each 1, smallest possible corrected p 1.000: "
        "CANNOT be significant, add seeds" in shown
    )
    assert "0 of 9 trials are done, 9 to run; records: runs/stub" in shown
    assert "is not on this machine (01 makes what `build: toy` needs)" in shown
    assert sorted(stub_notebooks.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "nowhere.yaml"], "no parameter file nowhere.yaml"),
        (["sweep", "p.yaml", "--grid", "nowhere.yaml"], "no grid file nowhere.yaml"),
        (["sweep", "p.yaml", "--only", "seed=77"], "seed=77 is not in the grid"),
        (["sweep"], "Missing argument 'PARAMS.yaml'"),
        (["sweep", "p.yaml", "--cpus-per-trial", "x"], "Invalid value for '--cpus-per-trial'"),
        (["swep", "p.yaml"], "No such command 'swep'. Did you mean 'sweep'?"),
        ([], "Missing command"),
        (["check", "nowhere"], "no run folder nowhere"),
        (["verify", "nowhere"], "no cache folder nowhere"),
        (
            ["evaluate", "nowhere", "--task", "sst2", "--split", "s", "--out", "o.parquet"],
            "nowhere",
        ),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    stub_notebooks, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(stub_notebooks)
    Path("p.yaml").write_text("")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_names_every_command_and_its_options(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("sweep", "bench", "evaluate", "verify", "check"))
    assert main(["sweep", "--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out


def test_a_run_folder_in_home_is_there_and_not_called_tilde(stub_notebooks, monkeypatch, capsys):
    (stub_notebooks / "p.yaml").write_text("epochs: 1\n")
    monkeypatch.setenv("HOME", str(stub_notebooks / "home"))
    assert main(["sweep", str(stub_notebooks / "p.yaml"), "--run-dir=~/toy", "--dry-run"]) == 0
    assert "records: home/toy\n" in capsys.readouterr().out


def test_a_folder_of_another_experiment_is_not_swept_over(stub_notebooks, capsys):
    (stub_notebooks / "p.yaml").write_text("epochs: 1\n")
    write_plan(stub_notebooks / "runs" / "stub", name="other")
    for more in ((), ("--dry-run",)):
        assert main(["sweep", str(stub_notebooks / "p.yaml"), *more]) == 2
        error = capsys.readouterr().err
        assert (
            "runs/stub holds experiment 'other', but this sweep is of 'stub': give another --run-dir"
            in error
        )


def test_the_command_line_answers_at_once():
    heavy = "('torch', 'ray', 'pandas', 'papermill')"
    code = f"import sys, kd_utils.__main__; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    ).stdout
    assert shown.strip() == "[]"


def test_progress_counts_and_tells_the_time_left(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress({"a": 3, "b": 3, "c": 3}, already=5)
    assert progress.summary() == "5 of 8 done, 0 running, 0 failed, 3 waiting"
    progress.reported("a", {})  # began at 10
    progress.reported("b", {})
    progress.running["a"] = {"epoch": 2}
    seconds = (20 - 10) * 7 / 2
    assert progress.summary().endswith(
        f"2 running, 0 failed, 1 waiting, about 0:00:{seconds:.0f} left"
    )
    progress.finished("a")
    progress.broke("b", "why")
    assert progress.summary().startswith("6 of 8 done, 0 running, 1 failed, 1 waiting, about ")


def test_a_sweep_through_ray_and_papermill_and_again(tmp_path):
    stub_project(tmp_path)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"teacher": "other", "epochs": 3}))
    (tmp_path / "grid.yaml").write_text(
        yaml.safe_dump({"distill_type": ["black_box", "attention"], "seed": [3]})
    )
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "fail-attention_seed3").touch()
    executed, run_dir = tmp_path / "artifacts" / "executed.txt", tmp_path / "runs" / "stub"
    command = ["sweep", "p.yaml", "--grid", "grid.yaml"]

    first = sweep_in(tmp_path, *command)
    assert first.returncode == 1, first.stderr
    assert "attention_seed3: FAILED: FloatingPointError: the loss is not finite" in first.stderr
    assert "epoch 3/3, validation accuracy 53.0 %" in first.stderr
    assert "1 of 2 trials are done; 1 failed: attention_seed3" in first.stdout
    assert "Traceback" in (run_dir / "trials" / "attention_seed3.failed.ipynb").read_text()
    summary = pd.read_csv(run_dir / "results_summary.csv").set_index("trial")
    assert summary["status"].to_dict() == {"black_box_seed3": "done", "attention_seed3": "failed"}
    assert summary.loc["black_box_seed3", "validation_accuracy"] == 0.53
    assert summary.loc["attention_seed3", "why"] == "FloatingPointError: the loss is not finite"
    assert sorted(executed.read_text().splitlines()) == ["attention_seed3 1", "black_box_seed3 1"]
    checked = sweep_in(tmp_path, "check", "runs/stub")
    assert checked.returncode == 1 and "1 of 2 trials whole" in checked.stdout

    (tmp_path / "artifacts" / "fail-attention_seed3").unlink()
    second = sweep_in(tmp_path, *command)
    assert second.returncode == 0, second.stderr
    assert (
        "01_prepare_data: already done" in second.stderr
        and "02_cache_teacher: already done" in second.stderr
    )
    assert executed.read_text().splitlines()[2:] == ["attention_seed3 1"], (
        "only what was missing is run"
    )
    assert not list((run_dir / "trials").glob("*.failed.ipynb")) and not list(
        (run_dir / "trials").glob(".*")
    )
    checked = sweep_in(tmp_path, "check", "runs/stub")
    assert (checked.returncode, checked.stdout) == (0, "2 of 2 trials whole\n")
    for path in run_dir.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), (
                f"{path.name} holds a path of this machine"
            )
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == [
        "cache",
        "data",
        "executed.txt",
    ]
    run_folder.read_notebook(run_dir / "trials" / "black_box_seed3.ipynb")

    third = sweep_in(tmp_path, *command, "--dry-run")
    assert "2 of 2 trials are done, 0 to run" in third.stdout and "to run again" not in third.stdout
    (tmp_path / "p.yaml").write_text(
        yaml.safe_dump({"teacher": "other", "epochs": 3, "data_seed": 9})
    )
    fourth = sweep_in(tmp_path, *command, "--dry-run").stdout
    assert "01_prepare_data                  to run: " in fourth and "run again too" in fourth
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"teacher": "other", "epochs": 4}))
    assert (
        "attention_seed3                  stale: config changed (epochs was 3, is 4)"
        in sweep_in(tmp_path, *command, "--dry-run").stdout
    )

    (run_dir / "verdict.txt").write_text("attention is better\n")
    (tmp_path / "artifacts" / "fail-attention_seed3").touch()
    (tmp_path / "artifacts" / "fail-black_box_seed3").touch()
    fifth = sweep_in(tmp_path, *command)
    assert fifth.returncode == 1 and "0 of 2 trials are done; 2 failed" in fifth.stdout, (
        fifth.stdout + fifth.stderr
    )
    assert "is better" not in fifth.stdout and "04_analyse" not in fifth.stdout, (
        "that was another plan's"
    )
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "01_prepare_data.ipynb",
        "02_cache_teacher.ipynb",
        "results_summary.csv",
        "sweep.json",
        "trials",
    ]
