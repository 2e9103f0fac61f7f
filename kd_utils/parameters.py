"""Parameter files and grids, and the notebooks' own defaults that they change."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import yaml

from .config import NOTEBOOKS, Config, TrialConfig, unknown_keys_are_errors

#: Keys of 03 that say where a trial's files go and not what it is.
NOT_SWEPT = ("name", "artifacts_dir", "run_dir", "trial", "device", "save_student")


def notebook_path(stem: str) -> Path:
    """Source of a notebook. It travels with the code, so it lies beside the package and not under KD_ROOT."""
    return Path(__file__).resolve().parents[1] / "notebooks" / f"{stem}.ipynb"


def notebook_defaults(stem: str) -> dict[str, Any]:
    """The literals that a notebook's `parameters` cell assigns, as a dict."""
    cells = json.loads(notebook_path(stem).read_text())["cells"]
    [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assigned = ast.parse("".join(cell["source"])).body
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assigned if isinstance(node, ast.Assign)}


def notebook_config(stem: str, parameters: dict[str, Any]) -> Config:
    """The config that notebook `stem` builds when it is passed those of `parameters` that it declares."""
    config = NOTEBOOKS[stem]
    known = {key: value for key, value in parameters.items() if key in config.model_fields}
    return config(**{**notebook_defaults(stem), **known})


def load_parameters(path: str | Path) -> dict[str, Any]:
    """A parameter file: flat YAML, only keys that some notebook declares.

    Raises:
        ValueError: not a flat mapping, or a key that no notebook declares (with the nearest that one does).
        FileNotFoundError: no such file, with those that there are.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else "none"
        raise FileNotFoundError(f"no parameter file {path} (files there: {near})")
    values = _read_yaml(path)
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must be flat `key: value` lines, got a {type(values).__name__}")
    for key, value in values.items():
        if isinstance(value, (dict, list)) or value is None:
            raise ValueError(f"{path}: {key} must be one scalar, got {value!r}: lists belong in a grid file")
    unknown_keys_are_errors(values, str(path))
    return values


def load_grid(path: str | Path | None = None) -> dict[str, list[Any]]:
    """A grid file: flat YAML, a list of values per key of 03. None: the project's own, all methods x 7 seeds.

    Raises:
        ValueError: not `key: [values]`, or a key that 03 does not declare or that cannot change a result.
        FileNotFoundError: no such file.
    """
    path = Path(path or Path(__file__).resolve().parents[1] / "papermill_params" / "grid.yaml")
    if not path.is_file():
        raise FileNotFoundError(f"no grid file {path}")
    grid = _read_yaml(path)
    if not isinstance(grid, dict) or not grid:
        raise ValueError(f"{path} must hold `key: [value, ...]` lines")
    for key, values in grid.items():
        if not isinstance(values, list) or not values or any(isinstance(v, (list, dict)) or v is None for v in values):
            raise ValueError(f"{path}: {key} must be a list of one or more scalars, got {values!r}")
        if key not in TrialConfig.model_fields or key in NOT_SWEPT:
            known = ", ".join(k for k in TrialConfig.model_fields if k not in NOT_SWEPT)
            raise ValueError(f"{path}: {key} cannot be swept; a grid may have: {known}")
    return grid


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
