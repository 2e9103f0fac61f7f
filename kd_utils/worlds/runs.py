"""A run of several worlds, read back: its folder holds a run for each of them."""

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kd_utils.config.project_paths import project_path
from kd_utils.records import run_folder
from kd_utils.records.by_hand import dated


def collect(run_dir: str | Path) -> pd.DataFrame:
    """`run_folder.collect` of every world in one table, with the column `world` (text) first."""
    tables = {
        world: run_folder.collect(folder)
        for world, folder in run_folder.world_runs(run_dir).items()
    }
    return pd.concat(tables, names=["world", ""]).reset_index("world").reset_index(drop=True)


class Done(NamedTuple):
    """What is done in one world.

    Attributes:
        predictions: of `run_folder.predictions`.
        records: of `run_folder.done_records`.
        teacher: metric -> fraction, the accuracies of its teacher.
        rows: task -> number of validation rows.
    """

    predictions: pd.DataFrame
    records: list[dict[str, Any]]
    teacher: dict[str, float]
    rows: dict[str, int]


def done(run_dir: str | Path) -> dict[str, Done]:
    """The worlds in which a trial is done, in the plan's order.

    Raises:
        ValueError: there is none, or two of them are one world: same cache, same initial student.
    """
    worlds: dict[str, Done] = {}
    made_from: dict[tuple[str, str], str] = {}
    for world, folder in run_folder.world_runs(run_dir).items():
        if records := run_folder.done_records(folder):
            first = records[0]
            made = first["cache"]["content_hash"], first.get("student", {}).get("fingerprint", "")
            if made in made_from:
                raise ValueError(
                    f"worlds {made_from[made]} and {world} have the same teacher cache and the "
                    "same student, so they would count twice: remove one of their runs"
                )
            made_from[made] = world
            table = run_folder.predictions(folder)
            rows = table.groupby("task", sort=False)["example_id"].nunique().to_dict()
            teacher = first.get("teacher", {}).get("accuracy", {})
            worlds[world] = Done(table, records, teacher, rows)
    if not worlds:
        raise ValueError(f"no trial of {Path(run_dir).name} is done: run the sweep first")
    return worlds


def find(name: str, run_dir: str = "") -> Path:
    """The run of several worlds that 12 reads: `run_dir`, else `runs/NAME` or `runs/NAME-worlds`,
    else the newest dated record of either.

    Raises:
        ValueError: there is none, or it has no worlds.
    """
    names, everything = (name, f"{name}-worlds"), project_path("runs")
    found = [(dated(n).fullmatch(p.name), p) for p in everything.glob("20*") for n in names]
    kept = sorted(((m[1], int(m[2] or 1)), p) for m, p in found if m)
    made_here = [everything / n for n in names]
    newest = [*made_here, *(path for _, path in reversed(kept))]
    for folder in [project_path(run_dir)] if run_dir else newest:
        if run_folder.world_runs(folder):
            return folder
    raise ValueError(
        f"no worlds in {run_dir or f'any run of {name}'}: sweep a parameter file with `worlds`, "
        "such as papermill_params/toy-worlds.yaml, or give its run_dir"
    )
