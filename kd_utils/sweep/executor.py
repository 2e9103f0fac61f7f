"""What runs the trials of a sweep: the interface of an executor, and the loop over its reports.

Ray is one executor (`ray_executor`), and processes of this machine are another (`local_pool`).
Others need the four methods of `Executor` and a way to run `slots.slot.run_here` elsewhere.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from kd_utils.cluster.machines import problem_with_files
from kd_utils.config import project_paths, stages
from kd_utils.config.parameter_files import notebook_config
from kd_utils.records import provenance, trial_record
from kd_utils.sweep import execution
from kd_utils.sweep.display import Progress
from kd_utils.sweep.planning import Trial

RESTARTS = 3  # of a trial whose process or machine was lost; it resumes from its last state


@dataclass(frozen=True)
class Job:
    """A trial to run, with everything that another process or machine has to know.

    Attributes:
        run_dir: where the record goes, relative to the project's root, which a machine may see at a
            place of its own.
        code, files: digests of the code that the trial must run (`provenance.code_of`), and of the
            files that it must see as the sweep sees them.
    """

    trial: Trial
    run_dir: str
    code: dict[str, str]
    files: dict[str, str]

    @property
    def name(self) -> str:
        return self.trial.trial

    @property
    def notebook(self) -> Path:
        return project_paths.project_path(self.run_dir) / "trials" / f"{self.name}.ipynb"


@dataclass(frozen=True)
class Report:
    """One event in the life of a running trial.

    Attributes:
        kind: "ended", "failed" and "lost" are the last report of a submitted job. A trial is lost
            when its process or machine is gone, and has failed when an error of its own ended it.
        row: of metrics, as the trial measured it.
        cause: why it failed or was lost, in one line.
        kept: whether the failed notebook is in the run folder already.
    """

    trial: str
    kind: Literal["started", "measured", "ended", "failed", "lost"]
    row: dict[str, Any] = field(default_factory=dict)
    cause: str = ""
    kept: bool = False


class Executor(Protocol):
    """Runs jobs somewhere: in a cluster, in a pool of processes, through a batch system."""

    def require_same_view(self, files: dict[str, str]) -> None:
        """Raise a ValueError if a machine sees other `files` (path -> SHA-256) than this one."""

    def submit(self, job: Job) -> None:
        """Queue a job; it runs `execute_trial` as soon as there is room. A lost one comes again."""

    def reports(self) -> Iterable[Report]:
        """Wait for at most about half a second, and return what the jobs reported meanwhile."""

    def cancel(self) -> None:
        """Stop the jobs that run, and forget those that wait."""


def open_executor(
    kind: str,
    parameters: dict[str, Any],
    address: str | None,
    cpus: float,
    gpus: float | None,
) -> AbstractContextManager[Executor]:
    """The executor of a name: "ray", or "local" for processes of this machine.

    Args:
        parameters: of the sweep.
        address: of a Ray cluster; None: this machine.
        cpus, gpus: for each trial; `gpus` None: one where a machine has one.

    Raises:
        ValueError: Ray is not installed, or 02 needs it.
    """
    device = notebook_config(stages.TRAIN, parameters).device
    if kind == "local":
        from kd_utils.sweep.local_pool import local_pool

        workers = notebook_config(stages.CACHE, parameters).workers
        if workers > 1:
            raise ValueError(f"workers = {workers} needs Ray: set workers to 0 or 1")
        return local_pool(cpus, gpus, device)
    try:
        from kd_utils.sweep.ray_executor import ray_executor  # brings Ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        remedy = "add --executor local to run on this machine, or `pip install 'ray[data]'`"
        raise ValueError(f"Ray is not installed: {remedy}") from None
    return ray_executor(address, cpus, gpus, device)


def run_trials(executor: Executor, jobs: Iterable[Job], progress: Progress) -> None:
    """Run all jobs to their end; one that fails does not stop the others.

    A job that is lost is submitted again, at most `RESTARTS` times. Whatever stops this loop, such
    as Ctrl-C, cancels the jobs.

    Args:
        progress: told of every start, row of metrics, end and failure.
    """
    unfinished = {job.name: job for job in jobs}
    losses: Counter[str] = Counter()
    try:
        for job in unfinished.values():
            executor.submit(job)
        while unfinished:
            for report in executor.reports():
                name, job = report.trial, unfinished[report.trial]
                losses[name] += report.kind == "lost"
                if report.kind in ("started", "measured"):
                    progress.reported(name, report.row)
                elif report.kind == "lost" and losses[name] <= RESTARTS:
                    again = f"starting again ({losses[name]} of {RESTARTS})"
                    progress.stopped(name, f"its process or machine was lost; {again}")
                    executor.submit(job)
                elif report.kind == "ended":
                    del unfinished[name]
                    progress.finished(name)
                else:
                    del unfinished[name]
                    times = f"the trial's process or machine was lost {losses[name]} times: "
                    cause = times * (report.kind == "lost") + report.cause
                    if not report.kept:
                        execution.keep_failure(job.notebook, stages.TRAIN, cause)
                    progress.broke(name, cause)
    except BaseException:
        executor.cancel()
        raise


def execute_trial(job: Job, threads: int) -> Iterator[Report]:
    """Run a trial here: notebook 03 executed into `RUN_DIR/trials`; yields what an executor hands
    on: the start, each row of metrics, and the end or the failure.

    Args:
        threads: for torch and the libraries below it, so that trials side by side do not compete
            for cores.
    """
    yield Report(job.name, "started")
    problem = problem_with_files(job.files)
    ran = provenance.Ingredients(code=provenance.code_of(stages.TRAIN))
    if why := ran.why_stale(provenance.Ingredients(code=job.code)):
        problem = f"the {why} since the sweep began: run the same command again"
    if problem:  # the sweep keeps the failure: the run folder here may be another one
        yield Report(job.name, "failed", cause=problem)
        return
    with tempfile.TemporaryDirectory(prefix="kd-") as scratch:
        reported, shown = Path(scratch) / "rows.jsonl", 0
        os.environ.update(
            KD_PROGRESS=str(reported),
            KD_ROOT=str(project_paths.ROOT),
            **thread_variables(threads),
        )
        try:
            for _ in execution.in_thread(
                lambda: execution.execute(
                    stages.TRAIN, job.notebook, job.trial.parameters, lambda: _about(job)
                )
            ):
                rows = read_rows(reported)
                yield from (Report(job.name, "measured", row) for row in rows[shown:])
                shown = len(rows)
            yield Report(job.name, "ended")
        except execution.NotebookFailed as error:
            yield Report(job.name, "failed", cause=error.cause, kept=error.kept)
        finally:
            os.environ.pop("KD_PROGRESS", None)  # its folder is gone now


def thread_variables(threads: int) -> dict[str, str]:
    """The environment of a process whose libraries are to use so many threads each."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "false",
    }


def _about(job: Job) -> dict[str, Any]:
    """What the executed notebook notes; a ValueError if the record is not the planned one."""
    metrics = trial_record.read_record(job.notebook.with_suffix(""))
    if metrics["config_hash"] != job.trial.config_hash:
        raise ValueError(
            f"the record was made with config {metrics['config_hash']}, but the plan asks for "
            f"{job.trial.config_hash}: run the same command again"
        )
    # It may have run one version of the code and recorded another.
    ran = provenance.Ingredients(code=metrics.get("code", {}))
    if why := ran.why_stale(provenance.Ingredients(code=job.code)):
        raise ValueError(f"the {why} while the trial ran: run the same command again")
    record = metrics["checksums"]["sha256"]
    return {"trial": job.name, "config_hash": job.trial.config_hash, "record": record}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that is still being written: only those that are complete."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]
