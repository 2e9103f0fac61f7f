"""A record holds only what one whole, unbroken execution made: which orders of cells are refused."""

import json
from types import SimpleNamespace

import pytest

from kd_utils.config import executed_cells, notebook_files
from kd_utils.config.executed_cells import Execution

CONFIG = "config = TrialConfig.from_notebook(globals())"
CELLS = ["import torch", "seed = 0", CONFIG, "model = build()", "train(model)", "write(model)"]


class Kernel:
    """What IPython tells of the cells that it runs."""

    def __init__(self):
        self.events, self.called, self.asked = self, {}, ""

    def get_parent(self):
        return {"content": {"code": self.asked}}

    def register(self, event, function):
        self.called[event] = function

    def run(self, source, then=lambda: None, *, fails=False, **info):
        info = SimpleNamespace(
            **{"raw_cell": source, "silent": False, "store_history": True, **info}
        )
        self.asked = source
        self.called.get("pre_run_cell", lambda info: None)(info)
        try:
            return then()
        finally:
            ended = SimpleNamespace(info=info, success=not fails)
            self.called.get("post_run_cell", lambda result: None)(ended)


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A kernel, and a saved notebook with `CELLS`."""
    cells = [{"cell_type": "code", "source": cell, "metadata": {}} for cell in CELLS]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(notebook_files, "notebook_path", lambda stem: tmp_path / "n.ipynb")
    kernel = Kernel()
    monkeypatch.setattr("IPython.get_ipython", lambda: kernel)
    monkeypatch.setattr(executed_cells, "_runs", [])
    return kernel


def run(kernel, *sources):
    """Run these cells; the last one writes. What is refused, or ""."""
    execution = None
    for source in sources[:-1]:
        if source.lstrip("!") == CONFIG:
            execution = kernel.run(CONFIG, lambda: Execution("n", "from_notebook(globals())"))
        else:
            kernel.run(source.lstrip("!"), fails=source.startswith("!"))
    try:
        kernel.run(sources[-1], execution.require_unbroken)
    except ValueError as error:
        return str(error)
    return ""


_, _, _, MODEL, TRAIN, WRITE = CELLS


@pytest.mark.parametrize(
    "sources",
    [
        CELLS,
        [*CELLS, WRITE],  # the writing cell once more
        [CONFIG, MODEL, MODEL, TRAIN, WRITE],  # again right after itself
        [CONFIG, MODEL, f"!{TRAIN}", TRAIN, WRITE],  # interrupted, and done anew
        [CONFIG, TRAIN, WRITE, CONFIG, MODEL, TRAIN, WRITE],  # a new start mends what was broken
        [CONFIG, MODEL, f"  {TRAIN}\n", WRITE],  # blanks around a cell
        [CONFIG, MODEL, TRAIN],  # a prefix: the cell that trains asks too
    ],
)
def test_one_whole_execution_may_write(kernel, sources):
    assert run(kernel, *sources) == ""


@pytest.mark.parametrize(
    "sources, words",
    [
        ([*CELLS, "seed = 1", CONFIG, WRITE], f"the cell `{MODEL}` was left out"),
        ([*CELLS, "seed = 1", CONFIG, TRAIN, WRITE], f"the cell `{MODEL}` was left out"),
        ([CONFIG, MODEL, TRAIN, MODEL, WRITE], f"the cell `{MODEL}` was run again after later"),
        ([CONFIG, MODEL, TRAIN, MODEL, TRAIN, WRITE], f"the cell `{MODEL}` was run again after"),
        ([CONFIG, MODEL, f"!{TRAIN}", WRITE], f"the cell `{TRAIN}` was not run to its end"),
        ([CONFIG, f"!{MODEL}", TRAIN, WRITE], f"the cell `{MODEL}` was not run to its end"),
        (
            [CONFIG, MODEL, "train(model, 2)", WRITE],
            "the cell `train(model, 2)` is not in notebooks",
        ),
        ([CONFIG, MODEL, TRAIN, "model.zero()", WRITE], "the cell `model.zero()` is not in"),
        ([CONFIG, "seed = 1", MODEL, TRAIN, WRITE], "the cell `seed = 1` is not in"),
    ],
)
def test_whatever_else_is_refused_and_told_from_where_to_run(kernel, sources, words):
    told = run(kernel, *sources)
    assert told.startswith(words)
    assert told.endswith("run again from the cell with `from_notebook(globals())` on")
    assert "\n" not in told


def test_a_cell_before_the_config_is_not_said_to_be_missing(kernel):
    assert run(kernel, *CELLS, CELLS[1], WRITE).startswith(
        "the cell `seed = 0` was run after the config was made: nothing is written; run again"
    )


def test_a_notebook_that_was_saved_with_other_cells_meanwhile_is_not_what_runs(kernel, tmp_path):
    """Its code would be recorded, although the cells ran as they were."""
    path = tmp_path / "n.ipynb"
    execution = kernel.run(CONFIG, lambda: Execution("n", "from_notebook(globals())"))
    earlier = path.read_text()
    path.write_text(earlier.replace("seed = 0", "seed = 1"))  # the parameters of the next trial
    execution.require_as_saved()
    path.write_text(earlier.replace("train(model)", "train(model, 2)"))
    with pytest.raises(ValueError, match="n.ipynb was saved with other cells after the config"):
        execution.require_as_saved()
    path.write_text(earlier)
    execution.require_as_saved()


def test_what_a_tool_runs_silently_is_no_cell(kernel):
    execution = kernel.run(CONFIG, lambda: Execution("n", "from_notebook(globals())"))
    kernel.run("dir()", silent=True)
    kernel.run("%who", store_history=False)
    kernel.run(" ")
    kernel.run(MODEL)
    kernel.run(TRAIN, execution.require_unbroken)


def test_nbval_which_keeps_no_history_runs_a_notebook_like_anybody(kernel):
    def run(source, then=lambda: None):
        return kernel.run(source, then, store_history=False)

    execution = run(CONFIG, lambda: Execution("n", "from_notebook(globals())"))
    run(MODEL)
    run(TRAIN, execution.require_unbroken)
    run(MODEL)
    with pytest.raises(ValueError, match="was run again after later cells"):
        run(WRITE, execution.require_unbroken)


def test_outside_of_a_kernel_nothing_is_refused(monkeypatch):
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    Execution("03_train_student", "from_notebook(globals())").require_unbroken()
