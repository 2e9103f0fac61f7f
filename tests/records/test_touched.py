"""A run's folder after other tools were at it: notebooks opened and saved, files left, line ends
changed. Nothing of it is a fault, and no trial is run again.
"""

import json
import subprocess
from pathlib import Path

import nbformat
import pytest
from stubs import files_of, whole_run, write_trial

from kd_utils.demos import toy_models
from kd_utils.models import loading
from kd_utils.records import check, run_folder
from kd_utils.store.sealed import SealedFolder
from kd_utils.sweep.sweep import Sweep
from kd_utils.tokens.encoding import tokenizer_files

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Cell is missing an id field")
STRAY = (".DS_Store", "._x.csv", ".nfs00000001", "Thumbs.db", "desktop.ini", "x~", ".x.csv.swp")


def strew(folder):
    """What file browsers, editors and JupyterLab leave, in every folder below this one."""
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in STRAY:
            (place / name).write_bytes(b"\0junk")
        (place / ".ipynb_checkpoints").mkdir()
        (place / ".ipynb_checkpoints" / "x-checkpoint.ipynb").write_text("{}")


def test_a_run_whose_every_file_was_opened_and_saved_is_whole_and_done(run_dir):
    before = run_folder.collect(run_dir)
    for path in files_of(run_dir):
        if path.suffix == ".ipynb":
            nbformat.write(nbformat.read(path, as_version=4), path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(json.loads(path.read_bytes()), sort_keys=True))
    assert check.check_run(run_dir) == [] and check.count_done(run_dir) == (4, 4)
    assert {state for _, state in run_folder.trials_with_status(run_dir)} == {("done", "")}
    assert run_folder.collect(run_dir)[list(before)].equals(before)


def test_a_sweep_does_not_train_such_a_trial_again(run_dir):
    sweep = Sweep({"name": "stub"}, {"distill_type": ["black_box"], "seed": [0]}, run_dir)
    sweep._write_plan()
    [trial] = sweep.trials
    code = run_folder.read_plan(run_dir)["code"]
    write_trial(run_dir, "black_box", 0, code=code, config_hash=trial.config_hash)
    path = run_dir / "trials" / f"{trial.trial}.ipynb"
    nbformat.write(saved := nbformat.read(path, as_version=4), path)
    assert sweep.states([trial]) == {trial.trial: ("done", "")}
    saved["cells"][2]["execution_count"] = None
    nbformat.write(saved, path)
    assert sweep.states([trial])[trial.trial].state == "broken"


def test_strays_are_no_fault_of_a_run(run_dir):
    strew(run_dir)
    assert check.check_run(run_dir) == [] and len(run_folder.done_records(run_dir)) == 4
    (run_dir / "trials" / ".attention_seed0.partial-99").touch()
    assert check.check_run(run_dir) == [
        "trials/.attention_seed0.partial-99 is left over from an execution that was stopped: "
        "remove it"
    ]


def test_strays_are_no_part_of_models_tokenizers_and_sealed_folders(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_text("{}")
    before = loading.model_fingerprint(str(model)), tokenizer_files(model)
    strew(model)
    for name in ("._model.safetensors", "tokenizer.json~", "._tokenizer.json"):
        (model / name).touch()
    assert (loading.model_fingerprint(str(model)), tokenizer_files(model)) == before
    sealed = SealedFolder(tmp_path / "sealed", "all.json")
    with sealed.replaced({}) as aside:
        (aside / "own.txt").touch()
        strew(aside)
    assert set(sealed.read()["checksums"]) == {"own.txt", "sha256"}


def test_a_folder_that_was_only_looked_at_is_free_for_the_toy(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_models, "_write", lambda folder, seed: (folder / "own").touch())
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / ".DS_Store").touch()
    toy_models.build(tmp_path / "toy")
    assert (tmp_path / "toy" / "own").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(FileExistsError, match="holds files that no toy build wrote"):
        toy_models.build(tmp_path / "mine")


@pytest.mark.parametrize("attributes", [True, False])
def test_a_clone_with_line_ends_of_windows_is_whole(tmp_path, attributes):
    """With the project's .gitattributes every byte stays; without it the content does."""
    origin = tmp_path / "origin"
    run_dir = whole_run(origin / "runs" / "2026-01-01-toy")
    (origin / "notebooks").mkdir()
    (origin / "notebooks" / "01.ipynb").write_text('{\n "cells": []\n}\n')
    (origin / "run.sh").write_text("#!/bin/sh\nexit\n")
    if attributes:
        (origin / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())

    def git(*arguments):
        person = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *person, *arguments], cwd=origin, check=True, capture_output=True)

    git("init")
    git("add", "--all")
    git("commit", "-m", "all")
    clone = tmp_path / "clone"
    git("-c", "core.autocrlf=true", "clone", "-c", "core.autocrlf=true", ".", str(clone))
    cloned = clone / run_dir.relative_to(origin)
    assert check.check_run(cloned) == [] and check.count_done(cloned) == (4, 4)
    same = [
        path.read_bytes() == (clone / path.relative_to(origin)).read_bytes()
        for path in files_of(origin)
        if ".git" not in path.parts
    ]
    assert all(same) == attributes
