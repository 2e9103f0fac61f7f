"""A sweep in several worlds over stub notebooks, and its folder read back."""

import json
import shutil

import pandas as pd
import pytest
import yaml
from stubs import stub_project, sweep_in, whole_run, write_notebook, write_plan

from kd_utils.__main__ import main
from kd_utils.config import project_paths
from kd_utils.records import check, run_folder, trial_record
from kd_utils.store.sealed import RecordError, write_sealed
from kd_utils.worlds import runs


def several_worlds(folder, worlds=("1", "2")):
    """A whole run of these worlds, made up."""
    for world in worlds:
        cache = {"name": f"n-2026-01-01-{world * 8}", "content_hash": (world * 64)[:64]}
        whole_run(folder / f"world-{world}", cache=cache)
    listed = [{"world": world, "run": f"world-{world}"} for world in worlds]
    plan = {"format": trial_record.FORMAT, "cache": None, "trials": [], "worlds": listed}
    write_sealed(folder / run_folder.PLAN, plan, "checksums")
    runs.collect(folder).to_csv(folder / run_folder.SUMMARY, index=False)
    write_notebook(folder / "12_compare_worlds.ipynb", {"wrote": {}})
    return folder


def test_a_whole_run_of_worlds_is_whole(tmp_path):
    run = several_worlds(tmp_path / "run")
    assert check.check_run(run) == [] and check.count_done(run) == (8, 8)
    with pytest.raises(
        RecordError, match="run has 2 worlds: compare them with notebook 12, or set"
    ):
        run_folder.predictions(run)
    table = runs.collect(run)
    assert list(table)[:2] == ["world", "trial"] and len(table) == 8
    assert [world for world, of in runs.done(run).items() if len(of.records) == 4] == ["1", "2"]


def test_what_is_wrong_in_a_world_is_named(tmp_path):
    run = several_worlds(tmp_path / "run")
    (run / "world-2" / "trials" / "attention_seed0" / "predictions.parquet").write_bytes(b"")
    (run / "world-3").mkdir()
    (run / "12_compare_worlds.ipynb").unlink()
    problems = check.check_run(run)
    assert any(p.startswith("world-2: attention_seed0: ") for p in problems)
    assert "world-3 belongs to no planned world: move it away" in problems
    assert any("12_compare_worlds.ipynb" in p for p in problems)
    assert check.count_done(run) == (7, 8)


def test_a_world_is_counted_once_and_has_the_plan_that_is_listed_for_it(tmp_path):
    run = several_worlds(tmp_path / "run")
    shutil.rmtree(run / "world-2")
    shutil.copytree(run / "world-1", run / "world-2")
    with pytest.raises(ValueError, match="worlds 1 and 2 have the same teacher cache"):
        runs.done(run)
    listed = [{"world": w, "run": f"world-{w}", "parameters": {"epochs": 3}} for w in "12"]
    plan = {"format": trial_record.FORMAT, "cache": None, "trials": [], "worlds": listed}
    write_sealed(run / run_folder.PLAN, plan, "checksums")
    problems = check.check_run(run)
    assert "world-2: its plan has other parameters than sweep.json lists for it" in problems


def test_worlds_in_which_nothing_is_done_are_said_so(tmp_path):
    run = several_worlds(tmp_path / "run")
    for world in "12":
        shutil.rmtree(run / f"world-{world}" / "trials")
    with pytest.raises(ValueError, match="no trial of run is done: run the sweep first"):
        runs.done(run)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"artifacts_dir": "a-{world}"}, "worlds 1 and 2 would be the same"),
        ({"learning_rate": "{world}"}, "worlds 1 and 2 would be the same"),
        ({"build": "toy-{world}"}, "makes artifacts/embedded/toy-1, but data_dir = "),
        (
            {"worlds": "sst2 mmlu", "train_rows": "{world}:9", "validation_rows": "{world}:9"},
            "worlds sst2 and mmlu have other tasks",
        ),
    ],
)
def test_worlds_that_cannot_be_compared_are_refused_before_they_run(
    stub_notebooks, capsys, parameters, message
):
    path = stub_notebooks / "p.yaml"
    path.write_text(yaml.safe_dump({"worlds": "1-3"} | parameters))
    assert main(["sweep", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_worlds_do_not_replace_the_plan_of_a_run_without_them(stub_notebooks, capsys):
    path, run = stub_notebooks / "p.yaml", stub_notebooks / "runs" / "stub"
    write_plan(run, name="stub")
    path.write_text("worlds: 1-3\nname: stub\ndata_seed: '{world}'\n")
    assert main(["sweep", str(path)]) == 2
    assert "this sweep is of 'stub' in several worlds: give another" in capsys.readouterr().err
    write_plan(run, name="stub", worlds=[{"world": "1", "run": "world-1"}])
    path.write_text("name: stub\n")
    assert main(["sweep", str(path)]) == 2
    assert "holds experiment 'stub' in several worlds" in capsys.readouterr().err


def test_a_world_that_is_missing_is_named(tmp_path):
    run = several_worlds(tmp_path / "run")
    (run / "world-1").rename(tmp_path / "elsewhere")
    assert any(p.startswith("world-1: it is missing") for p in check.check_run(run))


def test_no_plan_of_a_stranger_leads_out_of_its_folder(tmp_path):
    run = several_worlds(tmp_path / "run")
    listed = [{"world": "1", "run": "../elsewhere", "parameters": {}}]
    plan = {"format": trial_record.FORMAT, "cache": None, "trials": [], "worlds": listed}
    write_sealed(run / run_folder.PLAN, plan, "checksums")
    [problem] = check.check_run(run)
    assert "worlds" in problem and "run" in problem


def test_12_finds_the_runs_that_have_worlds(tmp_path, monkeypatch):
    monkeypatch.setattr(project_paths, "ROOT", tmp_path)
    everything = tmp_path / "runs"
    whole_run(everything / "toy")
    with pytest.raises(ValueError, match="no worlds in any run of toy: sweep a parameter file"):
        runs.find("toy")
    with pytest.raises(ValueError, match="no worlds in runs/toy"):
        runs.find("toy", "runs/toy")
    for name in ("2026-01-01-toy-worlds", "2026-01-02-toy-worlds"):
        several_worlds(everything / name)
    assert runs.find("toy").name == "2026-01-02-toy-worlds"
    several_worlds(everything / "toy-worlds")
    assert runs.find("toy").name == "toy-worlds" == runs.find("toy-worlds").name
    assert runs.find("toy", "runs/2026-01-01-toy-worlds").name == "2026-01-01-toy-worlds"


def test_dry_run_says_what_so_many_worlds_can_show(stub_notebooks, capsys):
    path, grid = stub_notebooks / "p.yaml", stub_notebooks / "grid.yaml"
    grid.write_text("distill_type: [task_only, black_box]\nseed: [0, 1]\n")
    for worlds, said in (
        ("1-7", "can be significant"),
        ("1-5", "CANNOT be significant, add worlds"),
    ):
        path.write_text(f"worlds: {worlds}\ndata_seed: '{{world}}'\n")
        assert main(["sweep", str(path), "--grid", str(grid), "--dry-run"]) == 0
        shown = capsys.readouterr().out
        assert (
            f"question teacher: comparisons 1, pairs each {worlds[-1]}" in shown and said in shown
        )
        assert "black_box_seed1                  missing" in shown
    assert not (stub_notebooks / "runs").exists()


@pytest.mark.ray
def test_worlds_run_one_after_the_other_and_not_again(tmp_path):
    stub_project(tmp_path)
    worlds = {"worlds": "1-2", "data_seed": "{world}", "teacher_seed": "{world}"}
    parameters = worlds | {"epochs": 1, "name": "stub"}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(parameters))
    (tmp_path / "grid.yaml").write_text(
        yaml.safe_dump({"distill_type": ["black_box"], "seed": [3]})
    )
    executed, run = tmp_path / "artifacts" / "executed.txt", tmp_path / "runs" / "stub"
    command = ["sweep", "p.yaml", "--grid", "grid.yaml", "--executor", "local"]

    first = sweep_in(tmp_path, *command)
    assert first.returncode == 0, first.stderr
    assert "world 2 (2 of 2): runs/stub/world-2" in first.stderr and "2 trials" in first.stdout
    assert executed.read_text().splitlines() == ["black_box_seed3 1"] * 2
    plan = json.loads((run / "sweep.json").read_text())
    assert [entry["parameters"]["data_seed"] for entry in plan["worlds"]] == [1, 2]
    assert pd.read_csv(run / "results_summary.csv")["world"].tolist() == [1, 2]
    names = {
        json.loads((run / f"world-{w}/trials/black_box_seed3/metrics.json").read_text())["config"][
            "name"
        ]
        for w in (1, 2)
    }
    assert names == {"stub-1", "stub-2"}
    assert sweep_in(tmp_path, "check", "runs/stub").stdout == "2 of 2 trials whole\n"

    second = sweep_in(tmp_path, *command)
    assert second.returncode == 0 and len(executed.read_text().splitlines()) == 2
    assert "already done" in second.stderr
