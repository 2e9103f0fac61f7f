"""A run's folder, read back: what was planned, which trials are done, and their results as tables.

Stale, damaged or foreign records never get into a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field

from kd_utils.config.project_paths import project_path
from kd_utils.records import trial_record
from kd_utils.records.by_hand import dated, found_trials
from kd_utils.records.trial_status import PLAN, Status, why_stale
from kd_utils.store.sealed import RecordError, SealedFolder, read_sealed

SUMMARY = "results_summary.csv"
COMPARISONS = "comparisons.csv"
VERDICT = "verdict.txt"


#: Characters of the name of the folder of one world or link.
LONGEST_WORLD = 60


class Plan(trial_record.Shape):
    """What every `sweep.json` has; keys with a default are missing in older ones."""

    class Trial(trial_record.Shape):
        class Swept(trial_record.Shape):
            distill_type: str
            seed: int

        #: One file name: no plan can point out of its folder.
        trial: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$", max_length=200)]
        swept: Swept
        config_hash: str

    class World(trial_record.Shape):
        """One of several worlds, or one link of a chain, whose run is a folder in this one."""

        world: str
        run: Annotated[
            str,
            Field(pattern=r"^(world|link)-[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST_WORLD),
        ]

    cache: trial_record.Metrics.Cache | None
    more_caches: dict[str, str] = {}
    tokenizer: str = ""
    students: dict[str, str] = {}
    code: dict[str, str] = {}
    trials: list[Trial]
    worlds: list[World] = []


def trial_status(
    run_dir: str | Path,
    trial: str,
    config_hash: str,
    made: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Status:
    """Whether a trial's record is whole and made from what is expected.

    Args:
        config_hash: the expected `TrialConfig.fingerprint()`.
        made: what else is expected, by the keys of a plan; what is empty is not compared.
        parameters: the trial's, to say which of them changed.
    """
    trials = Path(run_dir) / "trials"
    try:
        metrics = trial_record.read_record(trials / trial)
        about = read_notebook(trials / f"{trial}.ipynb")["metadata"]["kd_utils"]
        found = (about.get("record"), about.get("config_hash"))
        if why := why_stale(metrics, config_hash, made or {}, parameters or {}):
            state = Status("stale", why)
        elif found != (metrics["checksums"]["sha256"], config_hash):
            state = Status("stale", "the notebook is from another execution than metrics.json")
        else:
            return Status("done")
    except RecordError as error:
        state = Status("broken", str(error))
    if cause := failure_cause(trials / f"{trial}.failed.ipynb"):
        return Status("failed", cause)
    there = (trials / trial).exists() or (trials / f"{trial}.ipynb").exists()
    return state if there else Status("missing")


def read_notebook(path: str | Path) -> dict[str, Any]:
    """An executed notebook that is unchanged, and whose code cells all ran without an error.

    Raises:
        RecordError: names the notebook and what is wrong.
    """
    path = Path(path)
    notebook = read_sealed(path, "metadata.kd_utils")
    try:
        for number, cell in enumerate(notebook["cells"], 1):
            if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
                continue
            if errors := [output for output in cell["outputs"] if output["output_type"] == "error"]:
                raise RecordError(
                    f"{path.name}: cell {number} ended with {errors[0]['ename']}: "
                    f"{errors[0]['evalue']}"
                )
            if cell["execution_count"] is None:
                raise RecordError(f"{path.name}: cell {number} was not run")
    except (KeyError, TypeError):
        raise RecordError(f"{path.name} is not a notebook") from None
    return notebook


def failure_cause(path: Path) -> str:
    """Why a trial failed, in one line, from the failed notebook; "" if there is none."""
    try:
        cause = json.loads(path.read_text(encoding="utf-8"))["metadata"]["kd_utils"]["failure"]
        return " ".join(cause.split()) or f"{path.name} does not say why"
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{path.name} does not say why"


def read_plan(run_dir: str | Path) -> dict[str, Any] | None:
    """`sweep.json` of a run, or None for a folder that no sweep wrote (exploration by hand).

    Raises:
        RecordError: it is damaged, or not a plan.
    """
    path = Path(run_dir) / PLAN
    if not path.exists():
        return None
    plan = read_sealed(path, "checksums")
    if plan.get("format") != trial_record.FORMAT:
        raise RecordError(
            f"{PLAN} is not a plan of format {trial_record.FORMAT}: run the sweep again"
        )
    trial_record.require_shape(Plan, plan, PLAN)
    return plan


def world_runs(run_dir: str | Path) -> dict[str, Path]:
    """World -> the folder of its run; {} for a run of one world, which has no such folders.

    Raises:
        RecordError: the plan is damaged.
    """
    plan = read_plan(run_dir) or {}
    return {entry["world"]: Path(run_dir) / entry["run"] for entry in plan.get("worlds", [])}


def trials_with_status(
    run_dir: str | Path, experiment: str = ""
) -> list[tuple[dict[str, Any], Status]]:
    """Each planned trial with its status; without a plan, each record found (`found_trials`)."""
    if plan := read_plan(run_dir):
        return [
            (planned, trial_status(run_dir, planned["trial"], planned["config_hash"], plan))
            for planned in plan["trials"]
        ]
    return found_trials(run_dir, experiment)


def collect(run_dir: str | Path, experiment: str = "") -> pd.DataFrame:
    """The results table: a row per planned trial, or per trial found where there is no plan.

    Args:
        experiment: whose trials count in a folder without a plan (`found_trials`).

    Returns:
        Columns `trial`, `config/<swept key>` (distill_type and seed first), `status`, `why`, one
        per key of the last row of metrics (empty unless done), `student/SIZE` for each size of the
        student, `seconds` (whole trial), `peak_memory_mb`, `config_hash`.
    """
    rows, results = [], []
    for planned, state in trials_with_status(run_dir, experiment):
        swept = {f"config/{key}": value for key, value in planned["swept"].items()}
        rows.append({"trial": planned["trial"], **swept, "status": state.state, "why": state.why})
        results.append({"config_hash": planned["config_hash"]})
        if state.state == "done":
            metrics = trial_record.read_record(Path(run_dir) / "trials" / planned["trial"])
            about = {key: metrics[key] for key in ("peak_memory_mb", "config_hash")}
            sizes = metrics.get("sizes", {}).get("student", {})
            about |= {f"student/{key}": size for key, size in sizes.items()}
            results[-1] = {**metrics["final"], "seconds": metrics["seconds"]["total"], **about}
    columns = ["trial", "config/distill_type", "config/seed", "status", "why"]
    left = pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)
    right = pd.DataFrame(results)
    tail = [key for key in ("seconds", "peak_memory_mb", "config_hash") if key in right]
    # A metric cannot take the place of a column that says what the trial is.
    return left.join(right[[key for key in right if key not in tail and key not in left] + tail])


def done_records(run_dir: str | Path, experiment: str = "") -> list[dict[str, Any]]:
    """`metrics.json` of every done trial in the plan's order, and its `swept` keys."""
    done = _done(run_dir, experiment)
    return [trial_record.read_record(folder) | {"swept": swept} for folder, swept in done]


def predictions(run_dir: str | Path, experiment: str = "") -> pd.DataFrame:
    """All done trials' predictions in one table; the first columns are `trial` and the swept keys.

    Raises:
        RecordError: no trial is done.
    """
    tables = []
    for folder, swept in _done(run_dir, experiment):
        table = trial_predictions(folder)
        for at, (key, value) in enumerate({"trial": folder.name, **swept}.items()):
            table.insert(at, key, value)
        tables.append(table)
    if not tables:
        name, worlds = Path(run_dir).name, world_runs(run_dir)
        raise RecordError(
            f"{name} has {len(worlds)} worlds: compare them with notebook 12, or set run_dir to "
            f"one, such as {name}/{next(iter(worlds.values())).name}"
            if worlds
            else f"no trial of {name} is done: run the sweep first"
        )
    return pd.concat(tables, ignore_index=True)


def trial_predictions(folder: str | Path) -> pd.DataFrame:
    """One trial's predictions, a row per validation example, `example_id` first.

    Args:
        folder: `RUN_DIR/trials/TRIAL` of a trial whose record is whole.
    """
    folder = Path(folder)
    table = pd.read_parquet(folder / trial_record.PREDICTIONS)
    if examples := SealedFolder(folder, "metrics.json").read().get("examples"):
        ids = pd.read_parquet(trial_record.examples_file(folder, examples))
        table.insert(0, "example_id", ids["example_id"])
    return table


Records = list[dict[str, Any]]


def rest_runs(run_dir: str | Path, experiment: str) -> Iterator[tuple[str, Records, Records]]:
    """The runs that measured whether an experiment comes to rest: folders beside `run_dir` called
    `EXPERIMENT-rest...` or `DATE-EXPERIMENT-rest...`, that with the newest trial first.

    Yields:
        Name; `done_records`; and those of `run_dir` and of the experiment's runs beside it
        (`EXPERIMENT`, `DATE-EXPERIMENT`) that were made from the same caches. A damaged folder is
        left out.
    """
    run_dir = Path(run_dir).resolve()
    called, own = rf"(\d{{4}}-\d\d-\d\d-)?{re.escape(experiment)}", {experiment, run_dir.name}

    def found(name: Callable[[str], Any]) -> dict[str, Records]:
        records: dict[str, Records] = {}
        for path in sorted(run_dir.parent.iterdir()):
            if path.is_dir() and name(path.name):
                with suppress(RecordError):
                    records[path.name] = done_records(path, experiment)
        return records

    measuring = found(re.compile(rf"{called}-rest(-.+)?").fullmatch)
    newest = {name: max(map(_started, records), default="") for name, records in measuring.items()}
    beside = found(lambda name: name in own or dated(experiment).fullmatch(name)) if newest else {}
    for name in sorted(newest, key=newest.__getitem__, reverse=True):
        caches = set(map(_cache, measuring[name]))
        others = [record for records in beside.values() for record in records]
        yield name, measuring[name], [record for record in others if _cache(record) in caches]


def _started(record: dict[str, Any]) -> str:
    return record["started"]


def _cache(record: dict[str, Any]) -> str:
    return record["cache"]["content_hash"]


def analysed(*names: str) -> Iterator[Path]:
    """The runs called so that notebook 04 has analysed, under `runs`: of each name the working
    folder, then the dated records, the newest first.
    """
    runs = project_path("runs")
    for name in dict.fromkeys(names):
        kept = (path for path in runs.glob("20*") if dated(name).fullmatch(path.name))
        for path in (runs / name, *sorted(kept, reverse=True)):
            if (path / COMPARISONS).is_file():
                yield path


def _done(run_dir: str | Path, experiment: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for planned, status in trials_with_status(run_dir, experiment):
        if status.state == "done":
            yield Path(run_dir) / "trials" / planned["trial"], planned["swept"]
