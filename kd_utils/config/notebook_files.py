"""The source notebooks: where they are, and the parameters that their cells declare.

A `parameters` cell is read here without running it, so it may hold nothing but NAME = VALUE. What a
user made of it in JupyterLab, which saves by itself, is told by notebook and cell.
"""

import ast
import contextlib
import difflib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from kd_utils.config.fields import shown
from kd_utils.config.project_paths import CODE_ROOT

#: The tags of a notebook's own values, and of the cell that papermill writes after them.
TAG, INJECTED = "parameters", "injected-parameters"

#: IPython's own lines are not Python, but code: `%run` and `!` may do anything, `%%script false`
#: keeps a cell from running. Those that only time or show what runs are none.
IPYTHON = re.compile(r"(?m)^([ \t]*)((?=[%!])(%%(?:time|capture)\b|%matplotlib\b)?.*)$")


def notebook_path(stem: str) -> Path:
    """A source notebook: it lies beside the package, with which it travels on a cluster."""
    return CODE_ROOT / "notebooks" / f"{stem}.ipynb"


def place(stem: str, *numbers: int) -> str:
    """How messages name a notebook's cells, counted from 1: "notebooks/STEM.ipynb, cell 3"."""
    cells = ", ".join(map(str, numbers))
    return f"notebooks/{stem}.ipynb" + f", cell{'s' * (len(numbers) > 1)} {cells}" * bool(numbers)


def read_cells(stem: str) -> dict[int, tuple[str, list[str]]]:
    """The code cells of a notebook: number from 1, text cells counted too -> source and tags.

    Raises:
        ValueError: the file is no notebook.
    """
    try:
        cells = json.loads(notebook_path(stem).read_text(encoding="utf-8"))["cells"]
        return {
            number: ("".join(cell["source"]), cell.get("metadata", {}).get("tags", []))
            for number, cell in enumerate(cells, 1)
            if cell.get("cell_type") == "code"
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{place(stem)} must be a notebook ({why}): restore it, as with `git checkout`"
        ) from None


def parameters_cell(stem: str, cells: dict[int, tuple[str, list[str]]]) -> int:
    """The number of the one cell of `read_cells(stem)` that has the tag `parameters`.

    Raises:
        ValueError: no cell or several have it, or papermill left a cell of its own.
    """
    tagged, left = ([n for n, (_, tags) in cells.items() if tag in tags] for tag in (TAG, INJECTED))
    if left:
        raise ValueError(
            f"{place(stem, *left)}: values that papermill injected (tag `{INJECTED}`) must not "
            "stay in a source notebook: remove the cell"
        )
    if len(tagged) == 1:
        return tagged[0]
    if tagged:
        raise ValueError(
            f"{place(stem, *tagged)}: only one cell must have the tag `{TAG}`: keep one of them, "
            "and remove the others"
        )
    likely = max(cells, key=lambda n: len(_names(cells[n][0])), default=1)
    raise ValueError(
        f"{place(stem, likely)}: one cell must have the tag `{TAG}`, and none has: add it to the "
        "cell that assigns the parameters (JupyterLab: Property Inspector)"
    )


def notebook_defaults(stem: str) -> dict[str, Any]:
    """The values that a notebook's `parameters` cell assigns.

    Raises:
        ValueError: names the cell that is not as it must be: a line is not NAME = VALUE, a name is
            assigned twice, or again before the config is made.
    """
    cells = read_cells(stem)
    number = parameters_cell(stem, cells)
    source = cells[number][0]
    values: dict[str, Any] = {}
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ValueError(_not_plain(stem, number, source, error.lineno or 1)) from None
    for statement in statements:
        found = _plain(statement)
        if not found:
            raise ValueError(_not_plain(stem, number, source, statement.lineno))
        if found.keys() & values:
            raise ValueError(
                f"{place(stem, number)}: {', '.join(found)} must be assigned once, and line "
                f"{statement.lineno} assigns it again"
            )
        values |= found
    for later in (n for n in cells if n > number):
        if ".from_notebook(" in cells[later][0]:
            break
        if again := values.keys() & _names(cells[later][0]):
            raise ValueError(
                f"{place(stem, later)}: {', '.join(sorted(again))} must be assigned in cell "
                f"{number} alone, which has the tag `{TAG}`"
            )
    return values


def _not_plain(stem: str, number: int, source: str, line: int) -> str:
    text = shown(source.splitlines()[line - 1].strip())
    return (
        f"{place(stem, number)}: line {line}, {text}, must be NAME = VALUE, the value being text, "
        "a number, True or False as it is: put all else into a cell of its own"
    )


def _plain(statement: ast.stmt) -> dict[str, Any]:
    """The name and the value of `NAME = VALUE`; empty for any other statement."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        [target] = statement.targets
        with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval(statement.value)
            if isinstance(target, ast.Name) and isinstance(value, (str, int, float)):
                return {target.id: value}
    return {}


def _names(source: str) -> list[str]:
    """Names that lines of a cell assign, also where the cell as a whole is not Python."""
    return re.findall(r"(?m)^([A-Za-z_]\w*)\s*(?::[^=\n]*)?=(?!=)", source)


def code_without(stem: str, parameters: Collection[str]) -> str:
    """The code of a notebook without plain assignments of these parameters in the first cell that
    has the tag `parameters`: whatever else it holds, or another cell with that tag, is code.

    Raises:
        ValueError: names the cell that is not Python.
    """
    first, code = True, []
    for number, (source, tags) in read_cells(stem).items():
        source = IPYTHON.sub(lambda line: "" if line[3] else f"{line[1]}({line[2]!r},)", source)
        try:
            body = ast.parse(source).body
        except SyntaxError as error:
            raise ValueError(
                f"{place(stem, number)}: line {error.lineno} must be Python: {error.msg}"
            ) from None
        if TAG in tags and first:
            rest = [s for s in body if not _plain(s).keys() & set(parameters)]
            first, source = False, "\n".join(map(ast.unparse, rest))
        code.append(source)
    return "\n".join(code)


def declared_names() -> set[str]:
    """Every name that a `parameters` cell of any notebook assigns, in whatever state it is."""
    names: set[str] = set()
    for path in notebook_path("x").parent.glob("[0-9]*.ipynb"):
        with contextlib.suppress(ValueError):
            for source, tags in read_cells(path.stem).values():
                names |= set(_names(source)) if TAG in tags else set()
    return names


def refuse_unknown_keys(keys: Iterable[str], where: str, known: Collection[str]) -> None:
    """Raise a ValueError for the first key that is not known, and suggest a similar one.

    Args:
        where: the file, for the error.
        known: the parameters of all notebooks.
    """
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key[:100], sorted(known), n=1)
            if rows := re.fullmatch(r"\w+_(train|validation)", key):  # as older files have it
                near = [f"{rows[1]}_rows"]
            every = ", ".join(sorted(known))
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {every}"
            raise ValueError(f"{where}: no notebook has a parameter {shown(key)}; {hint}")


def _injected(cells: list[str]) -> list[ast.Module]:
    """The cells that start with `# Parameters`, as the one that papermill injects."""
    found = []
    for source in cells:
        if source.startswith("# Parameters\n"):
            with contextlib.suppress(SyntaxError):  # a cell written by hand, which did not run
                found.append(ast.parse(source))
    return found


def injected_names(cells: list[str]) -> list[str]:
    """Names assigned in cells that start with `# Parameters`, as the one that papermill injects."""
    return [
        node.id
        for cell in _injected(cells)
        for node in ast.walk(cell)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]


def refuse_overwritten(cells: list[str], namespace: dict[str, Any]) -> None:
    """Raise a ValueError for an injected parameter that has another value since: a cell after the
    injected one assigned it, as the `parameters` cell does when it has lost its tag.
    """
    injected: dict[str, Any] = {}
    for cell in _injected(cells):
        for statement in cell.body:
            injected |= _plain(statement)
    for key, value in injected.items():
        if key in namespace and shown(namespace[key]) != shown(value):
            raise ValueError(
                f"{key} = {shown(namespace[key])}, but {shown(value)} was injected: a later cell "
                f"must not assign it (has one cell, and only one, the tag `{TAG}`?)"
            )
