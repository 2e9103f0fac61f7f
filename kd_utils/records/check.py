"""`python -m kd_utils check RUN_DIR`: whether a run folder is whole, also one from others."""

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from kd_utils.config.parameter_files import CHAIN
from kd_utils.config.trial import initial_settings
from kd_utils.records import provenance, run_folder
from kd_utils.records.run_folder import PLAN, SUMMARY, Status, trials_with_status
from kd_utils.records.trial_record import Metrics, Shape, read_record, require_shape
from kd_utils.store.files import matching
from kd_utils.store.sealed import RecordError

STAGES = ("01_prepare_data", "02_cache_teacher", "04_analyse_results")

#: Compares the worlds of a run that has several.
JOIN = "12_compare_worlds"

#: What paired trials must have in common beside their config.
ALIKE = ("cache", "student", "initial", "precision", "arithmetic", "code", "git_commit", "versions")

LONGEST = 1000  # characters of a line, which may quote a stranger's file


class Stage(Shape):
    """The metadata of a stage's notebook."""

    class Papermill(Shape):
        input_path: str

    class About(Shape):
        class Artifact(Shape):
            data: str
            cache: Metrics.Cache | None = None

        artifact: Artifact | None = None
        wrote: dict[Annotated[str, Field(pattern=r"^[^/\x00]+$")], str] = {}

    papermill: Papermill | None = None
    kd_utils: About


def check_run(run_dir: str | Path) -> list[str]:
    """Everything that is wrong with a run's folder, one line each; an empty list for a whole run.

    Nothing outside of the folder is read, whatever is in it.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run folder {run_dir}: give a folder such as runs/NAME")
    try:
        problems = _links(run_dir) or list(_problems(run_dir))
    except OSError as error:
        problems = [f"{Path(str(error.filename)).name}: {error.strerror}"]
    except (RecordError, RecursionError) as error:
        problems = [str(error)]
    return [_one_line(problem) for problem in problems]


def _problems(run_dir: Path) -> Iterator[str]:
    if not (run_dir / PLAN).exists():
        yield f"{PLAN} is missing, so the planned trials are not known: give a folder of a sweep"
        return
    if worlds := run_folder.world_runs(run_dir):
        yield from _check_worlds(run_dir, worlds)
        return
    trials = trials_with_status(run_dir)
    for planned, state in trials:
        why = f": {state.why}" if state.why else ""
        found = _check_trial(run_dir, planned) if state.state == "done" else [state.state + why]
        yield from (f"{planned['trial']}: {problem}" for problem in found)
    yield from _check_stages(run_dir)
    yield from _check_names(run_dir, trials)
    yield from differences(run_dir, trials)
    summary = run_dir / SUMMARY
    if not summary.is_file():
        yield f"{SUMMARY} is missing: run the sweep again"
    elif _cells(summary.read_bytes()) != _cells(run_folder.collect(run_dir).to_csv(index=False)):
        yield f"{SUMMARY} does not agree with the records: run the sweep again to write it anew"


def _check_worlds(run_dir: Path, worlds: dict[str, Path]) -> Iterator[str]:
    """Whether every world's run is whole, and the notebook that compares them."""
    plan = run_folder.read_plan(run_dir) or {}
    for folder, listed in zip(worlds.values(), plan["worlds"]):
        there = folder.is_dir()
        problems = check_run(folder) if there else ["it is missing: run the sweep again"]
        yield from (f"{folder.name}: {problem}" for problem in problems)
        with suppress(RecordError):  # which is among the problems
            own = run_folder.read_plan(folder) or listed
            if own.get("parameters") != listed.get("parameters"):
                yield f"{folder.name}: its plan has other parameters than {PLAN} lists for it"
    for path in matching(run_dir, "[!.]*"):
        if path.is_dir() and path not in worlds.values():
            yield f"{path.name} belongs to no planned world: move it away"
    if CHAIN in plan.get("parameters", {}):  # whose links are not compared
        return
    try:
        metadata = run_folder.read_notebook(run_dir / f"{JOIN}.ipynb")["metadata"]
        yield from _check_written(run_dir, JOIN, require_shape(Stage, metadata, f"{JOIN}.ipynb"))
    except RecordError as error:
        yield str(error)


def count_done(run_dir: str | Path) -> tuple[int, int]:
    """How many trials of a run are whole, and how many are planned (or found, without a plan)."""
    try:
        if _links(Path(run_dir)):
            return 0, 0
        if worlds := run_folder.world_runs(run_dir):
            done, planned = zip(*map(count_done, worlds.values()))
            return sum(done), sum(planned)
        trials = trials_with_status(run_dir)
    except (RecordError, RecursionError, OSError):
        return 0, 0
    return sum(state.state == "done" for _, state in trials), len(trials)


def _links(run_dir: Path) -> list[str]:
    """Links and devices: to read them may lead out of the run's folder, or never end."""
    paths = [
        Path(folder, name)
        for folder, folders, files in os.walk(run_dir)
        for name in sorted(folders + files)
    ]
    return [
        f"{path.relative_to(run_dir)} is a link or a device, so the folder is not read: remove it"
        for path in paths
        if path.is_symlink() or not (path.is_file() or path.is_dir())
    ]


def _one_line(text: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 40]}... ({len(text):,} characters)"


def _check_trial(run_dir: Path, planned: dict[str, Any]) -> Iterator[str]:
    """Whether config, metrics and predictions of a record agree with each other and the plan."""
    folder = run_dir / "trials" / planned["trial"]
    metrics = read_record(folder)
    config, final = metrics["config"], metrics["final"]
    yield from (
        f"its {key} is {config.get(key)!r}, the plan says {value!r}"
        for key, value in planned["swept"].items()
        if config.get(key) != value
    )
    epochs = final.get("epoch") or 1  # the plan counts an untrained student's epoch 0 as one
    if planned.get("epochs", epochs) != epochs:
        yield f"it has {epochs:g} epochs, the plan says {planned['epochs']}"
    try:
        table = run_folder.trial_predictions(folder)
        for task, correct in table.groupby("task")["correct"]:
            key, accuracy = f"validation_accuracy/{task}", correct.mean()
            # `not <=` finds NaN too.
            if key in final and not abs(final[key] - accuracy) <= 1e-9:
                yield f"{key} is {final[key]}, its predictions say {accuracy}"
        if repeated := int(table["example_id"].duplicated().sum()):
            yield f"{repeated} examples are predicted twice"
    except Exception as error:  # pandas and pyarrow raise anything at a stranger's table
        yield f"its predictions cannot be read ({type(error).__name__})"


def _check_stages(run_dir: Path) -> Iterator[str]:
    """Whether the stages' notebooks are whole and from this run, and so are their files."""
    cache = (run_folder.read_plan(run_dir) or {}).get("cache")
    made = {"data": set(), "teacher cache": {cache["content_hash"]} if cache else set()}
    for stage in STAGES:
        try:
            metadata = run_folder.read_notebook(run_dir / f"{stage}.ipynb")["metadata"]
            about = require_shape(Stage, metadata, f"{stage}.ipynb")
        except RecordError as error:
            yield str(error)
            continue
        if about.papermill and about.papermill.input_path != f"notebooks/{stage}.ipynb":
            other = about.papermill.input_path
            yield f"{stage}.ipynb is an execution of {other}: run the sweep again"
        if artifact := about.kd_utils.artifact:
            made["data"].add(artifact.data)
            made["teacher cache"] |= {artifact.cache.content_hash} if artifact.cache else set()
        yield from _check_written(run_dir, stage, about)
    yield from (
        f"{STAGES[0]}.ipynb, {STAGES[1]}.ipynb and {PLAN} are not from one run: the {what} differs"
        for what, values in made.items()
        if len(values) > 1
    )


def _check_written(run_dir: Path, stage: str, about: Stage) -> Iterator[str]:
    """Whether the files beside a notebook are those that it wrote."""
    yield from (
        f"{name} is not the file that {stage}.ipynb wrote: run the sweep again to write it anew"
        for name, checksum in about.kd_utils.wrote.items()
        if not (run_dir / name).is_file() or checksum not in _digests(run_dir / name)
    )


def _digests(path: Path) -> list[str]:
    """Of a text file as it is, and with the line ends that it was written with (on Windows, git may
    have changed them).
    """
    data = path.read_bytes()
    return [hashlib.sha256(d).hexdigest() for d in (data, data.replace(b"\r\n", b"\n"))]


def _cells(table: str | bytes) -> list[list[tuple[str, str]]] | None:
    """The cells of a CSV table, row by row, each with its column's name; the order of columns is
    that of the keys in a record, which does not count. None for what is no such table.
    """
    text = table.decode(errors="replace") if isinstance(table, bytes) else table
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""))
        return [sorted(zip(header, row, strict=True)) for row in rows]
    except (ValueError, csv.Error):
        return None


def _check_names(run_dir: Path, trials: list[tuple[dict[str, Any], Status]]) -> Iterator[str]:
    """What is in `trials/` and should not be."""
    names = Counter(planned["trial"] for planned, _ in trials)
    yield from (f"{name} is planned {count} times" for name, count in names.items() if count > 1)
    ids = set(matching(run_dir / "trials", "examples-*.parquet"))
    for path in matching(run_dir / "trials", "*"):
        if path in ids:
            continue
        if path.name.startswith("."):
            yield f"trials/{path.name} is left over from an execution that was stopped: remove it"
        elif path.name.removesuffix(".ipynb").removesuffix(".failed") not in names:
            yield f"trials/{path.name} belongs to no planned trial: move it out of trials/"


def differences(run_dir: Path, trials: list[tuple[dict[str, Any], Status]]) -> list[str]:
    """What trials that are done must have in common and do not: initial weights, code, versions."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for planned, state in trials:
        if state.state != "done":
            continue
        metrics = read_record(run_dir / "trials" / planned["trial"])
        metrics["versions"] = {name: metrics["versions"].get(name) for name in provenance.COMPUTING}
        if "code" in metrics:
            # Its digests say more than the commit, which changes with every text.
            del metrics["git_commit"]
        for key in ALIKE:
            kind = _made_in_this_way(metrics["config"]).get(key, key)
            value = json.dumps(metrics.get(key), sort_keys=True)
            kinds.setdefault(kind, {}).setdefault(value, []).append(planned["trial"])
    return [
        f"trials differ in {kind}: "
        + " against ".join(provenance.listed(names, most=2) for names in values.values())
        for kind, values in kinds.items()
        if len(values) > 1
    ]


def _made_in_this_way(config: dict[str, Any]) -> dict[str, str]:
    """Names for what differs by intention between trials whose students are swept."""
    student, way = config.get("student"), config.get("student_init", "pretrained")
    settings = "".join(f" {value}" for value in initial_settings(config).values())
    return {
        "student": f"initial weights of {student}",
        "initial": f"the initial student ({way}{settings}) of {student}",
    }
