"""The sweep: a parameter file times a grid, planned, run by an executor, and never run twice.

01 and 02 are executed here; then each trial is one execution of 03 by the executor; 04 ends the
run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_utils.cache.manifest import CacheError, find_cache
from kd_utils.config import project_paths
from kd_utils.config.parameter_files import notebook_config
from kd_utils.config.stages import ANALYSE, CACHE, PREPARE, TRAIN
from kd_utils.records import run_folder, trial_record
from kd_utils.records.provenance import code_of
from kd_utils.store.files import sha256_file, written_aside
from kd_utils.store.locks import locked
from kd_utils.store.sealed import write_sealed
from kd_utils.sweep.display import Progress, say
from kd_utils.sweep.execution import execute_stage
from kd_utils.sweep.executor import Executor, Job, run_trials
from kd_utils.sweep.planning import Trial, plan, select
from kd_utils.sweep.staleness import (
    earlier_plan,
    made_of,
    more_caches,
    stage_key,
    status,
    why_to_run,
)

if TYPE_CHECKING:
    import pandas as pd

#: What 04 writes into the run folder.
ANALYSES = (f"{ANALYSE}.ipynb", run_folder.VERDICT, "comparisons.csv", "analysis.csv")


class Sweep:
    """A parameter file times a grid, in one run folder.

    Args:
        parameters, grid: as `load_parameters` and `load_grid` return them; the plan is always the
            whole grid.
        only: which of its trials to run now (see `select`).

    Raises:
        ValueError: bad parameters, or a folder that holds another experiment, whose trials this
            sweep would replace.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        grid: dict[str, list[Any]],
        run_dir: str | Path,
        only: str = "",
    ) -> None:
        self.parameters, self.grid = parameters, grid
        self.run_dir = Path(os.path.abspath(os.path.expanduser(run_dir)))
        self.place = project_paths.short_path(self.run_dir)  # as records and machines know it
        self.trials = plan(parameters, grid, self.run_dir)
        self.chosen = select(self.trials, only, grid)
        self.name = notebook_config(PREPARE, parameters).name
        earlier = earlier_plan(self.run_dir).get("name", self.name)
        if earlier != self.name:
            raise ValueError(
                f"{self.place} holds experiment {earlier!r}, and this is {self.name!r}: give "
                "another --run-dir, or remove that folder"
            )

    def why_to_run(self) -> dict[str, str]:
        """Why 01 and 02 must be executed (again), each in one line; "" if not."""
        return {stem: why_to_run(stem, self.run_dir, self.parameters) for stem in (PREPARE, CACHE)}

    def states(self, trials: list[Trial]) -> dict[str, run_folder.Status]:
        return status(trials, self.run_dir, self.parameters)

    def run(self, executor: Callable[[], AbstractContextManager[Executor]]) -> pd.DataFrame:
        """Run what is missing, write `results_summary.csv`, execute 04.

        Args:
            executor: called only if something is missing.

        Returns:
            The results table, a row for each planned trial (`run_folder.collect`). A trial that
            failed is in it as `failed`.

        Raises:
            ValueError: resources that no machine has, another sweep in this folder, or a machine
                that does not see the shared folder, all before any trial is run.
            NotebookFailed: 01, 02 or 04 did not run to its end.
        """
        remedy = "wait for it or stop it, or give this sweep another --run-dir"
        with locked(self.run_dir, "a sweep", remedy):
            states = self.states(self.chosen).values()
            if any(self.why_to_run().values()) or any(state.state != "done" for state in states):
                with executor() as running:
                    results = self._run_missing(running)
            else:
                self._write_plan()
                say(f"{len(self.chosen)} of {len(self.chosen)} trials: already done")
                results = self._write_summary()
            if (results["status"] == "done").any():
                parameters = self.parameters | {"run_dir": self.place}
                execute_stage(ANALYSE, self.run_dir, parameters, self._written)
            else:  # an earlier plan's trials showed them
                for name in ANALYSES:
                    (self.run_dir / name).unlink(missing_ok=True)
        return results

    def _run_missing(self, executor: Executor) -> pd.DataFrame:
        """01, 02 and the missing trials of those chosen; the results table."""
        self._write_plan()
        executor.require_same_view(self._shared_files())  # before the teacher runs for hours
        self._prepare()
        self._write_plan()
        states = self.states(self.trials)
        todo = [trial for trial in self.chosen if states[trial.trial].state != "done"]
        files, code, place = self._shared_files(), code_of(TRAIN), self.place
        jobs = [Job(trial, place, code, files) for trial in todo]
        already = sum(state.state == "done" for state in states.values())
        try:
            executor.require_same_view(files)
            with Progress({trial.trial: trial.epochs for trial in todo}, already) as progress:
                for trial in todo:
                    if states[trial.trial].state == "stale":
                        progress.say(f"{trial.trial}: stale, {states[trial.trial].why}")
                run_trials(executor, jobs, progress)
        finally:  # after Ctrl-C too: the table says what is done so far
            results = self._write_summary()
        if (results["status"] == "done").all():
            # A trial that was killed after it wrote its record leaves a checkpoint.
            artifacts = notebook_config(TRAIN, self.parameters).artifacts
            checkpoints = artifacts / "checkpoints" / project_paths.run_label(self.run_dir)
            shutil.rmtree(checkpoints, ignore_errors=True)
        return results

    def _prepare(self) -> None:
        """Execute 01 and 02 unless they are done."""
        for stem in (PREPARE, CACHE):
            why = why_to_run(stem, self.run_dir, self.parameters)
            say(f"{stem}: running ({why})" if why else f"{stem}: already done")
            if why:
                execute_stage(
                    stem, self.run_dir, self.parameters, lambda stem=stem: self._made(stem)
                )

    def _made(self, stem: str) -> dict[str, Any]:
        key = stage_key(stem, self.parameters)
        if key is None:
            raise ValueError(f"{stem} ran to its end, but left no result under artifacts_dir")
        return key

    def _written(self) -> dict[str, Any]:
        """Checksums of the tables and the verdict, for the record of 04."""
        files = sorted([*self.run_dir.glob("*.csv"), *self.run_dir.glob(run_folder.VERDICT)])
        return {"wrote": {path.name: sha256_file(path) for path in files}}

    def _write_summary(self) -> pd.DataFrame:
        results = run_folder.collect(self.run_dir)
        with written_aside(self.run_dir / run_folder.SUMMARY) as aside:
            results.to_csv(aside, index=False)
        return results

    def _shared_files(self) -> dict[str, str]:
        """What every machine must see as it is here: the plan, and the manifests of the data and
        the caches that exist.
        """
        settings = notebook_config(CACHE, self.parameters)
        folders = [settings.data_path, *more_caches(self.trials, self.parameters).values()]
        with suppress(CacheError):
            folders.append(find_cache(settings.artifacts, settings.name))
        paths = [self.run_dir / run_folder.PLAN, *(path / "manifest.json" for path in folders)]
        return {
            project_paths.short_path(path): sha256_file(path) for path in paths if path.is_file()
        }

    def _write_plan(self) -> None:
        """Write `sweep.json`: what is to be run, and what it has to be made from (`made_of`)."""
        document = {
            "format": trial_record.FORMAT,
            "name": self.name,
            "parameters": self.parameters,
            "grid": self.grid,
            **made_of(self.trials, self.run_dir, self.parameters),
            "trials": [asdict(trial) for trial in self.trials],
        }
        write_sealed(self.run_dir / run_folder.PLAN, document, "checksums")
