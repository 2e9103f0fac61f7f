"""Records of trials: what one leaves behind, how it is written whole or not at all, and how a run is read back.

A trial is whole when `trials/TRIAL/` (metrics.json, predictions.parquet) and the executed `trials/TRIAL.ipynb` are
both there, unchanged since they were written (see `sealed`), and of the same execution.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .files import sha256_file
from .sealed import RecordError, label, plain, read_sealed, write_sealed

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
PLAN = "sweep.json"
SUMMARY = "results_summary.csv"
VERDICT = "verdict.txt"
STAGES = ("01_prepare_data", "02_cache_teacher", "04_analyse_results")
REQUIRED = ("config", "config_hash", "cache", "git_commit", "versions", "device", "started", "seconds",
            "peak_memory_mb", "epochs", "final")


class Status(NamedTuple):
    """`state` is done, failed, stale (there, but of another config, cache or execution), broken or missing."""

    state: str
    why: str = ""


def trial_name(distill_type: str, seed: int, **other_swept: Any) -> str:
    """`METHOD_seedN`, with every other swept key appended: `attention_seed3_temperature=4.0`."""
    name = "_".join([distill_type, f"seed{seed}", *(f"{key}={value}" for key, value in sorted(other_swept.items()))])
    # A swept value may be a path ("teachers/a"): its name must stay one file name.
    return "".join(c if c.isalnum() or c in "._=-+" else "-" for c in name)


def report_epoch(row: dict[str, Any]) -> None:
    """Append one epoch's metrics, as a JSON line, to the file that KD_PROGRESS names; nothing when it is unset."""
    if path := os.environ.get("KD_PROGRESS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(row, finite=False)) + "\n")


def write_record(folder: str | Path, metrics: dict[str, Any], predictions: pd.DataFrame) -> None:
    """Write a trial's `metrics.json` and `predictions.parquet` aside and rename them into place, over an older record.

    Args:
        folder: `RUN_DIR/trials/TRIAL`.
        metrics: config, config_hash, cache, environment()'s keys, started, seconds, peak_memory_mb, epochs, final;
            `format` and `checksums` are added here.
        predictions: one row per validation example, as `evaluation.evaluate` returns them.

    Raises:
        RecordError: a key is missing, a number is not finite, or there are no predictions; nothing is written then.
    """
    folder = Path(folder)
    if missing := [key for key in REQUIRED if key not in metrics]:
        raise RecordError(f"the record of {folder.name} has no {', '.join(missing)}")
    if not len(predictions):
        raise RecordError(f"the record of {folder.name} has no predictions")
    metrics = {"format": FORMAT, **plain(metrics, finite=True), "checksums": {}}
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        predictions.to_parquet(aside / "predictions.parquet", index=False)
        metrics["checksums"]["predictions.parquet"] = sha256_file(aside / "predictions.parquet")
        write_sealed(aside / "metrics.json", metrics, "checksums")
        # A folder cannot be renamed over another: killed between the two lines, the trial is missing and done again.
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_record(folder: str | Path) -> dict[str, Any]:
    """A trial's metrics, after the checksums of `metrics.json` and `predictions.parquet` were found right.

    Raises:
        RecordError: names the file, and what is wrong with it.
    """
    folder = Path(folder)
    metrics = read_sealed(folder / "metrics.json", "checksums")
    if metrics.get("format") != FORMAT or any(key not in metrics for key in REQUIRED):
        raise RecordError(f"{label(folder / 'metrics.json')} is not a record of format {FORMAT}")
    predictions_file = folder / "predictions.parquet"
    if not predictions_file.is_file():
        raise RecordError(f"{label(predictions_file)} is missing")
    if sha256_file(predictions_file) != metrics["checksums"].get("predictions.parquet"):
        raise RecordError(f"{label(predictions_file)} is not the file that metrics.json was written with: its checksum "
                          "differs")
    return metrics


def read_notebook(path: str | Path) -> dict[str, Any]:
    """An executed notebook, checked: unchanged since it was written, every code cell run, no error among its outputs.

    Raises:
        RecordError: names the notebook and what is wrong.
    """
    notebook = read_sealed(Path(path), "metadata.kd_utils")
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        if errors := [output for output in cell["outputs"] if output["output_type"] == "error"]:
            raise RecordError(f"{label(path)}: cell {number} ended with {errors[0]['ename']}: {errors[0]['evalue']}")
        if cell["execution_count"] is None:
            raise RecordError(f"{label(path)}: cell {number} was not run")
    return notebook


def trial_status(run_dir: str | Path, trial: str, config_hash: str, cache_hash: str | None = None) -> Status:
    """Whether a trial's record is whole and is of this config and this teacher cache.

    Args:
        config_hash: expected `TrialConfig.fingerprint()`.
        cache_hash: expected content hash of the teacher cache; None does not ask.
    """
    trials = Path(run_dir) / "trials"
    try:
        metrics = read_record(trials / trial)
        notebook = read_notebook(trials / f"{trial}.ipynb")
        why = _differences(metrics, notebook, config_hash, cache_hash)
        state = Status("stale", why) if why else Status("done")
    except RecordError as error:
        state = Status("broken", str(error))
    if state.state == "done":
        return state
    if cause := failure_cause(trials / f"{trial}.failed.ipynb"):
        return Status("failed", cause)
    there = [path for path in (trials / trial, trials / f"{trial}.ipynb") if path.exists()]
    return state if there else Status("missing")


def failure_cause(path: Path) -> str:
    """Why a trial failed, one line, from the notebook kept with its traceback; "" where there is none."""
    if not path.exists():
        return ""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["metadata"]["kd_utils"]["failure"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} does not say why"


def read_plan(run_dir: str | Path) -> dict[str, Any] | None:
    """`sweep.json` of a run, or None for a folder that no sweep wrote (exploration by hand)."""
    path = Path(run_dir) / PLAN
    return read_sealed(path, "checksums") if path.exists() else None


def collect(run_dir: str | Path) -> pd.DataFrame:
    """The results table: a row per planned trial, or per trial found where there is no plan.

    Returns:
        Columns `trial`, `config/<swept key>` (distill_type and seed first), `status`, `why`, one per key of the last
        epoch's metrics (empty unless done), `seconds` (whole trial), `peak_memory_mb`, `config_hash`.
    """
    import pandas as pd

    rows, results = [], []
    for planned, state in _trials(run_dir):
        swept = {f"config/{key}": value for key, value in planned["swept"].items()}
        rows.append({"trial": planned["trial"], **swept, "status": state.state, "why": state.why})
        result = {}
        if state.state == "done":
            metrics = read_record(Path(run_dir) / "trials" / planned["trial"])
            result = {**metrics["final"], "seconds": metrics["seconds"]["total"],
                      "peak_memory_mb": metrics["peak_memory_mb"]}
        results.append(result | {"config_hash": planned["config_hash"]})
    columns = ["trial", "config/distill_type", "config/seed", "status", "why"]
    left = pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)
    right = pd.DataFrame(results)
    tail = [key for key in ("seconds", "peak_memory_mb", "config_hash") if key in right]
    return left.join(right[[key for key in right if key not in tail] + tail])


def done_records(run_dir: str | Path) -> list[dict[str, Any]]:
    """`metrics.json` of every done trial, in the plan's order, with `swept`: its place in the grid."""
    return [read_record(Path(run_dir) / "trials" / planned["trial"]) | {"swept": planned["swept"]}
            for planned, state in _trials(run_dir) if state.state == "done"]


def predictions(run_dir: str | Path) -> pd.DataFrame:
    """All done trials' predictions in one table, behind the columns `trial`, `distill_type`, `seed`, other swept keys.

    Raises:
        RecordError: no trial is done.
    """
    import pandas as pd

    tables = []
    for planned, state in _trials(run_dir):
        if state.state == "done":
            table = pd.read_parquet(Path(run_dir) / "trials" / planned["trial"] / "predictions.parquet")
            for at, (key, value) in enumerate({"trial": planned["trial"], **planned["swept"]}.items()):
                table.insert(at, key, value)
            tables.append(table)
    if not tables:
        raise RecordError(f"no trial of {Path(run_dir).name} is done: run the sweep first")
    return pd.concat(tables, ignore_index=True)


def check_run(run_dir: str | Path) -> list[str]:
    """Everything that is wrong with a run's folder, one line each; an empty list for a whole run.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run folder {run_dir}")
    if not (run_dir / PLAN).exists():
        return [f"{PLAN} is missing: no sweep wrote this folder, so what should be in it is not known"]
    try:
        trials = _trials(run_dir)
    except RecordError as error:
        return [str(error)]
    problems = [f"{planned['trial']}: {state.state}" + (f": {state.why}" if state.why else "")
                for planned, state in trials if state.state != "done"]
    for stage in STAGES:
        try:
            read_notebook(run_dir / f"{stage}.ipynb")
        except RecordError as error:
            problems.append(str(error))
    names = {planned["trial"] for planned, _ in trials}
    for path in sorted((run_dir / "trials").glob("*")):
        if path.name.startswith("."):
            problems.append(f"trials/{path.name} is left over from an execution that was stopped")
        elif path.name.removesuffix(".ipynb").removesuffix(".failed") not in names:
            problems.append(f"trials/{path.name} belongs to no planned trial")
    return problems + _check_alike(run_dir) + _check_summary(run_dir)


def count_done(run_dir: str | Path) -> tuple[int, int]:
    """How many trials of a run are whole, of how many that are planned (or found, without a plan)."""
    try:
        trials = _trials(run_dir)
    except RecordError:
        return 0, 0
    return sum(state.state == "done" for _, state in trials), len(trials)


def _differences(metrics: dict, notebook: dict, config_hash: str, cache_hash: str | None) -> str:
    """Why a record that can be read is not the one that is wanted; "" when it is."""
    if metrics["config_hash"] != config_hash:
        return f"config changed: the record has {metrics['config_hash']}, the plan {config_hash}"
    if cache_hash and metrics["cache"]["content_hash"] != cache_hash:
        return f"teacher cache changed: the record has {metrics['cache']['content_hash']}, the plan {cache_hash}"
    about = notebook["metadata"]["kd_utils"]
    if about.get("record") != metrics["checksums"]["sha256"] or about.get("config_hash") != config_hash:
        return "the notebook is of another execution than metrics.json"
    return ""


def _trials(run_dir: str | Path) -> list[tuple[dict[str, Any], Status]]:
    """Each planned trial with its status; without a plan, each record found."""
    plan = read_plan(run_dir)
    if plan is not None:
        cache_hash = (plan["cache"] or {}).get("content_hash")
        return [(planned, trial_status(run_dir, planned["trial"], planned["config_hash"], cache_hash))
                for planned in plan["trials"]]
    found = []
    for path in sorted(Path(run_dir).glob("trials/[!.]*/metrics.json")):
        planned: dict[str, Any] = {"trial": path.parent.name, "swept": {}, "config_hash": None}
        try:
            metrics = read_record(path.parent)
            planned["swept"] = {key: metrics["config"][key] for key in ("distill_type", "seed")}
            found.append((planned | {"config_hash": metrics["config_hash"]}, Status("done")))
        except RecordError as error:
            found.append((planned, Status("broken", str(error))))
    return found


def _check_alike(run_dir: Path) -> list[str]:
    """Paired trials start from the same weights and round alike: whether all that are done did."""
    done = done_records(run_dir)
    kinds = {key: {json.dumps(metrics.get(key)) for metrics in done} for key in ("student", "precision")}
    return [f"trials differ in {key}: {', '.join(sorted(values))}" for key, values in kinds.items() if len(values) > 1]


def _check_summary(run_dir: Path) -> list[str]:
    """Whether `results_summary.csv` says what the records say."""
    path = run_dir / SUMMARY
    if not path.exists():
        return [f"{SUMMARY} is missing"]
    if path.read_bytes() != collect(run_dir).to_csv(index=False).encode():
        return [f"{SUMMARY} does not say what the records say: run the sweep again to write it anew"]
    return []
