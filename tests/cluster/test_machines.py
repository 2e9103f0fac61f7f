"""Resources of trials: what a machine has, and what is refused before a trial runs."""

import math

import pytest

from kd_utils.cluster.machines import cores, fitting_gpus


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
