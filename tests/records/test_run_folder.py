"""A run's folder, read back: what is planned, what is done and why not, and tables that hold
nothing else.
"""

import numpy as np
import pytest
from stubs import MADE, PREDICTIONS, metrics_of, write_notebook, write_plan, write_trial

from kd_utils.config import project_paths
from kd_utils.records import run_folder, trial_record
from kd_utils.store.sealed import RecordError, write_sealed

HASH = metrics_of("attention", 0)["config_hash"]


def test_status_says_why_a_trial_is_not_done(run_dir):
    trials = run_dir / "trials"

    def status(config_hash=HASH, trial="attention_seed0", **made):
        return run_folder.trial_status(run_dir, trial, config_hash, made)

    assert status() == ("done", "") == status(**MADE)
    assert status("d" * 16) == ("stale", "config changed (config_hash)")
    parameters = {"name": "other", "student": "larger", "seed": 0}
    why = run_folder.trial_status(run_dir, "attention_seed0", "d" * 16, parameters=parameters).why
    assert why == "config changed (student was 'tiny', is 'larger')"
    assert status(trial="combined_seed9") == ("missing", "")
    (trials / "attention_seed1.ipynb").replace(trials / "attention_seed0.ipynb")
    assert status() == ("stale", "the notebook is from another execution than metrics.json")
    write_notebook(
        trials / "attention_seed0.failed.ipynb", {"failure": "ValueError:\n loss is nan"}
    )
    assert status() == ("failed", "ValueError: loss is nan")
    for text in ("{}", "", "[" * 100_000, '{"metadata": {"kd_utils": {"failure": 7}}}'):
        (trials / "attention_seed0.failed.ipynb").write_text(text)
        assert status() == ("failed", "attention_seed0.failed.ipynb does not say why")


def test_a_notebook_of_an_earlier_execution_of_the_same_trial_does_not_do(run_dir):
    notebook = run_dir / "trials" / "attention_seed0.ipynb"
    earlier, record = (
        notebook.read_bytes(),
        run_folder.read_notebook(notebook)["metadata"]["kd_utils"]["record"],
    )
    write_trial(run_dir, "attention", 0, accuracy=0.99)
    notebook.write_bytes(earlier)
    assert run_folder.trial_status(run_dir, "attention_seed0", HASH).why.startswith(
        "the notebook is from another execution"
    )
    write_trial(run_dir, "attention", 0, accuracy=0.25)  # as it was
    assert run_folder.trial_status(run_dir, "attention_seed0", HASH).state == "done"
    write_notebook(notebook, {"config_hash": "d" * 16, "record": record})
    assert run_folder.trial_status(run_dir, "attention_seed0", HASH).why.startswith(
        "the notebook is from another execution"
    )


def test_a_whole_record_goes_before_an_older_failure(run_dir):
    write_notebook(run_dir / "trials" / "attention_seed0.failed.ipynb", {"failure": "KeyError: 1"})
    assert run_folder.trial_status(run_dir, "attention_seed0", HASH).state == "done"


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (
            {"cache": {"name": "n", "content_hash": "l" * 64}},
            "teacher cache changed (experiment)",
        ),
        (
            {"more_caches": {"other": "l" * 64}},
            "teacher cache changed (other)",
        ),
        (
            {"tokenizer": "u" * 16},
            "student changed (tokenizer was 'tttttttttttttttt', is 'uuuuuuuuuuuuuuuu')",
        ),
        (
            {"students": {"tiny": "g" * 64}},
            "student changed (initial weights of tiny)",
        ),
        ({"code": {"kd_utils/losses.py": "1" * 12}}, "code changed (kd_utils/losses.py)"),
        (
            {"code": {**MADE["code"], "kd_utils/student.py": "1" * 12}},
            "code changed (kd_utils/student.py)",
        ),
        (
            {"code": {"kd_utils/new.py": "1" * 12}},
            "code changed (kd_utils/losses.py, kd_utils/new.py)",
        ),
    ],
)
def test_a_trial_of_another_cache_student_or_code_is_stale(run_dir, made, why):
    assert run_folder.trial_status(run_dir, "attention_seed0", HASH, made) == (
        "stale",
        why,
    )
    write_plan(
        run_dir,
        **made,
    )
    assert {state for _, state in run_folder.trials_with_status(run_dir)} == {("stale", why)}
    assert run_folder.done_records(run_dir) == []


def test_an_experiment_called_as_an_ingredient_is_not_taken_for_it(run_dir):
    metrics = metrics_of("attention", 0) | {"more_caches": {"tokenizer": "m" * 64}}
    trial_record.write_record(run_dir / "trials" / "attention_seed0", metrics, PREDICTIONS)
    sha256 = trial_record.read_record(run_dir / "trials" / "attention_seed0")["checksums"]["sha256"]
    write_notebook(
        run_dir / "trials" / "attention_seed0.ipynb", {"config_hash": HASH, "record": sha256}
    )
    made = MADE | {"more_caches": {"tokenizer": "m" * 64}}
    assert run_folder.trial_status(run_dir, "attention_seed0", HASH, made) == ("done", "")


def test_what_a_plan_does_not_ask_for_does_not_count(run_dir):
    assert (
        run_folder.trial_status(
            run_dir, "attention_seed0", HASH, {"students": {"other": "x"}}
        ).state
        == "done"
    )
    write_plan(run_dir, cache=None, students={}, code={})
    assert {state for _, state in run_folder.trials_with_status(run_dir)} == {("done", "")}


def test_a_record_without_code_and_student_is_stale_where_they_are_asked_for(run_dir):
    metrics = {
        key: value
        for key, value in metrics_of("attention", 0).items()
        if key not in ("code", "student")
    }
    trial_record.write_record(run_dir / "trials" / "attention_seed0", metrics, PREDICTIONS)
    sha256 = trial_record.read_record(run_dir / "trials" / "attention_seed0")["checksums"]["sha256"]
    write_notebook(
        run_dir / "trials" / "attention_seed0.ipynb", {"config_hash": HASH, "record": sha256}
    )
    assert run_folder.trial_status(run_dir, "attention_seed0", HASH) == ("done", "")
    for made in ({"code": MADE["code"]}, {"students": MADE["students"]}):
        assert run_folder.trial_status(run_dir, "attention_seed0", HASH, made).state == "stale"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (None, "is not a notebook"),
        (7, "is not a notebook"),
        (["a"], "is not a notebook"),
        ([{}], "is not a notebook"),
        (
            [{"cell_type": "code", "source": [1], "outputs": [], "execution_count": 1}],
            "is not a notebook",
        ),
        (
            [{"cell_type": "code", "source": "1", "outputs": None, "execution_count": 1}],
            "is not a notebook",
        ),
        (
            [{"cell_type": "code", "source": "1", "outputs": [], "execution_count": None}],
            "cell 1 was not run",
        ),
        (
            [
                {
                    "cell_type": "code",
                    "source": "1",
                    "execution_count": 1,
                    "outputs": [{"output_type": "error", "ename": "KeyError", "evalue": "'x'"}],
                }
            ],
            "cell 1 ended with KeyError: 'x'",
        ),
    ],
)
def test_a_notebook_that_did_not_run_to_its_end_is_refused(tmp_path, cells, message):
    write_sealed(tmp_path / "n.ipynb", {"cells": cells, "metadata": {}}, "metadata.kd_utils")
    with pytest.raises(RecordError, match=f"n.ipynb:? {message}"):
        run_folder.read_notebook(tmp_path / "n.ipynb")


def without(key):
    planned = {"trial": "a", "swept": {"distill_type": "attention", "seed": 0}, "config_hash": "c"}
    return {name: value for name, value in planned.items() if name != key}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 0}, "sweep.json is not a plan of format 1"),
        ({"trials": None}, "sweep.json: trials: "),
        ({"trials": ["attention_seed0"]}, "sweep.json: trials.0: "),
        *(
            ({"trials": [without(key)]}, f"sweep.json: trials.0.{key}: Field required")
            for key in ("trial", "swept", "config_hash")
        ),
        *(
            ({"trials": [without("") | {"trial": name}]}, "sweep.json: trials.0.trial: ")
            for name in (
                "../x",
                "..",
                "",
                "/etc",
                "a/b",
                "a\n",
                "a\0",
                ".hidden",
                "-rf",
                "a" * 201,
                7,
            )
        ),
        (
            {"trials": [without("") | {"swept": {"seed": 0}}]},
            "sweep.json: trials.0.swept.distill_type: Field required",
        ),
        (
            {"trials": [without("") | {"swept": {"distill_type": "a", "seed": "0"}}]},
            "sweep.json: trials.0.swept.seed: ",
        ),
        ({"trials": [without("") | {"config_hash": None}]}, "sweep.json: trials.0.config_hash: "),
        ({"cache": "k"}, "sweep.json: cache: "),
        ({"cache": {"name": "n"}}, "sweep.json: cache.content_hash: Field required"),
        ({"students": ["tiny"]}, "sweep.json: students: "),
        ({"code": {"kd_utils/losses.py": 1}}, "sweep.json: code.kd_utils/losses.py: "),
    ],
)
def test_a_plan_of_another_shape_is_one_line(tmp_path, changes, message):
    write_plan(tmp_path, **changes)
    with pytest.raises(RecordError) as raised:
        run_folder.read_plan(tmp_path)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["cache", "trials", "format"])
def test_a_plan_without_a_key_is_refused(tmp_path, key):
    plan = write_plan(tmp_path)
    del plan[key]
    write_sealed(tmp_path / run_folder.PLAN, plan, "checksums")
    with pytest.raises(RecordError, match="sweep.json(: trials|: cache| is not a plan)"):
        run_folder.read_plan(tmp_path)


def test_an_older_plan_needs_no_students_and_no_code(tmp_path):
    plan = write_plan(tmp_path)
    del plan["students"], plan["code"]
    write_sealed(tmp_path / run_folder.PLAN, plan, "checksums")
    assert len(run_folder.read_plan(tmp_path)["trials"]) == 4
    assert {state for _, state in run_folder.trials_with_status(tmp_path)} == {("missing", "")}


def test_collect_has_a_row_per_planned_trial(run_dir):
    (run_dir / "trials" / "black_box_seed1" / "predictions.parquet").unlink()
    write_notebook(run_dir / "trials" / "black_box_seed1.failed.ipynb", {"failure": "KeyError: 1"})
    table = run_folder.collect(run_dir)
    assert table.columns.tolist() == [
        "trial",
        "config/distill_type",
        "config/seed",
        "status",
        "why",
        "epoch",
        "train_loss",
        "validation_accuracy",
        "validation_accuracy/sst2",
        "validation_accuracy/gsm8k",
        "seconds",
        "peak_memory_mb",
        "config_hash",
    ]
    assert table["status"].tolist() == ["done", "failed", "done", "done"]
    assert table["seconds"].tolist()[0] == 21.5, "of the whole trial, not of its last epoch"
    assert np.isnan(table["validation_accuracy"][1])
    means = table.groupby("config/distill_type")["validation_accuracy"].agg(["mean", "count"])
    assert means.loc["attention"].tolist() == [0.5, 2] and means.loc["black_box"].tolist() == [
        0.25,
        1,
    ]


def test_a_stale_trial_gives_no_value(run_dir):
    write_trial(
        run_dir, "attention", 1, cache={"name": "n", "content_hash": "other"}, accuracy=0.99
    )
    row = run_folder.collect(run_dir).set_index("trial").loc["attention_seed1"]
    assert row["status"] == "stale" and np.isnan(row["validation_accuracy"])
    assert 0.99 not in [r["final"]["validation_accuracy"] for r in run_folder.done_records(run_dir)]


def test_collect_without_a_plan_reads_what_is_there(tmp_path):
    assert len(run_folder.collect(tmp_path)) == 0
    trial_record.write_record(tmp_path / "trials" / "attention_seed3", metrics_of(), PREDICTIONS)
    table = run_folder.collect(tmp_path)
    assert table[["trial", "config/distill_type", "config/seed", "status"]].values.tolist() == [
        ["attention_seed3", "attention", 3, "done"]
    ]
    (tmp_path / "trials" / "attention_seed3" / "predictions.parquet").write_bytes(b"")
    assert run_folder.collect(tmp_path)["status"].tolist() == ["broken"]


def test_a_metric_with_the_name_of_another_column_does_not_take_its_place(run_dir):
    epoch = {
        "epoch": 1,
        "status": 5,
        "trial": 6,
        "config/seed": 7,
        "config_hash": 8,
        "validation_accuracy": 0.5,
    }
    write_trial(run_dir, "attention", 1, epochs=[epoch], final=epoch)
    row = run_folder.collect(run_dir).set_index("trial").loc["attention_seed1"]
    assert (row["status"], row["config/seed"], row["validation_accuracy"]) == ("done", 1, 0.5)


def test_done_records_know_their_place_in_the_grid(run_dir):
    assert [record["swept"] for record in run_folder.done_records(run_dir)] == [
        {"distill_type": method, "seed": seed}
        for method in ("black_box", "attention")
        for seed in (0, 1)
    ]


def test_predictions_of_all_trials_in_one_table(run_dir):
    table = run_folder.predictions(run_dir)
    assert table.columns.tolist()[:4] == ["trial", "distill_type", "seed", "example_id"]
    assert len(table) == 8 and table.groupby(["distill_type", "seed"]).size().tolist() == [2] * 4
    with pytest.raises(RecordError, match="no trial of none is done"):
        run_folder.predictions(run_dir / "none")


def test_the_runs_that_measured_rest_are_beside_the_run_and_the_newest_comes_first(tmp_path):
    folders = {
        "2026-01-02-toy-rest": "2026-01-02T00:00:00+00:00",
        "toy-rest": "2026-01-03T00:00:00+00:00",
        "2026-01-01-toy-rest-long": "2026-01-01T00:00:00+00:00",
        "toy-restless": "2026-01-04T00:00:00+00:00",
        "other-rest": "2026-01-04T00:00:00+00:00",
    }
    for name, started in folders.items():
        write_trial(tmp_path / name, started=started)
    (tmp_path / "2026-01-05-toy-rest").mkdir()
    (tmp_path / "2026-01-05-toy-rest" / "sweep.json").write_text("damaged")
    found = [
        (name, len(records)) for name, records, _ in run_folder.rest_runs(tmp_path / "toy", "toy")
    ]
    assert found == [("toy-rest", 1), ("2026-01-02-toy-rest", 1), ("2026-01-01-toy-rest-long", 1)]


def test_the_runs_that_share_the_cache_of_a_measured_rest_come_with_it(tmp_path):
    other = {"name": "toy-2026-01-01-11111111", "content_hash": "z" * 64}
    write_trial(tmp_path / "2026-01-01-toy-rest", seed=1)
    write_trial(tmp_path / "2026-01-01-toy", seed=2)
    write_trial(tmp_path / "mine", seed=3)
    write_trial(tmp_path / "toy", seed=4, cache=other)
    write_trial(tmp_path / "elsewhere", seed=5)
    [(name, records, beside)] = run_folder.rest_runs(tmp_path / "mine", "toy")
    assert name == "2026-01-01-toy-rest" and len(records) == 1
    assert [record["config"]["seed"] for record in beside] == [2, 3]


def test_analysed_runs_of_a_name_are_the_working_one_and_the_newest_records(tmp_path, monkeypatch):
    monkeypatch.setattr(project_paths, "ROOT", tmp_path)
    for name in ("toy", "2026-01-01-toy", "2026-01-02-toy", "2026-01-03-toy-x", "2026-01-04-toy"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if not name.startswith("2026-01-04"):
            (tmp_path / "runs" / name / run_folder.COMPARISONS).touch()
    names = [path.name for path in run_folder.analysed("toy-x", "toy")]
    assert names == ["2026-01-03-toy-x", "toy", "2026-01-02-toy", "2026-01-01-toy"]
