"""What a sweep is to run: a parameter file times a grid, as trials with names, and which of
them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

from kd_utils.config import parameter_files, project_paths, stages
from kd_utils.config.fields import shown
from kd_utils.config.parameter_files import MOST_NAME
from kd_utils.config.trial import trial_name
from kd_utils.sweep.execution import injected

PREPARE, CACHE, TRAIN, ANALYSE, *_ = stages.NOTEBOOKS


@dataclasses.dataclass(frozen=True)
class Trial:
    """One planned trial: `swept` is its place in the grid, `parameters` what papermill injects into
    03, `without_effect` the grid's keys that its method does not use."""

    trial: str
    swept: dict[str, Any]
    config_hash: str
    epochs: int
    parameters: dict[str, Any]
    without_effect: list[str]


def plan(
    parameters: dict[str, Any], grid: dict[str, list[Any]], run_dir: str | Path
) -> list[Trial]:
    """Every combination of the grid as a trial, first key slowest. All values are checked, nothing
    is loaded.

    Combinations that differ only in what their method does not use (`TrialConfig.without_effect`)
    are one trial, which has no value of those keys: in a sweep over gamma_hidden there is one black
    box per seed.

    Args:
        parameters: of the parameter file; a key of the grid goes before it.

    Raises:
        ValueError: a value that a notebook refuses, or two combinations that are the same trial.
    """
    for stem in stages.NOTEBOOKS:  # 03 too: a value that the grid overrides may not be wrong either
        parameter_files.notebook_config(stem, parameters)
    trials: dict[str, Trial] = {}
    seen: dict[str, dict[str, Any]] = {}
    place = {"run_dir": project_paths.short_path(run_dir)}
    for values in itertools.product(*grid.values()):
        swept = dict(zip(grid, values))
        try:
            chosen = parameter_files.notebook_config(TRAIN, {**parameters, **swept})
        except ValueError as error:
            raise ValueError(
                f"{error} (in the grid: "
                f"{', '.join(f'{key}={value}' for key, value in swept.items())})"
            ) from None
        used = {key: value for key, value in swept.items() if key not in chosen.without_effect}
        if seen.get(chosen.fingerprint()) == used and used != swept:
            continue  # what differs means nothing to this method: one trial serves for all of them
        swept = {"distill_type": chosen.distill_type, "seed": chosen.seed} | used
        name = trial_name(**swept)
        if len(name) > MOST_NAME:
            raise ValueError(
                f"a trial would be called {shown(name)}: at most {MOST_NAME} characters"
            )
        inject = injected(TRAIN, {**parameters, **swept}) | swept | place | {"trial": name}
        unused = [key for key in grid if key in chosen.without_effect]
        trial = Trial(name, swept, chosen.fingerprint(), len(chosen.epoch_numbers), inject, unused)
        same = next(
            (t for t in trials.values() if t.config_hash == trial.config_hash or t.trial == name),
            None,
        )
        if same:
            raise ValueError(f"the grid has the same trial twice: {same.trial} and {name}")
        trials[name], seen[trial.config_hash] = trial, used
    return list(trials.values())


def select(trials: list[Trial], only: str, grid: dict[str, list[Any]]) -> list[Trial]:
    """The trials that `--only` names: `key=value`, `key=a+b`, `seed=0-2+5`, several keys with
    commas between.

    Raises:
        ValueError: a key or value that the grid does not have.
    """
    wanted: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in only.split(","))):
        key, _, text = part.partition("=")
        if key not in grid or key in wanted or not text:
            raise ValueError(
                f"--only {part}: give each key once, as key=value; the grid has {', '.join(grid)}"
            )
        wanted[key] = []
        for word in _words(text):
            found = [value for value in grid[key] if word and word in _spellings(value)]
            if not found:
                raise ValueError(
                    f"--only {part}: {key}={word} is not in the grid, which has "
                    + ", ".join(map(str, grid[key]))
                )
            wanted[key] += found
    # A trial serves for all values of what it does not use: the untrained student for all seeds.
    return [
        trial
        for trial in trials
        if all(
            key in trial.without_effect or trial.swept[key] in values
            for key, values in wanted.items()
        )
    ]


def default_run_dir(parameters: dict[str, Any], grid_file: str | Path | None = None) -> Path:
    """`runs/NAME` under the project's root; `runs/NAME-X` for a grid file `grid-X.yaml` or `X.yaml`
    of one's own.
    """
    stem = "" if grid_file is None else Path(grid_file).stem.removeprefix("grid").strip("-")
    name = parameter_files.notebook_config(PREPARE, parameters).name
    return project_paths.project_path("runs") / (f"{name}-{stem}" if stem else name)


def _words(text: str) -> list[str]:
    """`0-2+5` -> ["0", "1", "2", "5"]."""
    words = []
    for piece in text.split("+"):
        span = re.fullmatch(r"(\d{1,6})-(\d{1,6})", piece)
        words += (
            [str(number) for number in range(int(span[1]), int(span[2]) + 1)] or [piece]
            if span
            else [piece]
        )
    return words


def _spellings(value: Any) -> set[str]:
    return {str(value), f"{value:g}"} if isinstance(value, float) else {str(value)}
