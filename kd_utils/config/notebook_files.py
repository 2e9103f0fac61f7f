"""The source notebooks: where they are, and the parameters that their cells declare."""

import ast
import contextlib
import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kd_utils.config.fields import shown
from kd_utils.config.project_paths import CODE_ROOT


def notebook_path(stem: str) -> Path:
    """A source notebook: it lies beside the package, with which it travels on a cluster."""
    return CODE_ROOT / "notebooks" / f"{stem}.ipynb"


def notebook_defaults(stem: str) -> dict[str, Any]:
    """The literals that a notebook's `parameters` cell assigns, as a dict."""
    cells = json.loads(notebook_path(stem).read_text())["cells"]
    [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in ast.parse("".join(cell["source"])).body
        if isinstance(node, ast.Assign)
    }


def refuse_unknown_keys(keys: Iterable[str], where: str, more: Iterable[str] = ()) -> None:
    """Raise a ValueError for the first key that no notebook declares, and suggest a similar one.

    Args:
        where: the file, for the error.
        more: known keys beside those of the notebooks' `parameters` cells.
    """
    stems = [path.stem for path in notebook_path("x").parent.glob("[0-9]*.ipynb")]
    known = sorted({*more, *(key for stem in stems for key in notebook_defaults(stem))})
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key[:100], known, n=1)
            if rows := re.fullmatch(r"\w+_(train|validation)", key):  # as older files have it
                near = [f"{rows[1]}_rows"]
            hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(known)
            raise ValueError(f"{where}: no notebook has a parameter {shown(key)}; {hint}")


def injected_names(cells: list[str]) -> list[str]:
    """Names assigned in cells that start with `# Parameters`, as the one that papermill injects."""
    names: list[str] = []
    for source in cells:
        if source.startswith("# Parameters\n"):
            with contextlib.suppress(SyntaxError):  # a cell written by hand, which did not run
                names += [
                    node.id
                    for node in ast.walk(ast.parse(source))
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                ]
    return names
