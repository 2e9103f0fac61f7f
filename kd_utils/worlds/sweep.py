"""A sweep in several worlds: one sweep each, in its own run folder, and what they show jointly."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from kd_utils.analysis import tables
from kd_utils.analysis.words import seeds
from kd_utils.config import project_paths
from kd_utils.config.parameter_files import notebook_config
from kd_utils.config.stages import CACHE, JOIN, PREPARE, SWEPT, TRAIN
from kd_utils.records import run_folder, trial_record
from kd_utils.store import sealed
from kd_utils.sweep import staleness
from kd_utils.sweep.display import say
from kd_utils.sweep.execution import execute_stage
from kd_utils.sweep.executor import Executor
from kd_utils.sweep.planning import Trial, planned_results
from kd_utils.sweep.sweep import (
    ANALYSES,
    Sweep,
    alone_in,
    write_summary,
    written,
)
from kd_utils.worlds import runs
from kd_utils.worlds.comparisons import results_by_world
from kd_utils.worlds.parameters import FIELD, parameters_by_world


class WorldsSweep:
    """A parameter file with `worlds`, times a grid: world W is the run `world-W` of one folder.

    Args:
        parameters, grid, only: as of a `Sweep`.
        run_dir: holds the worlds' runs and `sweep.json`, which lists them.

    Raises:
        ValueError: as a `Sweep`; bad worlds; or worlds that are the same, or have other tasks.
    """

    #: The notebooks that it executes.
    notebooks: tuple[str, ...] = (*SWEPT, JOIN)

    #: What one of its sweeps is called.
    WORD = "world"

    def __init__(
        self,
        parameters: dict[str, Any],
        grid: dict[str, list[Any]],
        run_dir: str | Path,
        only: str = "",
    ) -> None:
        self.listed, self.grid = parameters, grid
        self.run_dir = Path(os.path.abspath(os.path.expanduser(run_dir)))
        self.place = project_paths.short_path(self.run_dir)
        self.name = str(parameters.get("name", "toy"))
        staleness.require_experiment(self.run_dir, self.name, several_worlds=True)
        self.sweeps = self._sweeps(only)
        self.parameters = next(iter(self.sweeps.values())).parameters  # of the first world

    def _sweeps(self, only: str) -> dict[str, Sweep]:
        """World -> its sweep, in the order in which they run."""
        sweeps = {
            world: Sweep(values, self.grid, self.run_dir / f"world-{world}", only)
            for world, values in parameters_by_world(self.listed).items()
        }
        _require_different(sweeps)
        return sweeps

    def dry_run(self) -> Iterator[str]:
        """What each world's sweep would do, what the first that is not done would cost, and
        whether so many worlds can show an effect.
        """
        looks = {world: sweep.look() for world, sweep in self._to_run.items()}
        for world, sweep in self._to_run.items():
            yield f"{self.WORD} {world}: {sweep.place}"
            yield from sweep.to_run(looks[world])
        for world, sweep in self._to_run.items():
            if costs := [*sweep.costs(looks[world])]:
                yield from (f"{self.WORD} {world} alone: {line}" for line in costs)
                break
        yield from self._reach()

    def _reach(self) -> Iterator[str]:
        """Whether so many worlds can show an effect."""
        planned = planned_results(self.chosen)
        by_world = pd.concat(planned.assign(world=world) for world in self.sweeps)
        of_worlds = tables.planned_trials(results_by_world(by_world))
        yield from seeds.reach_lines(of_worlds, run_folder.analysed(self.run_dir.name), "worlds")

    @property
    def _to_run(self) -> dict[str, Sweep]:
        """The sweeps of which a trial is chosen."""
        return {world: sweep for world, sweep in self.sweeps.items() if sweep.chosen}

    @property
    def chosen(self) -> list[Trial]:
        """The trials that a run is to do, which are called the same in every world."""
        return next(iter(self.sweeps.values())).chosen

    def warnings(self) -> Iterator[str]:
        """What the trials of a world do not have in common."""
        for sweep in self.sweeps.values():
            yield from (f"{sweep.place}: {found}" for found in sweep.warnings())

    def run(self, executor: Callable[[], AbstractContextManager[Executor]]) -> pd.DataFrame:
        """Run what is missing, one world after the other, then execute 12.

        Args:
            executor: called once, and only if something is missing.

        Returns:
            The worlds' results tables (`Sweep.run`) in one, with the column `world` first.

        Raises:
            ValueError, NotebookFailed: as `Sweep.run`; the worlds before are whole then.
        """
        with alone_in(self.run_dir), ExitStack() as stack:
            running = cache(lambda: stack.enter_context(executor()))
            self._write_plan()
            for number, (world, sweep) in enumerate(self._to_run.items(), 1):
                say(f"{self.WORD} {world} ({number} of {len(self._to_run)}): {sweep.place}")
                self._require_done(world, sweep.run(lambda: nullcontext(running())))
            results = write_summary(self.run_dir, runs.collect(self.run_dir))
            if (results["status"] == "done").any():
                self._join()
        return results

    def _require_done(self, world: str, results: pd.DataFrame) -> None:
        """Raise a ValueError if what is to follow needs a trial of this world that is not done."""

    def _join(self) -> None:
        """Compare the worlds that are done: execute 12."""
        parameters = self.parameters | {"name": self.name, "run_dir": self.place}
        about = partial(written, self.run_dir, run_folder.SUMMARY, *ANALYSES)
        execute_stage(JOIN, self.run_dir, parameters, about)

    def outcome(self, results: pd.DataFrame) -> Iterator[str]:
        """The joint verdict, and where the records are."""
        verdict = self.run_dir / run_folder.VERDICT
        if "done" in set(results["status"]) and verdict.exists():
            yield verdict.read_text(encoding="utf-8")
        yield f"Records: {self.place}/ (world-*/, a run each, and {JOIN}.ipynb)"

    def _write_plan(self) -> None:
        document = {
            "format": trial_record.FORMAT,
            "name": self.name,
            "parameters": self.listed,
            "grid": self.grid,
            "cache": None,
            "trials": [],
            "worlds": [
                {"world": world, "run": sweep.run_dir.name, "parameters": sweep.parameters}
                for world, sweep in self.sweeps.items()
            ],
        }
        sealed.write_sealed(self.run_dir / run_folder.PLAN, document, "checksums")


def _require_different(sweeps: dict[str, Sweep]) -> None:
    """Raise a ValueError for worlds that would be the same, or cannot be compared."""
    made_from: dict[Any, str] = {}
    asked: dict[frozenset[str], str] = {}
    for world, sweep in sweeps.items():
        data, teacher, trial = (
            notebook_config(stem, sweep.parameters) for stem in (PREPARE, CACHE, TRAIN)
        )
        student = trial.student, trial.student_init, *trial.initial_settings.values()
        same = made_from.setdefault((data.fingerprint(), teacher.fingerprint(), student), world)
        if same != world:
            raise ValueError(
                f"worlds {same} and {world} would be the same: {FIELD} must change rows, teacher "
                "or student; sweep a parameter of 03 by a grid"
            )
        asked.setdefault(frozenset(data.tasks), world)
    if len(asked) > 1:
        first, second = [*asked.values()][:2]
        raise ValueError(
            f"worlds {first} and {second} have other tasks, so they cannot be compared: give each "
            "its own parameter file"
        )
