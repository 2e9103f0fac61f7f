"""How the source notebooks read: short cells, lines that fit, and the loop of 03 in plain sight."""

import ast
import json
import re

import pytest

from kd_utils.config.notebook_files import notebook_path
from kd_utils.config.stages import NOTEBOOKS


def cells(stem):
    """The source of each code cell, and of each text cell."""
    found = {"code": [], "markdown": []}
    for cell in json.loads(notebook_path(stem).read_text())["cells"]:
        if "parameters" not in cell["metadata"].get("tags", []):
            found[cell["cell_type"]].append("".join(cell["source"]))
    return found


def loop():
    """The loop over stretches of steps, and the source of its cell."""
    [cell] = [cell for cell in cells("03_train_student")["code"] if "for stretch in" in cell]
    guard, tree = ast.parse(cell).body
    assert ast.unparse(guard) == "config.require_unbroken()"
    return tree, cell


#: What leaves files that others read, by notebook: each is in a cell that asks first.
WRITES = {
    "01_prepare_data": ["save_prepared("],
    "02_cache_teacher": ["prepare_teacher(", "assemble_cache(", "verification.verify("],
    "03_train_student": ["measure.stretches()", "write_record("],
    "04_analyse_results": ["written_aside("],
}


@pytest.mark.parametrize("stem, call", [(stem, call) for stem in WRITES for call in WRITES[stem]])
def test_a_cell_that_writes_first_asks_for_one_unbroken_execution(stem, call):
    [cell] = [cell for cell in cells(stem)["code"] if call in cell]
    assert cell.splitlines()[0] == "config.require_unbroken()"


def test_own_answers_of_rows_without_a_label_are_not_read_once_the_teacher_answered():
    """The tables that are encoded, cached and trained on are the answered ones."""
    for stem, allowed in (
        ("02_cache_teacher", {"train"}),  # asked, and compared for the reader
        ("03_train_student", {"require_tokenizer", "data_hash", "tokenizer_fingerprint"}),
    ):
        code = cells(stem)["code"]
        [first] = [n for n, cell in enumerate(code) if "answered_tables(" in cell]
        later = "\n".join(code[first:] if stem == "02_cache_teacher" else code)
        assert set(re.findall(r"\bprepared\.(\w+)", later)) <= allowed
        [encoded] = re.findall(r"encode_splits\(\w+, (\S+), pieces", "\n".join(code[first:]))
        assert encoded == "tables"


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_no_cell_gives_a_parameter_another_value(stem):
    """Else the config's cell could not run a second time."""
    for cell in cells(stem)["code"]:
        nodes = list(ast.walk(ast.parse(cell)))
        inner = {  # names of their own
            name
            for node in nodes
            if isinstance(node, (ast.comprehension, ast.Lambda))
            for name in ast.walk(node)
        }
        stored = {
            node.id
            for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in inner
        }
        imported = {
            alias.asname or alias.name
            for node in nodes
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not (stored | imported) & NOTEBOOKS[stem].model_fields.keys()


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_lines_fit_and_cells_are_short(stem):
    imports, *code = cells(stem)["code"]
    assert imports.count("import ") >= 2
    lines = [line for kind in cells(stem).values() for cell in kind for line in cell.splitlines()]
    assert max(map(len, lines)) <= 100
    for cell in code:
        is_figure = "alt." in cell
        is_loop = stem.startswith("03") and "for stretch in" in cell
        assert is_figure or is_loop or len(cell.splitlines()) <= 12, cell


def test_nothing_is_defined_in_a_cell_of_03_and_its_imports_name_modules():
    code = cells("03_train_student")["code"]
    for cell in code:
        for node in ast.walk(ast.parse(cell)):
            assert not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
    own = [line for line in code[0].splitlines() if line.startswith("from kd_utils")]
    assert 5 <= len(own) <= 12


def test_each_part_of_a_step_is_one_visible_line():
    tree, cell = loop()
    assert isinstance(tree, ast.For) and len(cell.splitlines()) <= 25
    wanted = {
        "for batch in": ast.For,
        "student_signals = signals_of(batch": ast.Assign,
        "terms = terms_of(student_signals": ast.Assign,
        "loss = training.weighted_sum(terms": ast.Assign,
        "loss.backward()": ast.Expr,
        "torch.nn.utils.clip_grad_norm_(parameters": ast.Assign,
        "optimizer.step()": ast.Expr,
        "schedule.step()": ast.Expr,
        "optimizer.zero_grad(": ast.Expr,
    }
    order = []
    for node in ast.walk(tree):
        text = ast.unparse(node).splitlines()[0] if isinstance(node, ast.stmt) else ""
        for start, kind in wanted.items():
            if start in text and isinstance(node, kind):
                order.append((node.lineno, start))
                assert isinstance(node, ast.For) or node.end_lineno == node.lineno
    assert [start for _, start in sorted(order)] == list(wanted)


def test_a_line_is_printed_and_told_after_each_stretch():
    tree, _ = loop()
    called = [ast.unparse(node.value.func) for node in tree.body if isinstance(node, ast.Expr)]
    assert {"print", "trial_record.report_row"} <= set(called)
