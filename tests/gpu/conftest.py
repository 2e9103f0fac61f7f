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

import pytest
import torch

DEVICE = torch.device(
    os.environ.get("KD_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests compute."""
    return DEVICE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "a rehearsal"
    terminalreporter.write_line(f"tests/gpu ran on {DEVICE} ({name}), torch {torch.__version__}")
