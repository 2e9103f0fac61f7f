"""A trial's overhead is its time on its slot without its training and evaluation."""

import time
from types import SimpleNamespace

import pytest

from kd_utils.speed import starts
from kd_utils.sweep.executor import Report


class Slot:
    def __init__(self, *reports):
        self.reports, self.job = list(reports), None

    def submit(self, job):
        self.job = job

    def receive(self):
        time.sleep(0.1)
        report = self.reports.pop(0)
        self.job = None if report is None else self.job
        return report


JOB = SimpleNamespace(name="a", notebook=SimpleNamespace(with_suffix=lambda _: "a"))


def test_training_and_evaluation_are_taken_off(monkeypatch):
    spent = {"training": 0.1, "evaluation": 0.05, "total": 9.0}
    monkeypatch.setattr(starts, "read_record", lambda folder: {"seconds": spent})
    found = starts.overhead(Slot(Report("a", "started"), Report("a", "ended"), None), JOB)
    assert 0.15 <= found < 5


@pytest.mark.parametrize("kind", ["failed", "lost"])
def test_a_trial_that_fails_is_no_measurement(kind):
    with pytest.raises(RuntimeError, match="a: the reason"):
        starts.overhead(Slot(Report("a", kind, cause="the reason")), JOB)
