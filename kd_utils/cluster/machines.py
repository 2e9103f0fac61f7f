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


#: What `--cpus` sets for this process and all that it starts: kernels, trials, Ray.
CPUS = "KD_CPUS"

#: How a batch system says how many cores of this machine a job has: Slurm, PBS and Torque, Grid
#: Engine, LSF. Not each of them also keeps a job from the other cores.
GIVEN = (
    *("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"),
    *("NCPUS", "PBS_NUM_PPN", "NSLOTS", "LSB_DJOB_NUMPROC"),
)


#: Where the system tells quotas of control groups, in the form of cgroups 2 or 1, and the groups
#: of this process.
LIMITS, GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores(limits: Path = LIMITS, groups: Path = GROUPS) -> int:
    """CPU cores that this process may use: what `--cpus` says, or what a batch system gave to the
    job; never more than the system lets it use (see `available_cores`).
    """
    of_job = _numbers(CPUS) or _numbers(*GIVEN)
    return min([available_cores(limits, groups), *of_job])


def available_cores(limits: Path = LIMITS, groups: Path = GROUPS) -> int:
    """CPU cores that the system lets this process use: fewer than the machine has under `taskset`,
    in a cpuset, or where a control group has a quota of CPU time, as in a container.
    """
    number = len(os.sched_getaffinity(0))
    for folder in _group_folders(limits, groups):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            with suppress(OSError, ValueError):  # no such file, or "max"
                quota, period = map(int, " ".join((folder / f).read_text() for f in files).split())
                number = min(number, max(1, quota // period)) if quota > 0 else number
    return number


def _group_folders(limits: Path, groups: Path) -> list[Path]:
    """The folders of this process's control groups that may limit its CPU time, and of the groups
    around them. In a container the path in `groups` may be the host's; then the root stands for it.
    """
    found = {limits: [limits], limits / "cpu": [limits / "cpu"]}
    with suppress(OSError, ValueError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                root = limits / controllers
                inner = root / path.lstrip("/")
                around = [inner, *inner.parents]
                found[root] = around[: around.index(root) + 1] if ".." not in path else [root]
    return [folder for folders in found.values() for folder in folders]


def _numbers(*names: str) -> list[int]:
    """The whole numbers above 0 that these environment variables hold."""
    texts = [os.environ.get(name, "") for name in names]
    return [int(text) for text in texts if text.isdecimal() and int(text)]


def limit_cores(cpus: int | None) -> None:
    """Let this process, and all that it starts, use `cpus` cores; None: as many as it may.

    torch uses as many threads as it may use cores by `taskset`, but knows of no other limit: where
    there is one, OMP_NUM_THREADS says so, unless it is set.

    Raises:
        ValueError: the system does not let this process use so many.
    """
    if cpus is not None:
        if cpus > (available := available_cores()):
            raise ValueError(f"--cpus {cpus}, but this process may use {available}: ask for less")
        os.environ[CPUS] = str(cpus)
    if (number := cores()) < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(number))


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
