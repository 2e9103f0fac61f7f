"""How the source notebooks read: short cells, lines that fit, and the loop of 03 in plain sight."""

import ast
import json

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
    """The loop over epochs, and the source of its cell."""
    [cell] = [cell for cell in cells("03_train_student")["code"] if "for epoch in" in cell]
    [tree] = ast.parse(cell).body
    return tree, cell


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_lines_fit_and_cells_are_short(stem):
    imports, *code = cells(stem)["code"]
    assert imports.count("import ") >= 2
    lines = [line for kind in cells(stem).values() for cell in kind for line in cell.splitlines()]
    assert max(map(len, lines)) <= 100
    for cell in code:
        is_figure = "alt." in cell
        is_loop = stem.startswith("03") and "for epoch in" in cell
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
    assert isinstance(tree, ast.For) and len(cell.splitlines()) <= 24
    wanted = {
        "for batch in": ast.For,
        "student_signals = signals_of(batch": ast.Assign,
        "terms = terms_of(student_signals": ast.Assign,
        "loss = training.weighted_sum(terms": ast.Assign,
        "loss.backward()": ast.Expr,
        "torch.nn.utils.clip_grad_norm_(parameters": ast.Assign,
        "optimizer.step()": ast.Expr,
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


def test_a_line_is_printed_and_told_after_each_epoch():
    tree, _ = loop()
    called = [ast.unparse(node.value.func) for node in tree.body if isinstance(node, ast.Expr)]
    assert {"print", "trial_record.report_epoch"} <= set(called)
