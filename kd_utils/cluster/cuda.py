"""The GPUs of this machine as CUDA shows them to torch, which decides what trials can use.

Others count otherwise: Ray takes the driver's count, and of CUDA_VISIBLE_DEVICES the number of
entries, "-1" and devices that do not exist included; and torch may be built without CUDA.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

VISIBLE = "CUDA_VISIBLE_DEVICES"

#: Entries that end the list: CUDA shows nothing from there on. "NoDevFiles" is a batch system's.
NONE = ("", "-1", "NoDevFiles")

#: CUDA reads its variable once in a process, so each value is tried in a process of its own.
COUNT = f"""
import os, sys, torch
print(torch.__version__, torch.version.cuda or "", sep="\\n", flush=True)
for value in [None, *sys.argv[1:]]:
    if not os.fork():
        if value is not None:
            os.environ[{VISIBLE!r}] = value
        print(torch.cuda.device_count() if torch.cuda.is_available() else 0, flush=True)
        os._exit(0)
    os.wait()
"""


@dataclass(frozen=True)
class Torch:
    """What torch says of itself and of the GPUs.

    Attributes:
        cuda: the version of CUDA that it is built for, or "".
        count: of the GPUs in a process that has this process's environment.
        counts: with other values of CUDA_VISIBLE_DEVICES.
    """

    version: str
    cuda: str
    count: int
    counts: list[int]


def ask_torch(*values: str) -> Torch:
    """Ask a short child process, so that this one imports no torch and holds no GPU.

    Args:
        values: of CUDA_VISIBLE_DEVICES to try too.
    """
    asked = [sys.executable, "-c", COUNT, *values]
    ran = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    try:
        version, cuda, *counts = ran.stdout.splitlines()
        count, *others = map(int, counts)
    except ValueError:
        why = (ran.stderr.strip().splitlines() or [f"status {ran.returncode}"])[-1]
        raise ValueError(f"torch cannot be imported by {sys.executable}: {why}") from None
    return Torch(version, cuda, count, others)


def usable_gpus(gpus: float | None, device: str, say: Callable[[str], None]) -> list[str]:
    """The GPUs of this machine that trials can use, by the names that CUDA_VISIBLE_DEVICES takes.

    Args:
        gpus: asked for by the user for each trial, or None.
        device: the trials' parameter.
        say: told, in one line, when torch can use fewer GPUs than the machine seems to have.

    Raises:
        ValueError: torch can use none of them, and the user asks for one.
    """
    visible = os.environ.get(VISIBLE)
    if gpus == 0 or (device == "cpu" and not gpus) or entries(visible) == []:
        return []
    torch = ask_torch(*entries(visible) or ())
    names = names_of(visible, torch)
    if (gpus or 0) > 1 and any(name.startswith("MIG-") for name in names):
        raise ValueError(
            f"a trial cannot have {gpus:g} MIG devices, because CUDA shows a process only one: "
            "give --gpus-per-trial 1, or less for several trials on one"
        )
    if problem := disagreement(visible, cards(), len(names), torch):
        if not names and (gpus or device.startswith("cuda")):
            raise ValueError(problem)
        say(problem)
    return names


def entries(visible: str | None) -> list[str] | None:
    """What a value of CUDA_VISIBLE_DEVICES names: numbers, UUIDs or MIG devices; None if unset."""
    if visible is None:
        return None
    return list(takewhile(lambda name: name not in NONE, map(str.strip, visible.split(","))))


def names_of(visible: str | None, torch: Torch) -> list[str]:
    """The devices that torch can use, each by itself.

    Of several MIG devices CUDA shows a process the first, so its count is 1 where each of several
    trials may have one of its own. A list with a device twice shows none, as its count says.

    Args:
        torch: asked for `entries(visible)`, one by one.
    """
    if visible is None:
        return [str(number) for number in range(torch.count)]
    counted = zip(entries(visible) or (), torch.counts)
    return [name for name, _ in takewhile(lambda pair: pair[1], counted)] if torch.count else []


def disagreement(visible: str | None, cards: int, usable: int, torch: Torch) -> str:
    """In one line, that torch can use fewer GPUs than the environment or the driver names.

    Args:
        cards: what the driver counts.
        usable: how many torch can use.
    """
    named = entries(visible)
    promised = cards if named is None else len(named)
    if usable >= promised:
        return ""
    source = "the driver has" if named is None else f"{VISIBLE}={visible} names"
    remedy = (
        "see `nvidia-smi -L`, and `python -c 'import torch; torch.cuda.init()'`"
        if torch.cuda
        else "this torch is built without CUDA: install a CUDA build"
    )
    return (
        f"torch {torch.version} can use {usable} of the {promised} GPUs that {source}; {remedy}; "
        "to train on the CPU: --gpus-per-trial 0"
    )


def cards() -> int:
    """How many GPUs the driver counts; 0 where its `nvidia-smi` is missing, fails or hangs."""
    if not (tool := shutil.which("nvidia-smi")):
        return 0
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def problem_with_gpus(given: float) -> str:
    """Why torch cannot use the GPUs that this process was given, in one line; "" if it can."""
    torch, needed = ask_torch(), max(1, int(given))
    return disagreement(os.environ.get(VISIBLE), needed, torch.count, torch)
