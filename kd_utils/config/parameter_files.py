"""Parameter files and grids, and the notebooks' own defaults that they change."""

import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from kd_utils.config import notebook_files
from kd_utils.config.base import NEVER_IN_A_RESULT
from kd_utils.config.fields import kind_of, shown
from kd_utils.config.project_paths import CODE_ROOT
from kd_utils.config.stages import NOTEBOOKS, SWEPT, TrialConfig, parameter_names

#: The keys of a parameter file that no notebook declares, which a sweep alone reads.
WORLDS, CHAIN = "worlds", "chain"

#: No parameter file is longer than this, and no sweep with more trials comes to its end.
MOST_BYTES, MOST_TRIALS = 1_000_000, 10_000


def notebook_config(stem: str, parameters: dict[str, Any]) -> Any:
    """The `NOTEBOOKS[stem]` of what its cell assigns and of those `parameters` that it declares."""
    own = own_config(stem).model_dump()
    return NOTEBOOKS[stem](**{**own, **_declared(stem, parameters)})


def _declared(stem: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {k: value for k, value in parameters.items() if k in NOTEBOOKS[stem].model_fields}


def check_values(parameters: dict[str, Any]) -> None:
    """Raise a ValueError for a value that a notebook refuses. What the cells of notebooks that a
    sweep does not execute hold does not matter.
    """
    for stem, config in NOTEBOOKS.items():
        own = own_config(stem).model_dump() if stem in SWEPT else {}
        config(**{**own, **_declared(stem, parameters)})


def own_config(stem: str) -> Any:
    """The `NOTEBOOKS[stem]` of what its `parameters` cell assigns, which a sweep runs as it is.

    Raises:
        ValueError: names notebook and cell: a value is wrong or of a wrong type, a parameter is
            missing or unknown (see also `notebook_defaults`).
    """
    config, values = NOTEBOOKS[stem], notebook_files.notebook_defaults(stem)
    wrong = [
        f"{key} = {shown(values[key])} must be {kind_of(default)}, got {kind_of(values[key])}"
        for key, default in config().model_dump().items()
        if key in values and not _fits(values[key], default)
    ]
    if missing := config.not_in(values):
        wrong.append(f"{missing} must be assigned: restore what the project has")
    try:
        if wrong:
            raise ValueError("; ".join(wrong))
        return config(**values)
    except ValueError as error:
        number = notebook_files.parameters_cell(stem, notebook_files.read_cells(stem))
        raise ValueError(f"{notebook_files.place(stem, number)}: {error}") from None


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of its default's type; a whole number is a number too."""
    return type(value) is type(default) or (type(value), type(default)) == (int, float)


def changed_defaults(stems: Iterable[str]) -> list[str]:
    """In one line each, what notebooks assign in place of the project's defaults."""
    lines = []
    for stem in stems:
        project = NOTEBOOKS[stem]().model_dump()
        lines += [
            f"{stem}: {key} = {value!r} in the notebook, the project's default is {project[key]!r}"
            for key, value in own_config(stem).model_dump().items()
            if value != project[key]
        ]
    return lines


def load_parameters(path: str | Path) -> dict[str, Any]:
    """Load a parameter file: flat YAML, one scalar for each key, only keys of some notebook, and
    `worlds` (`worlds.parameters`) and `chain` (`worlds.chain`), which a sweep alone reads.

    Raises:
        ValueError: the file is not flat YAML, or has a key that no notebook declares.
        FileNotFoundError: no such file; the error lists the files that are there.
    """
    loader, nodes = _read_yaml(Path(path), "parameter")
    notebook_files.refuse_unknown_keys(nodes, str(path), parameter_names() | {WORLDS, CHAIN})
    return {key: _scalar(loader, node, f"{path}: {key}") for key, node in nodes.items()}


def load_grid(path: str | Path | None = None) -> dict[str, list[Any]]:
    """Load a grid file: flat YAML, a list of values for each swept parameter of 03. Parameters that
    change together are one key, `keep_heads keep_mlp: [[8, 384], [4, 192]]`.

    Args:
        path: None for the project's own grid, all methods times 7 seeds.

    Returns:
        Key -> values; a value of a key of several parameters is a list, one entry for each.

    Raises:
        ValueError: the file is not `key: [values]`, or has a key that cannot be swept or a value
            that 03 refuses.
        FileNotFoundError: no such file.
    """
    path = Path(path or CODE_ROOT / "papermill_params" / "grid.yaml")
    loader, nodes = _read_yaml(path, "grid")
    if not nodes:
        raise ValueError(f"{path} must hold `key: [value, ...]` lines")
    swept = [key for key in TrialConfig.model_fields if key not in NEVER_IN_A_RESULT]
    grid: dict[str, list[Any]] = {}
    for key, node in nodes.items():
        names = key.split()
        if unknown := [name for name in names or [key] if name not in swept]:
            raise ValueError(
                f"{path}: {shown(unknown[0])} cannot be swept; a grid may have: {', '.join(swept)}"
            )
        if not _is_list(node) or not node.value:
            raise ValueError(
                f"{path}: {key} must be a list of one or more "
                f"{'scalars' if len(names) == 1 else 'lists'}, got {_source(loader, node)}"
            )
        where = f"{path}: each value of {key}"
        if len(names) == 1:
            values = [_scalar(loader, item, where) for item in node.value]
            grid[key] = [_grid_value(key, value, path) for value in values]
            continue
        grid[" ".join(names)] = [
            [
                _grid_value(name, _scalar(loader, part, where), path)
                for name, part in zip(names, _parts(loader, item, len(names), where), strict=True)
            ]
            for item in node.value
        ]
    swept_twice = Counter(name for key in grid for name in key.split())
    for name, count in swept_twice.items():
        if count > 1:
            raise ValueError(f"{path}: {name} is swept by two keys: give it in one of them")
    trials = math.prod(map(len, grid.values()))
    if trials > MOST_TRIALS:
        raise ValueError(
            f"{path} has {trials:,} combinations of {', '.join(grid)}: at most {MOST_TRIALS:,}"
        )
    return grid


def _is_list(node: yaml.Node) -> bool:
    return isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq"


def _parts(loader: yaml.SafeLoader, node: yaml.Node, count: int, where: str) -> list[yaml.Node]:
    """The nodes of one value of a key of several parameters."""
    if not _is_list(node) or len(node.value) != count:
        raise ValueError(
            f"{where} must be a list of {count} scalars, one for each parameter, got "
            f"{_source(loader, node)}"
        )
    return node.value


def _grid_value(key: str, value: Any, path: Path) -> Any:
    """The value that a trial's config will have: YAML reads 1e-4 as text, and 3.0 is no seed."""
    if isinstance(value, str) and not re.fullmatch("[ -~]*", value):
        raise ValueError(
            f"{path}: in {key}: {shown(value)} must be ASCII: it becomes part of a trial's name"
        )
    try:
        checked = getattr(TrialConfig(**{key: value}), key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return value if isinstance(checked, float) and isinstance(value, int) else checked  # 1 stays 1


def _read_yaml(path: Path, kind: str) -> tuple[yaml.SafeLoader, dict[str, yaml.Node]]:
    """Read the keys of a flat YAML file and their nodes, which `_scalar` turns into values.

    Unlike `yaml.safe_load`, this builds nothing but scalars, so deep nesting and aliases of aliases
    cost nothing, and it refuses a key that is given twice, where YAML keeps the last.
    """
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        near = path.parent.glob("*.yaml") if os.path.isdir(path.parent) else []
        names = ", ".join(sorted(p.name for p in near)) or "none"
        raise FileNotFoundError(f"no {kind} file {path} (files there: {names})")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} is too long: a {kind} file has at most {MOST_BYTES:,} bytes")
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: byte {error.start} is not UTF-8") from None
    except (yaml.YAMLError, OSError) as error:
        text = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise ValueError(f"{path} is not YAML: {text[:300]}") from None
    except RecursionError:
        raise ValueError(f"{path} is not YAML that can be read: nested too deeply") from None
    except (ValueError, OverflowError):  # which PyYAML does not turn into errors of its own
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
                f"{key.start_mark.line + 1}: each key must be given once"
            )
        nodes[key.value] = node
    return loader, nodes


def _scalar(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> str | int | float | bool:
    if isinstance(node, yaml.ScalarNode):
        # PyYAML fails in many ways at `!!int x`, `0x_`, 2026-02-31, `=`
        with contextlib.suppress(Exception):
            value = loader.construct_object(node)
            if isinstance(value, (str, int, float)):
                return value
    raise ValueError(
        f"{where} must be one scalar (text, a number, true or false), got {_source(loader, node)}: "
        "put text that looks like something else in quotes, and a list (of scalars) in a grid file"
    )


def _source(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    """The text of a node in the file, and the type that YAML gives it."""
    text = loader.buffer[node.start_mark.index : node.end_mark.index].strip()
    kind = shown(node.tag.removeprefix("tag:yaml.org,2002:"))[1:-1]  # a tag may hold any character
    return f"{shown(text)} (YAML reads {kind})"
