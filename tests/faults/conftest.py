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
def undisturbed(
    once: Callable[[str, Callable[[Path], None]], Path], with_toy: Callable[[Path], None]
) -> Path:
    """A project root with one whole sweep, `runs/toy-2`, and the files that it was started with.

    Two trials, one of each method; four under `make faults`.
    """

    def sweep(home: Path) -> None:
        with_toy(home)
        small = "\n".join(f"{key}: {value}" for key, value in SMALL.items())
        (home / "small.yaml").write_text(small)
        grid = f"distill_type: [black_box, combined]\nseed: {[0, 1] if LONG else [0]}\n"
        (home / "grid2.yaml").write_text(grid)
        command = Command(home, "sweep", home / "small.yaml", "--grid", home / "grid2.yaml")
        status, output = command.wait()
        assert status == 0, output[-3000:]
        (home / "seconds").write_text(str(time.monotonic() - command.began))

    return once("undisturbed", sweep)


@pytest.fixture
def prepared(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of that root in which 01 and 02 are done and no trial is."""
    home = tmp_path / "home"
    shutil.copytree(undisturbed, home)
    for path in (home / "runs" / "toy-2").iterdir():
        if not path.name.startswith(("01", "02")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return home
