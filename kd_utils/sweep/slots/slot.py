"""A slot of a machine: the process that runs its trials one after another, seen from outside."""

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe
from typing import IO, Any

import psutil

from kd_utils.config import project_paths
from kd_utils.records import provenance
from kd_utils.sweep.executor import Job, Report, thread_variables
from kd_utils.sweep.slots.forks import WHEN_LOADED

END_SECONDS = 10  # for a killed process to be gone: a GPU's driver may hold it for a while

MARK = "KD_SLOT"  # in the environment of a slot's process and of all that it starts


class Slot:
    """Runs one job at a time, in a process that is started for the first one and kept.

    Args:
        threads: for each job.
        environment: of the slot's trials, beyond this process's own.

    Attributes:
        job: the one that runs, or None.
        mark: the value of `MARK` in the environment of the process that runs now.
        pipe: this end of its pipe.
    """

    def __init__(self, threads: int, environment: dict[str, str] | None = None) -> None:
        self.threads, self.environment = threads, environment or {}
        self.job: Job | None = None
        self.process: subprocess.Popen | None = None
        self.mark, self.started = "", 0.0
        self._told, self._said_before = False, 0
        self._stderr: IO[bytes]
        self.pipe: Any = None

    def submit(self, job: Job) -> None:
        """Run a job. A process that loaded code which has changed since is replaced."""
        if self.process and provenance.changed_since(self.started, job.code):
            self.end()
        if not self.process:
            self._start()
        self.job, self._told = job, False
        self._said_before = os.fstat(self._stderr.fileno()).st_size
        with suppress(OSError):  # it is gone already
            self.pipe.send((job, self.threads, os.environ | self._variables()))

    def receive(self) -> Report | None:
        """Wait for the next report; None and `job` None: the slot is free.

        A process that ends before its last report has lost its job.
        """
        assert self.job
        name = self.job.name
        try:
            report = self.pipe.recv()
        except (EOFError, OSError):
            cause = self._gone()
            return None if self._told else Report(name, "lost", cause=cause)
        if report is None:
            self.job = None
        else:
            self._told = report.kind in ("ended", "failed")
        return report

    def end(self) -> None:
        """End the process, and all that it started."""
        if self.process:
            end_marked(self.mark)
            self.pipe.close()
            self._stderr.close()
            self.process.poll()  # so that it is no zombie
        self.process = self.job = None

    def _variables(self) -> dict[str, str]:
        return self.environment | {MARK: self.mark, "KD_ROOT": str(project_paths.ROOT)}

    def _start(self) -> None:
        self.mark, self.started = uuid.uuid4().hex, time.time()
        self.pipe, slot_end = Pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (read when the process has ended)
        # What libraries read when they are loaded is as in a trial.
        variables = self._variables() | thread_variables(self.threads) | WHEN_LOADED
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kd_utils.sweep.slots.server", str(slot_end.fileno())],
            cwd=project_paths.CODE_ROOT,  # where `-m` finds this code
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            pass_fds=[slot_end.fileno()],
            start_new_session=True,  # Ctrl-C is for the sweep alone, which ends its trials
        )
        slot_end.close()

    def _gone(self) -> str:
        """The process ended, and the slot is free. Returns why it ended."""
        assert self.process
        status = self.process.wait()
        size = os.fstat(self._stderr.fileno()).st_size - self._said_before
        said = os.pread(self._stderr.fileno(), size, self._said_before).decode(errors="replace")
        self.end()  # and what is left of it, such as its kernel
        if status < 0:
            return "the process was killed or ran out of memory"
        lines = [line.strip() for line in said.split("\n")]
        last = next((f": {line[:300]}" for line in reversed(lines) if line), "")
        return f"the process ended with status {status}{last}"


def end_marked(mark: str) -> None:
    """Kill every process that has this mark in its environment."""
    until = time.monotonic() + END_SECONDS
    while time.monotonic() < until:
        left = [process for process in psutil.process_iter() if _mark(process) == mark]
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def _mark(process: psutil.Process) -> str:
    with suppress(psutil.Error):  # another user's, or gone
        return process.environ().get(MARK, "")
    return ""


_of_this_process: list[Slot] = []


def run_here(job: Job, threads: int) -> Iterator[Report]:
    """Run a trial in the one slot of this process, which is kept for the next: for executors whose
    processes live on, as Ray's workers do. Yields the reports, a loss among them.
    """
    if not _of_this_process:
        _of_this_process.append(Slot(threads))
    slot = _of_this_process[0]
    slot.submit(job)
    while slot.job:
        if report := slot.receive():
            yield report
