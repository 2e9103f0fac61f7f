"""What the fault suite shares: how often each fault is tried, here and under `make faults`, and the tally of it.

With KD_FAULTS=long (`make faults`) faults are tried more often; with KD_FAULTS_RECORD=FILE the tally is written there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

LONG = os.environ.get("KD_FAULTS") == "long"
TALLY: Counter[str] = Counter()


@pytest.fixture
def times() -> Callable[[int, int], int]:
    """`times(short, long)`: how often to try a fault in `make test`, and in `make faults`."""
    return lambda short, long: long if LONG else short


@pytest.fixture
def tried() -> Callable[[str, int], None]:
    """`tried(fault, n)`: n more of this fault held. Call it after the assertions; names stand in the README's table."""
    return lambda fault, n=1: TALLY.update({fault: n})


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := os.environ.get("KD_FAULTS_RECORD"):
        Path(path).write_text(json.dumps(dict(sorted(TALLY.items())), indent=1) + "\n", encoding="utf-8")
