"""The sweep: a parameter file times a grid, planned, run through Ray Tune, and never run twice.

Stages 01 and 02 run here; then each trial is one papermill execution of 03 in an actor of Ray; 04 closes the run.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config, records
from . import parameters as parameter_files
from .display import Progress
from .execution import execute, in_thread, injected
from .files import sha256_file, sha256_json, written_aside
from .scheduling import run_trials
from .sealed import write_sealed

if TYPE_CHECKING:
    import pandas as pd

PREPARE, CACHE, TRAIN, ANALYSE, _ = config.NOTEBOOKS


@dataclasses.dataclass(frozen=True)
class Trial:
    """One planned trial: `swept` is its place in the grid, `parameters` what papermill injects into 03,
    `without_effect` the grid's keys that its method does not use."""

    trial: str
    swept: dict[str, Any]
    config_hash: str
    epochs: int
    parameters: dict[str, Any]
    without_effect: list[str]


def plan(parameters: dict[str, Any], grid: dict[str, list[Any]], run_dir: str | Path) -> list[Trial]:
    """Every combination of the grid as a trial, first key slowest. All values are checked, nothing is loaded.

    Combinations that differ only in what their method does not use (`TrialConfig.without_effect`) are one trial, which
    has no value of those keys: in a sweep over gamma_hidden there is one black box per seed.

    Args:
        parameters: of the parameter file; a key of the grid goes before it.

    Raises:
        ValueError: a value that a notebook refuses, or two combinations that are the same trial.
    """
    for stem in config.NOTEBOOKS:  # 03 too: a value that the grid overrides may not be wrong either
        parameter_files.notebook_config(stem, parameters)
    trials: dict[str, Trial] = {}
    seen: dict[str, dict[str, Any]] = {}
    place = {"run_dir": config.short_path(run_dir)}
    for values in itertools.product(*grid.values()):
        swept = dict(zip(grid, values))
        try:
            chosen = parameter_files.notebook_config(TRAIN, {**parameters, **swept})
        except ValueError as error:
            raise ValueError(f"{error} (in the grid: {', '.join(f'{key}={value}' for key, value in swept.items())})") \
                from None
        used = {key: value for key, value in swept.items() if key not in chosen.without_effect}
        if seen.get(chosen.fingerprint()) == used and used != swept:
            continue  # what differs means nothing to this method: one trial serves for all of them
        swept = {"distill_type": chosen.distill_type, "seed": chosen.seed} | used
        name = records.trial_name(**swept)
        inject = injected(TRAIN, {**parameters, **swept}) | swept | place | {"trial": name}
        unused = [key for key in grid if key in chosen.without_effect]
        trial = Trial(name, swept, chosen.fingerprint(), len(chosen.epoch_numbers), inject, unused)
        same = next((t for t in trials.values() if t.config_hash == trial.config_hash or t.trial == name), None)
        if same:
            raise ValueError(f"the grid has the same trial twice: {same.trial} and {name}")
        trials[name], seen[trial.config_hash] = trial, used
    return list(trials.values())


def select(trials: list[Trial], only: str, grid: dict[str, list[Any]]) -> list[Trial]:
    """The trials that `--only` names: `key=value`, `key=a+b`, `seed=0-2+5`, several keys with commas between.

    Raises:
        ValueError: a key or value that the grid does not have.
    """
    wanted: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in only.split(","))):
        key, _, text = part.partition("=")
        if key not in grid or key in wanted or not text:
            raise ValueError(f"--only {part}: give each key once, as key=value; the grid has {', '.join(grid)}")
        wanted[key] = []
        for word in _words(text):
            found = [value for value in grid[key] if word and word in _spellings(value)]
            if not found:
                raise ValueError(f"--only {part}: {key}={word} is not in the grid, which has "
                                 + ", ".join(map(str, grid[key])))
            wanted[key] += found
    # A trial serves for all values of what it does not use: the untrained student for all seeds.
    return [trial for trial in trials
            if all(key in trial.without_effect or trial.swept[key] in values for key, values in wanted.items())]


def default_run_dir(parameters: dict[str, Any], grid_file: str | Path | None = None) -> Path:
    """`runs/NAME` under the project's root; `runs/NAME-X` for a grid file `grid-X.yaml` or `X.yaml` of one's own."""
    stem = "" if grid_file is None else Path(grid_file).stem.removeprefix("grid").strip("-")
    name = parameter_files.notebook_config(PREPARE, parameters).name
    return config.resolve("runs") / (f"{name}-{stem}" if stem else name)


def status(trials: list[Trial], run_dir: Path, parameters: dict[str, Any]) -> dict[str, records.Status]:
    """Of each trial, whether it is done with this config and with the teacher cache that there is now."""
    cache = _artifact(CACHE, parameters)
    cache_hash = cache["cache"]["content_hash"] if cache else None
    return {t.trial: records.trial_status(run_dir, t.trial, t.config_hash, cache_hash) for t in trials}


def stage_is_done(stem: str, run_dir: Path, parameters: dict[str, Any]) -> bool:
    """Whether 01 or 02 was executed here from this source with these parameters, and what it made is still there."""
    artifact = _artifact(stem, parameters)
    try:
        about = records.read_notebook(run_dir / f"{stem}.ipynb")["metadata"]["kd_utils"]
    except records.RecordError:
        return False
    return artifact is not None and about.items() >= _stage_key(stem, parameters, artifact).items()


def run_sweep(parameters: dict[str, Any], grid: dict[str, list[Any]], *, only: str = "",
              run_dir: str | Path | None = None, address: str | None = None, cpus_per_trial: float = 1,
              gpus_per_trial: float | None = None) -> pd.DataFrame:
    """Run what is missing of a sweep, write `results_summary.csv`, execute 04.

    Args:
        parameters, grid: as `parameters.load_parameters` and `load_grid` give them; the plan is always the whole grid.
        only: which of its trials to run now (see `select`).
        run_dir: where the records go; None: `runs/NAME`.
        address: of a Ray cluster whose nodes see the project's root at the same path (or KD_ROOT); None: this machine.
        cpus_per_trial, gpus_per_trial: what Ray reserves for a trial, fractions too; None: one GPU where there is one.

    Returns:
        The results table, a row per planned trial (`records.collect`). A trial that failed is in it as `failed`.

    Raises:
        ValueError: bad parameters or resources that no machine has, before anything is run.
        NotebookFailed: 01, 02 or 04 did not run to its end.
    """
    run_dir = Path(os.path.abspath(run_dir or default_run_dir(parameters)))
    trials = plan(parameters, grid, run_dir)
    chosen = select(trials, only, grid)
    _write_plan(run_dir, parameters, grid, trials, None)
    _prepare(run_dir, parameters, address)
    _write_plan(run_dir, parameters, grid, trials, _artifact(CACHE, parameters))
    states = status(trials, run_dir, parameters)
    todo = [trial for trial in chosen if states[trial.trial].state != "done"]
    try:
        if todo:
            already = sum(state.state == "done" for state in states.values())
            with Progress({trial.trial: trial.epochs for trial in todo}, already) as progress:
                by_name = {trial.trial: dataclasses.asdict(trial) for trial in todo}
                run_trials(by_name, run_dir, progress, address, cpus_per_trial, gpus_per_trial)
    finally:  # after Ctrl-C too: the table says what is done so far
        results = records.collect(run_dir)
        with written_aside(run_dir / records.SUMMARY) as aside:
            results.to_csv(aside, index=False)
    if (results["status"] == "done").any():
        _execute_stage(ANALYSE, run_dir, parameters | {"run_dir": config.short_path(run_dir)}, dict)
    return results


def _words(text: str) -> list[str]:
    """`0-2+5` -> ["0", "1", "2", "5"]."""
    words = []
    for piece in text.split("+"):
        span = re.fullmatch(r"(\d{1,6})-(\d{1,6})", piece)
        words += [str(number) for number in range(int(span[1]), int(span[2]) + 1)] or [piece] if span else [piece]
    return words


def _spellings(value: Any) -> set[str]:
    return {str(value), f"{value:g}"} if isinstance(value, float) else {str(value)}


def _write_plan(run_dir: Path, parameters: dict[str, Any], grid: dict[str, list[Any]], trials: list[Trial],
                made: dict[str, Any] | None) -> None:
    document = {"format": records.FORMAT, "name": parameter_files.notebook_config(PREPARE, parameters).name,
                "parameters": parameters, "grid": grid, "cache": made and made["cache"],
                "trials": [dataclasses.asdict(trial) for trial in trials]}
    write_sealed(run_dir / records.PLAN, document, "checksums")


def _artifact(stem: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """What identifies the data and, for 02, the teacher cache that are there now; None when they are not there."""
    from .cache import CacheError, find_cache, read_manifest

    settings = parameter_files.notebook_config(stem, parameters)
    manifest = settings.data_path / "manifest.json"
    if not manifest.is_file():
        return None
    artifact: dict[str, Any] = {"data": sha256_file(manifest)}
    if stem == CACHE:
        try:
            folder = find_cache(settings.artifacts, settings.name)
            artifact["cache"] = {"name": folder.name, "content_hash": read_manifest(folder)["content_hash"]}
        except CacheError:
            return None
    return artifact


def _stage_key(stem: str, parameters: dict[str, Any], artifact: dict[str, Any]) -> dict[str, Any]:
    settings = parameter_files.notebook_config(stem, parameters).model_dump()
    return {"source": sha256_file(parameter_files.notebook_path(stem)), "parameters": sha256_json(settings),
            "artifact": artifact}


def _prepare(run_dir: Path, parameters: dict[str, Any], address: str | None) -> None:
    """Execute 01 and 02 unless they are done."""
    progress = Progress({})
    for stem in (PREPARE, CACHE):
        if stage_is_done(stem, run_dir, parameters):
            progress.say(f"{stem}: already done")
            continue

        def about(stem: str = stem) -> dict[str, Any]:
            artifact = _artifact(stem, parameters)
            if artifact is None:
                raise ValueError(f"{stem} ran to its end, but what it makes is not under artifacts_dir")
            return _stage_key(stem, parameters, artifact)

        progress.say(f"{stem}: running")
        _execute_stage(stem, run_dir, parameters, about, address)


def _execute_stage(stem: str, run_dir: Path, parameters: dict[str, Any], about: Any,
                   address: str | None = None) -> None:
    os.environ["KD_ROOT"] = str(config.ROOT)
    values, before = injected(stem, parameters), os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = address or "local"  # 02 runs its teacher where the trials will run
    try:
        in_thread(lambda: execute(stem, run_dir / f"{stem}.ipynb", values, about, progress_bar=os.isatty(2)))
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before
