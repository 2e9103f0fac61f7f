"""Where a trial ran: code, versions and kind of machine, without a host's name or a path of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from kd_utils.config import project_paths

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "numpy",
    "pyarrow",
    "pandas",
    "papermill",
    "ray",
)


def environment() -> dict[str, Any]:
    """Where a trial ran: `git_commit`, `versions`, `device`. No host name and no path of the
    machine is in it.
    """
    device: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
    torch = sys.modules.get(
        "torch"
    )  # this module stays light: torch is described where it is in use already
    if torch is not None:
        device["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            device["gpu"] = torch.cuda.get_device_name()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"git_commit": git_commit(), "versions": versions, "device": device}


def git_commit() -> str:
    """Commit of the code, `-dirty` where code or notebooks differ from it; "unknown" outside of a
    git checkout.
    """
    if travelled := os.environ.get(
        "KD_COMMIT"
    ):  # on a cluster the code travels without its history
        return travelled
    root = project_paths.CODE_ROOT

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not (root / ".git").exists():
            return "unknown"
        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "kd_utils", "notebooks") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
