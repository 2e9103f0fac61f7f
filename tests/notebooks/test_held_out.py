"""No validation row chooses anything: with other answers to them, a trial and its teacher are the
same to the last bit, and only what is measured at the end differs.
"""

import json
from dataclasses import replace

import pytest
from safetensors.numpy import load_file
from small_project import small_project

from kd_utils.analysis.retention import uninformed_tasks
from kd_utils.config.notebook_files import notebook_defaults, notebook_path
from kd_utils.data.prepared_data import load_prepared, save_prepared
from kd_utils.records.trial_record import read_record

TIMES = ("seconds", "tok_per_sec")
AT_THE_END = ("validation_", "token_accuracy", "calibration_error")
#: Means over a stretch.
TRAINED = (
    "train_loss",
    "train_loss/task",
    "train_loss/kd",
    "train_loss/hidden",
    "train_loss/attention",
)
PARAMETERS = {
    "train_rows": "sst2:16 gsm8k:8",
    "labelled": "1",
    "validation_rows": "sst2:8 gsm8k:4",
    "max_length": 200,
    "teacher_epochs": 1,
    "epochs": 2,
    "evaluations": 3,
    "batch_size": 4,
    "max_new_tokens": 4,
    "lr_schedule": "cosine",
    "warmup_ratio": 0.2,
    "average_last": 0.4,
    "distill_type": "combined",
}


def scrambled(tables):
    """The same rows; every validation row has the answer of its task's last one."""
    table = tables["validation"]
    last = table.groupby("task")[["answer", "gold"]].transform("last")
    return {**tables, "validation": table.assign(**last)}


def run(project, stem, **changes):
    """The notebook's cells in this process, which spares the start of a kernel."""
    known = notebook_defaults(stem).keys()
    values = project.parameters | changes
    given = {key: value for key, value in values.items() if key in known}
    namespace = {"display": lambda shown: None}
    for cell in json.loads(notebook_path(stem).read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            namespace |= given


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The projects, after 02 and 03: with the true validation answers, and with others."""
    made = []
    for name in ("true", "scrambled"):
        root = tmp_path_factory.mktemp(name)
        project = small_project(root, run_dir=str(root / "run"), **PARAMETERS)
        if name == "scrambled":
            folder = root / "artifacts" / "data" / "tiny"
            prepared = load_prepared(folder)
            save_prepared(replace(prepared, **scrambled(prepared.tables)), folder)
        run(project, "02_cache_teacher")
        run(project, "03_train_student")
        made.append(project)
    return made


def weights(project, pattern):
    [path] = (project.root / "artifacts").glob(pattern)
    return {name: value.tobytes() for name, value in load_file(path).items()}


def rows(project):
    return read_record(project.root / "run" / "trials" / "combined_seed0")["epochs"]


def test_the_teacher_and_its_signals_are_the_same(both):
    assert weights(both[0], "teachers/*/*.safetensors") == weights(
        both[1], "teachers/*/*.safetensors"
    )
    sums = []
    for project in both:
        [path] = (project.root / "artifacts" / "cache").glob("*/manifest.json")
        shards = json.loads(path.read_text())["checksums"]
        sums.append({name: value for name, value in shards.items() if "parquet" in name})
    splits = [{name.rsplit("-", 1)[0] for name in found} for found in sums]
    assert splits[0] == splits[1] >= {"train", "held_out", "validation"}
    differ = {name for name in sums[0] if sums[0][name] != sums[1][name]}
    assert differ and all(name.startswith("validation") for name in differ)


def test_what_the_teacher_is_said_to_know_is_the_same(both):
    """A verdict leaves out the tasks of which it knows nothing."""
    found = []
    for project in both:
        [path] = (project.root / "artifacts" / "cache").glob("*/manifest.json")
        found.append(json.loads(path.read_text())["teacher_accuracy"])
    differ = {key for key in found[0] if found[0][key] != found[1][key]}
    assert differ and all(key.startswith("validation_") for key in differ)
    known = {"held_out_accuracy/sst2", "held_out_rows/sst2", "held_out_accuracy/gsm8k"}
    assert known <= set(found[0])
    counts = {"sst2": 8, "gsm8k": 4}
    assert uninformed_tasks(found[0], counts) == uninformed_tasks(found[1], counts)


def test_the_student_and_all_that_was_measured_while_it_trained_are_the_same(both):
    assert weights(both[0], "students/run*/*/model.safetensors") == weights(
        both[1], "students/run*/*/model.safetensors"
    )
    found = [
        [{key: value for key, value in row.items() if key not in TIMES} for row in rows(project)]
        for project in both
    ]
    assert [row["step"] for row in found[0]] == [4, 8, 10, 12]
    for one, other in zip(*found, strict=True):
        chosen_by = [
            {k: v for k, v in row.items() if not k.startswith(AT_THE_END)} for row in (one, other)
        ]
        assert chosen_by[0] == chosen_by[1] and "held_out_accuracy/macro" in one


def test_validation_rows_are_measured_in_the_last_row_alone(both):
    *before, last = rows(both[0])
    assert not [key for row in before for key in row if key.startswith(AT_THE_END)]
    assert {"validation_loss/kd", "validation_accuracy/macro", "token_accuracy/gsm8k"} <= set(last)
    assert "calibration_error/sst2" in last and last["epoch"] == PARAMETERS["epochs"]
    assert last["validation_loss"] != rows(both[1])[-1]["validation_loss"]
    assert [round(row["learning_rate"], 9) for row in [*before, last]][-1] == 0.0


def test_how_often_a_student_is_measured_changes_no_weight(both):
    project = both[0]
    run(project, "03_train_student", run_dir=str(project.root / "seldom"), evaluations=1)
    record = read_record(project.root / "seldom" / "trials" / "combined_seed0")
    assert [row["step"] for row in record["epochs"]] == [10, 12]
    of_both = [
        weights(project, f"students/{name}*/*/model.safetensors") for name in ("run", "seldom")
    ]
    assert of_both[0] == of_both[1]
    often, seldom = rows(project)[-1], record["final"]
    assert {k for k in often if often[k] != seldom.get(k)} <= {*TIMES, *TRAINED}
