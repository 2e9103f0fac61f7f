"""Ray as the executor of a sweep: a task for each trial, on this machine or a cluster."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kd_utils.cluster import cuda, machines, session
from kd_utils.sweep.display import say
from kd_utils.sweep.executor import Executor, Job, Report
from kd_utils.sweep.slots.slot import run_here

WAIT_SECONDS = 0.5  # between two looks at what the trials report: Ctrl-C is answered within it

NODES_SECONDS = 120  # for every machine to answer: it has to unpack and import the code first


@contextmanager
def ray_executor(
    address: str | None, cpus: float, gpus: float | None, device: str
) -> Iterator[Executor]:
    """Ray for as long as the block runs, and RAY_ADDRESS for 02 to run its teacher there.

    Args:
        address: of a Ray cluster whose nodes see the project's root at the same path (or KD_ROOT);
            None: this machine.
        cpus, gpus: reserved for each trial, fractions too; `gpus` None: one where there is one.
        device: the trials' parameter.

    Raises:
        ValueError: no cluster answers, none of its machines has what a trial asks for, or torch
            cannot use the GPUs that Ray would give to a trial.
    """
    say("Ray is starting")
    local = address in (None, "local")
    here = cuda.usable_gpus(gpus, device, say) if local else []
    with session.ray_running(address, len(here)):
        os.environ["RAY_ADDRESS"] = address or "local"
        executor = RayExecutor(cpus, machines.fitting_gpus(ray.nodes(), cpus, gpus, device))
        if not local and device != "cpu":
            executor.require_gpus()
            if gpus is None and not executor.gpus and cuda.usable_gpus(None, device, say):
                say(
                    "Trials run on the CPU: torch can use a GPU of this machine, but Ray counts "
                    "none in the cluster; see `ray start --num-gpus`"
                )
        yield executor


class RayExecutor:
    """Runs jobs as tasks on the Ray that is running, as many side by side as fit.

    Args:
        cpus, gpus: reserved for each job, fractions too.
    """

    def __init__(self, cpus: float, gpus: float) -> None:
        self.cpus, self.gpus = cpus, gpus
        # The worker itself uses no GPU, so it need not end after each trial to free one.
        about = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": 0, "max_calls": 0}
        self._task = ray.remote(**about)(run_here)
        self._streams: dict[Any, str] = {}

    def require_same_view(self, files: dict[str, str]) -> None:
        """Ask every machine that can run a trial whether it sees the sweep's files as they are
        here. A machine that has less, as the head of many clusters, needs no shared folder.

        Raises:
            ValueError: names each machine that does not, and the path.
        """
        if problems := self._ask(machines.problem_with_files, files, "does not answer"):
            raise ValueError(
                f"{problems}. All nodes must see one shared folder: run from a checkout in that "
                "folder, or set KD_ROOT to it (where a node has another path, before `ray start` "
                "on that node)"
            )

    def require_gpus(self) -> None:
        """Ask every machine that can run a trial whether torch can use the GPUs that Ray gives to
        one: a trial with device "auto" would train on the CPU. One whose GPUs are all in use does
        not answer, and is not asked again.

        Raises:
            ValueError: names each machine where it cannot.
        """
        if self.gpus and (problems := self._ask(cuda.problem_with_gpus, self.gpus, "", self.gpus)):
            raise ValueError(problems)

    def _ask(self, look: Callable[[Any], str], about: Any, unanswered: str, gpus: float = 0) -> str:
        """What `look(about)` says on every machine that can run a trial, in one line; "" if
        nothing.

        Args:
            unanswered: what to say of a machine that does not answer.
            gpus: for `look`.
        """
        task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(look)
        asked = {}
        for node in machines.able(ray.nodes(), self.cpus, self.gpus):
            on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(scheduling_strategy=on_node).remote(about)] = node
        answered, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=NODES_SECONDS)
        present = [node["NodeID"] for node in machines.able(ray.nodes(), self.cpus, self.gpus)]
        problems = []
        for answer, node in asked.items():
            try:
                problem = ray.get(answer) if answer in answered else unanswered
            except ray.exceptions.RayError as error:
                problem = f"cannot run this code ({session.in_words(error)})"
            if problem and node["NodeID"] in present:  # a machine lost meanwhile is no obstacle
                problems.append(f"node {node['NodeManagerAddress']}: {problem}")
        for answer in waiting:
            ray.cancel(answer)
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        return "; ".join(problems[:4]) + more

    def submit(self, job: Job) -> None:
        stream = self._task.options(name=job.name).remote(job, max(1, int(self.cpus)))
        self._streams[stream] = job.name

    def reports(self) -> Iterator[Report]:
        """What the trials report; an error of Ray's is the loss or the failure of its trial."""
        streams = list(self._streams)
        ready, _ = ray.wait(
            streams, num_returns=len(streams), timeout=WAIT_SECONDS, fetch_local=False
        )
        for stream in ready:
            try:
                report = ray.get(next(stream))
            except ray.exceptions.LocalRayletDiedError:
                raise OSError(
                    "Ray's process on this machine was killed or ran out of memory; finished "
                    "trials are kept: run the same command again"
                ) from None
            except ray.exceptions.RayError as error:
                lost, cause = session.was_lost(error), session.in_words(error)
                report = Report(self._streams[stream], "lost" if lost else "failed", cause=cause)
            if report.kind in ("ended", "failed", "lost"):
                del self._streams[stream]
            yield report

    def cancel(self) -> None:
        for stream in self._streams:
            with suppress(Exception):  # Ray itself may have ended
                ray.cancel(stream, force=True)
