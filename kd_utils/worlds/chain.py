"""A chain of teachers: an experiment whose teachers are the students of another one, seed by seed.

`chain: toy-large` in a parameter file names the experiments that come before, by their files,
separated by spaces. The first of them has an ordinary teacher and is swept as usual, one trial a
seed. In every later one, and in the file's own experiment, the teacher of seed k is the student
that the experiment before trained with seed k (a *teacher assistant*, Mirzadeh et al. 2020). It is
cached by 02 as any other teacher, and trials of seed k train from that cache alone, so seeds stay
independent. A student that was trained anew makes the caches after it stale.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from kd_utils.analysis.rest import HELD_OUT
from kd_utils.config.parameter_files import CHAIN, WORLDS, load_parameters, notebook_config
from kd_utils.config.project_paths import CODE_ROOT, short_path
from kd_utils.config.stages import PREPARE, SWEPT, TRAIN
from kd_utils.records import run_folder
from kd_utils.records.trial_record import RecordError
from kd_utils.sweep import planning
from kd_utils.sweep.planning import Trial
from kd_utils.sweep.sweep import Sweep
from kd_utils.worlds.parameters import parameters_by_world
from kd_utils.worlds.sweep import WorldsSweep

#: Parameters of 01 that decide which rows are in which split.
ROWS = ("data_dir", "max_length", "data_seed", "train_rows", "held_out_rows", "validation_rows")


class ChainSweep(WorldsSweep):
    """A parameter file with `chain`, times a grid: its links are runs in one folder, `link-NAME` of
    the first experiment and `link-NAME-seed-K` of every later one.

    Args:
        parameters, grid, run_dir, only: as of a `WorldsSweep`. The grid is that of the last
            experiment; the earlier ones have its seeds, and the method that their files say.

    Raises:
        ValueError: a file of the chain that is missing or part of a circle, or an experiment that
            trains or keeps no students, or that has other rows.
    """

    notebooks = SWEPT
    WORD = "link"

    def _sweeps(self, only: str) -> dict[str, Sweep]:
        if WORLDS in self.listed:
            raise ValueError(f"{self.name} has {CHAIN} and {WORLDS}: give one of them")
        links = links_of(self.listed)
        if "seed" not in self.grid:
            raise ValueError(f"a grid for a {CHAIN} needs a key of its own for the seeds, `seed`")
        *_, last = links
        planned = planning.plan(links[last], self.grid, self.run_dir)
        chosen = {trial.swept["seed"] for trial in planning.select(planned, only, self.grid)}
        seeds = [seed for seed in self.grid["seed"] if seed in chosen]
        only = ",".join(part for part in only.split(",") if not part.strip().startswith("seed="))
        name, *later = links
        first = links[name] | {"name": f"{self.name}-{name}"}
        method = [notebook_config(TRAIN, first).distill_type]
        grid = {"distill_type": method, "seed": self.grid["seed"]}
        its_part = "seed=" + "+".join(map(str, seeds))
        sweeps = {name: Sweep(first, grid, self._place(name), its_part)}
        teachers = _students(sweeps[name])
        for link in later:
            following = dict[int, str]()
            for seed in self.grid["seed"]:
                place = self._place(f"{link}-seed-{seed}")
                values = links[link] | {"teacher": teachers[seed], "teacher_epochs": 0}
                values["name"] = f"{self.name}-{'' if link == last else f'{link}-'}{seed}"
                method = [notebook_config(TRAIN, values).distill_type]
                own = self.grid if link == last else {"distill_type": method}
                its_part = only if link == last else ""
                sweep = Sweep(values, own | {"seed": [seed]}, place, its_part)
                if seed not in seeds:
                    sweep.chosen = []
                sweeps[f"{link}-seed-{seed}"] = sweep
                following |= _students(sweep)
            teachers = following
        return sweeps

    def _place(self, link: str) -> Path:
        """The folder of a link's run.

        Raises:
            ValueError: its name is longer than a plan may have it.
        """
        folder = f"link-{link}"
        if len(folder) > run_folder.LONGEST_WORLD:
            raise ValueError(
                f"the folder {folder} of this chain has more than {run_folder.LONGEST_WORLD} "
                "letters: give the experiment a shorter name"
            )
        return self.run_dir / folder

    def _reach(self) -> Iterator[str]:
        """Nothing: links are not compared as worlds are."""
        return iter(())

    @property
    def chosen(self) -> list[Trial]:
        """The trials of all links."""
        return [trial for sweep in self.sweeps.values() for trial in sweep.chosen]

    def _require_done(self, world: str, results: pd.DataFrame) -> None:
        """Refuse to go on without the students that are the next link's teachers."""
        undone = results.loc[results["status"] != "done", "trial"].tolist()
        if undone and not self._is_last(world):
            raise ValueError(
                f"{world}: {undone[0]} is not done, and its student is to teach the next link: see "
                f"{self.sweeps[world].place}, then run the same command again"
            )

    def _is_last(self, link: str) -> bool:
        """Whether a run is of the file's own experiment, whose students teach nobody."""
        return _is_last(link, self.name)

    def _join(self) -> None:
        """The links have other teachers; notebook 04 of each says what its trials show."""

    def outcome(self, results: pd.DataFrame) -> Iterator[str]:
        """How many trials of each link are done, where the records are, and how the last students
        answer the held-out rows, by which one chooses between chains.
        """
        for link, sweep in self.sweeps.items():
            of_link = results[results["world"] == link]
            done = int((of_link["status"] == "done").sum())
            yield f"{link}: {done} of {len(of_link)} trials are done, in {sweep.place}"
        last = results[results["world"].map(self._is_last) & (results["status"] == "done")]
        for method, of_method in last.groupby("config/distill_type", sort=False):
            found = 100 * of_method[HELD_OUT]
            spread = f" ± {found.std():.1f}" if len(found) > 1 else ""
            yield (
                f"{self.name}, {method}: held-out accuracy {found.mean():.1f}{spread}; choose "
                "between chains by this, never by validation rows"
            )


def kind_of_sweep(parameters: dict[str, Any]) -> Callable[..., Any]:
    """The class that sweeps a parameter file: of a chain, of several worlds, or of neither."""
    if CHAIN in parameters:
        return ChainSweep
    return WorldsSweep if parameters_by_world(parameters) else Sweep


def links_of(parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Link -> its parameters, the file's own experiment last, by its `name`.

    Raises:
        ValueError: an experiment is named twice, has a chain or worlds of its own, trains or keeps
            no students, or has other rows.
    """
    own = {key: value for key, value in parameters.items() if key != CHAIN}
    name = str(own.get("name", "toy"))
    links: dict[str, dict[str, Any]] = {}
    for earlier in str(parameters[CHAIN]).replace(",", " ").split():
        if earlier in (*links, name):
            raise ValueError(
                f"{CHAIN} = {parameters[CHAIN]!r} of {name} comes back to {earlier}: a student "
                "cannot teach its own teacher; name each experiment once"
            )
        values = load_parameters(CODE_ROOT / "papermill_params" / f"{earlier}.yaml")
        for key in (CHAIN, WORLDS):
            if key in values:
                raise ValueError(
                    f"{CHAIN} names {earlier}, whose file has `{key}` itself: write the whole "
                    "chain into one file, of experiments without it"
                )
        trained = notebook_config(TRAIN, values)
        if not trained.save_student:
            raise ValueError(
                f"{CHAIN} names {earlier}, whose students are not kept: set save_student to True"
            )
        if not trained.trains:
            raise ValueError(
                f"{CHAIN} names {earlier}, whose distill_type is {trained.distill_type}, which "
                "trains no student for each seed: give it another one"
            )
        _require_same_rows(own, name, values, earlier)
        links[earlier] = values
    if not links:
        raise ValueError(f"{CHAIN} is empty: name the experiments whose students are the teachers")
    return links | {name: own}


def _require_same_rows(
    own: dict[str, Any], name: str, values: dict[str, Any], earlier: str
) -> None:
    """A teacher must not have learned from rows on which its student is measured."""
    last_data, data = (notebook_config(PREPARE, parameters) for parameters in (own, values))
    for key in ROWS:
        if (found := getattr(data, key)) != (wanted := getattr(last_data, key)):
            raise ValueError(
                f"{CHAIN} names {earlier}, whose {key} is {found!r}, and that of {name} is "
                f"{wanted!r}: all links need the same rows"
            )


def last_runs(run_dir: str | Path) -> list[Path]:
    """The folders of a chain's last link, a run for each seed, whose students teach nobody.

    Raises:
        RecordError: `run_dir` is not a run of a chain.
    """
    name = (run_folder.read_plan(run_dir) or {}).get("name", "")
    links = run_folder.world_runs(run_dir).items()
    if found := [folder for link, folder in links if _is_last(link, name)]:
        return found
    raise RecordError(
        f"{Path(run_dir).name} is no run of a {CHAIN}: sweep a parameter file that has the key "
        f"`{CHAIN}`, such as toy-chain.yaml, and give its run"
    )


def _is_last(link: str, name: str) -> bool:
    return link.startswith(f"{name}-seed-")


def _students(sweep: Sweep) -> dict[int, str]:
    """Seed -> the folder of the student that this sweep trains with it."""
    return {
        trial.swept["seed"]: short_path(notebook_config(TRAIN, trial.parameters).student_folder)
        for trial in sweep.trials
    }
