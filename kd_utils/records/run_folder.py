"""A run's folder, read back: what was planned, which trials are done, and their results as tables.

Nothing that is stale, damaged or of another execution gets into a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from kd_utils.config.base import NEVER_IN_A_RESULT
from kd_utils.records.source_code import changed_files
from kd_utils.records.trial_record import FORMAT, Metrics, Shape, read_record, require_shape
from kd_utils.store.sealed import RecordError, label, read_sealed

if TYPE_CHECKING:
    import pandas as pd

PLAN = "sweep.json"

SUMMARY = "results_summary.csv"

VERDICT = "verdict.txt"


class Plan(Shape):
    """What every `sweep.json` has; newer ones say of which `students` and which `code` the trials
    must be, too.
    """

    class Trial(Shape):
        class Swept(Shape):
            distill_type: str
            seed: int

        #: One file name: whoever wrote the plan, it cannot point out of its folder.
        trial: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]*$", max_length=200)]
        swept: Swept
        config_hash: str

    cache: Metrics.Cache | None
    more_caches: dict[str, str] = {}
    tokenizer: str = ""
    students: dict[str, str] = {}
    code: dict[str, str] = {}
    trials: list[Trial]


class Made(NamedTuple):
    """What a trial must have been made from; what is empty is not asked for.

    `cache` is the content hash of its experiment's, `more_caches` has those of other experiments,
    `students` a fingerprint per name, `code` what `source_code.code_of` gives, `tokenizer` the
    fingerprint of the student's.
    """

    cache: str = ""
    students: dict[str, str] = {}
    code: dict[str, str] = {}
    more_caches: dict[str, str] = {}
    tokenizer: str = ""


class Status(NamedTuple):
    """`state` is done, failed, stale (there, but of something else than is planned), broken or
    missing.
    """

    state: str
    why: str = ""


def trial_status(
    run_dir: str | Path,
    trial: str,
    config_hash: str,
    made: Made = Made(),
    parameters: Mapping[str, Any] | None = None,
) -> Status:
    """Whether a trial's record is whole and is of this config, teacher cache, student and code.

    Args:
        config_hash: expected `TrialConfig.fingerprint()`.
        made: what else is expected.
        parameters: the trial's, to say which of them changed.
    """
    trials = Path(run_dir) / "trials"
    try:
        metrics = read_record(trials / trial)
        notebook = read_notebook(trials / f"{trial}.ipynb")
        why = _differences(metrics, notebook, config_hash, made, parameters or {})
        state = Status("stale", why) if why else Status("done")
    except RecordError as error:
        state = Status("broken", str(error))
    if state.state == "done":
        return state
    if cause := failure_cause(trials / f"{trial}.failed.ipynb"):
        return Status("failed", cause)
    there = [path for path in (trials / trial, trials / f"{trial}.ipynb") if path.exists()]
    return state if there else Status("missing")


def read_notebook(path: str | Path) -> dict[str, Any]:
    """An executed notebook, checked: unchanged since it was written, every code cell run, no error
    among its outputs.

    Raises:
        RecordError: names the notebook and what is wrong.
    """
    notebook = read_sealed(Path(path), "metadata.kd_utils")
    try:
        for number, cell in enumerate(notebook["cells"], 1):
            if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
                continue
            if errors := [output for output in cell["outputs"] if output["output_type"] == "error"]:
                raise RecordError(
                    f"{label(path)}: cell {number} ended with {errors[0]['ename']}: "
                    f"{errors[0]['evalue']}"
                )
            if cell["execution_count"] is None:
                raise RecordError(f"{label(path)}: cell {number} was not run")
    except (KeyError, TypeError):
        raise RecordError(f"{label(path)} is not a notebook") from None
    return notebook


def failure_cause(path: Path) -> str:
    """Why a trial failed, one line, from the notebook kept with its traceback; "" where there is
    none.
    """
    if not path.exists():
        return ""
    try:
        cause = json.loads(path.read_text(encoding="utf-8"))["metadata"]["kd_utils"]["failure"]
        return " ".join(cause.split()) or f"{path.name} does not say why"
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
    if plan.get("format") != FORMAT:
        raise RecordError(f"{PLAN} is not a plan of format {FORMAT}")
    require_shape(Plan, plan, PLAN)
    return plan


def trials_with_status(run_dir: str | Path) -> list[tuple[dict[str, Any], Status]]:
    """Each planned trial with its status; without a plan, each record found."""
    plan = read_plan(run_dir)
    if plan is not None:
        made = Made(
            (plan["cache"] or {}).get("content_hash", ""),
            plan.get("students", {}),
            plan.get("code", {}),
            plan.get("more_caches", {}),
            plan.get("tokenizer", ""),
        )
        return [
            (planned, trial_status(run_dir, planned["trial"], planned["config_hash"], made))
            for planned in plan["trials"]
        ]
    found = []
    for path in sorted(Path(run_dir).glob("trials/[!.]*/metrics.json")):
        planned: dict[str, Any] = {"trial": path.parent.name, "swept": {}, "config_hash": None}
        try:
            metrics = read_record(path.parent)
            planned["swept"] = {key: metrics["config"].get(key) for key in ("distill_type", "seed")}
            found.append((planned | {"config_hash": metrics["config_hash"]}, Status("done")))
        except RecordError as error:
            found.append((planned, Status("broken", str(error))))
    return found


def collect(run_dir: str | Path) -> pd.DataFrame:
    """The results table: a row per planned trial, or per trial found where there is no plan.

    Returns:
        Columns `trial`, `config/<swept key>` (distill_type and seed first), `status`, `why`, one
        per key of the last epoch's metrics (empty unless done), `seconds` (whole trial),
        `peak_memory_mb`, `config_hash`.
    """
    import pandas as pd

    rows, results = [], []
    for planned, state in trials_with_status(run_dir):
        swept = {f"config/{key}": value for key, value in planned["swept"].items()}
        rows.append({"trial": planned["trial"], **swept, "status": state.state, "why": state.why})
        result = {}
        if state.state == "done":
            metrics = read_record(Path(run_dir) / "trials" / planned["trial"])
            result = {
                **metrics["final"],
                "seconds": metrics["seconds"]["total"],
                "peak_memory_mb": metrics["peak_memory_mb"],
            }
        results.append(result | {"config_hash": planned["config_hash"]})
    columns = ["trial", "config/distill_type", "config/seed", "status", "why"]
    left = pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)
    right = pd.DataFrame(results)
    tail = [key for key in ("seconds", "peak_memory_mb", "config_hash") if key in right]
    # A metric cannot take the place of a column that says what the trial is.
    return left.join(right[[key for key in right if key not in tail and key not in left] + tail])


def done_records(run_dir: str | Path) -> list[dict[str, Any]]:
    """`metrics.json` of every done trial, in the plan's order, with `swept`: its place in the
    grid.
    """
    return [
        read_record(Path(run_dir) / "trials" / planned["trial"]) | {"swept": planned["swept"]}
        for planned, state in trials_with_status(run_dir)
        if state.state == "done"
    ]


def predictions(run_dir: str | Path) -> pd.DataFrame:
    """All done trials' predictions in one table, behind the columns `trial`, `distill_type`,
    `seed`, other swept keys.

    Raises:
        RecordError: no trial is done.
    """
    import pandas as pd

    tables = []
    for planned, state in trials_with_status(run_dir):
        if state.state == "done":
            table = pd.read_parquet(
                Path(run_dir) / "trials" / planned["trial"] / "predictions.parquet"
            )
            for at, (key, value) in enumerate(
                {"trial": planned["trial"], **planned["swept"]}.items()
            ):
                table.insert(at, key, value)
            tables.append(table)
    if not tables:
        raise RecordError(f"no trial of {Path(run_dir).name} is done: run the sweep first")
    return pd.concat(tables, ignore_index=True)


def _differences(
    metrics: dict, notebook: dict, config_hash: str, made: Made, parameters: Mapping[str, Any]
) -> str:
    """Why a record that can be read is not the one that is wanted; "" when it is."""
    student = metrics.get("student", {}).get("fingerprint")
    if metrics["config_hash"] != config_hash:
        had, had_hash = metrics["config"], metrics["config_hash"]
        named = ", ".join(
            f"{key} was {had[key]!r}, is {value!r}"
            for key, value in parameters.items()
            if key in had.keys() - NEVER_IN_A_RESULT and had[key] != value
        )
        # A key that went back to its notebook's default is not among the parameters.
        return f"config changed: {named or f'its hash was {had_hash}, is {config_hash}'}"
    if made.cache and metrics["cache"]["content_hash"] != made.cache:
        return f"teacher cache changed: the record has {metrics['cache']['content_hash']}, the plan {made.cache}"
    for name, content in metrics.get("more_caches", {}).items():
        if made.more_caches.get(name, content) != content:
            return f"the teacher cache of {name} changed: the record has {content}, the plan {made.more_caches[name]}"
    if made.tokenizer and metrics.get("tokenizer") != made.tokenizer:
        return f"the student's tokenizer changed: the record has {metrics.get('tokenizer')}, the plan {made.tokenizer}"
    if (wanted := made.students.get(metrics["config"].get("student"))) and student != wanted:
        return f"the student's initial weights changed: the record has {student}, the plan {wanted}"
    if made.code and (files := changed_files(metrics.get("code", {}), made.code)):
        return f"code changed: {files}"
    about = notebook["metadata"]["kd_utils"]
    if (
        about.get("record") != metrics["checksums"]["sha256"]
        or about.get("config_hash") != config_hash
    ):
        return "the notebook is of another execution than metrics.json"
    return ""
