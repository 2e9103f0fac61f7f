"""Tests of what a GPU computes. Each one runs on `cuda` where torch sees a GPU, and on `cpu`
otherwise, so that a machine without a GPU rehearses every line:

    python -m pytest tests/gpu                      # on the GPU, if there is one
    KD_TEST_DEVICE=cpu python -m pytest tests/gpu   # rehearsed on a machine with a GPU

No test here is skipped, on either device. They need neither Ray nor a network, a Git history, real
data or records, and nothing beyond torch, transformers, pytest and what executes a notebook.

Errors are ||found - expected|| / ||expected|| on random inputs, `expected` in float64 on the CPU;
`NEAR` has the largest allowed one by precision. A NaN is never near.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from trials import Trials

from kd_utils.models.devices import choose_device

DEVICE = torch.device(
    os.environ.get("KD_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests compute, as notebooks choose it."""
    return choose_device(str(DEVICE))


@pytest.fixture(scope="session")
def trials(
    tmp_path_factory: pytest.TempPathFactory, device: torch.device
) -> Iterator[SimpleNamespace]:
    """Two trials side by side in a small project (`home`), while other tests compute: one is left
    alone, the other killed after a stretch and started again. `done` waits for both.
    """
    started = Trials(tmp_path_factory.mktemp("trials"), str(device))
    with ThreadPoolExecutor(2) as pool:
        try:
            runs = [pool.submit(started.whole), pool.submit(started.killed_and_resumed)]
            yield SimpleNamespace(home=started.home, done=lambda: [run.result() for run in runs])
        finally:
            started.stop()


@pytest.fixture(scope="session", autouse=True)
def trials_start_first(request: pytest.FixtureRequest) -> None:
    alone = "PYTEST_XDIST_WORKER" not in os.environ  # each process has all items
    if alone and any("trials" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("trials")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What became of the tests in this folder, in one line."""
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "a rehearsal"
    counts = {
        outcome: sum(
            "tests/gpu/" in report.nodeid for report in terminalreporter.getreports(outcome)
        )
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if any(counts.values()):
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        terminalreporter.write_line(
            f"tests/gpu on {DEVICE} ({name}), torch {torch.__version__}: {said}"
        )
