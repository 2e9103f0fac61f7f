"""What a trial costs beyond its training: forked by its slot's process, and in fresh processes."""

import time
from pathlib import Path

import pandas as pd

from kd_utils.config import project_paths, stages
from kd_utils.config.parameter_files import load_parameters
from kd_utils.records import provenance
from kd_utils.records.trial_record import read_record
from kd_utils.speed.meters import IMPORTS, python_seconds
from kd_utils.sweep import planning
from kd_utils.sweep.executor import Job
from kd_utils.sweep.slots.slot import Slot


def measure_starts(parameters: Path, rounds: int, run_dir: Path) -> pd.DataFrame:
    """Run trials of a parameter file, whose data and cache are there, on one slot, both ways in
    turn, and between them the imports of one process.

    Args:
        rounds: after one that is not measured, in which the slot's process imports, and what draws
            its pictures starts.

    Returns:
        Seconds, a row a round: `forked` and `fresh`, a trial's time beyond its training and
        evaluation; `imports`, those of a process that imports torch, transformers and pandas.

    Raises:
        RuntimeError: a trial failed.
    """
    grid: dict[str, list] = {"distill_type": ["black_box"], "seed": list(range(rounds + 1))}
    code = provenance.code_of(stages.TRAIN)
    ways = {"forked": Slot(1), "fresh": Slot(1, {"KD_FORK": "0"})}
    places = {way: run_dir / way for way in ways}
    trials = {
        way: planning.plan(load_parameters(parameters), grid, place)
        for way, place in places.items()
    }
    rows = []
    try:
        for number in range(rounds + 1):
            row = {}
            for way, slot in ways.items():
                place = project_paths.short_path(places[way])
                row[way] = overhead(slot, Job(trials[way][number], place, code, {}))
            rows.append(row | {"imports": python_seconds("-c", IMPORTS)})
    finally:
        for slot in ways.values():
            slot.end()
    return pd.DataFrame(rows[1:])


def overhead(slot: Slot, job: Job) -> float:
    """Run a job; seconds from its submission until the slot is free, without those of its training
    and evaluation.
    """
    start = time.perf_counter()
    slot.submit(job)
    while slot.job:
        report = slot.receive()
        if report and report.kind in ("failed", "lost"):
            raise RuntimeError(f"{job.name}: {report.cause}")
    spent = read_record(job.notebook.with_suffix(""))["seconds"]
    return time.perf_counter() - start - spent["training"] - spent["evaluation"]
