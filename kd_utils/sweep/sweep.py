"""The sweep: a parameter file times a grid, planned, run through Ray, and never run twice.

Stages 01 and 02 run here; then each trial is one papermill execution of 03 in a task of Ray; 04
closes the run.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_utils.cache.manifest import CacheError, find_cache
from kd_utils.cluster.machines import fitting_gpus, require_same_view
from kd_utils.cluster.session import ray_running
from kd_utils.config import parameter_files, project_paths
from kd_utils.records import run_folder, trial_record
from kd_utils.records.provenance import code_of
from kd_utils.store.files import sha256_file, written_aside
from kd_utils.store.locks import locked
from kd_utils.store.sealed import write_sealed
from kd_utils.sweep.display import Progress
from kd_utils.sweep.execution import execute, in_thread, injected
from kd_utils.sweep.planning import (
    ANALYSE,
    CACHE,
    PREPARE,
    TRAIN,
    Trial,
    default_run_dir,
    plan,
    select,
)
from kd_utils.sweep.ray_executor import run_trials
from kd_utils.sweep.staleness import (
    artifact_of,
    earlier_plan,
    made_of,
    more_caches,
    stage_key,
    status,
    why_to_run,
)

if TYPE_CHECKING:
    import pandas as pd

ANALYSES = ("comparisons.csv", "analysis.csv")  # which 04 writes, beside the verdict


def run_sweep(
    parameters: dict[str, Any],
    grid: dict[str, list[Any]],
    *,
    only: str = "",
    run_dir: str | Path | None = None,
    address: str | None = None,
    cpus_per_trial: float = 1,
    gpus_per_trial: float | None = None,
) -> pd.DataFrame:
    """Run what is missing of a sweep, write `results_summary.csv`, execute 04.

    Args:
        parameters, grid: as `parameters.load_parameters` and `load_grid` give them; the plan is
            always the whole grid.
        only: which of its trials to run now (see `select`).
        run_dir: where the records go; None: `runs/NAME`.
        address: of a Ray cluster whose nodes see the project's root at the same path (or KD_ROOT);
            None: this machine.
        cpus_per_trial, gpus_per_trial: what Ray reserves for a trial, fractions too; None: one GPU
            where there is one.

    Returns:
        The results table, a row per planned trial (`run_folder.collect`). A trial that failed is in
        it as `failed`.

    Raises:
        ValueError: bad parameters, resources that no machine has, or a run folder that another
            sweep is at, before anything is run; a machine that does not see the shared folder,
            before any trial is.
        NotebookFailed: 01, 02 or 04 did not run to its end.
    """
    run_dir = Path(os.path.abspath(run_dir or default_run_dir(parameters)))
    trials = plan(parameters, grid, run_dir)
    chosen = select(trials, only, grid)
    require_own(run_dir, parameters)
    with locked(run_dir, "a sweep", "wait for it or stop it, or give this one another --run-dir"):
        if _is_done(chosen, run_dir, parameters):
            _write_plan(run_dir, parameters, grid, trials)
            Progress({}).say(f"{len(chosen)} of {len(chosen)} trials: already done")
            results = _write_summary(run_dir)
        else:
            Progress({}).say("Ray is starting")
            with ray_running(address):
                results = _run(
                    parameters,
                    grid,
                    trials,
                    chosen,
                    run_dir,
                    address,
                    cpus_per_trial,
                    gpus_per_trial,
                )
        if (results["status"] == "done").any():
            _execute_stage(
                ANALYSE,
                run_dir,
                parameters | {"run_dir": project_paths.short_path(run_dir)},
                lambda: {
                    "wrote": {
                        path.name: sha256_file(path)
                        for path in sorted(run_dir.iterdir())
                        if path.name == run_folder.VERDICT or path.suffix == ".csv"
                    }
                },
            )
        else:  # what an earlier plan's trials showed is not this one's
            for name in (f"{ANALYSE}.ipynb", run_folder.VERDICT, *ANALYSES):
                (run_dir / name).unlink(missing_ok=True)
    return results


def require_own(run_dir: Path, parameters: dict[str, Any]) -> None:
    """Raise a ValueError if the run's folder holds another experiment, whose trials this sweep
    would replace.
    """
    name, earlier = parameter_files.notebook_config(PREPARE, parameters).name, earlier_plan(run_dir)
    if earlier.get("name", name) != name:
        raise ValueError(
            f"{project_paths.short_path(run_dir)} holds experiment {earlier['name']!r}, and this "
            f"is {name!r}: "
            "give another --run-dir, or remove that folder"
        )


def _run(
    parameters: dict[str, Any],
    grid: dict[str, list[Any]],
    trials: list[Trial],
    chosen: list[Trial],
    run_dir: Path,
    address: str | None,
    cpus: float,
    gpus: float | None,
) -> pd.DataFrame:
    """01, 02 and what is missing of the chosen trials, on the Ray that is running; the results
    table.
    """
    import ray

    device = parameter_files.notebook_config(TRAIN, parameters).device
    gpus = fitting_gpus(ray.nodes(), cpus, gpus, device)
    _write_plan(run_dir, parameters, grid, trials)
    if address not in (
        None,
        "local",
    ):  # before the teacher runs for hours, as far as it can be told by then
        require_same_view(_shared_files(trials, run_dir, parameters), cpus, gpus)
    _prepare(run_dir, parameters, address)
    _write_plan(run_dir, parameters, grid, trials)
    states = status(trials, run_dir, parameters)
    todo = {trial.trial: trial for trial in chosen if states[trial.trial].state != "done"}
    code = code_of(TRAIN)
    try:
        if todo:
            seen = _shared_files(trials, run_dir, parameters)
            require_same_view(seen, cpus, gpus)
            already = sum(state.state == "done" for state in states.values())
            with Progress(
                {name: trial.epochs for name, trial in todo.items()}, already
            ) as progress:
                for name, state in states.items():
                    if name in todo and state.state == "stale":
                        progress.say(f"{name}: stale, {state.why}")
                entries = {
                    name: dataclasses.asdict(trial) | {"code": code} for name, trial in todo.items()
                }
                run_trials(entries, run_dir, progress, cpus=cpus, gpus=gpus, seen=seen)
    finally:  # after Ctrl-C too: the table says what is done so far
        results = _write_summary(run_dir)
    if (
        results["status"] == "done"
    ).all():  # of a trial that was killed between its record and its last breath
        shutil.rmtree(
            project_paths.project_path(
                parameter_files.notebook_config(TRAIN, parameters).artifacts_dir
            )
            / "checkpoints"
            / project_paths.run_label(run_dir),
            ignore_errors=True,
        )
    return results


def _is_done(chosen: list[Trial], run_dir: Path, parameters: dict[str, Any]) -> bool:
    if any(why_to_run(stem, run_dir, parameters) for stem in (PREPARE, CACHE)):
        return False
    return all(state.state == "done" for state in status(chosen, run_dir, parameters).values())


def _write_summary(run_dir: Path) -> pd.DataFrame:
    results = run_folder.collect(run_dir)
    with written_aside(run_dir / run_folder.SUMMARY) as aside:
        results.to_csv(aside, index=False)
    return results


def _shared_files(trials: list[Trial], run_dir: Path, parameters: dict[str, Any]) -> dict[str, str]:
    """What every machine must see as it is here: the plan, the data's and the cache's manifest,
    once they are there.
    """
    settings = parameter_files.notebook_config(CACHE, parameters)
    paths = [run_dir / run_folder.PLAN, settings.data_path / "manifest.json"]
    with suppress(CacheError):
        paths.append(find_cache(settings.artifacts, settings.name) / "manifest.json")
    paths += [folder / "manifest.json" for folder in more_caches(trials, parameters).values()]
    return {project_paths.short_path(path): sha256_file(path) for path in paths if path.is_file()}


def _write_plan(
    run_dir: Path, parameters: dict[str, Any], grid: dict[str, list[Any]], trials: list[Trial]
) -> None:
    """Write `sweep.json`: what is to be run, and what of (`made_of`, the earlier plan's where there
    is no cache).
    """
    made = made_of(trials, run_dir, parameters)
    cache = (artifact_of(CACHE, parameters) or earlier_plan(run_dir)).get("cache")
    document = {
        "format": trial_record.FORMAT,
        "name": parameter_files.notebook_config(PREPARE, parameters).name,
        "parameters": parameters,
        "grid": grid,
        "cache": {key: cache[key] for key in ("name", "content_hash")} if cache else None,
        "more_caches": made.more_caches,
        "tokenizer": made.tokenizer,
        "students": made.students,
        "code": made.code,
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }
    write_sealed(run_dir / run_folder.PLAN, document, "checksums")


def _prepare(run_dir: Path, parameters: dict[str, Any], address: str | None) -> None:
    """Execute 01 and 02 unless they are done."""
    progress = Progress({})
    for stem in (PREPARE, CACHE):
        why = why_to_run(stem, run_dir, parameters)
        if not why:
            progress.say(f"{stem}: already done")
            continue

        def about(stem: str = stem) -> dict[str, Any]:
            key = stage_key(stem, parameters)
            if key is None:
                raise ValueError(
                    f"{stem} ran to its end, but what it makes is not under artifacts_dir"
                )
            return key

        progress.say(f"{stem}: running ({why})")
        _execute_stage(stem, run_dir, parameters, about, address)


def _execute_stage(
    stem: str, run_dir: Path, parameters: dict[str, Any], about: Any, address: str | None = None
) -> None:
    os.environ["KD_ROOT"] = str(project_paths.ROOT)
    values, before = injected(stem, parameters), os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = address or "local"  # 02 runs its teacher where the trials will run
    try:
        in_thread(
            lambda: execute(
                stem, run_dir / f"{stem}.ipynb", values, about, progress_bar=os.isatty(2)
            )
        )
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before
