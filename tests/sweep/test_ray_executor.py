"""Ray behind the executor's interface: which of its errors are losses and which are failures, and
which GPUs Ray is told of.
"""

import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest

from kd_utils.records.run_folder import failure_cause
from kd_utils.sweep import display
from kd_utils.sweep.display import Progress
from kd_utils.sweep.executor import Job, Report, run_trials
from kd_utils.sweep.planning import Trial
from kd_utils.sweep.ray_executor import RayExecutor


class Stream:
    """What Ray hands out for a trial: its reports, one after the other; an exception is raised."""

    def __init__(self, reports):
        self.reports = iter(reports)

    def __next__(self):
        return next(self.reports)


@pytest.fixture
def run(stub_notebooks, monkeypatch):
    """`run(trial=[reports of its first start, of its second, ...])`: Progress after `run_trials`
    on a Ray that is none.
    """
    import ray

    def get(report):
        if isinstance(report, Exception):
            raise report
        return report

    def run(**starts):
        class Remote:
            def options(self, name):
                self.name = name
                return self

            def remote(self, job, threads):
                name = self.name
                events = starts[name].pop(0)
                return Stream([Report(name, e) if isinstance(e, str) else e for e in events])

        monkeypatch.setattr(ray, "remote", lambda **_: lambda function: Remote())
        monkeypatch.setattr(ray, "wait", lambda streams, **_: (streams, []))
        monkeypatch.setattr(ray, "get", get)
        monkeypatch.setattr(ray, "cancel", lambda stream, force: None)
        progress = Progress(dict.fromkeys(starts, 1))
        progress.said = []
        monkeypatch.setattr(display, "say", progress.said.append)
        jobs = [Job(Trial(name, {}, "", 1, {}, []), "runs/stub", {}, {}) for name in starts]
        run_trials(RayExecutor(cpus=1, gpus=0), jobs, progress)
        assert not any(starts.values()), "a trial was not started again"
        return progress

    return run


BEGIN = "started"


def kept(folder, trial):
    path = folder / "runs" / "stub" / "trials" / f"{trial}.failed.ipynb"
    return failure_cause(path)


def test_whatever_takes_a_process_or_machine_is_a_loss(run):
    from ray.exceptions import NodeDiedError, ObjectLostError, WorkerCrashedError

    progress = run(
        a=[
            [BEGIN, WorkerCrashedError()],
            [NodeDiedError("gone")],
            [BEGIN, ObjectLostError("", "", "")],
            [BEGIN, "measured", "ended"],
        ],
        b=[[BEGIN, "measured", "ended"]],
    )
    assert sorted(progress.done) == ["a", "b"] and progress.failed == [] and not progress.running


def test_a_process_that_ray_kills_for_memory_says_what_to_do(run, stub_notebooks):
    from ray.exceptions import OutOfMemoryError

    run(a=[[OutOfMemoryError("Task was killed\n" * 50)]] * 4)
    assert kept(stub_notebooks, "a").startswith(
        "the trial's process or machine was lost 4 times: out of memory: Ray killed the process to "
        "save its machine; ask for more --cpus-per-trial"
    )


def test_an_error_in_the_trials_own_process_is_no_loss(run, stub_notebooks):
    from ray.exceptions import RayTaskError

    error = OSError(28, "disk\nis full")
    run(a=[[BEGIN, RayTaskError("run", "Traceback (most recent call last):", error)]])
    assert kept(stub_notebooks, "a") == "OSError: [Errno 28] disk is full"


def test_when_ray_itself_ends_the_sweep_stops_and_says_so(run):
    from ray.exceptions import LocalRayletDiedError

    with pytest.raises(
        OSError,
        match="Ray's process on this machine was killed or ran out of memory; finished trials are kept: run",
    ):
        run(a=[[BEGIN, LocalRayletDiedError()]], b=[[BEGIN, "ended"]])


@pytest.fixture
def started(monkeypatch):
    """`started(address, gpus, device, nodes=, names=, problems=)`: what `ray_executor` tells Ray,
    its executor and what it says, on a cluster of these nodes and a machine with these GPUs.
    """
    import ray

    from kd_utils.cluster import cuda, session
    from kd_utils.sweep import ray_executor

    def started(address, gpus, device, nodes=(), names=(), problems=""):
        told, said = [], []

        @contextmanager
        def running(*arguments):
            told.append(arguments)
            yield

        here = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": float(n)}} for n in nodes]
        monkeypatch.setattr(session, "ray_running", running)
        monkeypatch.setattr(ray, "nodes", lambda: here)
        monkeypatch.setattr(ray, "remote", lambda **_: lambda function: None)
        monkeypatch.setattr(cuda, "usable_gpus", lambda *_: list(names))
        monkeypatch.setattr(ray_executor, "say", said.append)
        monkeypatch.setattr(RayExecutor, "_ask", lambda *_: problems)
        monkeypatch.setenv("RAY_ADDRESS", "")
        with ray_executor.ray_executor(address, 1, gpus, device) as executor:
            return told, executor.gpus, said[1:]

    return started


@pytest.mark.parametrize("address", [None, "local"])
def test_on_one_machine_ray_is_told_of_the_gpus_that_torch_can_use(started, address):
    for names in ([], ["MIG-aa", "MIG-bb"]):
        found = started(address, None, "auto", nodes=[len(names)], names=names, problems="no GPU")
        assert found == ([(address, len(names))], int(bool(names)), [])


def test_on_a_cluster_whose_machines_cannot_use_what_ray_counts_nothing_is_trained(started):
    problem = "node 10.0.0.1: torch 2.11.0+cpu can use 0 of the 1 GPUs that the driver has"
    with pytest.raises(ValueError, match=re.escape(problem)):
        started("head:6379", None, "auto", nodes=[1, 0], problems=problem)
    assert started("head:6379", None, "auto", nodes=[1, 0])[1:] == (1, [])
    assert started("head:6379", 1, "cpu", nodes=[1], problems=problem)[1:] == (1, [])
    assert started("head:6379", 0, "auto", nodes=[1], problems=problem)[1:] == (0, [])


def test_a_cluster_for_which_ray_counts_no_gpu_beside_one_that_torch_sees_is_told(started):
    _, gpus, said = started("head:6379", None, "auto", nodes=[0], names=["0"])
    assert gpus == 0 and len(said) == 1
    assert said[0].startswith("Trials run on the CPU: torch can use a GPU of this machine, but Ray")
    assert started("head:6379", 0, "auto", nodes=[0], names=["0"])[2] == []
    assert started("head:6379", None, "cpu", nodes=[0], names=["0"])[2] == []


def test_a_task_with_a_gpu_tells_that_torch_cannot_use_it(tmp_path):
    """A machine whose GPU is in use does not answer, and is no obstacle."""
    (tmp_path / "torch.py").write_text(
        "class version: cuda = None\nclass cuda: is_available = lambda: False\n"
        "__version__ = '2.11.0+cpu'\n"
    )
    code = """
import os, ray
from kd_utils.cluster.session import ray_running
from kd_utils.sweep import ray_executor
with ray_running(None, 1):
    executor = ray_executor.RayExecutor(1, 1)
    try:
        executor.require_gpus()
    except ValueError as error:
        print(error)
    ray_executor.NODES_SECONDS = 1
    busy = ray.remote(num_gpus=1)(lambda: __import__("time").sleep(60)).remote()
    executor.require_gpus()
    print("not asked")
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "GPU-aa"},
    )
    told, busy = ran.stdout.splitlines()
    assert busy == "not asked" and told.startswith("node "), ran.stderr
    assert told.partition(": ")[2].startswith(
        "torch 2.11.0+cpu can use 0 of the 1 GPUs that CUDA_VISIBLE_DEVICES=GPU-aa names; this "
        "torch is built without CUDA: install a CUDA build; to train on the CPU: --gpus-per-trial 0"
    )
