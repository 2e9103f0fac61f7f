"""Resources of trials: what a machine has, and what is refused before a trial runs."""

import math
import os
import subprocess
import sys

import pytest

from kd_utils.cluster.machines import CPUS, GIVEN, cores, fitting_gpus, limit_cores


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
            "device = 'cuda', but a trial gets 0 GPUs .*: set device to 'auto' or 'cpu', or "
            "raise --gpus-per-trial if",
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
            "cannot ask for 1 CPUs and 1.5 GPUs: .* more than one GPU only as a whole number",
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
    ("files", "most"),
    [
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_container_has_the_cores_that_it_was_given(tmp_path, monkeypatch, files, most):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(64))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert cores(tmp_path) == min(64, most)


@pytest.fixture
def on_64_cores(monkeypatch):
    """A machine of 64 cores, outside of any batch system."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(64))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that nothing set here outlives the test
    monkeypatch.setenv(CPUS, "")
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("group", "files", "most"),
    [
        ("0::/job/step", {"job/step/cpu.max": "300000 100000", "job/cpu.max": "max 100000"}, 3),
        ("0::/job/step", {"job/step/cpu.max": "max 100000", "job/cpu.max": "250000 100000"}, 2),
        (
            "0::/of/the/host",
            {"cpu.max": "400000 100000"},
            4,
        ),  # a container sees its own as the root
        ("0::/../above", {"cpu.max": "500000 100000"}, 5),
        (
            "5:cpu,cpuacct:/job\n3:memory:/job",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "600000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        ("4:cpuset:/job", {"cpuset/job/cpu.max": "100000 100000"}, 64),  # no quota is there
        ("nonsense", {}, 64),
    ],
)
def test_a_quota_of_the_own_control_group_or_of_one_around_it_counts(
    tmp_path, on_64_cores, group, files, most
):
    (tmp_path / "groups").write_text(f"{group}\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert cores(tmp_path, tmp_path / "groups") == most


@pytest.mark.parametrize(
    ("variables", "most"),
    [
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "16"}, 4),
        ({"SLURM_CPUS_ON_NODE": "16"}, 16),
        ({"NCPUS": "8"}, 8),
        ({"NSLOTS": "200"}, 64),  # on several machines
        ({"LSB_DJOB_NUMPROC": "2"}, 2),
        ({"NSLOTS": "undefined"}, 64),
        ({"NSLOTS": "0"}, 64),
        ({"SLURM_CPUS_PER_TASK": "4", CPUS: "12"}, 12),  # the user's word
        ({CPUS: "100"}, 64),
    ],
)
def test_a_batch_system_gives_a_job_its_cores(tmp_path, on_64_cores, variables, most):
    for name, text in variables.items():
        on_64_cores.setenv(name, text)
    assert cores(tmp_path, tmp_path / "none") == most


def test_fewer_cores_by_request_are_torchs_threads_too(on_64_cores):
    on_64_cores.setattr("kd_utils.cluster.machines.available_cores", lambda *_: 32)
    on_64_cores.delenv("OMP_NUM_THREADS")
    with pytest.raises(ValueError, match="--cpus 33, but this process may use 32: ask for less"):
        limit_cores(33)
    limit_cores(3)
    assert cores() == 3 and os.environ["OMP_NUM_THREADS"] == "3"
    on_64_cores.setenv("OMP_NUM_THREADS", "2")  # set by the user
    limit_cores(5)
    assert cores() == 5 and os.environ["OMP_NUM_THREADS"] == "2"


def test_without_a_limit_nothing_is_set(on_64_cores):
    on_64_cores.setattr("kd_utils.cluster.machines.available_cores", lambda *_: 64)
    on_64_cores.delenv("OMP_NUM_THREADS")
    limit_cores(None)
    assert cores() == 64 and "OMP_NUM_THREADS" not in os.environ


def test_the_cores_of_taskset_count():
    code = (
        "import os; from kd_utils.cluster.machines import cores\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\nprint(cores())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "1\n", ran.stderr
