"""Digests of code: what can change a result changes them and is named, what cannot does not."""

import json
import shutil

import pytest

from kd_utils.config import notebook_files, stages
from kd_utils.records import provenance
from kd_utils.records.provenance import Ingredients, code_of

NOTEBOOK = [
    ("markdown", "# Title\nThis is no Python."),
    (
        "code",
        "%matplotlib inline\n!ls\nimport kd_utils\nfrom kd_utils import __version__\n"
        "from kd_utils.room import direct\nimport torch",
    ),
    ("parameters", "alpha = 1.0"),
    ("code", "from kd_utils.other import value\nresult = direct.f(alpha) + value"),
]
MODULES = {
    "room/direct": '"""About."""\nfrom kd_utils.hall.indirect import g\n'
    'from kd_utils.table import rows\n\n\ndef f(x):\n    """Its text."""\n    return g(x)  # why\n',
    "hall/indirect": "import kd_utils.room.dotted\n\n\ndef g(x):\n"
    "    from kd_utils.hall import late\n    return late.h(x)\n",
    "room/dotted": "class Table:\n    '''Of rows.'''\n    rows = 3\n",
    "hall/late": "from json import dumps\n\n\ndef h(x):\n    return 2 * x\n",
    "other": "value = 1\n",
    "hall/unused": "value = 2\n",
    "table/__init__": '"""A table on disk."""\nimport pkgutil\n\nrows = []\n',
    "table/row": "row = 1\n",
    "room/__init__": '"""A room."""\n',
}
REACHED = ["hall/indirect", "hall/late", "other", "room/direct", "room/dotted"]
TABLE = ["table/__init__", "table/row"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of rooms beside a notebook; the function returned writes it, with changes, and
    gives its code.
    """
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "kd_utils")
    monkeypatch.setattr(notebook_files, "notebook_path", lambda stem: tmp_path / f"{stem}.ipynb")

    def code(cells=(), start=None, modules=()):
        shutil.rmtree(tmp_path / "kd_utils", ignore_errors=True)
        for name, text in {**MODULES, **dict(modules)}.items():
            (tmp_path / "kd_utils" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "kd_utils" / f"{name}.py").write_text(text)
        written = [
            {
                "cell_type": "markdown" if kind == "markdown" else "code",
                "source": text.splitlines(True),
                "metadata": {"tags": ["parameters"]} if kind == "parameters" else {},
            }
            for kind, text in (cells or NOTEBOOK)
        ]
        (tmp_path / "n.ipynb").write_text(json.dumps({"cells": written}))
        return code_of("n", start)

    return code


def cells(number, kind, text):
    return [*NOTEBOOK[:number], (kind, text), *NOTEBOOK[number + 1 :]]


def changed_files(then, now):
    """What `Ingredients` says of two results of `code_of`, without the words around it."""
    why = Ingredients(code=then).why_stale(Ingredients(code=now))
    return why.removeprefix("code changed (").removesuffix(")")


def files(names):
    return [f"kd_utils/{name}.py" for name in names]


def test_code_is_the_notebook_and_all_that_it_reaches(package):
    code = package()
    assert list(code) == ["notebooks/n.ipynb", *files(REACHED + TABLE)]
    assert all(len(digest) == 12 and int(digest, 16) for digest in code.values())


DIRECT, LATE = MODULES["room/direct"], MODULES["hall/late"]


@pytest.mark.parametrize(
    "modules",
    [
        {"room/direct": DIRECT.replace("  # why", "")},
        {"room/direct": DIRECT.replace("  # why", "  # because")},
        {"room/direct": DIRECT.replace('"""Its text."""', '"""Other text."""')},
        {"room/direct": DIRECT.replace('    """Its text."""\n', "")},
        {"room/direct": DIRECT.replace('"""About."""\n', "")},
        {"room/dotted": MODULES["room/dotted"].replace("Of rows.", "Of\n    columns.")},
        {"hall/late": LATE.replace("2 * x", "(2\n        * x)")},
        {"hall/late": '"""New."""\n' + LATE.replace("    return", '    "What it is."\n    return')},
        {"hall/unused": "value = 3"},
        {"room/__init__": '"""Another room."""\n'},
    ],
)
def test_comments_docstrings_layout_and_what_is_not_imported_do_not_count(package, modules):
    assert package(modules=modules) == package()


@pytest.mark.parametrize(
    "notebook",
    [
        cells(0, "markdown", "Nor is this."),
        NOTEBOOK[1:],
        [*NOTEBOOK, ("markdown", "## What we saw")],
        cells(2, "parameters", "alpha = 2.0  # more"),
        cells(1, "code", NOTEBOOK[1][1].replace("%matplotlib inline\n", "")),
        cells(3, "code", "%%time\n" + NOTEBOOK[3][1]),
        cells(3, "code", NOTEBOOK[3][1] + "  # a sum"),
        [*NOTEBOOK, ("code", "")],
    ],
)
def test_text_cells_and_the_parameters_do_not_count(package, notebook):
    assert package(notebook) == package()


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("room/direct", "return g(x)", "return g(-x)"),
        ("hall/indirect", "late.h(x)", "late.h(x) + 1"),
        ("room/dotted", "3", "4"),
        ("hall/late", "2 * x", "3 * x"),
        ("other", "value = 1", "value = 1.0"),
        ("hall/late", "def h(x)", "def h(x: int)"),
        ("table/row", "row = 1", "row = 2"),
        ("table/__init__", "rows = []", "rows = [1]"),
    ],
)
def test_a_change_of_code_in_whatever_is_reached_counts_and_is_named(package, module, old, new):
    after = package(modules={module: MODULES[module].replace(old, new)})
    assert changed_files(package(), after) == f"kd_utils/{module}.py"


@pytest.mark.parametrize(
    "source",
    [
        NOTEBOOK[3][1].replace("+", "-"),
        "%%script false\n" + NOTEBOOK[3][1],  # the cell does not run
        NOTEBOOK[3][1] + "\n%run tweak.py",
        NOTEBOOK[3][1] + "\nif value:\n    !cp a b",
    ],
)
def test_a_change_of_the_notebook_counts_and_is_named(package, source):
    after = package(cells(3, "code", source))
    assert changed_files(package(), after) == "notebooks/n.ipynb"


def test_a_module_that_comes_or_goes_is_named(package):
    more = package(modules={"hall/late": LATE + "\nfrom kd_utils.hall.unused import value\n"})
    named = ", ".join(files(["hall/late", "hall/unused"]))
    assert changed_files(package(), more) == changed_files(more, package()) == named


def test_a_new_row_of_a_table_on_disk_counts_and_is_named(package):
    assert (
        changed_files(package(), package(modules={"table/more": "row = 3\n"}))
        == files(["table/more"])[0]
    )


@pytest.mark.parametrize(
    "line", ["from kd_utils.room.gone import f", "import kd_utils.gone", "from . import late"]
)
def test_an_import_that_no_file_stands_for_is_refused(package, line):
    with pytest.raises(ModuleNotFoundError, match="kd_utils"):
        package(modules={"hall/late": line + "\n"})


def test_start_counts_only_what_is_asked_for_and_the_notebook(package):
    assert list(package(start={"other"})) == ["notebooks/n.ipynb", "kd_utils/other.py"]
    names = ["hall/indirect", "hall/late", "room/dotted"]
    assert list(package(start=("hall.indirect",))) == ["notebooks/n.ipynb", *files(names)]
    after = package(start={"other"}, modules={"room/direct": "x = 1"})
    assert changed_files(package(start={"other"}), after) == ""


def test_what_differs_is_told_in_a_few_words():
    then = {f"kd_utils/{name}.py": "0" * 12 for name in "abcdef"}
    assert changed_files(then, then) == ""
    assert changed_files(then, then | {"kd_utils/b.py": "1" * 12}) == "kd_utils/b.py"
    some = ", ".join(f"kd_utils/{name}.py" for name in "abcd")
    assert changed_files(then, {"kd_utils/f.py": "0" * 12}) == f"{some} and 1 more"
    assert Ingredients().why_stale(Ingredients(code=then)) == "the code is not recorded"


@pytest.mark.parametrize("stem", stages.NOTEBOOKS)
def test_the_projects_notebooks_have_digests_of_what_they_import(stem):
    code = code_of(stem)
    assert code == code_of(stem) and f"notebooks/{stem}.ipynb" in code
    assert "kd_utils/config/base.py" in code


#: The rooms whose code decides a trial's result, and those that do not.
ROOMS_OF_A_TRIAL = "cache config data distill evaluation models records store tokens".split()
OTHER_ROOMS = "analysis cluster demos figures speed sweep teacher".split()


@pytest.mark.parametrize("room", ROOMS_OF_A_TRIAL + OTHER_ROOMS)
def test_an_edited_line_of_a_room_makes_trials_stale_if_a_trial_reaches_it(
    room, tmp_path, monkeypatch
):
    before = code_of("03_train_student")
    shutil.copytree(provenance.PACKAGE, tmp_path / "kd_utils")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "kd_utils")
    edited = set()
    for path in (tmp_path / "kd_utils" / room).rglob("*.py"):
        path.write_text(path.read_text() + "\nEDITED = 1\n")
        edited.add(str(path.relative_to(tmp_path)))
    named = {
        file for file, digest in code_of("03_train_student").items() if before.get(file) != digest
    }
    assert named <= edited
    assert bool(named) == (room in ROOMS_OF_A_TRIAL)
