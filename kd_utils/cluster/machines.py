"""The machines of a Ray cluster: what they have, and whether they see the same files."""

import math
from collections import Counter
from typing import Any

from kd_utils.cluster.session import in_words
from kd_utils.config import project_paths
from kd_utils.store.files import sha256_file

NODES_SECONDS = 120  # for every machine to answer: it has to unpack and import the code first


def require_same_view(files: dict[str, str], cpus: float = 0, gpus: float = 0) -> None:
    """Ask every machine that can run a trial whether it sees the sweep's files as they are here.

    Args:
        files: path under the project's root -> SHA-256.
        cpus, gpus: of a trial. A machine that has less, as the head of many clusters, needs no
            shared folder.

    Raises:
        ValueError: names each machine that does not, and the path.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(problem_with_files)
    asked = {
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(files): node
        for node in _able(ray.nodes(), cpus, gpus)
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NODES_SECONDS)
    present, problems = [node["NodeID"] for node in _able(ray.nodes(), cpus, gpus)], []
    for answer, node in asked.items():
        try:
            problem = ray.get(answer) if answer in answered else "does not answer"
        except ray.exceptions.RayError as error:
            problem = f"cannot run this code ({in_words(error)})"
        if problem and node["NodeID"] in present:  # a machine lost meanwhile is no obstacle
            problems.append(f"node {node['NodeManagerAddress']}: {problem}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"{'; '.join(problems[:4])}{more}. All nodes must see one folder: run from a checkout "
            "on it, or set KD_ROOT to it (on a node that sees it elsewhere, before `ray start` "
            "there)"
        )


def problem_with_files(files: dict[str, str]) -> str:
    """The first file that this machine does not see as the sweep does, in one line; "" if none.

    Args:
        files: path under the project's root -> SHA-256 of the file as the sweep saw it.
    """
    for path, checksum in files.items():
        place = project_paths.project_path(path)
        try:
            if sha256_file(place) != checksum:
                return f"{place} differs from the file that the sweep sees"
        except OSError as error:
            return f"{place}: {error.strerror}"
    return ""


def fitting_gpus(
    nodes: list[dict[str, Any]], cpus: float, gpus: float | None, device: str = "auto"
) -> float:
    """Decide how many GPUs a trial gets: by default one where any machine has one.

    Args:
        nodes: `ray.nodes()`.
        cpus, gpus: asked for; `gpus` None: decided here.
        device: the trials' parameter: "cuda" needs a GPU, "cpu" none.

    Raises:
        ValueError: no machine could ever run a trial.
    """
    if gpus is None:
        gpus = 1 if device != "cpu" and _able(nodes, 0, 1) else 0
    kinds = Counter(
        f"{node['Resources'].get('CPU', 0):g} CPUs and {node['Resources'].get('GPU', 0):g} GPUs"
        for node in _able(nodes, 0, 0)
    )
    machines = "; ".join(
        f"{number} x {kind}" if number > 1 else kind for kind, number in kinds.items()
    )
    if any(not 0 <= n < math.inf or 0 < n < 1e-4 for n in (cpus, gpus)) or gpus > 1 and gpus % 1:
        raise ValueError(
            f"a trial cannot ask for {cpus:g} CPUs and {gpus:g} GPUs: give 0 or at least 0.0001, "
            "and more than one GPU only as a whole number"
        )
    if device.startswith("cuda") and gpus <= int(device.partition(":")[2] or 0):
        raise ValueError(
            f"device = {device!r}, but a trial gets {gpus:g} GPUs (the machines have: {machines}): "
            "set device to 'auto' or 'cpu', or ask for more with --gpus-per-trial where there are "
            "more"
        )
    if not _able(nodes, cpus, gpus):
        raise ValueError(
            f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, but the machines have: {machines}; "
            "ask for less with --cpus-per-trial or --gpus-per-trial"
        )
    return gpus


def _able(nodes: list[dict[str, Any]], cpus: float, gpus: float) -> list[dict[str, Any]]:
    """The machines that are alive and have that much, in use or not."""
    return [
        node
        for node in nodes
        if node["Alive"]
        and node["Resources"].get("CPU", 0) >= cpus
        and node["Resources"].get("GPU", 0) >= gpus
    ]
