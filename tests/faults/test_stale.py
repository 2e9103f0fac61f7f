"""What was made before something changed is stale, says what changed, and is never put together
with what is new.

Here notebooks are stubs that run in this process, one trial after the other; the last test is a
real sweep of stubs.
"""

import json
import os
import shutil
import time
from contextlib import nullcontext
from functools import lru_cache

import pandas as pd
import pytest
from clusters import Sweep, begun, ended, events, hold, project
from stubs import stub_project

from kd_utils.__main__ import main
from kd_utils.cache import manifest
from kd_utils.config import notebook_files, project_paths
from kd_utils.records import provenance, run_folder
from kd_utils.records.check import check_run
from kd_utils.store.sealed import write_sealed
from kd_utils.sweep import execution, executor, ray_executor

FIRST = """
from kd_utils.cache import manifest as cache
from kd_utils.data import prepared_data as data
from kd_utils.store import files, sealed
from kd_utils.config.project_paths import project_path
from kd_utils.config.stages import *
from kd_utils.config.trial import TrialConfig
from kd_utils.models.loading import model_fingerprint
from kd_utils.tokens.encoding import tokenizer_files
config = {0}.from_notebook(globals())"""
SOURCES = {
    "01_prepare_data": FIRST.format("DataConfig")
    + """
made_from = data.ingredients(config)
sealed.write_sealed(config.data_path / "manifest.json", {
    "format": data.FORMAT, "name": config.name, "config_fingerprint": config.fingerprint(), "counts": [],
    "made_from": made_from,
    "tokenizer_fingerprint": str(made_from["source"]), "data_hash": config.fingerprint()}, "checksums")""",
    "02_cache_teacher": FIRST.format("CacheConfig")
    + """
prepared = data.read_manifest(config.data_path)
manifest = {"format": cache.FORMAT_VERSION, "code": cache.cache_code(), "teacher": config.teacher,
            "base_teacher": config.teacher, "base_fingerprint": model_fingerprint(config.teacher),
            "tokenizer_files": tokenizer_files(project_path(config.teacher)), "data_hash": prepared["data_hash"],
            "shards": []}
folder = config.artifacts / "cache" / f"{config.name}-2026-01-01-{files.sha256_json(manifest)[:8]}"
sealed.write_sealed(folder / "manifest.json", manifest, "checksums")
cache.sealed_cache(folder, "verified.json").seal(
    {"content_hash": cache.read_manifest(folder)["content_hash"]}, {})""",
    "03_train_student": FIRST.format("TrialConfig")
    + """
import pandas as pd
from kd_utils.analysis import tables
from kd_utils.records import trial_record as records
from kd_utils.records.provenance import environment
from kd_utils.records.provenance import code_of
code = code_of("03_train_student")
accuracy = float((config.artifacts / "accuracy").read_text())
folder = cache.find_cache(config.artifacts, config.name)
epochs = [{"epoch": 1, "validation_accuracy": accuracy, "validation_accuracy/sst2": accuracy}]
metrics = {"config": config.model_dump(), "config_hash": config.fingerprint(), **environment(), "code": code,
           "cache": {"name": folder.name, "content_hash": cache.read_manifest(folder)["content_hash"]},
           "student": {"name": config.student, "fingerprint": model_fingerprint(config.student)},
           "tokenizer": data.read_manifest(config.data_path)["tokenizer_fingerprint"],
           "precision": "float32", "started": "2026-01-01", "seconds": {"total": 1.0}, "peak_memory_mb": 1.0,
           "epochs": epochs, "final": epochs[-1]}
predictions = pd.DataFrame({"example_id": ["a", "b", "c", "d"], "task": "sst2"})
predictions["correct"], predictions["loglikelihoods"] = predictions.index < 4 * accuracy, None
records.write_record(project_path(config.run_dir) / "trials" / config.trial, metrics, predictions)""",
}
TRIALS = [f"{method}_seed{seed}" for method in ("black_box", "attention") for seed in (0, 1)]


def execute_here(stem, target, parameters_, about, **_):
    """As `execution.execute`, in this process."""
    notebook = json.loads(notebook_files.notebook_path(stem).read_text())
    namespace = {}
    try:
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), namespace)
                namespace |= parameters_ if cell["metadata"]["tags"] else {}
                cell["execution_count"] = 1
        notebook["metadata"]["kd_utils"] = about()
    except Exception as error:
        raise execution.NotebookFailed(stem, f"{type(error).__name__}: {error}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_name(f"{target.stem}.failed.ipynb").unlink(missing_ok=True)
    write_sealed(target, notebook, "metadata.kd_utils")


class Here:
    """An executor that runs its jobs in this process, one after the other."""

    def __init__(self):
        self.jobs = []

    def require_same_view(self, files):
        pass

    def submit(self, job):
        self.jobs.append(job)

    def reports(self):
        yield from executor.execute_trial(self.jobs.pop(0), threads=1)

    def cancel(self):
        self.jobs.clear()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A project of stubs, swept once: 2 methods x 2 seeds, of accuracy 0.25."""
    stub_project(tmp_path)
    for stem, source in SOURCES.items():
        edit_notebook(tmp_path, stem, lambda cells: cells[1].update(source=source))
    for name in ("student", "teacher", "tokenizer", "other"):
        (tmp_path / "models" / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / "models" / name / file).write_text(file + name)
    monkeypatch.setattr(project_paths, "ROOT", tmp_path)
    monkeypatch.setattr(
        notebook_files, "notebook_path", lambda stem: tmp_path / "notebooks" / f"{stem}.ipynb"
    )
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "kd_utils")
    imported = lru_cache(provenance._imported)  # five sweeps a test ask for the same
    monkeypatch.setattr(provenance, "_imported", lambda source: set(imported(source)))
    monkeypatch.setattr(execution, "execute", execute_here)
    monkeypatch.setattr(ray_executor, "ray_executor", lambda *_: nullcontext(Here()))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    manifest.cache_code.cache_clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "grid.yaml").write_text("distill_type: [black_box, attention]\nseed: [0, 1]\n")
    parameter(
        tmp_path,
        student="models/student",
        teacher="models/teacher",
        tokenizer="models/tokenizer",
        epochs=1,
    )
    assert swept(tmp_path, 0.25) == 0
    yield tmp_path
    manifest.cache_code.cache_clear()


def parameter(home, **values):
    path = home / "p.yaml"
    path.write_text(
        (path.read_text() if path.exists() else "")
        + "".join(f"{k}: {v}\n" for k, v in values.items())
    )


def swept(home, accuracy, *arguments):
    (home / "artifacts" / "accuracy").write_text(str(accuracy))
    return main(["sweep", "p.yaml", "--grid", "grid.yaml", "--run-dir", "runs/stub", *arguments])


def planned(home, capsys):
    """What `--dry-run` says of each stage and trial."""
    capsys.readouterr()
    assert swept(home, 0.25, "--dry-run") == 0
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[:6])


def edit_notebook(home, stem, change):
    path = home / "notebooks" / f"{stem}.ipynb"
    notebook = json.loads(path.read_text())
    change(notebook["cells"])
    path.write_text(json.dumps(notebook))


def edit_module(home, name, text):
    path = home / "kd_utils" / f"{name}.py"
    path.write_text(path.read_text() + text)


def replaced(home, **values):
    text = (home / "p.yaml").read_text()
    for key, value in values.items():
        text = "\n".join(
            f"{key}: {value}" if line.startswith(f"{key}:") else line for line in text.splitlines()
        )
    (home / "p.yaml").write_text(text + "\n")


def weights_of(home, name, file="model.safetensors"):
    (home / "models" / name / file).write_text("other weights")


# what changes, which stage has to run again and why, and why the trials are stale before that
CHANGES = {
    "data": (
        lambda home: parameter(home, data_seed=7),
        {"01_prepare_data": "parameters changed (data_seed was 0, is 7)"},
        "",
    ),
    "tokenizer": (
        lambda home: replaced(home, tokenizer="models/other"),
        {"01_prepare_data": "parameters changed (tokenizer was "},
        "config",
    ),
    "tokenizer's file": (
        lambda home: weights_of(home, "tokenizer", "tokenizer.json"),
        {"01_prepare_data": "source changed (tokenizer/tokenizer.json)"},
        "",
    ),
    "teacher": (
        lambda home: replaced(home, teacher="models/other"),
        {"02_cache_teacher": "parameters changed (teacher was "},
        "config",
    ),
    "teacher's weights": (
        lambda home: weights_of(home, "teacher"),
        {"02_cache_teacher": "teacher changed (weights)"},
        "",
    ),
    "student's weights": (
        lambda home: weights_of(home, "student"),
        {},
        "student changed (initial weights of models/student)",
    ),
    "student": (lambda home: replaced(home, student="models/other"), {}, "config changed"),
    "config": (lambda home: parameter(home, learning_rate=0.5), {}, "config changed"),
    "module": (
        lambda home: edit_module(home, "analysis/tables", "\nNEW = 1\n"),
        {},
        "code changed (kd_utils/analysis/tables.py)",
    ),
    "notebook": (
        lambda home: edit_notebook(
            home,
            "03_train_student",
            lambda cells: cells[1].update(source=cells[1]["source"] + "\n1 + 1"),
        ),
        {},
        "code changed (notebooks/03_train_student.ipynb)",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_after_a_change_old_trials_are_stale_with_the_reason_and_in_no_table_beside_new_ones(
    home, what, capsys, tried
):
    change, stages, why = CHANGES[what]
    assert set(planned(home, capsys).values()) == {"done"}
    time.sleep(0.01)
    change(home)
    manifest.cache_code.cache_clear()
    said = planned(home, capsys)
    for stem, reason in stages.items():
        assert said[stem].startswith("to run: ") and reason in said[stem], said
    for trial in TRIALS:
        assert said[trial].startswith(f"stale: {why}") if why else said[trial].startswith("done"), (
            said
        )

    assert swept(home, 0.75, "--only", "seed=0") == 0
    table = run_folder.collect("runs/stub").set_index("trial")
    states = {trial: "done" if trial.endswith("0") else "stale" for trial in TRIALS}
    assert table["status"].to_dict() == states
    assert set(table["validation_accuracy"].dropna()) == {0.75} and table["why"][TRIALS[1]] != ""
    assert table[table["status"] == "stale"]["validation_accuracy"].isna().all()
    assert [
        record["final"]["validation_accuracy"] for record in run_folder.done_records("runs/stub")
    ] == [0.75, 0.75]
    assert set(run_folder.predictions("runs/stub")["trial"]) == {
        "black_box_seed0",
        "attention_seed0",
    }
    assert pd.read_csv("runs/stub/results_summary.csv")["validation_accuracy"].count() == 2

    assert swept(home, 0.75) == 0
    assert set(run_folder.collect("runs/stub")["validation_accuracy"]) == {0.75}
    assert check_run("runs/stub") == [] and set(planned(home, capsys).values()) == {"done"}
    tried("data, tokenizer, teacher, student, config or code changed")


@pytest.mark.parametrize(
    "change",
    [
        lambda home: edit_module(home, "analysis/tables", "\n# a comment\n"),
        lambda home: edit_module(
            home, "figures/plots", "\nNEW = 1\n"
        ),  # which nothing here reaches
        lambda home: edit_notebook(
            home,
            "03_train_student",
            lambda cells: cells.append(
                {
                    "cell_type": "markdown",
                    "metadata": {"tags": []},
                    "source": "# Text",
                    "id": "text",
                }
            ),
        ),
        lambda home: edit_notebook(
            home,
            "03_train_student",
            lambda cells: cells[1].update(source="# a comment\n" + cells[1]["source"]),
        ),
        lambda home: parameter(home, margin_points=2.0),
    ],
)
def test_what_cannot_change_a_result_makes_nothing_stale(home, change, capsys):
    before = {
        path: path.read_bytes()
        for path in (home / "runs" / "stub" / "trials").rglob("*")
        if path.is_file()
    }
    change(home)
    assert set(planned(home, capsys).values()) == {"done"}
    assert swept(home, 0.75) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_trials_of_another_torch_are_told_of_though_they_are_not_run_again(
    home, capsys, monkeypatch, tried
):
    real = provenance.environment
    shutil.rmtree(home / "runs" / "stub" / "trials" / "attention_seed1")
    monkeypatch.setattr(
        provenance,
        "environment",
        lambda: (now := real()) | {"versions": now["versions"] | {"torch": "1.0"}},
    )
    assert swept(home, 0.25) == 0
    assert (
        "warning: trials differ in versions: black_box_seed0, black_box_seed1 and 1 more against "
        "attention_seed1: "
        "remove one of these groups from trials/ and run the sweep again" in capsys.readouterr().err
    )
    for name in ("black_box_seed0", "black_box_seed1", "attention_seed0"):
        shutil.rmtree(home / "runs" / "stub" / "trials" / name)
    assert swept(home, 0.25) == 0
    assert "warning" not in capsys.readouterr().err
    tried("data, tokenizer, teacher, student, config or code changed")


def test_a_trial_during_which_the_code_changed_is_not_taken_for_one_of_the_new_code(
    home, capsys, tried
):
    """03 notes its code when its modules are there already: between the two an edit makes it say
    what did not run.
    """
    edit_notebook(
        home,
        "03_train_student",
        lambda cells: cells[1].update(
            source=cells[1]["source"].replace(
                "code = code_of",
                'tables_py = project_path("kd_utils/analysis/tables.py")\n'
                'tables_py.write_text(tables_py.read_text() + "EDIT = 1\\n")\ncode = code_of',
            )
        ),
    )
    assert swept(home, 0.75, "--only", "seed=0,distill_type=attention") == 1
    assert (
        run_folder.collect("runs/stub").set_index("trial")["status"]["attention_seed0"] == "failed"
    )
    shown = capsys.readouterr().err
    assert (
        "attention_seed0: FAILED: " in shown
        and "the code changed (kd_utils/analysis/tables.py) while the trial ran" in shown
    )
    assert planned(home, capsys)["attention_seed0"].startswith("failed")
    tried("data, tokenizer, teacher, student, config or code changed")


def test_an_edit_while_a_sweep_runs_a_second_sweep_and_a_kill_end_in_trials_of_one_code(
    tmp_path, tried
):
    from ray._private.utils import get_num_cpus

    home = project(tmp_path / "project", distill_type=["black_box"], seed=[0, 1, 2])
    run_dir, one_by_one = home / "runs" / "stub", ("--cpus-per-trial", str(get_num_cpus()))
    hold(home, True)
    first = Sweep(home, *one_by_one)
    begun(home, 1, first)
    status, output = Sweep(home).wait()
    assert (
        status == 2
        and f"error: stub is in use by a sweep (process {first.process.pid} on " in output
    ), output
    # The stubs' defaults are not the project's, which is said first.
    told = [line for line in output.splitlines() if " in the notebook, " not in line]
    assert len(told) == 1 and "since " in output and "give this sweep another --run-dir" in output
    edit_module(home, "records/trial_record", "\nEDIT = 1\n")
    hold(home, False)
    status, output = first.wait()
    assert (
        status == 1
        and "1 of 3 trials are done; 2 failed: black_box_seed1, black_box_seed2" in output
    ), output
    table = run_folder.collect(run_dir).set_index("trial")
    assert list(table["status"]) == ["done", "failed", "failed"]
    why = "the code changed (kd_utils/records/trial_record.py) since the sweep began: run the same command again"
    assert list(table["why"][1:]) == [why, why]
    assert (events(home)["what"] == "begins").sum() == 1, "no kernel is started for the others"

    hold(home, True)
    again = Sweep(home, *one_by_one)
    told = begun(home, 2, again)
    again.kill("driver")
    _, output = again.wait()
    assert "black_box_seed0: stale: code changed (kd_utils/records/trial_record.py)" in output, (
        output
    )
    assert ended(told["pid"])
    hold(home, False)
    status, output = Sweep(home).wait()
    assert status == 0, output
    assert check_run(run_dir) == []
    assert len({json.dumps(record["code"]) for record in run_folder.done_records(run_dir)}) == 1
    assert list(events(home)["trial"].value_counts().sort_index()) == [5, 2, 2]
    tried("second sweep on one run folder")
    tried("data, tokenizer, teacher, student, config or code changed")
