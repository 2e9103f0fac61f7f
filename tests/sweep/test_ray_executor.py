"""Scheduling without a cluster: what is refused before Ray is asked, and what comes of a trial that
ends so or so.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time

import pytest

from kd_utils.cluster import session
from kd_utils.cluster.machines import fitting_gpus
from kd_utils.sweep import ray_executor
from kd_utils.sweep.display import Progress


def machine(cpus, gpus=0, alive=True):
    return {
        "Alive": alive,
        "Resources": {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})},
    }


@pytest.mark.parametrize(
    ("asked", "device", "given"),
    [
        (None, "auto", 1),
        (None, "cuda", 1),
        (None, "cpu", 0),
        (0, "auto", 0),
        (0.25, "auto", 0.25),
        (2, "cuda:1", 2),
        (0.5, "cuda", 0.5),
    ],
)
def test_a_trial_gets_one_gpu_where_there_is_one_unless_told(asked, device, given):
    assert fitting_gpus([machine(8), machine(2, gpus=2)], 1, asked, device) == given


@pytest.mark.parametrize(
    ("cpus", "gpus", "device", "message"),
    [
        (
            1,
            1,
            "auto",
            "asks for 1 CPUs and 1 GPUs, but the machines have: 2 CPUs and 0 GPUs; 2 x 4 CPUs and "
            "0 GPUs; ask",
        ),
        (99, None, "auto", "asks for 99 CPUs and 0 GPUs"),
        (
            1,
            None,
            "cuda",
            "device = 'cuda', but a trial gets 0 GPUs .*: set device to 'auto' or 'cpu'",
        ),
        (1, None, "cuda:1", "device = 'cuda:1'"),
        (-1, None, "auto", "cannot ask for -1 CPUs"),
        (1, -1, "auto", "cannot ask for 1 CPUs and -1 GPUs"),
        (math.nan, None, "auto", "cannot ask for nan CPUs"),
        (1, math.inf, "auto", "cannot ask for 1 CPUs and inf GPUs"),
        (
            1,
            1.5,
            "auto",
            "cannot ask for 1 CPUs and 1.5 GPUs: .* of more than one GPU a whole number",
        ),
        (0.00001, None, "auto", "cannot ask for 1e-05 CPUs"),
    ],
)
def test_what_no_machine_has_is_refused(cpus, gpus, device, message):
    machines = [machine(2), machine(64, gpus=8, alive=False), machine(4), machine(4)]
    with pytest.raises(ValueError, match=message):
        fitting_gpus(machines, cpus, gpus, device)


def test_cpus_of_one_machine_and_gpus_of_another_make_no_place_for_a_trial():
    with pytest.raises(
        ValueError,
        match="4 CPUs and 1 GPUs, but the machines have: 4 CPUs and 0 GPUs; 2 CPUs and 1",
    ):
        fitting_gpus([machine(4), machine(2, gpus=1)], 4, 1)


def test_a_second_gpu_by_number_needs_two_for_the_trial():
    with pytest.raises(ValueError, match="device = 'cuda:1', but a trial gets 1 GPUs"):
        fitting_gpus([machine(4, gpus=8)], 1, None, "cuda:1")


@pytest.mark.parametrize(
    "address", ["nonsense", "ray://127.0.0.1:10001", "127.0.0.1", "http://here:8265", ":1", ""]
)
def test_an_address_that_is_none_is_refused_with_what_to_give(address):
    with (
        pytest.raises(ValueError, match=f"--address {address}: give HOST:PORT"),
        session.ray_running(address),
    ):
        pass


def test_the_dashboard_that_ray_starts_listens_to_this_machine_alone():
    """A process of that name is there for Ray's own ends even where no dashboard is asked for."""
    code = """
import psutil, ray
from kd_utils.cluster.session import ray_running
with ray_running(None):
    session = ray._private.worker._global_node.get_session_dir_path()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.endswith("dashboard.py") for word in words) and f"--session-dir={session}" in words:
            print(*(word for word in words if word.startswith("--host")))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert ran.stdout.splitlines() == ["--host=127.0.0.1"], ran.stderr


def test_a_sigterm_while_ray_shuts_down_waits_for_its_end():
    """Ray's C++ side, as it ends, sets the signal back to killing at once; its processes would be
    left.
    """
    code = """
import os, signal, time, psutil, ray
from kd_utils.cluster.session import ray_running
signal.signal(signal.SIGTERM, lambda *_: print("caught;", len(psutil.Process().children(recursive=True)), "left"))
shut_down = ray.shutdown
def shut_down_and_be_told_to_end():
    shut_down()
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    print("shut down")
with ray_running(None):
    ray.shutdown = shut_down_and_be_told_to_end
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (ran.returncode, ran.stdout.splitlines()) == (0, ["shut down", "caught; 0 left"]), (
        ran.stderr
    )


def test_a_home_that_cannot_be_written_is_told_with_the_way_around(tmp_path):
    code = """
from kd_utils.cluster.session import ray_running
try:
    with ray_running(None):
        print("runs")
except ValueError as error:
    print(error)
"""

    def told(**more):
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "HOME": "/proc/nohome", **more},
        ).stdout.strip()

    assert told().endswith(
        "where HOME cannot be written, name a file that holds one in RAY_AUTH_TOKEN_PATH"
    )
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    assert told(RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")) == "runs"


def test_a_cluster_that_does_not_answer_is_told_at_once():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # a port of ours at which nothing listens
        began = time.monotonic()
        with pytest.raises(
            ValueError,
            match=r"no Ray cluster can be joined at 127.0.0.1:\d+ \(ConnectionError: "
            "nothing answers there.*see `ray status` there",
        ):
            with session.ray_running(f"127.0.0.1:{nobody.getsockname()[1]}"):
                pass
    assert time.monotonic() - began < 30


class Stream:
    """What Ray hands out for a trial: its rows, one after the other; an exception among them is
    raised.
    """

    def __init__(self, rows):
        self.rows = iter(rows)

    def __next__(self):
        return next(self.rows)


@pytest.fixture
def run(stub_notebooks, monkeypatch):  # noqa: F811
    """`run(trial=[rows of its first start, of its second, ...])`: Progress after `run_trials` on a
    Ray that is none.
    """
    import ray

    def get(row):
        if isinstance(row, Exception):
            raise row
        return row

    def run(**starts):
        starts = {name: list(rows) for name, rows in starts.items()}

        class Remote:
            def options(self, name):
                self.name = name
                return self

            def remote(self, trial):
                return Stream(starts[self.name].pop(0))

        monkeypatch.setattr(ray, "remote", lambda **_: lambda function: Remote())
        monkeypatch.setattr(ray, "wait", lambda streams, **_: (streams, []))
        monkeypatch.setattr(ray, "get", get)
        progress = Progress({name: 1 for name in starts})
        progress.said = []
        progress.say = progress.said.append
        ray_executor.run_trials(
            dict.fromkeys(starts, {}),
            stub_notebooks / "runs" / "stub",
            progress,
            cpus=1,
            gpus=0,
            seen={},
        )
        assert not any(starts.values()), "a trial was not started again"
        return progress

    return run


BEGIN, EPOCH = {"started": True}, {"epoch": 1, "validation_accuracy": 0.5}


def kept(folder, trial):
    notebook = json.loads(
        (folder / "runs" / "stub" / "trials" / f"{trial}.failed.ipynb").read_text()
    )
    return notebook["metadata"]["kd_utils"]["failure"]


def test_a_lost_trial_starts_again_and_others_are_not_touched(run):
    from ray.exceptions import NodeDiedError, ObjectLostError, WorkerCrashedError

    progress = run(
        a=[
            [BEGIN, WorkerCrashedError()],
            [NodeDiedError("gone")],
            [BEGIN, ObjectLostError("", "", "")],
            [BEGIN, EPOCH],
        ],
        b=[[BEGIN, EPOCH]],
    )
    assert sorted(progress.done) == ["a", "b"] and progress.failed == [] and not progress.running
    assert [line.split("; ")[-1] for line in progress.said if "was lost" in line] == [
        f"starting again ({n} of 3)" for n in (1, 2, 3)
    ]


# noqa: F811
def test_a_trial_that_is_lost_a_fourth_time_has_failed_and_its_cause_is_kept(run, stub_notebooks):
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    progress = run(
        a=[[BEGIN, WorkerCrashedError()]] * 4, b=[[OutOfMemoryError("Task was killed\n" * 50)]] * 4
    )
    assert progress.done == [] and sorted(progress.failed) == ["a", "b"]
    assert (
        kept(stub_notebooks, "a")
        == "the trial's process or machine was lost 4 times: killed, or out of memory"
    )
    assert kept(stub_notebooks, "b").startswith(
        "out of memory: Ray killed the trial's process to save its machine; "
    )


def test_an_error_in_the_trials_own_process_is_no_loss(run, stub_notebooks):  # noqa: F811
    from ray.exceptions import RayTaskError

    progress = run(
        a=[
            [
                BEGIN,
                RayTaskError(
                    "run", "Traceback (most recent call last):", OSError(28, "disk\nis full")
                ),
            ]
        ]
    )
    assert (
        progress.failed == ["a"] and kept(stub_notebooks, "a") == "OSError: [Errno 28] disk is full"
    )


def test_a_failure_that_its_machine_could_not_keep_is_kept_here(run, stub_notebooks):  # noqa: F811
    progress = run(
        a=[[BEGIN, {"failure": "why", "kept": True}]],
        b=[[BEGIN, {"failure": "no cache", "kept": False}]],
    )
    assert sorted(progress.failed) == ["a", "b"] and progress.done == []
    assert kept(stub_notebooks, "b") == "no cache"
    assert not (stub_notebooks / "runs/stub/trials/a.failed.ipynb").exists()


def test_when_ray_itself_ends_the_sweep_stops_and_says_so(run):
    from ray.exceptions import LocalRayletDiedError

    with pytest.raises(
        OSError, match="Ray's process on this machine ended.*run the same command again"
    ):
        run(a=[[BEGIN, LocalRayletDiedError()]], b=[[BEGIN, EPOCH]])
