"""The record of notebook 05 is on disk as it goes, and a time limit leaves sections out."""

import json

import pytest
import torch

from kd_utils.config.parameter_files import notebook_config
from kd_utils.speed import progress


@pytest.fixture
def record_of(tmp_path):
    def make(seconds=0):
        values = {"run_dir": str(tmp_path), "seconds": seconds}
        config = notebook_config("05_measure_speed", values)
        return progress.SpeedRecord(config, torch.device("cpu"))

    return make


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for `clock[0] += seconds`."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def written(record):
    return json.loads(record.file.read_text())


def test_a_killed_notebook_leaves_the_sections_that_are_done(record_of, clock):
    record = record_of()
    assert record.begins("first")
    record.measured["a"], record.limits["a"] = 1.5, 1.0
    assert "a" not in written(record)
    clock[0] += 7
    assert record.begins("second")
    record.measured["b"] = 2.0
    found = written(record)
    assert found["a"] == 1.5 and found["limits"] == {"a": 1.0} and "b" not in found
    assert found["section_seconds"] == {"first": 7.0} and found["running"] == "second"
    assert found["complete"] is False and found["left_out"] == []


def test_the_whole_record_says_so_and_where_it_was_made(record_of):
    record = record_of()
    record.begins("only")
    record.tables["parts"] = {"wait": {"seconds": 0.5}}
    record.finish()
    found = written(record)
    assert found["complete"] is True and found["running"] == ""
    assert found["parts"] == {"wait": {"seconds": 0.5}} and list(found["section_seconds"]) == [
        "only"
    ]
    assert {"device", "threads", "shapes", "config", "commit", "machine", "versions"} <= set(found)


def test_sections_that_would_begin_after_the_limit_are_left_out(record_of, clock):
    record = record_of(seconds=10)
    assert record.begins("early")
    clock[0] += 11
    assert not record.has_time
    assert not record.begins("late") and not record.begins("later")
    record.finish()
    found = written(record)
    assert found["left_out"] == ["late", "later"] and found["complete"] is True
    assert found["section_seconds"] == {"early": 11.0}
