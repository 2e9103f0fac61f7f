"""The sweep: a parameter file times a grid, planned, run by an executor, and never run twice.

01 and 02 are executed here, then 03 by the executor for each trial, and 04 at the end.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kd_utils.analysis import tables
from kd_utils.analysis.words import seeds
from kd_utils.cache.manifest import CacheError, find_cache
from kd_utils.config import project_paths
from kd_utils.config.parameter_files import notebook_config
from kd_utils.config.stages import ANALYSE, CACHE, PREPARE, SWEPT, TRAIN
from kd_utils.records import check, provenance, run_folder, trial_record
from kd_utils.store import files, locks, sealed
from kd_utils.sweep import planning, staleness
from kd_utils.sweep.display import Progress, say
from kd_utils.sweep.execution import execute_stage
from kd_utils.sweep.executor import Executor, Job, run_trials

#: What 04 writes into the run folder.
ANALYSES = (run_folder.VERDICT, run_folder.COMPARISONS, "analysis.csv")


class Look(NamedTuple):
    """What is there of a sweep: why 01 and 02 must be executed ("" if not), and each chosen trial's
    state.
    """

    why: dict[str, str]
    states: dict[str, run_folder.Status]

    @property
    def done(self) -> int:
        return sum(state.state == "done" for state in self.states.values())


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

    #: The notebooks that it executes.
    notebooks: tuple[str, ...] = SWEPT

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
        self.trials = planning.plan(parameters, grid, self.run_dir)
        self.chosen = planning.select(self.trials, only, grid)
        self.name = notebook_config(PREPARE, parameters).name
        staleness.require_experiment(self.run_dir, self.name)

    def warnings(self) -> Iterator[str]:
        """What trials that are compared do not have in common, such as a package since upgraded."""
        remedy = "remove one of these groups from trials/ and run the sweep again"
        trials = run_folder.trials_with_status(self.run_dir)
        yield from (f"{found}: {remedy}" for found in check.differences(self.run_dir, trials))

    def why_to_run(self, stem: str, *, every_byte: bool = False) -> str:
        """Why 01 or 02 must be executed (again), in one line; "" if not."""
        return staleness.why_to_run(
            stem, self.run_dir, self.parameters, self.chosen, every_byte=every_byte
        )

    def states(self, trials: list[planning.Trial]) -> dict[str, run_folder.Status]:
        """Whether each trial is done with its config and with today's code, student and cache."""
        made = staleness.made_of(trials, self.run_dir, self.parameters)
        found = {
            t.trial: run_folder.trial_status(
                self.run_dir, t.trial, t.config_hash, made, t.parameters
            )
            for t in trials
        }
        return staleness.with_lineage(trials, found)

    def dry_run(self) -> Iterator[str]:
        """What a run would do: the state of 01, 02 and each trial; whether any effect could be
        significant, which with many comparisons and few pairs none is, however large; and about
        what it would cost.
        """
        look = self.look()
        yield from self.to_run(look)
        planned = tables.planned_trials(planning.planned_results(self.chosen))
        yield from seeds.reach_lines(planned, run_folder.analysed(self.run_dir.name, self.name))
        yield from self.costs(look)

    def look(self) -> Look:
        """Why 01 and 02 are to run, and the states of the chosen trials."""
        why = {stem: self.why_to_run(stem) for stem in (PREPARE, CACHE)}
        return Look(why, self.states(self.chosen))

    def to_run(self, look: Look) -> Iterator[str]:
        """The state of 01, 02 and each trial."""
        for stem, reason in look.why.items():
            yield f"{stem:<32} {f'to run: {reason}' if reason else 'done'}"
        for name, state in look.states.items():
            yield f"{name:<32} {state.state}" + f": {state.why}" * bool(state.why)
        done, of = look.done, len(look.states)
        yield f"{done} of {of} trials are done, {of - done} to run; records: {self.place}"
        if done and any(look.why.values()):
            yield (
                "If 01 or 02 produces different data or a different cache, finished trials run "
                "again too"
            )

    def costs(self, look: Look) -> Iterator[str]:
        """About what 02 and the trials will take that are to run; or why that is not known."""
        todo = [t for t in self.chosen if look.states[t.trial].state != "done"]
        with_cache = bool(look.why[CACHE])
        if not todo and not with_cache:
            return
        from kd_utils.cost.experiment import experiment_lines  # brings torch
        from kd_utils.teacher.extraction import cached_layers

        data, cache = (notebook_config(stem, self.parameters) for stem in (PREPARE, CACHE))
        trials = [notebook_config(TRAIN, trial.parameters) for trial in todo]
        try:
            yield from experiment_lines(data, cache, trials, cached_layers, with_cache=with_cache)
        except ValueError as error:
            first = "" if data.build == "none" else f" (01 makes what `build: {data.build}` needs)"
            yield f"cost: not known: {error}{first}"

    def outcome(self, results: pd.DataFrame) -> Iterator[str]:
        """The verdict of 04, or which trials are done; and where the records are."""
        analysed, verdict = "done" in set(results["status"]), self.run_dir / run_folder.VERDICT
        shown = analysed and verdict.exists()
        yield verdict.read_text(encoding="utf-8") if shown else tables.coverage(results)
        yield (
            f"Records: {self.place}/ (one executed notebook per trial in trials/, "
            f"{run_folder.SUMMARY}" + f", {ANALYSE}.ipynb" * analysed + ")"
        )

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
        with alone_in(self.run_dir):
            done = all(state.state == "done" for state in self.states(self.chosen).values())
            if not done or any(map(self.why_to_run, (PREPARE, CACHE))):
                with executor() as running:
                    results = self._run_missing(running)
            else:
                self._write_plan()
                say(f"{len(self.chosen)} of {len(self.chosen)} trials: already done")
                results = self._write_summary()
            if (results["status"] == "done").all():
                self._remove_leftovers()
            if (results["status"] == "done").any():
                parameters = self.parameters | {"run_dir": self.place}
                tables_of = partial(written, self.run_dir, run_folder.SUMMARY, *ANALYSES)
                execute_stage(ANALYSE, self.run_dir, parameters, tables_of)
            else:  # an earlier plan's trials showed them
                for name in (f"{ANALYSE}.ipynb", *ANALYSES):
                    (self.run_dir / name).unlink(missing_ok=True)
        return results

    def _run_missing(self, executor: Executor) -> pd.DataFrame:
        """01, 02 and the missing trials of those chosen; the results table."""
        self._write_plan()
        executor.require_same_view(self._shared_files())  # before the teacher runs for hours
        for stem in (PREPARE, CACHE):
            why = self.why_to_run(stem, every_byte=True)  # as each trial will look at it
            say(f"{stem}: running ({why})" if why else f"{stem}: already done")
            if why:
                asked = staleness.asked_of(stem, self.parameters)
                made = partial(staleness.stage_key, stem, self.parameters, asked)
                execute_stage(stem, self.run_dir, self.parameters, made)
            if stem == PREPARE:
                self._require_possible_students()  # before the teacher runs for hours
        self._write_plan()
        states = self.states(self.trials)
        todo = [trial for trial in self.chosen if states[trial.trial].state != "done"]
        already, code = (
            sum(state.state == "done" for state in states.values()),
            provenance.code_of(TRAIN),
        )
        progress = Progress({trial.trial: trial.epochs for trial in todo}, already)
        try:
            executor.require_same_view(self._shared_files())
            with progress.shown():
                for trial in todo:
                    if states[trial.trial].state == "stale":
                        say(f"{trial.trial}: stale: {states[trial.trial].why}")
                for wave in planning.waves(todo):
                    self._run_wave(executor, wave, progress, code)
        finally:  # after Ctrl-C too: the table says what is done so far
            results = self._write_summary()
        return results

    def _require_possible_students(self) -> None:
        """Raise a ValueError for a cut that no trial could make."""
        trials = [notebook_config(TRAIN, trial.parameters) for trial in self.chosen]
        if any(trial.student_init != "pretrained" for trial in trials):
            from kd_utils.models.initial.students import require_possible  # brings torch

            teacher = notebook_config(CACHE, self.parameters)
            require_possible(trials, teacher.teacher, teacher.teacher_revision)

    def _run_wave(
        self,
        executor: Executor,
        wave: list[planning.Trial],
        progress: Progress,
        code: dict[str, str],
    ) -> None:
        """Run trials of which none starts from another one's student.

        Args:
            code: of the sweep's begin, which every trial must run.
        """
        starts = {trial.after for trial in wave} - {""}
        if starts:
            self._write_plan()  # which names the students that they left
        states = self.states([trial for trial in self.trials if trial.trial in starts])
        ready = []
        for trial in wave:
            if trial.after and states[trial.after].state != "done":
                state = states[trial.after]
                why = f"{state.state}: {state.why}" if state.why else state.state
                progress.broke(trial.trial, f"it starts from {trial.after}, which is {why}")
            else:
                ready.append(trial)
        shared = self._shared_files()
        run_trials(executor, [Job(trial, self.place, code, shared) for trial in ready], progress)

    def _remove_leftovers(self) -> None:
        """What trials left that were killed after they wrote their records, when all are done."""
        artifacts = notebook_config(TRAIN, self.parameters).artifacts
        checkpoints = artifacts / "checkpoints" / project_paths.run_label(self.run_dir)
        shutil.rmtree(checkpoints, ignore_errors=True)
        for trial in self.trials:
            for leftover in (self.run_dir / "trials").glob(f".{trial.trial}.partial-*.ipynb"):
                leftover.unlink(missing_ok=True)

    def _write_summary(self) -> pd.DataFrame:
        return write_summary(self.run_dir, run_folder.collect(self.run_dir))

    def _shared_files(self) -> dict[str, str]:
        """What every machine must see as it is here: the plan, and the manifests of the data and
        the caches that exist.
        """
        settings = notebook_config(CACHE, self.parameters)
        more_caches = staleness.more_caches(self.trials, self.parameters)
        folders = [settings.data_path, *more_caches.values()]
        with suppress(CacheError):
            folders.append(find_cache(settings.artifacts, settings.name))
        paths = [self.run_dir / run_folder.PLAN, *(path / "manifest.json" for path in folders)]
        return {project_paths.short_path(p): files.sha256_file(p) for p in paths if p.is_file()}

    def _write_plan(self) -> None:
        """Write `sweep.json`: what is to be run, and what it has to be made from (`made_of`)."""
        document = {
            "format": trial_record.FORMAT,
            "name": self.name,
            "parameters": self.parameters,
            "grid": self.grid,
            **staleness.made_of(self.trials, self.run_dir, self.parameters),
            "trials": [asdict(trial) for trial in self.trials],
        }
        sealed.write_sealed(self.run_dir / run_folder.PLAN, document, "checksums")


def alone_in(run_dir: Path) -> AbstractContextManager[None]:
    """Hold a run folder, or raise a ValueError if another sweep does."""
    remedy = "wait for it or stop it, or give this sweep another --run-dir"
    return locks.locked(run_dir, "a sweep", remedy)


def write_summary(run_dir: Path, results: pd.DataFrame) -> pd.DataFrame:
    """Write `results_summary.csv`, whole or not at all; returns the table."""
    with files.written_aside(run_dir / run_folder.SUMMARY) as aside:
        results.to_csv(aside, index=False)
    return results


def written(run_dir: Path, *names: str) -> dict[str, Any]:
    """Checksums of tables and verdict, for the record of the notebook that wrote them."""
    paths = [run_dir / name for name in names]
    return {"wrote": {p.name: files.sha256_file(p) for p in paths if p.is_file()}}
