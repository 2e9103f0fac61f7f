"""A sweep in several worlds over stub notebooks, and its folder read back."""

import json

import pandas as pd
import pytest
import yaml
from stubs import stub_project, sweep_in, whole_run, write_notebook

from kd_utils.__main__ import main
from kd_utils.config import project_paths
from kd_utils.records import check, run_folder, trial_record
from kd_utils.store.sealed import write_sealed
from kd_utils.worlds import runs


def several_worlds(folder, worlds=("1", "2")):
    """A whole run of these worlds, made up."""
    for world in worlds:
        whole_run(folder / f"world-{world}")
    listed = [{"world": world, "run": f"world-{world}", "parameters": {}} for world in worlds]
    plan = {"format": trial_record.FORMAT, "cache": None, "trials": [], "worlds": listed}
    write_sealed(folder / run_folder.PLAN, plan, "checksums")
    runs.collect(folder).to_csv(folder / run_folder.SUMMARY, index=False)
    write_notebook(folder / "12_compare_worlds.ipynb", {"wrote": {}})
    return folder


def test_a_whole_run_of_worlds_is_whole(tmp_path):
    run = several_worlds(tmp_path / "run")
    assert check.check_run(run) == [] and check.count_done(run) == (8, 8)
    table = runs.collect(run)
    assert list(table)[:2] == ["world", "trial"] and len(table) == 8
    assert [world for world, done in runs.done(run) if len(done.records) == 4] == ["1", "2"]


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
    parameters = {"worlds": "1-2", "data_seed": "{world}", "epochs": 1, "name": "stub"}
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
