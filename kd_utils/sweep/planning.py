"""What a sweep is to run: a parameter file times a grid, as named trials, and a choice of them."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from kd_utils.config import fields, project_paths, stages
from kd_utils.config.parameter_files import WORLDS, check_values, notebook_config
from kd_utils.config.trial import TrialConfig, trial_name
from kd_utils.sweep.execution import injected


@dataclasses.dataclass(frozen=True)
class Trial:
    """One planned trial."""

    trial: str  # its name
    swept: dict[str, Any]  # its place in the grid
    config_hash: str
    epochs: int  # how many it trains for; 1 for an untrained student, which is measured once
    parameters: dict[str, Any]  # what papermill injects into 03
    without_effect: list[str]  # keys of the grid that its method does not use
    after: str = ""  # the trial whose student it starts from


def plan(
    parameters: dict[str, Any], grid: dict[str, list[Any]], run_dir: str | Path
) -> list[Trial]:
    """Plan every combination of the grid as a trial, first key slowest; nothing is loaded.

    Combinations that differ only in parameters that their method does not use
    (`TrialConfig.without_effect`) are one trial, which has no value of those parameters: a sweep
    over gamma_hidden has one black-box trial for each seed.

    Args:
        parameters: of the parameter file; the grid overrides them.

    Raises:
        ValueError: a value that a notebook refuses, or two combinations that are the same trial.
    """
    check_values(parameters)  # of 03 too: a value that the grid overrides must be right as well
    if any("round" in key.split() for key in grid):
        raise ValueError("the grid has round, which a sweep sets: give rounds")
    trials: list[Trial] = []
    known: dict[str, Trial] = {}  # by name and by config
    for combination in combinations(grid):
        before: Trial | None = None
        for cut in _rounds(parameters, combination):
            trial = _planned(parameters, combination | cut, run_dir, before)
            same = known.get(trial.config_hash) or known.get(trial.trial)
            used = {k: v for k, v in trial.swept.items() if k not in trial.without_effect}
            if same and trial.without_effect and used.items() <= same.swept.items():
                before = same
                continue
            if same:
                raise ValueError(
                    f"the grid has the same trial twice: {same.trial} and {trial.trial}: remove "
                    "one of the two values"
                )
            trials.append(trial)
            known[trial.trial] = known[trial.config_hash] = before = trial
    return trials


def _rounds(parameters: dict[str, Any], combination: dict[str, Any]) -> list[dict[str, int]]:
    """What the trials of one combination differ in: the round, where there are several."""
    cuts = _config(parameters, combination).cuts
    return [{}] if cuts == 1 else [{"round": number} for number in range(1, cuts + 1)]


def _config(
    parameters: dict[str, Any], combination: dict[str, Any], start: dict[str, str] | None = None
) -> TrialConfig:
    """A trial's config; an error names its place in the grid."""
    try:
        return notebook_config(stages.TRAIN, {**parameters, **combination, **(start or {})})
    except ValueError as error:
        where = ", ".join(f"{key}={value}" for key, value in combination.items())
        raise ValueError(f"{error} (in the grid: {where})") from None


def _planned(
    parameters: dict[str, Any], combination: dict[str, Any], run_dir: str | Path, before: Any
) -> Trial:
    """One trial of a plan.

    Args:
        before: the trial from whose student this one starts; None: from that of the parameters.
    """
    start = {}
    if before:
        folder = notebook_config(stages.TRAIN, before.parameters).student_folder
        start = {"student": project_paths.short_path(folder)}
    config = _config(parameters, combination, start)
    unused = [key for key in combination if key in config.without_effect]
    used = {key: value for key, value in combination.items() if key not in unused}
    swept: dict[str, Any] = {"distill_type": config.distill_type, "seed": config.seed} | used
    name = trial_name(**swept)
    if len(name) > 200:  # it becomes the name of files
        raise ValueError(
            f"the trial name {fields.shown(name)} is longer than 200 characters: sweep fewer "
            "parameters, or shorter values"
        )
    place = {"run_dir": project_paths.short_path(run_dir), "trial": name}
    inject = injected(stages.TRAIN, {**parameters, **combination}) | swept | start | place
    for key, value in inject.items():  # as records have it: "8" and not 8 of what may be "all"
        if isinstance(checked := getattr(config, key), str):
            inject[key] = checked if key not in place else value
    epochs = config.own_epochs if config.trains else 1
    after = before.trial if before else ""
    return Trial(name, swept, config.fingerprint(), epochs, inject, unused, after)


def waves(trials: list[Trial]) -> list[list[Trial]]:
    """Trials in the order in which they can run: those of a wave start from students of earlier
    ones, or of none of these trials.
    """
    number: dict[str, int] = {}
    for trial in trials:  # a plan has a trial behind the one that it starts from
        number[trial.trial] = number.get(trial.after, -1) + 1
    return [
        [trial for trial in trials if number[trial.trial] == wave]
        for wave in sorted({*number.values()})
    ]


def combinations(grid: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of a grid's values, first key slowest: parameter -> value.

    Args:
        grid: as `load_grid` returns it; a key may name several parameters that change together.
    """
    for values in itertools.product(*grid.values()):
        combination: dict[str, Any] = {}
        for key, value in zip(grid, values, strict=True):
            names = key.split()
            combination |= zip(names, [value] if len(names) == 1 else value, strict=True)
        yield combination


def select(trials: list[Trial], only: str, grid: dict[str, list[Any]]) -> list[Trial]:
    """Choose trials as `--only` does: `key=value`, `key=a+b`, `seed=0-2+5`, several keys separated
    by commas.

    Raises:
        ValueError: a key or value that the grid does not have.
    """
    values_of: dict[str, dict[Any, None]] = {}  # without repeats, in their order
    for combination in combinations(grid):
        for key, value in combination.items():
            values_of.setdefault(key, {})[value] = None
    wanted: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in only.split(","))):
        key, _, text = part.partition("=")
        if key not in values_of or key in wanted or not text:
            raise ValueError(
                f"--only {part}: give each key once, as key=value; the grid has "
                f"{', '.join(values_of)}"
            )
        wanted[key] = []
        for word in _words(text):
            found = [
                value
                for value in values_of[key]
                if word == str(value) or isinstance(value, float) and word == f"{value:g}"
            ]
            if not found:
                values = ", ".join(map(str, values_of[key]))
                raise ValueError(
                    f"--only {part}: {key}={word} is not in the grid, which has {values}"
                )
            wanted[key] += found
    # A trial stands for all values of what it does not use: the untrained student for all seeds.
    return [
        trial
        for trial in trials
        if all(
            key in trial.without_effect or trial.swept[key] in values
            for key, values in wanted.items()
        )
    ]


def planned_results(trials: list[Trial]) -> pd.DataFrame:
    """The table of `run_folder.collect`, without metrics, as if these trials were done."""
    rows = [
        {"trial": t.trial, "status": "done"}
        | {f"config/{key}": value for key, value in t.swept.items()}
        for t in trials
    ]
    return pd.DataFrame(rows)


def default_run_dir(parameters: dict[str, Any], grid_file: str | Path | None = None) -> Path:
    """`runs/NAME` under the project's root; `runs/NAME-X` with a grid file `grid-X.yaml`, `X.yaml`,
    or, for this experiment alone, `grid-X-NAME.yaml`; and `runs/NAME` for worlds
    whose NAME ends in `-X`.
    """
    own = {key: value for key, value in parameters.items() if key == "name"}
    name = notebook_config(stages.PREPARE, own).name
    suffix = Path(grid_file or "").stem.removeprefix("grid").strip("-").removesuffix(f"-{name}")
    return project_paths.project_path("runs") / (
        name
        if not suffix or WORLDS in parameters and name.endswith(f"-{suffix}")
        else f"{name}-{suffix}"
    )


def _words(text: str) -> list[str]:
    """`0-2+5` -> ["0", "1", "2", "5"]."""
    words: list[str] = []
    for piece in text.split("+"):
        span = re.fullmatch(r"(\d{1,6})-(\d{1,6})", piece)
        numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
        words += map(str, numbers) if numbers else [piece]
    return words
