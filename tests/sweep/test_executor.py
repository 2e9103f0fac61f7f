"""The executor's interface: one that is scripted, and one of threads in place of Ray."""

import queue
import threading

import pytest

from kd_utils.records import provenance
from kd_utils.records.run_folder import failure_cause
from kd_utils.sweep import display, execution, executor
from kd_utils.sweep.display import Progress
from kd_utils.sweep.executor import Job, Report, read_rows, run_trials
from kd_utils.sweep.planning import Trial


class Scripted:
    """Every start of a job reports what `starts[name]` says; an exception in it is raised."""

    def __init__(self, **starts):
        self.starts = starts
        self.waiting, self.submitted, self.cancelled = [], [], False

    def submit(self, job):
        self.submitted.append(job.name)
        self.waiting += [(job.name, event) for event in self.starts[job.name].pop(0)]

    def reports(self):
        waiting, self.waiting = self.waiting, []
        for name, event in waiting:
            if isinstance(event, BaseException):
                raise event
            kind, about = (event, {}) if isinstance(event, str) else event
            yield Report(name, kind, **about)

    def cancel(self):
        self.cancelled = True


@pytest.fixture
def run(stub_notebooks, monkeypatch):
    """`run(an executor, trial names)`: Progress after `run_trials`, with what it said."""

    def run(running, *names):
        progress = Progress(dict.fromkeys(names, 2))
        progress.said = []
        monkeypatch.setattr(display, "say", progress.said.append)
        jobs = [Job(Trial(name, {}, "", 2, {}, []), "runs/stub", {}, {}) for name in names]
        run_trials(running, jobs, progress)
        return progress

    return run


EPOCH = ("measured", {"row": {"epoch": 1, "validation_accuracy": 0.5}})
LOST = ("lost", {"cause": "killed, or out of memory"})


def kept(folder, trial):
    return failure_cause(folder / "runs" / "stub" / "trials" / f"{trial}.failed.ipynb")


def test_a_trial_lost_twice_starts_again_and_others_are_not_touched(run):
    script = Scripted(
        a=[["started", EPOCH, LOST], [LOST], ["started", EPOCH, "ended"]],
        b=[["started", EPOCH, "ended"]],
    )
    progress = run(script, "a", "b")
    assert sorted(progress.done) == ["a", "b"] and progress.failed == [] and not progress.running
    assert script.submitted == ["a", "b", "a", "a"] and not script.cancelled
    assert [line.split("; ")[-1] for line in progress.said if "was lost" in line] == [
        f"starting again ({n} of 3)" for n in (1, 2)
    ]


def test_a_trial_lost_a_fourth_time_has_failed_and_its_cause_is_kept(run, stub_notebooks):
    progress = run(Scripted(a=[["started", LOST]] * 4, b=[["started", "ended"]]), "a", "b")
    assert progress.done == ["b"] and progress.failed == ["a"]
    cause = "the trial's process or machine was lost 4 times: killed, or out of memory"
    assert kept(stub_notebooks, "a") == cause and f"a: FAILED: {cause}" in progress.said[-1]


def test_a_failure_does_not_stop_others_and_is_kept_here_if_not_where_it_ran(run, stub_notebooks):
    script = Scripted(
        a=[["started", ("failed", {"cause": "why", "kept": True})]],
        b=[["started", ("failed", {"cause": "no cache"})]],
        c=[["started", EPOCH, "ended"]],
    )
    progress = run(script, "a", "b", "c")
    assert sorted(progress.failed) == ["a", "b"] and progress.done == ["c"]
    assert kept(stub_notebooks, "b") == "no cache" and kept(stub_notebooks, "a") == ""
    assert script.submitted == ["a", "b", "c"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the executor itself ended")])
def test_ctrl_c_cancels_the_jobs(run, error):
    script = Scripted(a=[["started", error]], b=[["started", "ended"]])
    with pytest.raises(type(error)):
        run(script, "a", "b")
    assert script.cancelled


class Threads:
    """Jobs in threads of this process: all that an executor needs, in a few lines."""

    def __init__(self):
        self.queue = queue.Queue()

    def submit(self, job):
        def work():
            for report in executor.execute_trial(job, threads=1):
                self.queue.put(report)

        threading.Thread(target=work, daemon=True).start()

    def reports(self):
        yield self.queue.get(timeout=60)


def test_trials_in_threads_report_their_epochs_and_their_failures(run, monkeypatch):
    def execute(stem, target, parameters, about):
        reported = executor.os.environ["KD_PROGRESS"]
        with open(reported, "a") as file:
            file.write('{"epoch": 1, "validation_accuracy": 0.25}\n{"epoch": 2}\n')
        if target.stem == "b":
            raise execution.NotebookFailed(target.stem, "the loss is not finite", "kept")

    monkeypatch.setattr(execution, "execute", execute)
    monkeypatch.setattr(provenance, "code_of", lambda stem: {})
    progress = run(Threads(), "a")
    assert [line.split("] ")[-1] for line in progress.said] == [
        "a: epoch 1/2, validation accuracy 25.0 %",
        "a: epoch 2/2",
        "a: done",
    ]
    progress = run(Threads(), "b")
    assert progress.said[-1].endswith("b: FAILED: the loss is not finite")


def test_a_trial_whose_files_or_code_are_others_does_not_run(stub_notebooks, monkeypatch):
    job = Job(Trial("a", {}, "", 1, {}, []), "runs/stub", {"x.py": "1" * 12}, {"runs/plan": "0"})
    monkeypatch.setattr(provenance, "code_of", lambda stem: {"x.py": "1" * 12})
    started, failed = executor.execute_trial(job, threads=1)
    assert started.kind == "started" and failed.kind == "failed" and not failed.kept
    assert failed.cause.endswith("runs/plan: No such file or directory")
    monkeypatch.setattr(provenance, "code_of", lambda stem: {"x.py": "2" * 12})
    *_, failed = executor.execute_trial(job, threads=1)
    assert failed.cause.startswith("the code changed (x.py) since the sweep began")


def test_rows_are_read_only_when_their_line_is_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_text('{"epoch": 1}\n{"epo')
    assert read_rows(path) == [{"epoch": 1}]
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert read_rows(path) == [{"epoch": 1}, {"epoch": 2}]
