"""`check`: a whole run has no problem, and each thing that can be wrong is named in one line."""

import json
import os

import pandas as pd
import pytest
from stubs import (
    MADE,
    PREDICTIONS,
    metrics_of,
    write_notebook,
    write_plan,
    write_summary,
    write_trial,
)

from kd_utils.__main__ import main
from kd_utils.records import check, run_folder, trial_record
from kd_utils.store.files import sha256_file, sha256_json
from kd_utils.store.sealed import write_sealed

OTHER_CACHE = {"data": sha256_json(MADE), "cache": {"name": "n", "content_hash": "l" * 64}}


def problems_of(run_dir):
    """What is wrong, after the table and the stages were written anew, so that only the trials may
    be.
    """
    write_summary(run_dir)
    return check.check_run(run_dir)


def test_a_whole_run_has_no_problems(run_dir, capsys):
    assert check.check_run(run_dir) == []
    assert check.count_done(run_dir) == (4, 4)
    assert main(["check", str(run_dir)]) == 0
    assert capsys.readouterr().out == "4 of 4 trials whole\n"


def test_check_names_what_is_wrong(run_dir, capsys):
    write_trial(run_dir, "combined", 0)
    (run_dir / "trials" / "black_box_seed0.ipynb").unlink()
    (run_dir / "trials" / ".black_box_seed0.partial-7.ipynb").touch()
    (run_dir / "trials" / "attention_seed0.ipynb").unlink()
    (run_dir / "trials" / "attention_seed0" / "metrics.json").unlink()
    write_notebook(run_dir / "02_cache_teacher.ipynb", {}, execution_count=None)
    write_notebook(
        run_dir / "04_analyse_results.ipynb",
        {},
        outputs=[{"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []}],
    )
    problems = check.check_run(run_dir)
    assert problems == [
        "black_box_seed0: broken: black_box_seed0.ipynb is missing",
        "attention_seed0: broken: attention_seed0/metrics.json is missing",
        "02_cache_teacher.ipynb: cell 3 was not run",
        "04_analyse_results.ipynb: cell 3 ended with KeyError: 'x'",
        "trials/.black_box_seed0.partial-7.ipynb is left over from an execution that was stopped: "
        "remove it",
        "trials/combined_seed0 belongs to no planned trial: move it out of trials/",
        "trials/combined_seed0.ipynb belongs to no planned trial: move it out of trials/",
        "results_summary.csv does not agree with the records: run the sweep again to write it anew",
    ]
    assert main(["check", str(run_dir)]) == 1
    assert capsys.readouterr().out.splitlines() == [*problems, "2 of 4 trials whole; 8 problems"]


def test_check_of_other_folders(tmp_path, capsys):
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(FileNotFoundError, match=f"no run folder .*{name}"):
            check.check_run(tmp_path / name)
        assert main(["check", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith("error: no run folder")
    assert check.check_run(tmp_path) == [
        "sweep.json is missing, so the planned trials are not known: give a folder of a sweep"
    ]
    (tmp_path / "sweep.json").write_text("{}")
    assert len(check.check_run(tmp_path)) == 1 and check.count_done(tmp_path) == (0, 0)


def test_trials_that_are_missing_failed_or_stale_are_named_with_why(run_dir):
    (run_dir / "trials" / "black_box_seed0" / "metrics.json").unlink()
    write_notebook(run_dir / "trials" / "black_box_seed0.failed.ipynb", {"failure": "KeyError: 1"})
    write_trial(run_dir, "attention", 1, cache={"name": "n", "content_hash": "other"})
    (run_dir / "trials" / "attention_seed0.ipynb").unlink()
    for path in (run_dir / "trials" / "attention_seed0").iterdir():
        path.unlink()
    (run_dir / "trials" / "attention_seed0").rmdir()
    assert problems_of(run_dir) == [
        "black_box_seed0: failed: KeyError: 1",
        "attention_seed0: missing",
        "attention_seed1: stale: teacher cache changed (experiment)",
    ]


EPOCH = metrics_of()["final"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"config": {"distill_type": "attention", "seed": 7, "student": "tiny"}},
            "its seed is 7, the plan says 1",
        ),
        (
            {"config": {"distill_type": "combined", "seed": 1, "student": "tiny"}},
            "its distill_type is 'combined', the plan says 'attention'",
        ),
        ({"epochs": [EPOCH | {"epoch": 1}]}, "it has 1 epochs, the plan says 2"),
        ({"epochs": [EPOCH, EPOCH | {"epoch": 2.7}]}, "it has 2.7 epochs, the plan says 2"),
        (
            {"epochs": [EPOCH, EPOCH | {"validation_accuracy/sst2": 0.0}]},
            "validation_accuracy/sst2 is 0.0, its predictions say 1.0",
        ),
    ],
)
def test_a_whole_record_that_contradicts_itself_or_the_plan_is_named(run_dir, changes, problem):
    changes.update(
        config_hash=metrics_of("attention", 1)["config_hash"],
        final=changes.get("epochs", [EPOCH])[-1],
    )
    write_trial(run_dir, "attention", 1, **{"epochs": [EPOCH, EPOCH], **changes})
    assert problems_of(run_dir) == [f"attention_seed1: {problem}"]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            PREDICTIONS.assign(correct=[False, False]),
            "validation_accuracy/sst2 is 1.0, its predictions say 0.0",
        ),
        (
            PREDICTIONS.assign(correct=[None, 0.0]),
            "validation_accuracy/sst2 is 1.0, its predictions say nan",
        ),
        (PREDICTIONS.assign(example_id="a"), "1 examples are predicted twice"),
        (PREDICTIONS.drop(columns="task"), "its predictions cannot be read (KeyError)"),
        (PREDICTIONS.assign(correct="yes"), "its predictions cannot be read (TypeError)"),
        (
            PREDICTIONS.assign(correct=[pd.Timestamp(0)] * 2),
            "its predictions cannot be read (TypeError)",
        ),
    ],
)
def test_predictions_that_do_not_give_the_metrics_are_named(run_dir, table, problem):
    write_trial(run_dir, "attention", 1, predictions=table)
    assert problems_of(run_dir) == [f"attention_seed1: {problem}"]


def test_ids_of_predictions_that_are_damaged_are_named(run_dir):
    [path] = (run_dir / "trials").glob("examples-*")
    path.write_bytes(path.read_bytes()[:-1])
    assert problems_of(run_dir) == [
        f"{trial}: broken: trials/{path.name}, the ids of the predictions, is lost or damaged: "
        "restore it, or run the sweep again, which repeats the trials"
        for trial in ("black_box_seed0", "black_box_seed1", "attention_seed0", "attention_seed1")
    ]


def test_predictions_that_are_no_table_are_named(run_dir):
    folder = run_dir / "trials" / "attention_seed1"
    metrics = trial_record.read_record(folder)
    (folder / "predictions.parquet").write_bytes(b"PAR1 and so on")
    metrics["checksums"]["predictions.parquet"] = sha256_file(folder / "predictions.parquet")
    write_sealed(folder / "metrics.json", metrics, "checksums")
    write_notebook(
        run_dir / "trials" / "attention_seed1.ipynb",
        {"config_hash": metrics["config_hash"], "record": metrics["checksums"]["sha256"]},
    )
    assert problems_of(run_dir) == [
        "attention_seed1: its predictions cannot be read (ArrowInvalid)"
    ]


@pytest.mark.parametrize("name", ["analysis.csv", "verdict.txt"])
def test_a_file_that_04_wrote_and_that_changed_or_went_away_is_named(run_dir, name):
    problem = [
        f"{name} is not the file that 04_analyse_results.ipynb wrote: run the sweep again to write "
        f"it anew"
    ]
    (run_dir / name).write_text((run_dir / name).read_text().replace("n", "m", 1))
    assert check.check_run(run_dir) == problem
    (run_dir / name).unlink()
    assert check.check_run(run_dir) == problem


def test_a_results_table_that_says_something_else_is_named(run_dir):
    table = (run_dir / run_folder.SUMMARY).read_text()
    write_notebook(
        run_dir / "04_analyse_results.ipynb", {}
    )  # of a time when it did not vouch for any file
    (run_dir / run_folder.SUMMARY).write_text(table.replace("0.75", "0.85"))
    assert check.check_run(run_dir) == [
        "results_summary.csv does not agree with the records: run the sweep again to write it anew"
    ]
    (run_dir / run_folder.SUMMARY).unlink()
    assert check.check_run(run_dir) == ["results_summary.csv is missing: run the sweep again"]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("student", {"name": "tiny", "fingerprint": "0"}, "initial weights of tiny"),
        ("initial", "0" * 64, "the initial student (pretrained) of tiny"),
        ("precision", "torch.bfloat16", "precision"),
        ("code", {"kd_utils/losses.py": "1" * 12}, "code"),
        ("versions", metrics_of()["versions"] | {"torch": "1.0"}, "versions"),
    ],
)
def test_trials_that_differ_where_they_must_not_are_named(run_dir, key, value, named):
    write_plan(run_dir, students={}, code={})
    write_trial(run_dir, "attention", 1, **{key: value})
    assert problems_of(run_dir) == [
        f"trials differ in {named}: black_box_seed0, black_box_seed1 and 1 more against "
        "attention_seed1"
    ]


def test_what_cannot_change_numbers_may_differ_between_trials(run_dir):
    write_plan(run_dir, students={})
    write_trial(
        run_dir,
        "attention",
        1,
        git_commit="e" * 40,
        versions=metrics_of()["versions"] | {"pandas": "1.0"},
    )
    write_trial(
        run_dir,
        "attention",
        0,
        config=metrics_of("attention", 0)["config"] | {"student": "other"},
        config_hash=metrics_of("attention", 0)["config_hash"],
        student={"name": "o", "fingerprint": "0"},
    )
    assert problems_of(run_dir) == []


def test_older_trials_without_digests_of_their_code_must_be_of_one_commit(run_dir):
    write_plan(run_dir, code={})
    for seed, commit in ((0, "a"), (1, "b")):
        for method in ("black_box", "attention"):
            metrics = {
                key: value for key, value in metrics_of(method, seed).items() if key != "code"
            }
            trial_record.write_record(
                run_dir / "trials" / f"{method}_seed{seed}",
                metrics | {"git_commit": commit},
                PREDICTIONS,
            )
            sha256 = trial_record.read_record(run_dir / "trials" / f"{method}_seed{seed}")[
                "checksums"
            ]["sha256"]
            write_notebook(
                run_dir / "trials" / f"{method}_seed{seed}.ipynb",
                {"config_hash": metrics["config_hash"], "record": sha256},
            )
    assert problems_of(run_dir) == [
        "trials differ in git_commit: black_box_seed0, attention_seed0 against "
        "black_box_seed1, attention_seed1"
    ]


@pytest.mark.parametrize(
    ("stem", "about", "problem"),
    [
        (
            "01_prepare_data",
            {"artifact": {"data": "e" * 64}},
            "01_prepare_data.ipynb, 02_cache_teacher.ipynb and sweep.json are not from one run: the "
            "data differs",
        ),
        (
            "02_cache_teacher",
            {"artifact": OTHER_CACHE},
            "01_prepare_data.ipynb, 02_cache_teacher.ipynb and sweep.json are not from one run: the "
            "teacher cache differs",
        ),
        ("01_prepare_data", {"artifact": 7}, "01_prepare_data.ipynb: kd_utils.artifact: "),
        (
            "04_analyse_results",
            {"wrote": ["verdict.txt"]},
            "04_analyse_results.ipynb: kd_utils.wrote: ",
        ),
        (
            "04_analyse_results",
            {"wrote": {"../trials": "0"}},
            "04_analyse_results.ipynb: kd_utils.wrote.../trials.",
        ),
    ],
)
def test_a_stage_of_another_run_or_shape_is_named(run_dir, stem, about, problem):
    write_notebook(run_dir / f"{stem}.ipynb", about)
    [found] = check.check_run(run_dir)
    assert found.startswith(problem)


def test_a_stage_in_anothers_place_is_named(run_dir):
    (run_dir / "01_prepare_data.ipynb").write_bytes(
        (run_dir / "02_cache_teacher.ipynb").read_bytes()
    )
    assert check.check_run(run_dir) == [
        "01_prepare_data.ipynb is an execution of notebooks/02_cache_teacher.ipynb: run the sweep "
        "again"
    ]


def test_a_trial_that_is_planned_twice_is_named(run_dir):
    plan = run_folder.read_plan(run_dir)
    write_plan(run_dir, trials=[*plan["trials"], plan["trials"][0]])
    assert problems_of(run_dir) == ["black_box_seed0 is planned 2 times"]


def test_links_and_devices_are_named_and_nothing_is_read(run_dir, tmp_path):
    (tmp_path / "elsewhere").write_text("{}")
    (run_dir / "verdict.txt").unlink()
    (run_dir / "verdict.txt").symlink_to(tmp_path / "elsewhere")
    (run_dir / "trials" / "loop").symlink_to(run_dir / "trials")
    os.mkfifo(run_dir / "trials" / "attention_seed0.failed.ipynb")
    assert check.check_run(run_dir) == [
        f"{name} is a link or a device, so the folder is not read: remove it"
        for name in ("verdict.txt", "trials/attention_seed0.failed.ipynb", "trials/loop")
    ]
    assert check.count_done(run_dir) == (0, 0)


def test_a_strangers_text_stays_one_line_and_short(run_dir):
    write_notebook(
        run_dir / "01_prepare_data.ipynb",
        {},
        outputs=[
            {
                "output_type": "error",
                "ename": "E\n\x1b[2J\u202e",
                "evalue": "x" * 10_000,
                "traceback": [],
            }
        ],
    )
    [problem] = check.check_run(run_dir)
    assert (
        problem.startswith("01_prepare_data.ipynb: cell 3 ended with E ?[2J?: xxx")
        and len(problem) <= check.LONGEST
    )
    assert problem.isprintable() and json.dumps(problem)
