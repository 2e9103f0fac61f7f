"""SIGKILL at the n-th thing that a process does to the disk, for every n, and at random moments.

One process loads everything; each attempt is a fork of it, so hundreds of kills take seconds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from kd_utils.store.files import sha256_file

EVENTS = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.utime",
    "fcntl.flock",
}
#: What Python's audit events do not tell of, since it happens in C: a kill before each and one
#: after each.
WRAPPED = [
    ("os", "fsync"),
    ("pyarrow.parquet", "ParquetWriter.write_table"),
    ("pyarrow.parquet", "ParquetWriter.close"),
    ("pyarrow.parquet", "write_table"),
    ("safetensors.torch", "save_file"),
]


def kill_at(step: int) -> Callable[[], int]:
    """From now on count what this process does to the disk, and let it die at the `step`-th, before
    it is done.

    Returns:
        What gives the count.
    """
    done, lock = 0, threading.Lock()

    def count() -> None:
        nonlocal done
        with lock:
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS or event == "open" and _writes(*arguments[1:]):
            count()

    for module, name in WRAPPED:
        owner: Any = sys.modules.get(module)
        *inside, name = name.split(".")
        for part in inside:
            owner = getattr(owner, part)
        if owner:
            setattr(owner, name, _counted(getattr(owner, name), count))
    sys.addaudithook(audit)
    return lambda: done


def _writes(mode: str | None, flags: int) -> bool:
    return (
        any(letter in mode for letter in "wax+")
        if mode
        else bool(flags & (os.O_WRONLY | os.O_RDWR))
    )


def _counted(function: Callable, count: Callable[[], None]) -> Callable:
    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count()
        result = function(*args, **kwargs)
        count()
        return result

    return counted


def forked(action: Callable[[], None], *, step: int = 0, seconds: float | None = None) -> bool:
    """Run an action in a fork of this process; True if it ran to its end, False if it was killed.

    Args:
        step: die at this thing done to the disk.
        seconds: die after so much time.
    """
    child = os.fork()
    if not child:
        try:
            if step:
                kill_at(step)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the process failed (status {status}), see above"
    return status == 0


def count_steps(action: Callable[[], None]) -> int:
    """How many things an undisturbed action does to the disk."""
    reads, writes = os.pipe()

    def counted() -> None:
        count = kill_at(0)
        action()
        os.write(writes, str(count()).encode())

    assert forked(counted)
    os.close(writes)
    with os.fdopen(reads) as file:
        return int(file.read())


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files, hidden ones too, and every folder."""
    return {
        str(path.relative_to(folder)): sha256_file(path) if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def survives(
    work: Path,
    begin: Callable[[], None],
    action: Callable[[], None],
    look: Callable[[], None],
    *,
    every: bool,
    moments: int,
    sample: int = 0,
) -> dict[str, Any]:
    """Kill an action in all these ways; after each, what is there must pass `look`, and the action
    again must end with the very files that an undisturbed one leaves.

    Args:
        work: the folder that it all happens in; made anew each time.
        begin: makes what is there before the action.
        action: what is killed.
        look: raises if what a killed action left could be used though it is not whole.
        every: at each thing done to the disk; else at the last eight and at `sample` others.
        moments: how many kills after a random time, with up to two more of the run that goes on.
    """
    rng, kills = random.Random(0), 0

    def anew() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        begin()

    def end(where: str) -> None:
        look()
        assert forked(action), where
        assert contents(work) == expected, where

    for _ in range(2):  # the first is slower, and may write what Python keeps of a module
        anew()
        start = time.monotonic()
        steps = count_steps(action)
        seconds, expected = time.monotonic() - start, contents(work)
    chosen = range(1, steps + 1)
    if not every:
        chosen = sorted({*rng.sample(chosen, min(sample, steps)), *chosen[-8:]})
    for step in chosen:
        anew()
        assert not forked(action, step=step), f"only {step - 1} steps this time"
        kills += 1
        end(f"killed at step {step} of {steps}")
    for number in range(moments):
        anew()
        for _ in range(rng.randint(1, 3)):
            kills += not forked(action, seconds=rng.uniform(0, seconds))
        end(f"killed at random, number {number}")
    return {"steps": steps, "kills": kills}
