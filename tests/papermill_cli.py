"""papermill's own command line with the sweep's settings of kernels, which start side by side in
these tests too; and a notebook that runs so in a process of its own, until it is killed.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]


def start(
    home: Path, run: str, parameters: dict[str, Any], **environment: str
) -> subprocess.Popen[str]:
    """Notebook 03 with HOME/small.yaml and these parameters, into HOME/RUN.ipynb."""
    values = {"run_dir": f"runs/{run}"} | parameters
    command = [
        sys.executable,
        __file__,
        ROOT / "notebooks" / "03_train_student.ipynb",
        home / f"{run}.ipynb",
        "-f",
        home / "small.yaml",
        "--no-progress-bar",
        *(word for key, value in values.items() for word in ("-p", key, value)),
    ]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "KD_ROOT": str(home), "OMP_NUM_THREADS": "1", **environment},
    )


def kill(process: subprocess.Popen[str]) -> None:
    """papermill and its kernel, which would live on for a second, at once."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


if __name__ == "__main__":
    import papermill.cli

    from kd_utils.sweep.execution import kernel_settings

    with tempfile.TemporaryDirectory(prefix="kd-", ignore_cleanup_errors=True) as sockets:
        execute, settings = papermill.cli.execute_notebook, kernel_settings(sockets)
        papermill.cli.execute_notebook = lambda **given: execute(**given | settings)
        papermill.cli.papermill()
