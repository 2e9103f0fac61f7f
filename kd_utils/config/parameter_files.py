"""Parameter files and grids, and the notebooks' own defaults that they change."""

from __future__ import annotations

import ast
import contextlib
import difflib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import yaml

from kd_utils.config.base import Config
from kd_utils.config.fields import shown
from kd_utils.config.project_paths import CODE_ROOT
from kd_utils.config.stages import NOTEBOOKS
from kd_utils.config.trial import TrialConfig

#: Keys of 03 that say where a trial's files go and not what it is.
NOT_SWEPT = (
    "name",
    "artifacts_dir",
    "run_dir",
    "trial",
    "device",
    "save_student",
    "checkpoint_seconds",
)

#: More than this is no parameter file, no sweep that ends, no file name.
MOST_BYTES, MOST_TRIALS, MOST_NAME = 1_000_000, 10_000, 200


def notebook_path(stem: str) -> Path:
    """Source of a notebook. It travels with the code, so it lies beside the package and not under
    KD_ROOT.
    """
    return CODE_ROOT / "notebooks" / f"{stem}.ipynb"


def notebook_defaults(stem: str) -> dict[str, Any]:
    """The literals that a notebook's `parameters` cell assigns, as a dict."""
    cells = json.loads(notebook_path(stem).read_text())["cells"]
    [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assigned = ast.parse("".join(cell["source"])).body
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in assigned
        if isinstance(node, ast.Assign)
    }


def notebook_config(stem: str, parameters: dict[str, Any]) -> Config:
    """The config that notebook `stem` builds when it is passed those of `parameters` that it
    declares.
    """
    config = NOTEBOOKS[stem]
    known = {key: value for key, value in parameters.items() if key in config.model_fields}
    return config(**{**notebook_defaults(stem), **known})


def unknown_keys_are_errors(keys: Any, where: str) -> None:
    """Raise a ValueError for the first key that no notebook declares, with the nearest one that it
    may have meant.
    """
    known = sorted({key for config in NOTEBOOKS.values() for key in config.model_fields})
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key[:100], known, n=1)
            if rows := re.fullmatch(r"\w+_(train|validation)", key):  # as older files have it
                near = [f"{rows[1]}_rows"]
            hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(known)
            raise ValueError(f"{where}: no notebook has a parameter {shown(key)}; {hint}")


def injected_names(cells: list[str]) -> list[str]:
    """Names assigned in the cell that papermill injects, which begins with the comment `#
    Parameters`.
    """
    names: list[str] = []
    for source in cells:
        if source.startswith("# Parameters\n"):
            with contextlib.suppress(SyntaxError):  # written by hand, and did not run
                names += [
                    node.id
                    for node in ast.walk(ast.parse(source))
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                ]
    return names


def load_parameters(path: str | Path) -> dict[str, Any]:
    """A parameter file: flat YAML, only keys that some notebook declares, one scalar each.

    Raises:
        ValueError: not flat YAML, or a key that no notebook declares (with the nearest that one
            does).
        FileNotFoundError: no such file, with those that there are.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path's own raises where a name is too long
        near = (
            sorted(p.name for p in path.parent.glob("*.yaml")) if os.path.isdir(path.parent) else []
        )
        raise FileNotFoundError(
            f"no parameter file {path} (files there: {', '.join(near) or 'none'})"
        )
    loader, nodes = _read_yaml(path)
    unknown_keys_are_errors(nodes, str(path))
    return {key: _scalar(loader, node, f"{path}: {key}") for key, node in nodes.items()}


def load_grid(path: str | Path | None = None) -> dict[str, list[Any]]:
    """A grid file: flat YAML, a list of values per key of 03. None: the project's own, all methods
    x 7 seeds.

    Raises:
        ValueError: not `key: [values]`, a key that 03 does not declare or that cannot change a
            result, or a value that 03 refuses.
        FileNotFoundError: no such file.
    """
    path = Path(path or CODE_ROOT / "papermill_params" / "grid.yaml")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no grid file {path}")
    loader, nodes = _read_yaml(path)
    if not nodes:
        raise ValueError(f"{path} must hold `key: [value, ...]` lines")
    defaults, grid = notebook_defaults("03_train_student"), {}
    for key, node in nodes.items():
        if key not in TrialConfig.model_fields or key in NOT_SWEPT:
            known = ", ".join(k for k in TrialConfig.model_fields if k not in NOT_SWEPT)
            raise ValueError(f"{path}: {shown(key)} cannot be swept; a grid may have: {known}")
        if (
            not isinstance(node, yaml.SequenceNode)
            or node.tag != "tag:yaml.org,2002:seq"
            or not node.value
        ):
            raise ValueError(
                f"{path}: {key} must be a list of one or more scalars, got {_source(loader, node)}"
            )
        grid[key] = [_scalar(loader, item, f"{path}: each value of {key}") for item in node.value]
        for at, value in enumerate(grid[key]):
            if isinstance(value, str) and not re.fullmatch("[ -~]+", value):
                raise ValueError(
                    f"{path}: in {key}: {shown(value)} must be ASCII: it becomes a part of a "
                    f"trial's name"
                )
            try:
                meant = getattr(TrialConfig(**{**defaults, key: value}), key)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            # YAML reads 1e-4 as text, and 3.0 is no seed: the plan has what the trial will have. 1
            # stays 1 in a name.
            grid[key][at] = value if isinstance(meant, float) and isinstance(value, int) else meant
    longest = "_".join(f"{key}={max(map(str, values), key=len)}" for key, values in grid.items())
    if len(longest) > MOST_NAME:
        raise ValueError(
            f"{path}: a trial would be called {shown(longest)}: at most {MOST_NAME} characters"
        )
    trials = math.prod(map(len, grid.values()))
    if trials > MOST_TRIALS:
        raise ValueError(
            f"{path} has {trials:,} combinations of {', '.join(grid)}: at most {MOST_TRIALS:,}"
        )
    return grid


def _read_yaml(path: Path) -> tuple[yaml.SafeLoader, dict[str, yaml.Node]]:
    """The keys of a flat YAML file and what stands behind them, which `_scalar` makes into values.

    It is `yaml.safe_load` with a look in between. Nothing but a scalar is made, so that nesting and
    aliases of aliases cost nothing, and no key is given twice, of which YAML would keep the last.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"{path} is too long: a parameter or grid file has at most {MOST_BYTES:,} bytes"
        )
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except (yaml.YAMLError, OSError) as error:
        text = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise ValueError(f"{path} is not YAML: {text[:300]}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path} is not YAML that can be read: nested too deeply") from None
    except (ValueError, OverflowError):  # PyYAML's own check lets them through
        raise ValueError(
            f"{path} is not YAML: an escape or a version in it is out of range"
        ) from None
    if root is None:
        return loader, {}
    if not isinstance(root, yaml.MappingNode) or root.tag != "tag:yaml.org,2002:map":
        raise ValueError(f"{path} must be flat `key: value` lines, got {_source(loader, root)}")
    nodes: dict[str, yaml.Node] = {}
    for key, node in root.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            raise ValueError(
                f"{path}: {_source(loader, key)} is no key: a key must be a parameter's name"
            )
        if key.value in nodes:
            raise ValueError(
                f"{path}: {shown(key.value)} is given twice, again in line "
                f"{key.start_mark.line + 1}: "
                "a key must stand there once"
            )
        nodes[key.value] = node
    return loader, nodes


def _scalar(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> str | int | float | bool:
    if isinstance(node, yaml.ScalarNode):
        with contextlib.suppress(
            Exception
        ):  # PyYAML fails in many ways at `!!int x`, `0x_`, 2026-02-31, `=`
            value = loader.construct_object(node)
            if isinstance(value, (str, int, float)):
                return value
    raise ValueError(
        f"{where} must be one scalar (text, a number, true or false), got {_source(loader, node)}: "
        f"text "
        "that looks like something else belongs in quotes, a list (of scalars) in a grid file"
    )


def _source(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    """What stands in the file, and what YAML takes it for."""
    text = loader.buffer[node.start_mark.index : node.end_mark.index].strip()
    kind = shown(node.tag.removeprefix("tag:yaml.org,2002:"))[
        1:-1
    ]  # a tag may hold any character, as %0A
    return f"{shown(text)} (to YAML {kind})"
