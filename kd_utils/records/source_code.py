"""Which code made something: a digest of every module that it ran, so that what changed can be told
by name.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

from kd_utils.config import notebook_files
from kd_utils.config.project_paths import CODE_ROOT

PACKAGE = CODE_ROOT / "kd_utils"

#: What reads parameters and takes these digests: the values themselves are part of every config.
NOT_COUNTED = {"config.notebook_files", "config.parameter_files", "records.source_code"}


def code_of(stem: str, start: Collection[str] | None = None) -> dict[str, str]:
    """Digests of notebook `stem` and of the modules of `kd_utils` that it reaches by imports.

    What cannot change a result does not count: comments, docstrings, layout, text cells, and the
    `parameters` cell, whose values are part of every config.

    Args:
        start: count only these modules and what they reach, of all that the notebook imports (its
            figures, say).

    Returns:
        "notebooks/STEM.ipynb" and "kd_utils/MODULE.py" -> twelve hex digits.
    """
    cells = json.loads(notebook_files.notebook_path(stem).read_text(encoding="utf-8"))["cells"]
    source = "\n".join(
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    )
    source = re.sub(
        r"^\s*[%!].*$", "", source, flags=re.MULTILINE
    )  # IPython's own lines are no Python
    modules = _modules(_imported(source) if start is None else set(start))
    return {f"notebooks/{stem}.ipynb": _digest(source), **modules}


def changed_files(then: dict[str, str], now: dict[str, str]) -> str:
    """Which files differ between two results of `code_of`, in a few words; "" if none does."""
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if names and not then:
        return "the record does not say which code made it"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _modules(todo: set[str]) -> dict[str, str]:
    """The digest of each of these modules, and of each that they import."""
    found: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name not in found:
            text = _file(name).read_text(encoding="utf-8")
            found[name] = _digest(text)
            todo |= _imported(text)
    digests = {str(_file(name).relative_to(PACKAGE.parent)): found[name] for name in found}
    return dict(sorted(digests.items()))


def _imported(source: str) -> set[str]:
    """Modules of this package that a source imports, at its top or inside its functions.

    A folder whose `__init__` has code is a table on disk, such as the terms of the loss: whoever
    imports it reaches every file in it.

    Raises:
        ModuleNotFoundError: an import of this package that no file stands for.
    """
    names: set[str] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # for type checkers, never run
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ModuleNotFoundError(
                    f"kd_utils is imported by whole names: {ast.unparse(node)}"
                )
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if _file(name).is_file() else node.module for name in inner}
    parts = {name.split(".", 1)[1] for name in names if name.startswith("kd_utils.")}
    return set().union(*map(_with_packages, parts)) - NOT_COUNTED


def _with_packages(name: str) -> set[str]:
    """A module, and the folders on the way to it that have code of their own with their files."""
    if not _file(name).is_file():
        raise ModuleNotFoundError(f"no module kd_utils.{name}: its digest cannot be taken")
    found, parts = {name}, name.split(".")
    for depth in range(1, len(parts) + 1):
        init = PACKAGE.joinpath(*parts[:depth], "__init__.py")
        if init.is_file() and len(ast.parse(init.read_text(encoding="utf-8")).body) > 1:
            folder = ".".join(parts[:depth])
            found |= {folder, *(f"{folder}.{file.stem}" for file in init.parent.glob("[!_]*.py"))}
    return {name for name in found if not _is_plain_package(name)}


def _is_plain_package(name: str) -> bool:
    init = _file(name)
    return init.name == "__init__.py" and len(ast.parse(init.read_text(encoding="utf-8")).body) <= 1


def _file(name: str) -> Path:
    """The file of a module; names with and without "kd_utils." before them."""
    path = PACKAGE.joinpath(*name.removeprefix("kd_utils.").split("."))
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


@lru_cache(maxsize=256)
def _digest(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and body
        ):
            if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                del body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]
