"""A disk that fills up while trials train and while their records are written."""

import shutil
import sys

import pytest
from disk import run_on_small_disk
from ray._private.utils import get_num_cpus
from sweeps import LONG, record, results

from kd_utils.records.check import check_run
from kd_utils.records.run_folder import trials_with_status
from kd_utils.store.sealed import RecordError, read_sealed

WORDS = "no space left on device"


def sweep(home, room, *more):
    """The sweep on a disk that has `room` bytes left when it starts."""
    used = sum(-path.lstat().st_size // 4096 * -4096 + 4096 for path in home.rglob("*"))
    return run_on_small_disk(
        [
            sys.executable,
            "-m",
            "kd_utils",
            "sweep",
            home / "small.yaml",
            "--grid",
            home / "grid2.yaml",
            *more,
        ],
        home,
        used + room,
        {"KD_ROOT": str(home), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def one_done(undisturbed, prepared):
    """One trial is done before the disk fills up."""
    run_dir, whole = prepared / "runs" / "toy-2", undisturbed / "runs" / "toy-2"
    (run_dir / "trials").mkdir()
    shutil.copytree(whole / "trials" / "black_box_seed0", run_dir / "trials" / "black_box_seed0")
    for path in ("black_box_seed0.ipynb", *(whole / "trials").glob("examples-*")):
        shutil.copy(whole / "trials" / path, run_dir / "trials")
    shutil.rmtree(prepared / "artifacts" / "students")
    return prepared


ROOMS = [
    0,
    2_500_000,
    *([100_000, 300_000, 900_000, 1_600_000, 3_000_000, 3_500_000] if LONG else []),
]


@pytest.mark.parametrize("room", ROOMS)
def test_a_full_disk_is_told_and_leaves_no_half_file(undisturbed, one_done, room, tried):
    run_dir = one_done / "runs" / "toy-2"
    done = sweep(one_done, room, "--cpus-per-trial", str(min(2, get_num_cpus())))
    output = done.stdout + done.stderr
    assert done.returncode in (1, 2) and WORDS in output, output[-3000:]
    assert "Traceback" not in output and max(map(len, output.splitlines())) < 500, output[-3000:]
    assert not [path for path in one_done.rglob(".*") if ".partial-" in path.name]
    try:
        plan = read_sealed(run_dir / "sweep.json", "checksums")
    except RecordError:
        assert room == 0 and not (run_dir / "sweep.json").exists()
    else:
        assert {trial["trial"] for trial in plan["trials"]} == set(
            results(undisturbed / "runs" / "toy-2")["trial"]
        )
        states = {trial["trial"]: state.state for trial, state in trials_with_status(run_dir)}
        assert states.pop("black_box_seed0") == "done" and set(states.values()) <= {
            "done",
            "failed",
            "missing",
        }, states
        assert any(state != "done" for state in states.values())
    assert record(run_dir, "black_box_seed0") == record(
        undisturbed / "runs" / "toy-2", "black_box_seed0"
    )
    with_room = sweep(one_done, 200_000_000)
    assert with_room.returncode == 0, with_room.stderr[-3000:]
    assert check_run(run_dir) == [] and results(run_dir).equals(
        results(undisturbed / "runs" / "toy-2")
    )
    tried("disk full while training or recording")
