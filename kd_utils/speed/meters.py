"""Clocks, peak memory, and the rate of a large matrix product."""

import ctypes
import gc
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch


class Laps:
    """Seconds between calls of `lap`, summed by part.

    Args:
        device: a GPU is waited for at the end of each lap.

    Attributes:
        seconds: part -> seconds.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.seconds: Counter[str] = Counter()
        self._device = torch.device(device)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """End a lap, add its seconds to `part`, and start the next one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def alternate(
    sides: dict[str, Callable[[], Any]],
    repeats: int,
    *,
    device: torch.device | str = "cpu",
    warm_up: bool = True,
) -> pd.DataFrame:
    """Time several sides in turn, so that other load on the machine slows all of them alike.

    Args:
        sides: the work of each side, by name.
        repeats: measurements of each side.
        device: where the work runs; a GPU is waited for.
        warm_up: first run every side once without measuring it.

    Returns:
        Seconds, a row per repeat and a column per side.
    """
    rounds, first = [], int(warm_up)
    for number in range(first + repeats):
        if number == first:
            gc.collect()
        laps = Laps(device)
        for name, work in sides.items():
            work()
            laps.lap(name)
        rounds.append(laps.seconds)
    return pd.DataFrame(rounds[first:])


def matrix_rate(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, size: int = 2048
) -> float:
    """Multiply-adds per second of a large square matrix product, the best of five."""
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    seconds = alternate({"product": lambda: left @ right}, 5, device=device)["product"].min()
    return size**3 / seconds


def peak_mb(work: Callable[[], Any], *, device: torch.device | str = "cpu") -> float:
    """Run `work` and return the most memory in MB that it held beyond what was held before.

    On a GPU this counts torch's allocations, otherwise the resident set of the process (Linux).
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not returned would hide new memory
    Path("/proc/self/clear_refs").write_text("5")  # restarts the kernel's record of the peak
    before = _resident_kb("VmRSS")
    work()
    return (_resident_kb("VmHWM") - before) / 2**10


def _resident_kb(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
