"""Kernels, Ray's workers and the driver killed at random moments, and Ctrl-C: what is left, and
what comes of it.
"""

import random
import shutil
import signal
import time

import pytest
from sweeps import Command, record, results

from kd_utils.records.check import check_run
from kd_utils.records.run_folder import trials_with_status


def sweep(home, **environment):
    return Command(home, "sweep", home / "small.yaml", "--grid", home / "grid2.yaml", **environment)


def whole_trials(run_dir) -> dict[str, int]:
    """Finished trials, and when their records were written: one that is run again has another
    time.
    """
    if not (run_dir / "sweep.json").exists():
        return {}
    return {
        trial["trial"]: (run_dir / "trials" / trial["trial"] / "metrics.json").stat().st_mtime_ns
        for trial, state in trials_with_status(run_dir)
        if state.state == "done"
    }


def kill_soon(command, kind: str, rng: random.Random) -> bool:
    """Kill one of a kind at a random moment of its life; False if the command came to its end
    before.
    """
    until = time.monotonic() + 600
    while command.process.poll() is None:
        if kind == "driver" or command.alive(kind):
            time.sleep(rng.uniform(0, 6 if kind == "driver" else 3))
            if command.process.poll() is None and command.kill(kind):
                return True
        time.sleep(0.1)
        assert time.monotonic() < until, f"no {kind} to kill in 600 seconds"
    return False


def test_killed_again_and_again_the_same_command_comes_to_the_same_results(
    undisturbed, prepared, times, tried
):
    run_dir, rng = prepared / "runs" / "toy-2", random.Random(0)
    wanted, kills, finished = times(8, 50), {"kernel": 0, "slot": 0, "worker": 0, "driver": 0}, {}
    command = sweep(prepared)
    while sum(kills.values()) < wanted:
        kind = min(kills, key=lambda kind: (kills[kind] * (3 if kind == "driver" else 1), kind))
        if kill_soon(command, kind, rng):
            kills[kind] += 1
        if kind == "driver" or command.process.poll() is not None:
            command.process.wait(600)
            assert (
                command.orphans(within=100) == []
            )  # Ray's agents wait a minute for an answer of the dead
            now = whole_trials(run_dir)
            assert finished.items() <= now.items(), "a finished trial was lost, or run again"
            if len(now) == len(results(undisturbed / "runs" / "toy-2")):
                lost = rng.choice(sorted(now))  # so that there is something left to kill
                shutil.rmtree(run_dir / "trials" / lost)
                del now[lost]
            finished, command = now, sweep(prepared)
    status, output = command.wait()
    if (
        status == 1
        # a killed kernel leaves its trial failed, as a fourth worker does: the same command does it
        # again
    ):
        assert "the kernel was killed or" in output or "was lost 4 times" in output
        status, output = sweep(prepared).wait()
    assert status == 0, output[-2000:]
    assert finished.items() <= whole_trials(run_dir).items()
    assert results(run_dir).equals(results(undisturbed / "runs" / "toy-2"))
    for trial in results(run_dir)["trial"]:
        assert record(run_dir, trial) == record(undisturbed / "runs" / "toy-2", trial)
    assert check_run(run_dir) == []
    for kind, count in kills.items():
        tried(f"kill -9 of a {kind}", count)


def test_killed_between_the_caches_manifest_and_its_verification_the_same_command_goes_on(
    undisturbed, prepared, tried
):
    """The record of an earlier 02 names the same content, and the cache is not verified."""
    caches, run_dir = prepared / "artifacts" / "cache", prepared / "runs" / "toy-2"
    shutil.rmtree(caches)
    command = sweep(prepared)
    kernels, looked = [], 0.0
    while not list(caches.glob("*/manifest.json")):
        assert command.process.poll() is None
        if caches.exists() and time.monotonic() - looked > 1:
            kernels, looked = command.alive("kernel"), time.monotonic()
        time.sleep(0.001)
    for kernel in kernels:
        kernel.kill()
    status, output = command.wait()
    assert status == 1 and "02_cache_teacher failed: the kernel was killed" in output
    assert not list(caches.glob("*/verified.json")), "too late: this shows nothing"
    tried("kill -9 of a kernel")
    status, output = sweep(prepared).wait()
    assert status == 0, output[-2000:]
    assert "02_cache_teacher: running (" in output and "has not been verified" in output
    assert results(run_dir).equals(results(undisturbed / "runs" / "toy-2"))
    assert check_run(run_dir) == []


@pytest.mark.parametrize("how", ["Ctrl-C", "to the driver", "SIGTERM"])
def test_ctrl_c_once_stops_within_ten_seconds_and_leaves_no_process(
    undisturbed, prepared, times, tried, how
):
    """At a random moment: while Ray starts, at 01 or 02, while trials run; and the same command
    goes on.
    """
    rng, run_dir = random.Random(how), prepared / "runs" / "toy-2"
    shutil.rmtree(prepared / "artifacts" / "cache")  # 02 is to be done again too
    longest = 0.5 * float(
        (undisturbed / "seconds").read_text()
    )  # 01 and, mostly, 02 are done already
    for moment in [rng.uniform(0.3, longest) for _ in range(times(1, 12))]:
        command = sweep(prepared)
        while time.monotonic() - command.began < moment and command.process.poll() is None:
            time.sleep(0.05)
        if command.process.poll() is not None:
            shutil.rmtree(run_dir / "trials")
            continue
        before = whole_trials(run_dir)
        pressed = time.monotonic()
        command.interrupt(how)
        status, output = command.wait(timeout=60)
        assert command.orphans(within=10 - (time.monotonic() - pressed)) == [], f"at {moment:.1f} s"
        if status == 0 and len(before) == len(
            results(undisturbed / "runs" / "toy-2")
        ):  # it was on its way out
            shutil.rmtree(run_dir / "trials")
            continue
        # While Ray starts, a handler of its C++ side may be in force, which aborts.
        if how != "SIGTERM" or "01_prepare_data" in output or status != -signal.SIGABRT:
            assert status == 130, output
            assert (
                output.splitlines()[-1]
                == "stopped; finished trials are kept: run the same command again to resume"
            )
            assert "Traceback" not in output
        assert before.items() <= whole_trials(run_dir).items()
        tried("SIGTERM" if how == "SIGTERM" else "Ctrl-C")
    status, output = sweep(prepared).wait()
    assert status == 0, output[-2000:]
    assert results(run_dir).equals(results(undisturbed / "runs" / "toy-2"))
