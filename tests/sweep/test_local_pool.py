"""The local pool: sweeps without Ray, slots and their GPUs, processes that die, and none left."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter

import pandas as pd
import psutil
import pytest
import yaml
from stubs import stub_project, sweep_in

from kd_utils.__main__ import main
from kd_utils.config import project_paths
from kd_utils.records.run_folder import failure_cause
from kd_utils.sweep import display
from kd_utils.sweep.display import Progress
from kd_utils.sweep.executor import Job, run_trials
from kd_utils.sweep.local_pool import LocalPool, local_pool, slots
from kd_utils.sweep.planning import Trial
from kd_utils.sweep.slots.slot import MARK


@pytest.mark.parametrize(
    ("cores", "names", "cpus", "gpus", "expected"),
    [
        (4, [], 1, 0, [""] * 4),
        (4, [], 3, 0, [""]),
        (1, [], 0.1, 0, [""] * 10),
        (3, [], 0.3, 0, [""] * 10),
        (16, ["0"], 1, 1, ["0"]),
        (16, ["0"], 1, 0.5, ["0", "0"]),
        (16, ["0"], 1, 0.3, ["0"] * 3),
        (16, ["GPU-a", "GPU-b"], 1, 0.5, ["GPU-a", "GPU-b"] * 2),
        (3, ["GPU-a", "GPU-b"], 1, 0.5, ["GPU-a", "GPU-b", "GPU-a"]),
        (16, ["MIG-a", "MIG-b", "MIG-c"], 4, 1, ["MIG-a", "MIG-b", "MIG-c"]),
        (16, ["MIG-GPU-x/1/0"], 4, 0.25, ["MIG-GPU-x/1/0"] * 4),
        (16, ["3", "1", "2", "0", "5"], 1, 2, ["3,1", "2,0"]),
        (16, ["0", "1"], 1, 0, [""] * 16),
    ],
)
def test_as_many_side_by_side_as_cores_and_gpus_allow(cores, names, cpus, gpus, expected):
    assert slots(cores, names, cpus, gpus) == expected


def test_what_this_machine_has_not_is_refused_as_with_ray(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for arguments, message in (
        ((999, None, "auto"), "asks for 999 CPUs and 0 GPUs, but the machines have: .* and 0 GPUs"),
        ((1, 1, "auto"), "a trial asks for 1 CPUs and 1 GPUs"),
        ((1, None, "cuda"), "device = 'cuda', but a trial gets 0 GPUs"),
    ):
        with pytest.raises(ValueError, match=message), local_pool(*arguments):
            pass


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        (
            "",
            ["--executor", "local", "--address", "auto"],
            "--address names a Ray cluster, which --executor local does not use: leave",
        ),
        ("workers: 2", ["--executor", "local"], "workers = 2 needs Ray: set workers to 0 or 1"),
        ("", [], "Ray is not installed: add --executor local to run on this machine, or `pip "),
        ("", ["--executor", "slurm"], "Invalid value for '--executor'"),
    ],
)
def test_what_does_not_go_together_is_told_in_one_line(
    stub_notebooks, monkeypatch, capsys, values, arguments, message
):
    monkeypatch.delitem(sys.modules, "kd_utils.sweep.ray_executor", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    (stub_notebooks / "p.yaml").write_text(values)
    assert main(["sweep", str(stub_notebooks / "p.yaml"), *arguments]) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {message}")
    assert all("in the notebook, the project's default is" in note for note in notes)  # the stubs'


#: In place of the notebook: a trial does what its parameter `do` says, and shows its environment.
DO = """

def execute_trial(job, threads):
    import sys, time
    about = {"epoch": 1, "visible": os.environ["CUDA_VISIBLE_DEVICES"], "pid": os.getpid(),
             "slot": os.environ["KD_SLOT"], "began": time.monotonic(),
             "ray": "ray" in sys.modules, "torch": "torch" in sys.modules, "threads": threads}
    yield Report(job.name, "started")
    yield Report(job.name, "measured", about)
    exec(job.trial.parameters["do"])
    yield Report(job.name, "ended")
"""
#: A child in a session of its own, as a kernel is.
CHILD = "import subprocess; child = subprocess.Popen(['sleep', '600'], start_new_session=True);"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(pool, trial="what it does", ...)`: Progress after `run_trials`, with what it said and
    the rows that it was told of.
    """
    project = stub_project(tmp_path)
    with open(project / "kd_utils" / "sweep" / "executor.py", "a") as file:
        file.write(DO)
    monkeypatch.setattr(project_paths, "ROOT", project)
    monkeypatch.setattr(project_paths, "CODE_ROOT", project)  # the processes run the copy

    def run(pool, **trials):
        progress = Progress(dict.fromkeys(trials, 1))
        progress.said, progress.rows, reported = [], [], progress.reported
        monkeypatch.setattr(display, "say", progress.said.append)

        def keep(trial, row):
            progress.rows.append(row | {"trial": trial, "running": 1 + len(progress.running)})
            reported(trial, row)

        monkeypatch.setattr(progress, "reported", keep)
        jobs = [
            Job(Trial(name, {}, "", 1, {"do": do}, []), "runs/stub", {}, {})
            for name, do in trials.items()
        ]
        try:
            run_trials(pool, jobs, progress)
        finally:
            pool.cancel()
        return progress

    return run


def alive(value: str, name: str = MARK) -> list[str]:
    """Processes with this in their environment that run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(name) == value:
                found.append(process.name())
        except psutil.Error:
            continue
    return found


def gone(value: str, name: str = MARK, within: float = 10) -> bool:
    until = time.monotonic() + within
    while alive(value, name) and time.monotonic() < until:
        time.sleep(0.1)
    return not alive(value, name)


def test_each_trial_sees_its_slots_gpus_in_a_process_without_ray_or_torch(run):
    planned = ["MIG-a", "GPU-1,GPU-2", "0", "0"]
    trials = dict.fromkeys("abcdefghi", "import time; time.sleep(0.5)")
    progress = run(LocalPool(planned, threads=3), **trials)
    assert sorted(progress.done) == sorted(trials) and not progress.failed
    rows = pd.DataFrame([row for row in progress.rows if "pid" in row])
    assert set(rows["visible"]) == set(planned)
    used = Counter(rows.drop_duplicates("slot")["visible"])
    assert used == Counter(planned), "a slot stayed empty, or had two processes"
    for _, began in rows.groupby("slot")["began"]:
        assert (began.diff().dropna() >= 0.5).all(), "a slot had two trials at once"
    assert rows["pid"].nunique() == len(trials) and os.getpid() not in set(rows["pid"])
    assert not rows["ray"].any() and not rows["torch"].any() and set(rows["threads"]) == {3}


def test_a_killed_process_is_lost_and_starts_again_without_its_old_kernel(run, tmp_path):
    once = (
        f"import pathlib; here = pathlib.Path({str(tmp_path)!r}, 'once')\n"
        f"if not here.exists(): {CHILD} here.write_text(os.environ[{MARK!r}]); "
        "os.kill(os.getpid(), 9)"
    )
    progress = run(LocalPool(["", ""], threads=1), a=once, b="")
    assert sorted(progress.done) == ["a", "b"] and not progress.failed
    lost = [line for line in progress.said if "was lost" in line]
    assert [line.split("] ")[1] for line in lost] == [
        "a: its process or machine was lost; starting again (1 of 3)"
    ]
    assert alive((tmp_path / "once").read_text()) == []


def test_a_trial_that_fails_or_is_lost_for_good_stops_no_other(run, tmp_path):
    progress = run(
        LocalPool([""], threads=1),
        a="raise OSError(28, 'disk\\nis full')",
        b="os._exit(3)",
        c="os.kill(os.getpid(), 9)",
        d="",
        e="print('\\nno module of that name\\n', file=sys.stderr); os._exit(1)",
    )
    assert progress.done == ["d"] and sorted(progress.failed) == ["a", "b", "c", "e"]
    trials = tmp_path / "runs" / "stub" / "trials"
    lost = "the trial's process or machine was lost 4 times: the process "
    assert {name: failure_cause(trials / f"{name}.failed.ipynb") for name in "abce"} == {
        "a": "OSError: [Errno 28] disk is full",
        "b": f"{lost}ended with status 3",
        "c": f"{lost}was killed or ran out of memory",
        "e": f"{lost}ended with status 1: no module of that name",
    }


def test_cancel_leaves_no_process_and_starts_none(run, monkeypatch):
    pool = LocalPool(["", ""], threads=1)
    reports = pool.reports

    def interrupted():
        for report in reports():
            yield report
            if report.kind == "measured":
                time.sleep(1)  # so that its child is there
                # The slot's process, the trial, the kernel that it does not use, and its child.
                assert len(alive(pool.slots[0].mark)) == 4
                marks.extend(slot.mark for slot in pool.slots)
                raise KeyboardInterrupt

    marks = []
    monkeypatch.setattr(pool, "reports", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pool, **dict.fromkeys("abcd", f"{CHILD} child.wait()"))
    assert len(marks) == 2 and all(alive(mark) == [] for mark in marks)
    assert not pool._waiting and not any(slot.process for slot in pool.slots)


SWEEP = ["sweep", "p.yaml", "--grid", "grid.yaml"]
NO_RAY = "raise ModuleNotFoundError(\"No module named 'ray'\", name='ray')"


@pytest.fixture
def project(tmp_path):
    """A project of stubs on a machine without Ray."""
    stub_project(tmp_path)
    (tmp_path / "ray.py").write_text(NO_RAY)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"epochs": 2}))
    grid = {"distill_type": ["black_box", "attention"], "seed": [3]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    (tmp_path / "artifacts").mkdir()
    return tmp_path


def test_a_sweep_without_ray_leaves_what_one_with_ray_leaves(project):
    (project / "artifacts" / "fail-attention_seed3").touch()
    ran = sweep_in(project, *SWEEP, "--executor", "local", "--cpus-per-trial", "0.5")
    assert ran.returncode == 1, ran.stderr
    assert "attention_seed3: FAILED: FloatingPointError: the loss is not finite" in ran.stderr
    assert "black_box_seed3: epoch 2/2, validation accuracy 53.0 %" in ran.stderr
    assert "1 of 2 trials are done; 1 failed: attention_seed3" in ran.stdout
    run_dir = project / "runs" / "stub"
    summary = pd.read_csv(run_dir / "results_summary.csv").set_index("trial")
    assert summary["status"].to_dict() == {"black_box_seed3": "done", "attention_seed3": "failed"}
    executed = (project / "artifacts" / "executed.txt").read_text().splitlines()
    assert sorted(executed) == ["attention_seed3 1", "black_box_seed3 1"]
    checked = sweep_in(project, "check", "runs/stub").stdout.splitlines()
    assert len(checked) == 2 and checked[0].startswith("attention_seed3: failed")
    assert checked[1] == "1 of 2 trials whole; 1 problems"
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "01_prepare_data.ipynb",
        "02_cache_teacher.ipynb",
        "04_analyse_results.ipynb",
        "results_summary.csv",
        "sweep.json",
        "trials",
    ]
    assert sorted(path.name for path in (run_dir / "trials").glob("*_seed*")) == [
        "attention_seed3.failed.ipynb",
        "black_box_seed3",
        "black_box_seed3.ipynb",
    ]


def test_whatever_ends_the_sweep_no_process_stays_not_even_a_kernel(project):
    (project / "p.yaml").write_text(yaml.safe_dump({"epochs": 2000}))  # ten minutes
    executed = project / "artifacts" / "executed.txt"
    for how, send in (
        ("Ctrl-C", lambda pid: os.killpg(pid, signal.SIGINT)),
        ("SIGKILL", lambda pid: os.kill(pid, signal.SIGKILL)),
    ):
        executed.unlink(missing_ok=True)
        mark = uuid.uuid4().hex
        sweep = subprocess.Popen(
            [sys.executable, "-m", "kd_utils", *SWEEP, "--executor", "local"],
            cwd=project,
            env=os.environ | {"PYTHONPATH": str(project), "KD_ROOT": "", "KD_MARK": mark},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        until = time.monotonic() + 300
        while not executed.exists() and sweep.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        kernels = [name for name in alive(mark, "KD_MARK") if name == "kd-kernel"]
        assert kernels, sweep.stderr.read() if sweep.poll() else "no kernel"
        send(sweep.pid)
        said = sweep.communicate(timeout=60)[1]
        assert gone(mark, "KD_MARK"), (how, alive(mark, "KD_MARK"))
        if how != "SIGKILL":
            assert sweep.returncode == 130 and "Traceback" not in said, said
            assert said.splitlines()[-1].startswith("stopped; finished trials are kept"), said
