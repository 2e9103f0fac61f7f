"""Ray behind the executor's interface: which of its errors are losses, and which are failures."""

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
            [BEGIN, "epoch", "ended"],
        ],
        b=[[BEGIN, "epoch", "ended"]],
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
