"""Processes of this machine as the executor of a sweep, without Ray: for a machine of your own, or
the bare image of a rented GPU.

Each slot has a process of its own with its CUDA_VISIBLE_DEVICES, which forks its trials
(`slots.server`).
"""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from kd_utils.cluster import cuda, machines
from kd_utils.sweep.display import say
from kd_utils.sweep.executor import Executor, Job, Report
from kd_utils.sweep.slots.slot import Slot

WAIT_SECONDS = 0.5  # between two looks at what the trials report: Ctrl-C is answered within it


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


class LocalPool:
    """Runs jobs on this machine, one in each slot.

    Args:
        slots: CUDA_VISIBLE_DEVICES of each, "" for a trial without a GPU.
        threads: for each job.
    """

    def __init__(self, slots: list[str], threads: int) -> None:
        self.slots = [Slot(threads, {cuda.VISIBLE: visible}) for visible in slots]
        self._free, self._waiting = deque(self.slots), deque[Job]()

    def require_same_view(self, files: dict[str, str]) -> None:
        """Nothing to ask: the one machine is this one, and `files` are as it sees them."""

    def submit(self, job: Job) -> None:
        self._waiting.append(job)
        self._start()

    def reports(self) -> Iterator[Report]:
        """What the trials report; a process that ends before its last report is lost."""
        running: dict[Any, Slot] = {slot.pipe: slot for slot in self.slots if slot.job}
        for pipe in wait(list(running), WAIT_SECONDS):
            slot = running[pipe]
            report = slot.receive()
            if not slot.job:
                self._free.append(slot)
                self._start()
            if report:
                yield report

    def cancel(self) -> None:
        self._waiting.clear()
        for slot in self.slots:
            slot.end()

    def _start(self) -> None:
        """Start the jobs that wait, as many as there are free slots."""
        while self._free and self._waiting:
            self._free.popleft().submit(self._waiting.popleft())
