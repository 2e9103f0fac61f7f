"""Which code made something: a digest of every module that it ran, so that what changed can be told by name."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

from . import parameters

PACKAGE = Path(__file__).parent
#: What reads parameters and takes these digests: the values themselves are part of every config.
NOT_COUNTED = {"parameters", "source_code"}


def code_of(stem: str, start: Collection[str] | None = None) -> dict[str, str]:
    """Digests of notebook `stem` and of the modules of `kd_utils` that it reaches by imports.

    What cannot change a result does not count: comments, docstrings, layout, text cells, and the `parameters` cell,
    whose values are part of every config.

    Args:
        start: count only these modules and what they reach, of all that the notebook imports (its figures, say).

    Returns:
        "notebooks/STEM.ipynb" and "kd_utils/MODULE.py" -> twelve hex digits.
    """
    cells = json.loads(parameters.notebook_path(stem).read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells
                       if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", []))
    source = re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)  # IPython's own lines are no Python
    modules = _modules(_imported(source) if start is None else set(start))
    return {f"notebooks/{stem}.ipynb": _digest(source), **modules}


def changed(then: dict[str, str], now: dict[str, str]) -> str:
    """Which files differ between two results of `code_of`, in a few words; "" if none does."""
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if names and not then:
        return "of which code it is was not noted"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _modules(todo: set[str]) -> dict[str, str]:
    """The digest of each of these modules, and of each that they import."""
    found: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name not in found:
            text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
            found[name] = _digest(text)
            todo |= _imported(text)
    return {f"kd_utils/{name}.py": digest for name, digest in sorted(found.items())}


def _imported(source: str) -> set[str]:
    """Modules of this package that a source imports, at its top or inside its functions."""
    names: set[str] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # of type checkers, and never run
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(filter(None, ["kd_utils" if node.level else "", node.module]))
            names |= {package, *(f"{package}.{alias.name}" for alias in node.names)}
    parts = {name.split(".")[1] for name in names if name.startswith("kd_utils.")}
    return {part for part in parts - NOT_COUNTED if (PACKAGE / f"{part}.py").is_file()}


@lru_cache(maxsize=256)
def _digest(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body:
            if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                del body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]
