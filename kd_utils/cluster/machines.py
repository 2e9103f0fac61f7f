"""The machines that run trials: what they have, and whether one sees the files of the sweep."""

import math
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from kd_utils.config import project_paths
from kd_utils.store.files import sha256_file


def problem_with_files(files: dict[str, str]) -> str:
    """The first of these files (path -> SHA-256) that is missing or different on this machine, in
    one line; "" if none.
    """
    for path, checksum in files.items():
        place = project_paths.project_path(path)
        try:
            if sha256_file(place) != checksum:
                return f"{place} differs from the file that the sweep sees"
        except OSError as error:
            return f"{place}: {error.strerror}"
    return ""


def cores(limits: Path = Path("/sys/fs/cgroup")) -> int:
    """CPU cores that this process may use: a container often has fewer than its machine.

    Args:
        limits: where the system tells them, in the form of cgroups 2 or 1.
    """
    number = len(os.sched_getaffinity(0))
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = map(int, " ".join((limits / f).read_text() for f in files).split())
            number = min(number, max(1, quota // period)) if quota > 0 else number
    return number


def fitting_gpus(
    nodes: list[dict[str, Any]], cpus: float, gpus: float | None, device: str = "auto"
) -> float:
    """Decide how many GPUs a trial gets: by default one where any machine has one.

    Args:
        nodes: `ray.nodes()`, or machines in its form.
        cpus, gpus: asked for; `gpus` None: decided here.
        device: the trials' parameter: "cuda" needs a GPU, "cpu" none.

    Raises:
        ValueError: no machine could ever run a trial.
    """
    if gpus is None:
        gpus = 1 if device != "cpu" and able(nodes, 0, 1) else 0
    alive = [node["Resources"] for node in able(nodes, 0, 0)]
    kinds = Counter(f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs" for has in alive)
    machines = "; ".join(f"{n} x {kind}" if n > 1 else kind for kind, n in kinds.items())
    if any(not 0 <= n < math.inf or 0 < n < 1e-4 for n in (cpus, gpus)) or gpus > 1 and gpus % 1:
        raise ValueError(
            f"a trial cannot ask for {cpus:g} CPUs and {gpus:g} GPUs: give 0 or at least 0.0001, "
            "and more than one GPU only as a whole number"
        )
    if device.startswith("cuda") and gpus <= int(device.partition(":")[2] or 0):
        raise ValueError(
            f"device = {device!r}, but a trial gets {gpus:g} GPUs (the machines have: {machines}): "
            "set device to 'auto' or 'cpu', or raise --gpus-per-trial if a machine has more GPUs"
        )
    if not able(nodes, cpus, gpus):
        raise ValueError(
            f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, but the machines have: {machines}; "
            "ask for less with --cpus-per-trial or --gpus-per-trial"
        )
    return gpus


def able(nodes: list[dict[str, Any]], cpus: float, gpus: float) -> list[dict[str, Any]]:
    """The machines that are alive and have that much, in use or not."""
    return [
        node
        for node in nodes
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= cpus
        and node["Resources"].get("GPU", 0) >= gpus
    ]
