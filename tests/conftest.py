"""What all tests share: where the real data is, no network, one thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from stubs import run_dir, stub_notebooks  # noqa: F401 (fixtures of many tests)

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
torch.set_num_threads(
    1
)  # tiny models: a second thread costs more than it gives, above all on a busy machine


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout (or KD_SHARED): real data and tokenizers, not part of the project."""
    folder = Path(os.environ.get("KD_SHARED") or ROOT.parent / "shared")
    if not (folder / "data").is_dir():
        message = "needs the real data and tokenizers in ../shared (or KD_SHARED), which are not part of the project"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return folder
