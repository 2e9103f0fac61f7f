"""The sweep: planning without running, and one real run through Ray and papermill over stub notebooks."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import yaml

from kd_utils import config, execution, parameters, records, scheduling, sweep
from kd_utils.__main__ import main
from kd_utils.display import Progress

#: The real notebooks' own parameters, under another name and on one CPU.
VALUES = {key: value for stem in config.NOTEBOOKS for key, value in parameters.notebook_defaults(stem).items()}
VALUES |= {"name": "stub", "build": "none", "device": "cpu", "epochs": 2, "teacher_epochs": 0, "run_dir": "runs/stub"}
SOURCES = {
    "01_prepare_data": """
from kd_utils import config, files
config = config.DataConfig.from_notebook(globals())
files.write_json(config.data_path / "manifest.json", {"data_hash": config.data_seed})""",
    "02_cache_teacher": """
from kd_utils import cache, config, files
config = config.CacheConfig.from_notebook(globals())
manifest = {"format": cache.FORMAT_VERSION, "teacher": config.teacher}
folder = config.artifacts / "cache" / f"{config.name}-2026-01-01-{files.sha256_json(manifest)[:8]}"
files.write_json(folder / "manifest.json", manifest | {"content_hash": files.sha256_json(manifest)})""",
    "03_train_student": """
import os, time
import pandas as pd
from kd_utils import cache, records
from kd_utils.config import TrialConfig, resolve
from kd_utils.environment import environment
config = TrialConfig.from_notebook(globals())
trial = config.trial
with open(config.artifacts / "executed.txt", "a") as file:
    file.write(f"{trial} {os.environ['OMP_NUM_THREADS']}\\n")
rows = []
for epoch in range(1, config.epochs + 1):
    time.sleep(0.3)
    rows.append({"epoch": epoch, "train_loss": 1.0, "validation_loss": 1 / epoch, "seconds": 0.3,
                 "validation_accuracy": 0.5 + 0.01 * config.seed, "validation_accuracy/sst2": 0.5})
    records.report_epoch(rows[-1])
if (config.artifacts / f"fail-{trial}").exists():
    raise FloatingPointError("the loss is not finite")
folder = cache.find_cache(config.artifacts, config.name)
metrics = {"config": config.model_dump(), "config_hash": config.fingerprint(), **environment(),
           "cache": {"name": folder.name, "content_hash": cache.read_manifest(folder)["content_hash"]},
           "started": "2026-01-01T00:00:00Z", "seconds": {"total": 1.0}, "peak_memory_mb": 1.0, "epochs": rows,
           "final": rows[-1]}
predictions = pd.DataFrame({"example_id": ["a"], "task": ["sst2"], "correct": [True], "loglikelihoods": [[-1.0, -2.0]]})
records.write_record(resolve(config.run_dir) / "trials" / trial, metrics, predictions)""",
    "04_analyse_results": """
from kd_utils import records
from kd_utils.config import AnalysisConfig, resolve
records.collect(resolve(AnalysisConfig.from_notebook(globals()).run_dir))""",
    "05_measure_speed": "",
}


def write_notebooks(folder: Path) -> None:
    """The notebooks' stubs: all parameters, then a few lines that leave what the real ones leave."""
    folder.mkdir(parents=True)
    for stem, source in SOURCES.items():
        keys = config.NOTEBOOKS[stem].model_fields
        cells = [("\n".join(f"{key} = {VALUES[key]!r}" for key in keys), ["parameters"]), (source.strip(), [])]
        notebook = {"nbformat": 4, "nbformat_minor": 5, "cells": [
            {"cell_type": "code", "id": f"c{n}", "metadata": {"tags": tags}, "source": text, "outputs": [],
             "execution_count": None} for n, (text, tags) in enumerate(cells)],
            "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}}
        (folder / f"{stem}.ipynb").write_text(json.dumps(notebook))


@pytest.fixture
def stub_notebooks(tmp_path, monkeypatch):
    """Stub notebooks under tmp_path, which is the project's root too."""
    write_notebooks(tmp_path / "notebooks")
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(parameters, "notebook_path", lambda stem: tmp_path / "notebooks" / f"{stem}.ipynb")
    return tmp_path


GRID = {"distill_type": ["black_box", "attention"], "seed": [0, 1, 2, 3]}


def test_the_projects_grid_is_28_trials_and_their_references(stub_notebooks):
    trials = sweep.plan({}, parameters.load_grid(), stub_notebooks / "runs" / "stub")
    of_method = {method: [t.swept["seed"] for t in trials if t.swept["distill_type"] == method]
                 for method in config.METHODS}
    assert of_method == {method: [0] if method == "untrained" else list(range(7)) for method in config.METHODS}
    assert sum(len(of_method[method]) for method in config.DISTILLATIONS) == 28
    assert len({t.config_hash for t in trials}) == len(trials) == 36
    assert [t.epochs for t in trials if t.swept["distill_type"] == "untrained"] == [1]


def test_the_untrained_student_goes_with_every_seed(stub_notebooks):
    grid = {"distill_type": ["untrained", "task_only"], "seed": [0, 1]}
    chosen = sweep.select(sweep.plan({}, grid, stub_notebooks / "runs" / "x"), "seed=1", grid)
    assert [t.trial for t in chosen] == ["untrained_seed0", "task_only_seed1"]


def test_a_combination_that_is_refused_is_named(stub_notebooks):
    with pytest.raises(ValueError, match="every weight of the loss is 0.*in the grid: distill_type=task_only, alpha=0"):
        sweep.plan({}, {"distill_type": ["black_box", "task_only"], "alpha": [1, 0]}, stub_notebooks / "runs" / "x")


def test_a_method_that_does_not_use_a_swept_key_is_one_trial_for_all_its_values(stub_notebooks):
    grid = {"distill_type": ["task_only", "black_box", "hidden_state"], "gamma_hidden": [0.1, 1.0], "seed": [0, 1]}
    trials = sweep.plan({}, grid, stub_notebooks / "runs" / "x")
    assert [t.trial for t in trials] == [
        "task_only_seed0", "task_only_seed1", "black_box_seed0", "black_box_seed1",
        *(f"hidden_state_seed{seed}_gamma_hidden={gamma}" for gamma in (0.1, 1.0) for seed in (0, 1))]
    assert "gamma_hidden" not in trials[0].swept and "gamma_hidden" not in trials[0].parameters
    chosen = sweep.select(trials, "gamma_hidden=1,seed=0", grid)
    assert [t.trial for t in chosen] == ["task_only_seed0", "black_box_seed0", "hidden_state_seed0_gamma_hidden=1.0"]


@pytest.mark.parametrize("path", sorted(Path(config.__file__).parents[1].glob("papermill_params/grid-*.yaml")),
                         ids=lambda path: path.stem)
def test_every_further_grid_is_planned_with_its_references_once(stub_notebooks, path):
    grid = parameters.load_grid(path)
    trials = sweep.plan({}, grid, sweep.default_run_dir({}, path))
    seeds = len(grid["seed"])
    assert sum(t.swept["distill_type"] == "task_only" for t in trials) == seeds
    [key] = set(grid) - {"distill_type", "seed"}
    values = [t.swept[key] for t in trials if t.swept["distill_type"] == grid["distill_type"][-1]]
    assert values == [value for value in grid[key] for _ in range(seeds)]
    assert sweep.default_run_dir({}, path).name == f"stub-{path.stem.removeprefix('grid-')}"


def test_the_projects_grid_has_the_plain_run_folder():
    assert sweep.default_run_dir({}).name == sweep.default_run_dir({}, "elsewhere/grid.yaml").name == "toy"
    assert sweep.default_run_dir({}, "my.yaml").name == "toy-my"


def test_a_trial_is_injected_what_differs_and_what_names_it(stub_notebooks):
    grid = {"seed": [0], "temperature": [4]}
    [trial] = sweep.plan({"epochs": 5, "beta": 0.5, "teacher_epochs": 3}, grid, stub_notebooks / "runs" / "x")
    assert trial.parameters == {"epochs": 5, "temperature": 4, "distill_type": "black_box", "seed": 0,
                                "run_dir": "runs/x", "trial": "black_box_seed0_temperature=4"}
    assert trial.trial == "black_box_seed0_temperature=4"
    assert trial.epochs == 5
    assert trial.config_hash == config.TrialConfig(**{**notebook_values(), "epochs": 5, "temperature": 4}).fingerprint()


def notebook_values():
    return {key: VALUES[key] for key in config.TrialConfig.model_fields}


def test_the_grid_goes_before_the_parameter_file(stub_notebooks):
    trials = sweep.plan({"seed": 9, "distill_type": "combined"}, {"seed": [1, 2]}, stub_notebooks / "runs" / "x")
    assert [t.trial for t in trials] == ["combined_seed1", "combined_seed2"]


@pytest.mark.parametrize(("grid", "message"), [
    ({"seed": [1, 1]}, "same trial twice"),
    ({"temperature": [4, 4.0]}, "same trial twice"),
    ({"seed": [-1]}, "seed = -1"),
    ({"distill_type": ["atention"]}, "distill_type = 'atention'"),
])
def test_bad_values_in_a_grid_are_refused_before_anything_runs(stub_notebooks, grid, message):
    with pytest.raises(ValueError, match=message):
        sweep.plan({}, grid, stub_notebooks / "runs" / "x")


def test_a_bad_value_that_the_grid_overrides_is_refused_all_the_same(stub_notebooks):
    with pytest.raises(ValueError, match="distill_type = 'atention'"):
        sweep.plan({"distill_type": "atention"}, {"distill_type": ["attention"]}, "runs/x")


def test_bad_values_of_another_stage_are_refused_too(stub_notebooks):
    with pytest.raises(ValueError, match="teacher_epochs = -1"):
        sweep.plan({"teacher_epochs": -1}, GRID, stub_notebooks / "runs" / "x")


@pytest.mark.parametrize(("only", "names"), [
    ("", 8),
    ("distill_type=attention", ["attention_seed0", "attention_seed1", "attention_seed2", "attention_seed3"]),
    ("distill_type=attention,seed=0-1+3", ["attention_seed0", "attention_seed1", "attention_seed3"]),
    ("seed=2, distill_type=attention+black_box", ["black_box_seed2", "attention_seed2"]),
])
def test_only_chooses_trials(stub_notebooks, only, names):
    chosen = sweep.select(sweep.plan({}, GRID, stub_notebooks / "runs" / "x"), only, GRID)
    assert len(chosen) == names if isinstance(names, int) else [t.trial for t in chosen] == names


@pytest.mark.parametrize("only", ["seed", "seed=", "sed=1", "seed=0-9", "seed=1,seed=2", "seed=2-1", "seed=x",
                                  "seed=1++2", "distill_type=hidden_state", "seed=[", "temperature=2"])
def test_only_refuses_what_the_grid_does_not_have(stub_notebooks, only):
    with pytest.raises(ValueError, match="--only"):
        sweep.select(sweep.plan({}, GRID, stub_notebooks / "runs" / "x"), only, GRID)


def test_dry_run_writes_nothing_and_names_the_trials(stub_notebooks, capsys):
    (stub_notebooks / "p.yaml").write_text("epochs: 1\n")
    before = sorted(stub_notebooks.rglob("*"))
    assert main(["sweep", str(stub_notebooks / "p.yaml"), "--only", "seed=6", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "combined_seed6                   missing" in shown
    assert "question white_box: 3 comparisons of 1 pairs, smallest corrected p 1.000, CANNOT be significant" in shown
    assert "0 of 6 trials are done, 6 to run; records: runs/stub" in shown
    assert sorted(stub_notebooks.rglob("*")) == before


@pytest.mark.parametrize(("arguments", "message"), [
    (["sweep", "nowhere.yaml"], "no parameter file nowhere.yaml"),
    (["sweep", "p.yaml", "--grid", "nowhere.yaml"], "no grid file nowhere.yaml"),
    (["sweep", "p.yaml", "--only", "seed=77"], "seed=77 is not in the grid"),
    (["check", "nowhere"], "no run folder nowhere"),
    (["verify", "nowhere"], "no cache folder nowhere"),
    (["evaluate", "nowhere", "--task", "sst2", "--split", "s", "--out", "o.parquet"], "nowhere"),
])
def test_wrong_input_is_one_line_and_status_2(stub_notebooks, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(stub_notebooks)
    Path("p.yaml").write_text("")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_command_line_answers_at_once():
    heavy = "('torch', 'ray', 'pandas', 'papermill')"
    code = f"import sys, kd_utils.__main__; print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert shown.strip() == "[]"


def test_resources_that_no_machine_has_are_refused_at_once():
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]
    with pytest.raises(ValueError, match="1 CPUs and 1 GPUs, but the machines have: 2 CPUs and 0 GPUs"):
        scheduling.fitting_gpus(nodes, 1, 1)
    with pytest.raises(ValueError, match="4 CPUs"):
        scheduling.fitting_gpus(nodes, 4, None)
    assert scheduling.fitting_gpus(nodes, 2, None) == 0
    assert scheduling.fitting_gpus([{"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}], 1, None) == 1
    assert scheduling.fitting_gpus([{"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}], 1, 0.25) == 0.25


def test_the_watch_can_be_pickled_with_a_live_display(tmp_path):
    import ray.cloudpickle
    progress = Progress({"t": 2})
    progress._live = threading.RLock()  # what rich's display holds, and what cannot be pickled
    ray.cloudpickle.dumps(scheduling.watch(progress, tmp_path))


def test_progress_counts_and_tells_the_time_left(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress({"a": 3, "b": 3, "c": 3}, already=5)
    progress.say = lambda text: None
    assert progress.summary() == "5 of 8 done, 0 running, 0 failed, 3 waiting"
    progress.started("a")  # began at 10
    progress.started("b")
    progress.running["a"] = {"epoch": 2}
    assert progress.seconds_left() == (20 - 10) * 7 / 2
    progress.finished("a")
    progress.broke("b", "why")
    assert progress.summary().startswith("6 of 8 done, 0 running, 1 failed, 1 waiting, about ")


def test_epochs_are_read_only_when_their_line_is_whole(tmp_path):
    path = tmp_path / "epochs.jsonl"
    rows = execution._new_rows(path)
    assert next(rows) == []
    path.write_text('{"epoch": 1}\n{"epo')
    assert next(rows) == [{"epoch": 1}]
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert next(rows) == [{"epoch": 2}]


def test_a_failed_notebook_is_kept_with_its_cause_and_no_place_is_taken(stub_notebooks, monkeypatch):
    target = stub_notebooks / "runs" / "stub" / "04_analyse_results.ipynb"
    monkeypatch.setattr(execution, "code_root", lambda: Path(__file__).parents[1])
    with pytest.raises(execution.NotebookFailed, match="04_analyse_results failed: ValueError: AnalysisConfig: name"):
        execution.execute("04_analyse_results", target, {"name": "../up"}, dict)
    assert [path.name for path in target.parent.iterdir()] == ["04_analyse_results.failed.ipynb"]
    assert "Traceback" in (target.parent / "04_analyse_results.failed.ipynb").read_text()


def sweep_in(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The real command in a project of its own: a copy of the package beside stub notebooks."""
    environment = {**os.environ, "PYTHONPATH": str(project)}
    environment.pop("KD_ROOT", None)
    return subprocess.run([sys.executable, "-m", "kd_utils", *arguments], cwd=project, env=environment,
                          capture_output=True, text=True, timeout=300)


def test_a_sweep_through_ray_and_papermill_and_again(tmp_path):
    source = Path(config.__file__).parent
    shutil.copytree(source, tmp_path / "kd_utils", ignore=shutil.ignore_patterns("__pycache__"))
    write_notebooks(tmp_path / "notebooks")
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"teacher": "other", "epochs": 3}))
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"distill_type": ["black_box", "attention"], "seed": [3]}))
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
    assert "01_prepare_data: already done" in second.stderr and "02_cache_teacher: already done" in second.stderr
    assert executed.read_text().splitlines()[2:] == ["attention_seed3 1"], "only what was missing is run"
    assert not list((run_dir / "trials").glob("*.failed.ipynb")) and not list((run_dir / "trials").glob(".*"))
    checked = sweep_in(tmp_path, "check", "runs/stub")
    assert (checked.returncode, checked.stdout) == (0, "2 of 2 trials whole\n")
    for path in run_dir.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), f"{path.name} holds a path of this machine"
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == ["cache", "data", "executed.txt"]
    records.read_notebook(run_dir / "trials" / "black_box_seed3.ipynb")

    third = sweep_in(tmp_path, *command, "--dry-run")
    assert "2 of 2 trials are done, 0 to run" in third.stdout
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"teacher": "other", "epochs": 4}))
    assert "attention_seed3                  stale: config changed" in sweep_in(tmp_path, *command, "--dry-run").stdout
