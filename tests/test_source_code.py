"""Digests of code: what can change a result changes them and is named, what cannot does not."""

import json

import pytest

from kd_utils import config, parameters, source_code
from kd_utils.source_code import changed, code_of

NOTEBOOK = [("markdown", "# Title\nThis is no Python."),
            ("code", "%matplotlib inline\n!ls\nfrom kd_utils import direct\nimport torch"),
            ("parameters", "alpha = 1.0"),
            ("code", "from kd_utils.other import value\nresult = direct.f(alpha) + value")]
MODULES = {
    "direct": '"""About."""\nfrom .indirect import g\n\n\ndef f(x):\n    """Its text."""\n    return g(x)  # why\n',
    "indirect": "import kd_utils.dotted\n\n\ndef g(x):\n    from . import late\n    return late.h(x)\n",
    "dotted": "class Table:\n    '''Of rows.'''\n    rows = 3\n",
    "late": "from json import dumps\n\n\ndef h(x):\n    return 2 * x\n",
    "other": "value = 1\n",
    "unused": "value = 2\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of six modules beside a notebook; the function returned writes it, with changes, and gives its code."""
    monkeypatch.setattr(source_code, "PACKAGE", tmp_path)
    monkeypatch.setattr(parameters, "notebook_path", lambda stem: tmp_path / f"{stem}.ipynb")

    def code(cells=(), start=None, **modules):
        for name, text in {**MODULES, **modules}.items():
            (tmp_path / f"{name}.py").write_text(text)
        written = [{"cell_type": "markdown" if kind == "markdown" else "code", "source": text.splitlines(True),
                    "metadata": {"tags": ["parameters"]} if kind == "parameters" else {}}
                   for kind, text in (cells or NOTEBOOK)]
        (tmp_path / "n.ipynb").write_text(json.dumps({"cells": written}))
        return code_of("n", start)

    return code


def cells(number, kind, text):
    return [*NOTEBOOK[:number], (kind, text), *NOTEBOOK[number + 1:]]


def test_code_is_the_notebook_and_all_that_it_reaches(package):
    code = package()
    assert list(code) == ["notebooks/n.ipynb", *(f"kd_utils/{name}.py" for name in (
        "direct", "dotted", "indirect", "late", "other"))]
    assert all(len(digest) == 12 and int(digest, 16) for digest in code.values())


@pytest.mark.parametrize("modules", [
    {"direct": MODULES["direct"].replace("  # why", "")},
    {"direct": MODULES["direct"].replace("  # why", "  # because")},
    {"direct": MODULES["direct"].replace('"""Its text."""', '"""Other text."""')},
    {"direct": MODULES["direct"].replace('    """Its text."""\n', "")},
    {"direct": MODULES["direct"].replace('"""About."""\n', "")},
    {"dotted": MODULES["dotted"].replace("Of rows.", "Of\n    columns.")},
    {"late": MODULES["late"].replace("2 * x", "(2\n        * x)")},
    {"late": '"""New text."""\n' + MODULES["late"].replace("    return", '    "What it is."\n    return')},
    {"unused": "value = 3"},
])
def test_comments_docstrings_layout_and_what_is_not_imported_do_not_count(package, modules):
    assert package(**modules) == package()


@pytest.mark.parametrize("notebook", [
    cells(0, "markdown", "Nor is this."), NOTEBOOK[1:], [*NOTEBOOK, ("markdown", "## What we saw")],
    cells(2, "parameters", "alpha = 2.0  # more"), cells(1, "code", NOTEBOOK[1][1].replace("!ls\n", "")),
    cells(3, "code", NOTEBOOK[3][1] + "  # a sum"), [*NOTEBOOK, ("code", "")],
])
def test_text_cells_and_the_parameters_do_not_count(package, notebook):
    assert package(notebook) == package()


@pytest.mark.parametrize(("module", "old", "new"), [
    ("direct", "return g(x)", "return g(-x)"), ("indirect", "late.h(x)", "late.h(x) + 1"), ("dotted", "3", "4"),
    ("late", "2 * x", "3 * x"), ("other", "value = 1", "value = 1.0"), ("late", "def h(x)", "def h(x: int)"),
])
def test_a_change_of_code_in_whatever_is_reached_counts_and_is_named(package, module, old, new):
    assert changed(package(), package(**{module: MODULES[module].replace(old, new)})) == f"kd_utils/{module}.py"


def test_a_change_of_the_notebook_counts_and_is_named(package):
    assert changed(package(), package(cells(3, "code", NOTEBOOK[3][1].replace("+", "-")))) == "notebooks/n.ipynb"


def test_a_module_that_comes_or_goes_is_named(package):
    more = package(late=MODULES["late"] + "\nfrom .unused import value\n")
    assert changed(package(), more) == changed(more, package()) == "kd_utils/late.py, kd_utils/unused.py"


def test_start_counts_only_what_is_asked_for_and_the_notebook(package):
    assert list(package(start={"other"})) == ["notebooks/n.ipynb", "kd_utils/other.py"]
    assert list(package(start=("indirect",))) == ["notebooks/n.ipynb", "kd_utils/dotted.py", "kd_utils/indirect.py",
                                                  "kd_utils/late.py"]
    assert changed(package(start={"other"}), package(start={"other"}, direct="x = 1")) == ""


def test_what_differs_is_told_in_a_few_words():
    then = {f"kd_utils/{name}.py": "0" for name in "abcdef"}
    assert changed(then, then) == ""
    assert changed(then, then | {"kd_utils/b.py": "1"}) == "kd_utils/b.py"
    assert changed(then, {"kd_utils/f.py": "0"}) == ", ".join(f"kd_utils/{name}.py" for name in "abcd") + " and 1 more"
    assert changed({}, then) == "of which code it is was not noted"


@pytest.mark.parametrize("stem", config.NOTEBOOKS)
def test_the_projects_notebooks_have_digests_of_what_they_import(stem):
    code = code_of(stem)
    assert code == code_of(stem) and f"notebooks/{stem}.ipynb" in code and "kd_utils/config.py" in code


def test_a_trials_code_has_the_losses_and_no_figures():
    code = code_of("03_train_student")
    assert {"kd_utils/losses.py", "kd_utils/training.py", "kd_utils/checkpoint.py"} < set(code)
    assert not {"kd_utils/plots.py", "kd_utils/sweep.py", "kd_utils/check.py", "kd_utils/display.py"} & set(code)
