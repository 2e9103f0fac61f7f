"""Stopped between what is written and what vouches for it: the same command comes to its end.

The record of an earlier, whole execution lies in the run folder all the while. Notebooks are the
stubs of `test_stale`, which run in this process.
"""

import shutil

import pytest
import test_stale
from test_stale import edit_notebook, planned, swept

from kd_utils.cache import manifest
from kd_utils.config import project_paths
from kd_utils.records.check import check_run
from kd_utils.sweep import staleness

home = test_stale.home
STOP = 'if (config.artifacts / "stop").exists():\n    raise KeyboardInterrupt\n'


def stop_before(home, stem, line):
    """Let a stub stop before the line that starts so, while there is a file `artifacts/stop`."""

    def change(cells):
        source = cells[1]["source"]
        assert source.count(f"\n{line}") == 1
        cells[1]["source"] = source.replace(f"\n{line}", f"\n{STOP}{line}")

    edit_notebook(home, stem, change)
    assert swept(home, 0.25) == 0  # with this code


def cache_of(home):
    [folder] = (home / "artifacts" / "cache").iterdir()
    return folder


GAPS = {
    "the cache's manifest, verified.json": (
        ("02_cache_teacher", "cache.sealed_cache("),
        lambda home: shutil.rmtree(home / "artifacts" / "cache"),
        {"02_cache_teacher": "has not been verified: run 02 again"},
    ),
    "a verification, its result": (
        None,
        lambda home: (cache_of(home) / "verified.json").unlink(),
        {"02_cache_teacher": "has not been verified: run 02 again"},
    ),
    "verified.json cut short": (
        None,
        lambda home: (cache_of(home) / "verified.json").write_text("{"),
        {"02_cache_teacher": "verified.json is damaged"},
    ),
    "the data, the cache": (
        ("02_cache_teacher", "sealed.write_sealed("),
        lambda home: shutil.rmtree(home / "artifacts" / "cache"),
        {"02_cache_teacher": "is missing or damaged"},
    ),
    "nothing, the data": (
        ("01_prepare_data", "sealed.write_sealed("),
        lambda home: shutil.rmtree(home / "artifacts" / "data"),
        dict.fromkeys(("01_prepare_data", "02_cache_teacher"), "is missing or damaged"),
    ),
    "the record, its notebook": (
        None,
        lambda home: (home / "runs" / "stub" / "trials" / "attention_seed0.ipynb").unlink(),
        {"attention_seed0": "broken"},
    ),
    "the student, its record": (
        ("03_train_student", "records.write_record("),
        lambda home: shutil.rmtree(home / "runs" / "stub" / "trials" / "attention_seed0"),
        {"attention_seed0": "broken"},
    ),
    "the trials, their table and 04": (
        None,
        lambda home: [
            (home / "runs" / "stub" / name).unlink()
            for name in ("results_summary.csv", "04_analyse_results.ipynb")
        ],
        {},
    ),
}


@pytest.mark.parametrize("gap", GAPS)
def test_the_same_command_comes_to_its_end(home, gap, capsys):
    stop, begin, said = GAPS[gap]
    if stop:
        stop_before(home, *stop)
    begin(home)
    if stop:
        (home / "artifacts" / "stop").touch()
        assert swept(home, 0.25) == 130
        (home / "artifacts" / "stop").unlink()
    states = planned(home, capsys)
    for name, state in states.items():
        assert said[name] in state if name in said else state == "done", states
    assert swept(home, 0.25) == 0
    assert set(planned(home, capsys).values()) == {"done"}
    assert check_run(home / "runs" / "stub") == []


def test_what_finished_trials_left_is_removed_by_the_run_that_finds_them_all_done(home):
    """Killed after the last record: the checkpoint, and papermill's own file."""
    left = [
        home / "artifacts" / "checkpoints" / "stub" / "attention_seed0.json",
        home / "runs" / "stub" / "trials" / ".attention_seed0.partial-7.ipynb",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert swept(home, 0.25) == 0 and not any(path.exists() for path in left)


def test_a_fine_tuned_teacher_that_trials_start_from_is_made_again(home, monkeypatch):
    cache = {**manifest.read_manifest(cache_of(home)), "teacher": "artifacts/teachers/stub-1"}
    cache |= {"teacher_revision": "", "key": {"teacher": "f"}}
    monkeypatch.setattr(manifest, "read_manifest", lambda folder: cache)
    parameters = {"name": "stub", "teacher": "models/teacher"}
    trial = type("Trial", (), {"parameters": {"student": "teacher"}})
    assert staleness._why_cache_stale(parameters, [], every_byte=True) == ""
    why = staleness._why_cache_stale(parameters, [trial], every_byte=True)
    assert why.startswith("no model folder artifacts/teachers/stub-1")
    place = project_paths.project_path("artifacts/teachers/stub-1")
    shutil.copytree(home / "models" / "teacher", place)
    why = staleness._why_cache_stale(parameters, [trial], every_byte=True)
    assert why == "the weights of artifacts/teachers/stub-1 are not those that were cached"
