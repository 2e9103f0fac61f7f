"""Processes of this machine as the executor of a sweep, without Ray: for a machine of your own, or
the bare image of a rented GPU.

Each trial gets a fresh process (this file, run as a program) with one slot's CUDA_VISIBLE_DEVICES.
That costs a second of imports beside a trial's minutes, and saves all that a persistent process
would need: a lost one takes one trial with it, and nothing of a trial stays behind.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Any

import psutil

from kd_utils.cluster import cuda, machines
from kd_utils.config import project_paths
from kd_utils.sweep.display import say
from kd_utils.sweep.executor import Executor, Job, Report, execute_trial

WAIT_SECONDS = 0.5  # between two looks at what the trials report: Ctrl-C is answered within it

END_SECONDS = 10  # for a killed process to be gone: a GPU's driver may hold it for a while

MARK = "KD_SLOT"  # in the environment of a trial's process and of all that it starts


@contextmanager
def local_pool(cpus: float, gpus: float | None, device: str) -> Iterator[Executor]:
    """A pool for as long as the block runs, and RAY_ADDRESS for 02 to need no Ray either.

    Args:
        cpus, gpus: for each trial, fractions too; `gpus` None: one where there is one.
        device: the trials' parameter.

    Raises:
        ValueError: this machine does not have what a trial asks for, or torch cannot use its GPUs.
    """
    names, cores = cuda.usable_gpus(gpus, device, say), machines.cores()
    here = {"Alive": True, "Resources": {"CPU": cores, "GPU": len(names)}}
    gpus = machines.fitting_gpus([here], cpus, gpus, device)
    os.environ["RAY_ADDRESS"] = "none"
    pool = LocalPool(slots(cores, names, cpus, gpus), max(1, int(cpus)))
    try:
        yield pool
    finally:
        pool.cancel()


def slots(cores: int, names: list[str], cpus: float, gpus: float) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each of the trials that fit side by side.

    Args:
        cores, names: of this machine: CPU cores, and GPUs as `cuda.usable_gpus` names them.
        cpus, gpus: for each trial; at most one GPU, or a whole number.
    """
    if gpus > 1:
        size = int(gpus)
        groups = [names[i : i + size] for i in range(0, len(names) - size + 1, size)]
        places = [",".join(group) for group in groups]
    elif gpus:
        places = names * _times(1, gpus)  # each GPU once before any has a second trial
    else:
        places = [""] * _times(cores, cpus)
    return places[: _times(cores, cpus)]


def _times(has: float, asked: float) -> int:
    """How often `asked` fits, in steps of 0.0001, as Ray counts; 0 counts as one step."""
    return int(has * 10_000) // max(1, round(asked * 10_000))


@dataclass
class Running:
    """A trial's process.

    Attributes:
        stderr: what it said; the last line is why it ended, if it did not get to say so.
        slot: its CUDA_VISIBLE_DEVICES.
        mark: the value of `MARK` in its environment.
        told: whether its last report came.
    """

    job: Job
    process: subprocess.Popen
    stderr: IO[bytes]
    slot: str
    mark: str
    told: bool = False


class LocalPool:
    """Runs jobs on this machine, one in each slot.

    Args:
        slots: CUDA_VISIBLE_DEVICES of each, "" for a trial without a GPU.
        threads: for each job.
    """

    def __init__(self, slots: list[str], threads: int) -> None:
        self.free, self.threads = deque(slots), threads
        self._waiting: deque[Job] = deque()
        self._running: dict[Any, Running] = {}  # by the pool's end of the process's pipe

    def require_same_view(self, files: dict[str, str]) -> None:
        """Nothing to ask: the one machine is this one, and `files` are as it sees them."""

    def submit(self, job: Job) -> None:
        self._waiting.append(job)
        self._start()

    def reports(self) -> Iterator[Report]:
        """What the trials report; a process that ends before its last report is lost."""
        stream: Any
        for stream in wait(list(self._running), WAIT_SECONDS):
            running = self._running[stream]
            try:
                report = stream.recv()
            except (EOFError, OSError):
                cause = self._gone(stream)
                if not running.told:
                    yield Report(running.job.name, "lost", cause=cause)
            else:
                running.told = report.kind in ("ended", "failed")
                yield report

    def cancel(self) -> None:
        self._waiting.clear()
        for running in self._running.values():
            end_marked(running.mark)
            running.process.poll()  # so that it is no zombie
        self._running.clear()

    def _start(self) -> None:
        """Start the jobs that wait, as many as there are free slots."""
        while self.free and self._waiting:
            job, slot, mark = self._waiting.popleft(), self.free.popleft(), uuid.uuid4().hex
            pool_end, trial_end = Pipe()
            stderr = tempfile.TemporaryFile()  # noqa: SIM115 (read when the process has ended)
            about = {MARK: mark, cuda.VISIBLE: slot, "KD_ROOT": str(project_paths.ROOT)}
            process = subprocess.Popen(
                [sys.executable, "-m", "kd_utils.sweep.local_pool", str(trial_end.fileno())],
                cwd=project_paths.CODE_ROOT,  # where `-m` finds this code
                env=os.environ | about,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=[trial_end.fileno()],
                start_new_session=True,  # Ctrl-C is for the sweep alone, which ends its trials
            )
            self._running[pool_end] = Running(job, process, stderr, slot, mark)
            trial_end.close()
            with suppress(OSError):  # it is gone already
                pool_end.send((job, self.threads))

    def _gone(self, stream: Any) -> str:
        """A process ended, and its slot is free: the next job starts. Returns why it ended."""
        running = self._running.pop(stream)
        stream.close()
        status = running.process.wait()
        if not running.told:
            end_marked(running.mark)  # its kernel
        self.free.append(running.slot)
        self._start()
        running.stderr.seek(0)
        said = running.stderr.read().decode(errors="replace").split("\n")
        running.stderr.close()
        if status < 0:
            return "the process was killed or ran out of memory"
        last = next((f": {line.strip()[:300]}" for line in reversed(said) if line.strip()), "")
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


def main() -> None:
    """A trial's process: it gets its job through the pipe, and ends with the sweep's process."""
    pipe: Any = Connection(int(sys.argv[1]))
    job, threads = pipe.recv()
    threading.Thread(target=_end_with, args=[pipe], daemon=True).start()
    try:
        for report in execute_trial(job, threads):
            pipe.send(report)
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        pipe.send(Report(job.name, "failed", cause=cause))


def _end_with(pipe: Connection) -> None:
    with suppress(EOFError, OSError):
        pipe.recv()  # nothing more is sent: this waits for the other end to be gone
    os._exit(1)  # the kernel notices by itself, within a second


if __name__ == "__main__":
    main()
