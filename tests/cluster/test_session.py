"""Sessions of Ray: what is refused, what starts with it, and how it ends."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_utils.cluster import session
from kd_utils.config.project_paths import CODE_ROOT


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
        is_dashboard = any(word.endswith("dashboard.py") for word in words)
        if is_dashboard and f"--session-dir={session}" in words:
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
def children():
    return len(psutil.Process().children(recursive=True))
signal.signal(signal.SIGTERM, lambda *_: print("caught;", children(), "left"))
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
        "if HOME is not writable, set RAY_AUTH_TOKEN_PATH to a file with a token"
    )
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    assert told(RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")) == "runs"


def test_a_cluster_that_does_not_answer_is_told_at_once():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # a port of ours at which nothing listens
        began = time.monotonic()
        with pytest.raises(
            ValueError,
            match=r"cannot join a Ray cluster at 127.0.0.1:\d+ \(ConnectionError: "
            "nothing answers there.*see `ray status` there",
        ):
            with session.ray_running(f"127.0.0.1:{nobody.getsockname()[1]}"):
                pass
    assert time.monotonic() - began < 30


def test_ray_shares_out_the_gpus_that_it_is_told_of_by_their_own_names(tmp_path, monkeypatch):
    """Two tasks side by side on each MIG device that torch can use, and one task without a GPU; it
    is not asked whether there is a driver that Ray could ask.
    """
    code = f"""
import os, pathlib, time, ray
from kd_utils.cluster.session import ray_running
def look(folder=pathlib.Path({str(tmp_path)!r})):
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 5:
        time.sleep(0.1)
    return os.environ["CUDA_VISIBLE_DEVICES"]
with ray_running(None, 2):
    half, none = ray.remote(num_cpus=0, num_gpus=0.5)(look), ray.remote(num_cpus=0)(look)
    *halves, without = ray.get([half.remote() for _ in range(4)] + [none.remote()])
    print(*sorted(halves), repr(without))
"""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-aa,MIG-bb,MIG-xx")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert ran.stdout == "MIG-aa MIG-aa MIG-bb MIG-bb ''\n", ran.stderr


def test_under_uv_run_workers_are_this_python(tmp_path):
    """Ray has a hook that starts every worker with the command that started the driver."""
    uv = Path(sys.prefix, "bin", "uv")
    if not uv.exists():
        pytest.skip("uv is not installed")
    code = """
import os, sys, ray
from kd_utils.cluster.session import ray_running
with ray_running(None):
    look = ray.remote(num_cpus=1)(lambda: (sys.executable, os.getcwd()))
    print(ray.cluster_resources()["CPU"], *ray.get(look.remote()))
"""
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\nversion = '0'\n")
    command = [uv, "run", "--no-sync", "--offline", "--active", "python", "-c", code]
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CODE_ROOT), "KD_CPUS": "1", "VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=600,
    )
    cpus, python, folder = ran.stdout.split()
    assert (cpus, folder, Path(python).parent) == ("1.0", str(tmp_path), uv.parent), ran.stderr
