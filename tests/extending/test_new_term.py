"""A new term of the loss by registration alone, through notebook 03.

`cosine_term.py` beside this file is the whole change: a class, one line in the table of methods and
one parameter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from kd_utils.config.notebook_files import notebook_path
from kd_utils.config.project_paths import ROOT

HERE = Path(__file__).parent


def train(project, name, **parameters):
    """Notebook 03 in papermill, with the new module imported in a cell of its own at the front."""
    notebook = json.loads(notebook_path("03_train_student").read_text())
    cell = {"cell_type": "code", "execution_count": None, "id": "plugin", "metadata": {}}
    notebook["cells"].insert(0, {**cell, "outputs": [], "source": ["import cosine_term"]})
    (project.root / "03.ipynb").write_text(json.dumps(notebook))
    given = {"run_dir": str(project.root / "run"), "trial": name, "epochs": 2, **parameters}
    (project.root / "03.yaml").write_text(yaml.safe_dump(project.parameters | given))
    out = project.root / f"{name}.ipynb"
    command = [ROOT / "tests" / "papermill_cli.py", project.root / "03.ipynb", out]
    done = subprocess.run(
        [sys.executable, *map(str, command), "-f", str(project.root / "03.yaml")],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = project.root / "run" / "trials" / name / "metrics.json"
    return json.loads(metrics.read_text()), out.read_text()


def test_a_new_term_trains_and_is_in_the_record(project):
    project.cache()
    record, shown = train(project, "new", distill_type="cosine", gamma_cosine=5.0)
    first, *_, last = record["epochs"]
    assert "cosine of layers 3:2 (teacher:student)" in shown
    assert record["config"]["gamma_cosine"] == last["weight/cosine"] == 5.0
    assert {"train_loss/cosine", "held_out_loss/cosine", "grad_share/cosine"} <= set(last)
    assert 0.05 < last["grad_share/cosine"] < 1, "the term moves the student"
    assert last["held_out_loss/cosine"] < first["held_out_loss/cosine"] < 2


def test_the_new_method_is_compared_with_black_box():
    code = """
import cosine_term
from kd_utils.analysis import comparisons, questions
print(*(method for method, _ in questions.QUESTIONS["white_box"]))
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["hidden_state", "attention", "combined", "cosine"]
