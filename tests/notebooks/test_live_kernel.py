"""The notebooks in a live kernel, as a person in JupyterLab runs them: some cells again, in another
order, interrupted. What is recorded is true, or nothing is.
"""

import shutil

import pytest
from live_kernel import Lab
from small_project import small_project

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config.notebook_files import notebook_defaults
from kd_utils.config.project_paths import CODE_ROOT
from kd_utils.data.prepared_data import load_prepared
from kd_utils.records.trial_record import read_record

REFUSED = "nothing is written; run again from the cell with `{}.from_notebook(globals())` on"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Prepared data, two models and a verified cache."""
    project = small_project(
        tmp_path_factory.mktemp("project"),
        train_rows="sst2:24 gsm8k:13",
        validation_rows="sst2:8 gsm8k:4",
        labelled="sst2=9",  # random weights write no answer that ends
        max_length=200,
        max_new_tokens=4,
        epochs=3,
        evaluations=3,
    )
    project.cache()
    return project


def lab(project, stem, code=CODE_ROOT, **changes):
    """A kernel with this notebook; its user changed these parameters, and the project's own."""
    known = {k: v for k, v in project.parameters.items() if k in notebook_defaults(stem)}
    return Lab(stem, known | changes, KD_ROOT=str(project.root), PYTHONPATH=str(code))


def change(lab, **changes):
    """The user edits the parameters cell, and runs it and the cell that makes the config."""
    lab.parameters |= changes
    lab.cell(lab.parameters_cell)
    assert lab.cell(lab.number("from_notebook"))[1] == ""


def refused(told, kind):
    assert told[1].startswith("ValueError: ") and told[1].endswith(REFUSED.format(kind)), told
    return True


def numbers(record):
    """What two executions of one trial have in common: all of its numbers but the times."""
    times = ("seconds", "tok_per_sec")
    return [{k: v for k, v in row.items() if k not in times} for row in record["epochs"]]


def test_03_records_only_what_one_whole_execution_made(project):
    trials = project.root / "runs" / "explore" / "trials"
    with lab(project, "03_train_student") as live:
        train, write = live.number("measure.stretches()"), live.number("write_record(")
        assert live.run() == ""
        first = read_record(trials / "black_box_seed0")
        # Another seed, and some cells again: seed 0's student would stand under seed 1's name.
        change(live, seed=1, learning_rate=0.01)
        assert refused(live.cell(train), "TrialConfig") and refused(live.cell(write), "TrialConfig")
        # The cells that make batches and optimizer too: it would be trained further.
        for number in range(live.number("batches.TrialData("), train):
            live.cell(number)
        assert refused(live.cell(train), "TrialConfig") and refused(live.cell(write), "TrialConfig")
        # A look in between, in a cell that is not in the notebook.
        change(live)
        assert live.run(live.number("from_notebook") + 1, train - 1) == ""
        live.execute("next(model.parameters()).data.zero_()")
        assert refused(live.cell(train), "TrialConfig")
        assert [path.name for path in trials.glob("*_seed*")] == ["black_box_seed0"]
        # As it says: from the config on.
        assert live.run(live.number("from_notebook")) == ""
        # Trained already: once more changes nothing, and is told.
        assert refused(live.cell(train), "TrialConfig")
    second = read_record(trials / "black_box_seed1")
    assert second["config"]["seed"] == 1 and numbers(second) != numbers(first)
    with lab(project, "03_train_student", run_dir="runs/alone", seed=1, learning_rate=0.01) as live:
        assert live.run() == ""
    alone = read_record(project.root / "runs" / "alone" / "trials" / "black_box_seed1")
    assert numbers(alone) == numbers(second)
    assert read_record(trials / "black_box_seed0") == first


def test_03_interrupted_inside_a_stretch_goes_back_to_the_last_whole_one(project):
    # A stretch of 185 steps: an interrupt must not come after its end on a fast machine.
    many_steps = {"batch_size": 1, "micro_batch_size": 1, "epochs": 15}
    with lab(project, "03_train_student", run_dir="runs/broken", **many_steps) as live:
        train = live.number("measure.stretches()")
        assert live.run(last=train - 1) == ""
        shown, error = live.cell(train, interrupt_at="epoch 5 of 15")
        assert error.startswith("KeyboardInterrupt") and "epoch 10 of 15" not in shown, shown
        shown, error = live.cell(train)
        assert not error and shown.startswith("epoch 10 of 15")
        assert live.run(train + 1) == ""
        broken = read_record(project.root / "runs/broken/trials/black_box_seed0")
        # Nothing is kept before the first stretch's end, or where states are kept less often.
        change(live, run_dir="runs/whole", checkpoint_seconds=3600)
        assert live.run(live.number("from_notebook") + 1, train - 1) == ""
        shown, error = live.cell(train, interrupt_at="epoch 5 of 15")
        assert error.startswith("KeyboardInterrupt"), shown
        assert "steps 186 to 370 were left in their middle, and no state" in live.cell(train)[1]
        assert live.run(live.number("from_notebook")) == ""
    whole = read_record(project.root / "runs/whole/trials/black_box_seed0")
    assert whole["resumed_after"] is None and broken["resumed_after"] == 5
    assert numbers(whole) == numbers(broken) and len(numbers(whole)) == 4


def test_04_writes_a_runs_verdict_into_that_run_alone(project):
    runs = project.root / "runs"
    with lab(project, "03_train_student", run_dir="runs/first", epochs=1) as live:
        assert live.run() == ""
        change(live, distill_type="task_only")
        assert live.run(live.number("from_notebook")) == ""
    shutil.copytree(runs / "first", runs / "second")
    shutil.rmtree(runs / "second" / "trials" / "black_box_seed0")
    with lab(project, "04_analyse_results", run_dir="runs/first") as live:
        write = live.number("written_aside(")
        assert live.run() == ""
        assert live.cell(live.number("from_notebook"))[1] == "", "it can run a second time"
        assert refused(live.cell(write), "AnalysisConfig")
        change(live, run_dir="runs/second", margin_points=50.0)
        assert refused(live.cell(write), "AnalysisConfig")
        live.cell(live.number("find_run("))
        assert refused(live.cell(write), "AnalysisConfig")
        assert not (runs / "second" / "verdict.txt").exists()
        assert live.run(live.number("from_notebook")) == ""
    assert "1 of 1 trials are done" in (runs / "second" / "verdict.txt").read_text()
    assert "2 of 2 trials are done" in (runs / "first" / "verdict.txt").read_text()


def test_05_writes_only_what_its_config_measured(project):
    tiny = {"shapes": "tiny", "bench_rows": 8, "seconds": 1, "run_dir": "runs/speed"}
    with lab(project, "05_measure_speed", **tiny) as live:
        first = live.number('record.begins("caching")')
        assert live.run(last=first - 1) == ""
        change(live, run_dir="runs/other-speed")
        assert refused(live.cell(first), "SpeedConfig")
    assert not (project.root / "runs" / "other-speed").exists()
    assert not (project.root / "runs" / "speed").exists()


def test_a_module_that_changed_under_a_kernel_is_not_recorded_as_what_ran(project, tmp_path):
    for folder in ("kd_utils", "notebooks"):
        rest = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CODE_ROOT / folder, tmp_path / folder, ignore=rest)
    with lab(project, "03_train_student", code=tmp_path, run_dir="runs/edited") as live:
        made = live.number("trial_record.made_from(")
        assert live.run(last=made) == ""
        module = tmp_path / "kd_utils" / "distill" / "meter.py"
        module.write_text(module.read_text() + "\nEDITED = True\n")
        change(live)
        told = live.run(live.number("from_notebook"))
        assert "kd_utils/distill/meter.py was changed after this kernel started" in told
        assert told.endswith("restart the kernel and run all cells")
    assert not (project.root / "runs" / "edited").exists()


def test_01_and_02_write_only_what_their_config_made(project):
    data = project.root / "artifacts" / "data"
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    with lab(project, "01_prepare_data") as live:
        save = live.number("save_prepared(")
        assert live.run(last=save - 1) == ""
        change(live, name="other", train_rows="sst2:10")
        assert refused(live.cell(save), "DataConfig")
        assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    caches = project.root / "artifacts" / "cache"
    known = {path.name for path in caches.iterdir()}
    with lab(project, "02_cache_teacher", attention_dtype="uint8") as live:
        write, tune = live.number("assemble_cache("), live.number("prepare_teacher(")
        assert live.run(last=write - 1) == ""
        # The other model's signals would be cached as this one's.
        change(live, teacher=str(project.root / "student"))
        live.cell(live.number("cache_header("))
        assert refused(live.cell(write), "CacheConfig")
        assert refused(live.cell(tune), "CacheConfig")
        assert {path.name for path in caches.iterdir()} == known
        assert live.run(live.number("from_notebook")) == ""
    [made] = {path.name for path in caches.iterdir()} - known
    cache = TeacherCache(caches / made)
    prepared = load_prepared(data / project.parameters["name"])
    rows = prepared.train.set_index("example_id")
    said = cache.answers().set_index("example_id")["answer"]
    for example_id in cache.splits["train"]:
        row = cache[example_id]
        labelled, own = rows.loc[example_id, ["labelled", "answer"]]
        text = project.tokenizer.decode(row.tokens[row.answer_start : -1])
        assert text == (own if labelled else said[example_id])
    assert (said != rows["answer"])[~rows["labelled"]].any()
