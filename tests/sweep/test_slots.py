"""A slot's process and its forks: as good as fresh ones, nothing handed on, none left over."""

import hashlib
import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import vl_convert
from stubs import stub_project

from kd_utils.config import project_paths
from kd_utils.records import provenance
from kd_utils.sweep.executor import Job
from kd_utils.sweep.planning import Trial
from kd_utils.sweep.slots import forks
from kd_utils.sweep.slots.slot import MARK, Slot

#: In place of `execute_trial`: a trial that does what its parameter says, and reports `about`.
DO = """

def execute_trial(job, threads):
    about = {"pid": os.getpid(), "slot": os.getppid()}
    exec(job.trial.parameters["do"])
    yield Report(job.name, "epoch", about)
    yield Report(job.name, "ended")
"""
MODULE = "kd_utils/records/arithmetic.py"

#: In place of notebook 03: what a kernel finds around it, before it makes a mess of it.
LOOK = """
import json, os, random, signal, sys, threading
import numpy, pandas
signals = {s.name: str(signal.getsignal(s)) for s in signal.Signals if s.name != "SIGCHLD"}
found = {
    "argv": sys.argv[1:2] + sys.argv[3:4],
    "cwd": os.getcwd(),
    "path": sys.path,
    "environment": dict(os.environ),
    "signals": signals,
    "session": os.getsid(0) == os.getpid(),
    "main": sys.modules["__main__"] is not None and __name__,
    "names": sorted(name for name in globals() if not name.startswith("_")),
    "history": get_ipython().execution_count,
    "draws": [random.random(), numpy.random.random()],
    "threads": sorted(thread.name for thread in threading.enumerate()),
    "left": getattr(pandas, "left", None),
}
with open(os.environ["KD_FOUND"], "a") as file:
    file.write(json.dumps(found) + "\\n")
os.environ["LEFT"] = sys.argv[0] = pandas.left = "left"
os.chdir("/")
random.seed(0), numpy.random.seed(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path.insert(0, "/left")
"""


def job(name: str, do: str = "", code: dict[str, str] | None = None) -> Job:
    return Job(Trial(name, {}, "", 1, {"do": do}, []), "runs/stub", code or {}, {})


def run(slot: Slot, job: Job) -> list:
    slot.submit(job)
    reports = []
    while slot.job:
        reports.append(slot.receive())
    return [report for report in reports if report]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of stubs of its own, whose code the slots run."""
    project = stub_project(tmp_path)
    with open(project / "kd_utils" / "sweep" / "executor.py", "a") as file:
        file.write(DO)
    monkeypatch.setattr(project_paths, "ROOT", project)
    monkeypatch.setattr(project_paths, "CODE_ROOT", project)
    monkeypatch.setattr(provenance, "PACKAGE", project / "kd_utils")
    return project


@pytest.fixture
def slot(project):
    slot = Slot(threads=1)
    yield slot
    slot.end()


def marked(mark: str) -> list[psutil.Process]:
    """The processes of a slot that are alive."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def alive(mark: str) -> list[str]:
    return [process.info["name"] for process in marked(mark)]


def gone(mark: str, within: float = 5) -> bool:
    until = time.monotonic() + within
    while alive(mark) and time.monotonic() < until:
        time.sleep(0.1)
    return not alive(mark)


def test_trials_are_forks_of_one_process_that_hand_nothing_on(slot):
    do = (
        "import pandas; about |= {'found': getattr(pandas, 'left', None), 'at': os.getcwd(), "
        "'LEFT': os.environ.get('LEFT')}; os.environ['LEFT'] = pandas.left = 'left'; os.chdir('/')"
    )
    rows = [run(slot, job(name, do))[0].row for name in "abc"]
    assert len({row["pid"] for row in rows}) == 3
    assert {row["slot"] for row in rows} == {slot.process.pid}
    assert {row["at"] for row in rows} == {str(project_paths.CODE_ROOT)}
    assert {(row["found"], row["LEFT"]) for row in rows} == {(None, None)}


def test_variables_are_those_of_the_moment_at_which_a_trial_is_given(slot, monkeypatch):
    do = "about |= {'gpu': os.environ.get('CUDA_VISIBLE_DEVICES'), 'x': os.environ.get('KD_X')}"
    for number in ("0", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", number)
        monkeypatch.setenv("KD_X", number)
        row = run(slot, job(number, do))[0].row
        assert (row["gpu"], row["x"]) == (number, number)
    monkeypatch.delenv("KD_X")
    assert run(slot, job("none", do))[0].row["x"] is None


@pytest.mark.parametrize("victim", ["slot", "pid"])
def test_whichever_process_is_killed_the_trial_is_lost_with_its_kernel_and_the_next_one_runs(
    slot, victim
):
    kill = f"import time; time.sleep(0.3); os.kill(about[{victim!r}], 9); time.sleep(60)"
    slot.submit(job("a", kill))
    mark, began = slot.mark, time.monotonic()
    lost = slot.receive()
    assert (lost.kind, lost.cause) == ("lost", "the process was killed or ran out of memory")
    assert time.monotonic() - began < 50 and gone(mark)
    assert [report.kind for report in run(slot, job("b"))] == ["epoch", "ended"]
    assert slot.mark != mark


def test_a_slots_process_that_was_killed_between_trials_costs_a_start_and_no_more(slot):
    run(slot, job("a"))
    slot.process.kill()
    slot.process.wait()
    assert [report.kind for report in run(slot, job("b"))] == ["lost"]
    assert [report.kind for report in run(slot, job("b"))] == ["epoch", "ended"]


def test_what_an_ended_trial_said_is_not_the_cause_of_the_next_ones_loss(slot):
    run(slot, job("a", "import sys; print('a warning', file=sys.stderr)"))
    [lost] = run(slot, job("b", "os._exit(3)"))
    assert lost.cause == "the process ended with status 3"
    [lost] = run(slot, job("c", "os._exit(0)"))
    assert (lost.kind, lost.cause) == ("lost", "the process ended with status 0")


@pytest.mark.parametrize("seconds", [0.0, 1.0, 30.0])
def test_a_process_ends_with_whoever_started_it_also_while_it_imports(slot, seconds):
    if seconds > 5:
        run(slot, job("a"))
    else:
        slot.submit(job("a", "import time; time.sleep(60)"))
        time.sleep(seconds)
    slot.pipe.close()
    assert gone(slot.mark), alive(slot.mark)


def test_code_that_changed_is_loaded_by_a_new_process_and_never_run_in_its_earlier_form(
    slot, project
):
    do = "from kd_utils.records import arithmetic as a; about['new'] = getattr(a, 'NEW', None)"
    code, file = {MODULE: "0" * 12}, project / MODULE
    assert [run(slot, job(name, do, code))[0].row["new"] for name in "ab"] == [None, None]
    first = slot.process.pid
    with open(file, "a") as text:
        text.write("\nNEW = 1\n")
    assert run(slot, job("c", do, code))[0].row["new"] == 1
    assert slot.process.pid != first
    # A fork is as old as the process that loaded the code, not as itself.
    time.sleep(max(0.0, slot.started + 3 - time.time()))
    os.utime(file)
    look = f"from kd_utils.records import provenance as p; p.require_loaded([{MODULE!r}])"
    [failed] = run(slot, job("d", f"from kd_utils.records import arithmetic; {look}"))
    assert failed.kind == "failed" and f"{MODULE} was changed after this kernel started" in (
        failed.cause
    )


@pytest.mark.parametrize("cause", ["KD_FORK=0", "an import fails"])
def test_where_trials_cannot_be_forked_each_has_a_fresh_process(slot, project, monkeypatch, cause):
    if cause == "KD_FORK=0":
        monkeypatch.setenv("KD_FORK", "0")
    else:
        path = project / "notebooks" / "03_train_student.ipynb"
        path.write_text(path.read_text().replace("import pandas", "import missing_module"))
        assert "missing_module" in path.read_text()
    rows = []
    for name in "ab":
        first, ended = run(slot, job(name))
        assert ended.kind == "ended"
        rows.append(first.row)
    assert rows[0]["pid"] != rows[1]["pid"] and {row["slot"] for row in rows} == {os.getpid()}


def test_a_process_that_runs_threads_or_cuda_is_not_forked():
    code = """
import sys, threading, types
from kd_utils.sweep.slots import forks
print(forks.why_not())
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: True))
print(forks.why_not())
del sys.modules["torch"]
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(forks.why_not())
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert shown.splitlines() == [
        "",
        "CUDA is in use already, and a forked process cannot use it again",
        "1 threads run beside the main one",
    ]


def test_what_notebook_03_and_its_kernel_import_can_be_forked():
    code = """
import sys
from kd_utils.sweep.slots import forks, server
server.import_all()
print([name for name in (*server.KERNEL, *server.LATER["torch"]) if name not in sys.modules])
print(forks.why_not())
"""
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | forks.WHEN_LOADED,
        cwd=project_paths.CODE_ROOT,
        capture_output=True,
        text=True,
    )
    assert (shown.stdout, shown.stderr) == ("[]\n\n", "")


#: Draws a chart, and notes its digest and how many threads that left in the trial's process.
DRAW = """
from kd_utils.figures import plots
import hashlib
chart = {"data": {"values": [{"a": 1}]}, "mark": "bar", "encoding": {"x": {"field": "a"}}}
about["png"] = hashlib.sha256(plots.draw(chart, scale=1.5)).hexdigest()
about["threads"] = len(os.listdir("/proc/self/task"))
"""


def test_one_process_beside_a_slots_draws_the_pictures_of_its_trials(slot, project):
    path = project / "notebooks" / "03_train_student.ipynb"
    draws = "import pandas\\nfrom kd_utils.figures import plots"
    module = project / "kd_utils" / "sweep" / "slots" / "drawing.py"
    module.write_text(module.read_text().replace("WAIT_SECONDS = 30.0", "WAIT_SECONDS = 2.0"))
    path.write_text(path.read_text().replace("import pandas", draws))
    alone = run(slot, job("z", "about['threads'] = len(os.listdir('/proc/self/task'))"))[0].row
    rows = [run(slot, job(name, DRAW))[0].row for name in "ab"]
    assert alive(slot.mark).count("kd-drawing") == 1
    assert {row["threads"] for row in rows} == {alone["threads"]}
    # A trial that ends before it has its picture, and one whose chart is wrong.
    leaves = "\nimport socket\nasking, answering = socket.socketpair()\n"
    leaves += "socket.send_fds(plots.draw.args[0], [b' '], [answering.fileno()])\n"
    leaves += "asking.sendall(b'[{\"data\"')\nos._exit(0)"
    assert [report.kind for report in run(slot, job("c", DRAW + leaves))] == ["lost"]
    [failed] = run(slot, job("d", DRAW.replace('"bar"', "{}")))
    assert failed.kind == "failed" and "ValueError" in failed.cause
    rows.append(run(slot, job("e", DRAW))[0].row)
    assert rows[-1]["threads"] == alone["threads"]
    [drawing] = [p for p in marked(slot.mark) if p.info["name"] == "kd-drawing"]
    drawing.suspend()
    rows.append(run(slot, job("f", DRAW))[0].row)
    drawing.kill()
    rows.append(run(slot, job("g", DRAW))[0].row)
    assert min(row["threads"] for row in rows[-2:]) > alone["threads"]
    chart = {"data": {"values": [{"a": 1}]}, "mark": "bar", "encoding": {"x": {"field": "a"}}}
    png = hashlib.sha256(vl_convert.vegalite_to_png(chart, scale=1.5)).hexdigest()
    assert {row["png"] for row in rows} == {png}


def test_a_forked_kernel_finds_what_a_fresh_one_finds(tmp_path, monkeypatch):
    """Whatever the kernel before it did: names, arguments, folders, signals, random numbers."""
    stub_project(tmp_path)
    path = tmp_path / "notebooks" / "03_train_student.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][-1]["source"] = LOOK
    path.write_text(json.dumps(notebook))
    for name in ("ROOT", "CODE_ROOT"):
        monkeypatch.setattr(project_paths, name, tmp_path)
    monkeypatch.setenv("KD_FOUND", str(tmp_path / "found.jsonl"))
    digests = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json; from kd_utils.records import provenance as p\n"
            "print(json.dumps(p.code_of('03_train_student')))",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "kd_utils")
    trial = Trial("a", {}, "", 1, {}, [])
    task = Job(trial, "runs/stub", json.loads(digests.stdout), {})
    for forked in ("1", "0"):
        monkeypatch.setenv("KD_FORK", forked)
        slot = Slot(threads=1)
        for _ in range(2 if forked == "1" else 1):
            # It writes no record, so that it fails after its last cell.
            assert "metrics.json" in run(slot, task)[-1].cause
        slot.end()
    lines = (tmp_path / "found.jsonl").read_text().splitlines()
    first, second, fresh = map(json.loads, lines)
    own = {MARK, "KD_FORK", "KD_PROGRESS", "JPY_PARENT_PID", "JE_ARROW_MALLOC_CONF"}
    draws = []
    for found in (first, second, fresh):
        for name in own:
            found["environment"].pop(name, None)
        draws.append(tuple(found.pop("draws")))
    assert first == second
    assert fresh["threads"].count("Thread-1") == 1
    # The debugger makes one thread that never runs when it is imported, here before the kernel.
    fresh["threads"][fresh["threads"].index("Thread-1")] = "Thread-2"
    assert {key for key in fresh if first[key] != fresh[key]} == set(), (first, fresh)
    for numbers in zip(*draws):
        assert len(set(numbers)) == 3, "random numbers that another kernel drew too"
