"""What something was made from: code, data and settings, and the kind of machine.

`Ingredients` says why something that exists is not what would be made now. `code_of` gives a digest
of every module that a notebook runs, so that a change of the code is told by file name.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from kd_utils.config import notebook_files, project_paths, stages
from kd_utils.records.arithmetic import cpu_name
from kd_utils.store.files import sha256_json

PACKAGE = project_paths.CODE_ROOT / "kd_utils"

#: When this process may have begun to load modules. A fork keeps the time of the process that it
#: was forked from, whose modules it has. A process's start is known to a second or two.
STARTED = psutil.Process().create_time() + 2

#: These change no result: parameters are part of the config, figures only show results, and an
#: estimate of the cost is only printed.
NOT_COUNTED = (
    "config.executed_cells",
    "config.notebook_files",
    "config.parameter_files",
    "records.arithmetic",
    "records.provenance",
    "figures",
    "cost",
)

#: Packages whose versions a record names.
PACKAGES = "torch transformers tokenizers datasets numpy pyarrow pandas papermill ray".split()


#: Those whose versions can change a trial's numbers.
COMPUTING = ("python", "torch", "transformers", "tokenizers", "numpy")


class Ingredients(dict[str, dict[str, Any]]):
    """What something was made from: kind ("config", "code", "data") -> name -> value or digest."""

    def why_stale(self, now: Ingredients) -> str:
        """What differs from `now`, in one line, or ""; kinds that `now` does not have do not count.

        Returns:
            For example "config changed (seed was 1, is 2); code changed (kd_utils/data/hub.py)".
        """
        reasons = []
        for kind, wanted in now.items():
            made = self.get(kind)
            if isinstance(made, dict):
                changes = [
                    _change(name, made.get(name), wanted.get(name))
                    for name in sorted(made.keys() | wanted)
                    if made.get(name) != wanted.get(name)
                ]
                reasons += [f"{kind} changed ({listed(changes)})"] if changes else []
            elif wanted:
                reasons.append(f"the {kind} is not recorded")
        return "; ".join(reasons)

    @property
    def digest(self) -> str:
        """Eight hex digits, for the name of what is made from these."""
        return sha256_json(self)[:8]


def _change(name: str, then: Any, now: Any) -> str:
    """The name; with both values where a reader can compare them, which digests are not for."""
    texts = [value if isinstance(value, str) else json.dumps(value) for value in (then, now)]
    if None in (then, now) or any(len(t) > 40 or re.fullmatch("[0-9a-f]{8,}", t) for t in texts):
        return name
    return f"{name} was {then!r}, is {now!r}"


def listed(names: list[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def code_of(stem: str, start: Collection[str] | None = None) -> dict[str, str]:
    """Digests of notebook `stem` and of the modules of `kd_utils` that it imports, at any depth.

    Comments, docstrings, layout and text cells cannot change a result and do not count. Nor do
    parameters that the first `parameters` cell assigns: their values are part of every config.

    Args:
        start: count only these modules, and what they import ("data.hub").

    Returns:
        "notebooks/STEM.ipynb" and "kd_utils/ROOM/MODULE.py" -> twelve hex digits.
    """
    source = notebook_files.code_without(stem, stages.parameter_names())
    todo, modules = set(_imported(source) if start is None else start), {}
    while todo:
        file = _file(todo.pop())
        name = str(file.relative_to(PACKAGE.parent))
        if name not in modules:
            text = file.read_text(encoding="utf-8")
            modules[name] = _digest(text)
            todo |= _imported(text)
    return {f"notebooks/{stem}.ipynb": _digest(source), **dict(sorted(modules.items()))}


def require_loaded(code: Collection[str]) -> None:
    """Refuse files that changed after this process may have loaded them: their digests would be of
    code that did not run. A kernel of JupyterLab lives on while its user edits modules.

    Args:
        code: file names as `code_of` has them.

    Raises:
        ValueError: names the first such file.
    """
    for name in changed_since(STARTED, code):
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module in sys.modules:
            raise ValueError(
                f"{name} was changed after this kernel started, which still runs the earlier "
                "code: restart the kernel and run all cells"
            )


def changed_since(started: float, code: Collection[str]) -> list[str]:
    """Those of these files (names as `code_of` has them) that were written after this time."""
    now = time.time()
    changed = {name: (PACKAGE.parent / name).stat().st_mtime for name in code}
    return [name for name, at in changed.items() if started < at <= now]


def _imported(source: str) -> set[str]:
    """Modules of this package that a source imports, at its top or inside its functions.

    A folder whose `__init__` has code is a table on disk, such as the terms of the loss: whoever
    imports it reaches every file in it.

    Raises:
        ModuleNotFoundError: an import of this package that is relative or has no file.
    """
    found: set[str] = set()
    for module, name in _import_names(source):
        inner = f"{module}.{name}".rstrip(".")
        target = inner if _file(inner).is_file() else module
        if target != "kd_utils":
            found |= _with_packages(target.removeprefix("kd_utils."))
    return {name for name in found if not name.startswith(NOT_COUNTED)}


@lru_cache(maxsize=256)
def _import_names(source: str) -> frozenset[tuple[str, str]]:
    """(module, name) of each import of this package; name is "" for `import module`."""
    names: set[tuple[str, str]] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # for type checkers, never run
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ModuleNotFoundError(f"import kd_utils by whole names: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {(node.module, alias.name) for alias in node.names}
    return frozenset(pair for pair in names if f"{pair[0]}.".startswith("kd_utils."))


def _with_packages(name: str) -> set[str]:
    """A module, and all files of the folders on the way to it whose `__init__` has code."""
    if not _file(name).is_file():
        raise ModuleNotFoundError(f"no module kd_utils.{name}: its digest cannot be taken")
    found = set() if _file(name).name == "__init__.py" else {name}
    for package in itertools.accumulate(name.split("."), "{}.{}".format):
        init = _file(package)
        if init.name != "__init__.py" or not init.is_file():
            continue
        if len(ast.parse(init.read_text(encoding="utf-8")).body) > 1:
            found |= {
                package,
                *(f"{package}.{file.stem}" for file in init.parent.glob("[!_.]*.py")),
            }
    return found


def _file(name: str) -> Path:
    """The file of a module; names with and without "kd_utils." before them."""
    path = PACKAGE.joinpath(*name.removeprefix("kd_utils.").split("."))
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


@lru_cache(maxsize=256)
def _digest(source: str) -> str:
    """Twelve hex digits of a source's syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


def environment() -> dict[str, Any]:
    """Where a trial ran: `git_commit`, `versions`, `device`; without host name and paths."""
    device: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
    # torch is described where it is in use already; this module does not import it.
    if torch := sys.modules.get("torch"):
        device["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            device["gpu"] = torch.cuda.get_device_name()
            device["deterministic"] = torch.are_deterministic_algorithms_enabled()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"git_commit": git_commit(), "versions": versions, "device": device}


def git_commit() -> str:
    """Commit of the code, with `-dirty` if code or notebooks differ from it, or "unknown"."""
    # On a cluster the code is sent without its history.
    if sent := os.environ.get("KD_COMMIT"):
        return sent
    if not (project_paths.CODE_ROOT / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(project_paths.CODE_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "kd_utils", "notebooks")
        return git("rev-parse", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
