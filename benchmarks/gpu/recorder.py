"""A pytest plugin of part `correct`: a line of JSON per test as soon as it has ended, and a clean
end at a time limit. KD_RECORD names the file; KD_DEADLINE is the time (seconds since 1970).
"""

import json
import os
import time
from pathlib import Path

import pytest

RECORD, DEADLINE = Path(os.environ["KD_RECORD"]), float(os.environ["KD_DEADLINE"])


class Recorder:
    def __init__(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        said = str(report.longrepr[2] if report.skipped else report.longrepr or "")
        row = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "said": said.strip().splitlines()[-1][:300] if said.strip() else "",
        }
        with RECORD.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if time.time() > DEADLINE:
            self.session.shouldstop = "the time limit"


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(Recorder(session))


def pytest_collection_finish(session: pytest.Session) -> None:
    RECORD.with_suffix(".planned").write_text(f"{len(session.items)}\n")
