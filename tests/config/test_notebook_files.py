"""Parameters cells as people leave them in JupyterLab: each is run as it is, or refused in one line
that names notebook and cell.
"""

import json

import nbformat
import pytest

from kd_utils.__main__ import main
from kd_utils.config import notebook_files, parameter_files
from kd_utils.config.stages import NOTEBOOKS, SWEPT
from kd_utils.config.trial import TrialConfig
from kd_utils.sweep.planning import plan

STEM, CELL = "03_train_student", "notebooks/03_train_student.ipynb, cell 3"


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Edits copies of the real notebooks, and returns the parameters cell and the cells of 03."""
    real = notebook_files.notebook_path("x").parent
    monkeypatch.setattr(notebook_files, "notebook_path", lambda stem: tmp_path / f"{stem}.ipynb")
    for path in real.glob("*.ipynb"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def edit(change, stem=STEM):
        notebook = nbformat.read(tmp_path / f"{stem}.ipynb", 4)
        [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        change(cell, notebook.cells)
        nbformat.write(notebook, tmp_path / f"{stem}.ipynb")

    return edit


def said():
    with pytest.raises(ValueError) as caught:
        plan({}, {"seed": [0]}, "runs/x")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_each_notebook_assigns_the_projects_defaults(stem):
    values, project = notebook_files.notebook_defaults(stem), NOTEBOOKS[stem]().model_dump()
    assert values == project
    assert {key: type(value) for key, value in values.items()} == {
        key: type(value) for key, value in project.items()
    }
    assert parameter_files.changed_defaults([stem]) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("learning_rate = 2e-3", "learning_rate = 2 * 1e-3", "'learning_rate = 2 * 1e-3', must be"),
        ("epochs = 8", "epochs: int = 3", "'epochs: int = 3', must be NAME = VALUE"),
        ("epochs = 8", "epochs = int('3')", "must be NAME = VALUE"),
        ("epochs = 8", "epochs = None", "'epochs = None', must be NAME = VALUE"),
        ("epochs = 8", "epochs = [3]", "must be NAME = VALUE"),
        ("epochs = 8", "epochs = f'3'", "must be NAME = VALUE"),
        ("epochs = 8", "epochs = batch_size = 3", "must be NAME = VALUE"),
        ("epochs = 8", "epochs, batch_size = 3, 8", "must be NAME = VALUE"),
        ("epochs = 8", "epochs = 3\nepochs += 1", "'epochs += 1', must be NAME = VALUE"),
        ("epochs = 8", "if True:\n    epochs = 3", "must be NAME = VALUE"),
        ("epochs = 8", "print(1)\nepochs = 3", "'print(1)', must be NAME = VALUE"),
        ("name =", "import os\nname =", "line 1, 'import os', must be NAME = VALUE"),
        ("name =", "%load_ext autoreload\nname =", "line 1, '%load_ext autoreload', must be"),
        ("name =", "!ls\nname =", "line 1, '!ls', must be NAME = VALUE"),
        ("epochs = 8", "epochs = = 3", "'epochs = = 3', must be NAME = VALUE"),
        ("epochs = 8", "epochs = 3\nepochs = 5", "epochs must be assigned once, and line"),
        ("epochs = 8", "# epochs = 3", "epochs must be assigned: restore"),
        ("epochs = 8", "epochs = '3'", "epochs = '3' must be a whole number (int), got text (str)"),
        ("epochs = 8", "epochs = 3.0", "epochs = 3.0 must be a whole number (int), got a number"),
        ("epochs = 8", "epochs = True", "epochs = True must be a whole number (int), got true or"),
        ("save_student = True", "save_student = 1", "must be true or false (bool), got a whole"),
        ("epochs = 8", "epochs = 0", "epochs = 0: Input should be greater than or equal to 1"),
        ("epochs = 8", "epochs = 3\nepoch = 5", "epoch = 5: no such parameter, did you mean"),
    ],
)
def test_a_cell_that_is_not_plain_is_named_with_its_notebook(edited, old, new, words):
    edited(lambda cell, _: cell.update(source=cell.source.replace(old, new)))
    text = said()
    assert text.startswith(f"{CELL}: ") and words in text, text


def test_the_tag_is_on_one_cell(edited):
    edited(lambda cell, cells: cells.insert(3, nbformat.from_dict({**cell, "id": "copy"})))
    assert said().startswith("notebooks/03_train_student.ipynb, cells 3, 4: only one cell must")


def test_a_lost_tag_is_missed_on_the_cell_that_had_it(edited):
    edited(lambda cell, _: cell.metadata.update(tags=[]))
    assert said().startswith(f"{CELL}: one cell must have the tag `parameters`, and none has")


def test_a_tag_on_a_text_cell_is_no_tag(edited):
    edited(
        lambda cell, cells: (
            cell.metadata.update(tags=[]),
            cells[0].metadata.update(tags=["parameters"]),
        )
    )
    assert "one cell must have the tag" in said()


def test_what_papermill_injected_does_not_stay_in_a_source(edited):
    tags = {"tags": ["injected-parameters"]}
    cell = nbformat.v4.new_code_cell("# Parameters\nepochs = 9", metadata=tags)
    edited(lambda _, cells: cells.insert(3, cell))
    assert "cell 4: values that papermill injected" in said()


def test_a_parameter_is_not_assigned_again_before_the_config_is_made(edited):
    edited(lambda _, cells: cells.insert(3, nbformat.v4.new_code_cell("epochs = 1")))
    assert said().startswith("notebooks/03_train_student.ipynb, cell 4: epochs must be assigned in")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"cells": 3}', '{"cells": [3]}', '{"worksheets": []}']
)
def test_a_file_that_is_no_notebook_is_named(edited, tmp_path, text):
    (tmp_path / f"{STEM}.ipynb").write_text(text)
    assert said().startswith("notebooks/03_train_student.ipynb")


def test_a_notebook_that_no_sweep_executes_stops_none(edited):
    edited(lambda cell, _: cell.update(source="import os"), "06_any_teacher")
    assert plan({}, {"seed": [0]}, "runs/x")
    with pytest.raises(ValueError, match="TrialConfig: epochs = 0"):
        plan({"epochs": 0}, {"seed": [0]}, "runs/x")
    with pytest.raises(ValueError, match="AlignmentConfig: map_head = -1"):
        plan({"map_head": -1}, {"seed": [0]}, "runs/x")


def test_a_default_that_differs_is_run_and_told_and_strictly_refused(edited, tmp_path, capsys):
    edited(lambda cell, _: cell.update(source=cell.source.replace("epochs = 8", "epochs = 1")))
    line = "03_train_student: epochs = 1 in the notebook, the project's default is 8"
    assert parameter_files.changed_defaults(SWEPT) == [line]
    [trial] = plan({}, {"seed": [0]}, "runs/x")
    assert trial.epochs == 1
    [other] = plan({"epochs": 3}, {"seed": [0]}, "runs/x")  # papermill has to inject it
    assert other.epochs == other.parameters["epochs"] == 3

    (tmp_path / "p.yaml").write_text("name: other")
    sweep = ["sweep", str(tmp_path / "p.yaml"), "--run-dir", str(tmp_path / "run"), "--dry-run"]
    assert main(sweep) == 0 and capsys.readouterr().err.splitlines() == [line]
    assert main([*sweep, "--strict"]) == 2
    refused = capsys.readouterr()
    assert refused.err.startswith(f"error: {line}: restore notebooks/") and not refused.out


def test_source_of_one_line_per_cell_or_of_several_is_the_same(edited, tmp_path):
    """nbformat writes a list of lines, others one string."""
    path = tmp_path / f"{STEM}.ipynb"
    document, values = json.loads(path.read_text()), notebook_files.notebook_defaults(STEM)
    for cell in document["cells"]:
        cell["source"] = "".join(cell["source"])
    path.write_text(json.dumps(document))
    assert notebook_files.notebook_defaults(STEM) == values


@pytest.mark.parametrize(
    ("cells", "refused"),
    [
        (["epochs = 3", "# Parameters\nepochs = 5"], False),
        (
            ["# Parameters\nepochs = 5", "epochs = 3"],
            True,
        ),  # the tag was lost: papermill's is first
        (["epochs = 3", "# Parameters\nepochs = 5", "epochs = 3"], True),  # two cells had it
    ],
)
def test_an_injected_value_that_was_assigned_again_is_refused(cells, refused):
    namespace = TrialConfig().model_dump()
    for source in cells:
        exec(source, namespace)
    namespace["In"] = cells
    if not refused:
        assert TrialConfig.from_notebook(namespace).epochs == 5
        return
    with pytest.raises(ValueError, match="epochs = 3, but 5 was injected: a later cell must not"):
        TrialConfig.from_notebook(namespace)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("epochs", "many", "should be a valid integer, got text (str)"),
        ("epochs", 1.5, "should be a valid integer, got a number (float)"),
        ("learning_rate", "fast", "should be a valid number, got text (str)"),
        ("learning_rate", None, "should be a valid number, got nothing (NoneType)"),
        ("save_student", 1, "should be true or false, got a whole number (int)"),
        ("save_student", "yes", "should be true or false, got text (str)"),
        ("teacher", 7, "should be text, got a whole number (int): put it in quotes"),
        ("trial", True, "should be text, got true or false (bool): put it in quotes"),
        ("seed", True, "should be a number, not true or false"),
        ("seed", b"1", "should be a number, got a value (bytes)"),
    ],
)
def test_a_wrong_type_is_called_a_wrong_type(key, value, words):
    with pytest.raises(ValueError) as caught:
        TrialConfig(**{key: value})
    assert str(caught.value) == f"TrialConfig: {key} = {value!r}: Input {words}"


def test_text_that_papermill_passes_for_true_or_false_is_that():
    assert TrialConfig(save_student="false").save_student is False  # papermill ... -p save_student
