"""What the fault suite shares: how often each fault is tried, here and under `make faults`, and the
tally of it.

With KD_FAULTS=long (`make faults`) faults are tried more often; with KD_FAULTS_RECORD=FILE the
tally is written there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from sweeps import LONG, SMALL, Command

TALLY: Counter[str] = Counter()
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job, whose children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def times() -> Callable[[int, int], int]:
    """`times(short, long)`: how often to try a fault in `make test`, and in `make faults`."""
    return lambda short, long: long if LONG else short


@pytest.fixture
def tried() -> Callable[[str, int], None]:
    """`tried(fault, n)`: n more of this fault held. Call it after the assertions. The names are
    those of the table in docs/faults.md.
    """
    return lambda fault, n=1: TALLY.update({fault: n})


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := os.environ.get("KD_FAULTS_RECORD"):
        Path(path).write_text(
            json.dumps(dict(sorted(TALLY.items())), indent=1) + "\n", encoding="utf-8"
        )


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project root with one whole sweep of four trials, `runs/toy-2`, and the files that it was
    started with.
    """
    home = tmp_path_factory.getbasetemp() / "undisturbed"
    if os.environ.get("PYTEST_XDIST_WORKER"):  # one sweep for the test processes together
        home = home.parents[1] / "undisturbed"
    with FileLock(f"{home}.lock"):
        if not (home / "seconds").exists():
            _sweep(home)
    return home


def _sweep(home: Path) -> None:
    home.mkdir(exist_ok=True)
    (home / "small.yaml").write_text("\n".join(f"{key}: {value}" for key, value in SMALL.items()))
    (home / "grid2.yaml").write_text("distill_type: [black_box, combined]\nseed: [0, 1]\n")
    command = Command(home, "sweep", home / "small.yaml", "--grid", home / "grid2.yaml")
    status, output = command.wait()
    assert status == 0, output[-3000:]
    (home / "seconds").write_text(str(time.monotonic() - command.began))


@pytest.fixture
def prepared(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of that root in which 01 and 02 are done and no trial is."""
    home = tmp_path / "home"
    shutil.copytree(undisturbed, home)
    for path in (home / "runs" / "toy-2").iterdir():
        if not path.name.startswith(("01", "02")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return home
