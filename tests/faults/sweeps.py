"""Real sweeps of the real notebooks, small: started, watched, killed piece by piece, and read
back.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil

LONG = os.environ.get("KD_FAULTS") == "long"  # `make faults`
ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "train_rows": "sst2:24 mmlu:16 gsm8k:16",
    "held_out_rows": 6,
    "validation_rows": "sst2:9 mmlu:8 gsm8k:7",
    "teacher_epochs": 1,
    "shard_examples": 20,
    "epochs": 3,
    "batch_size": 8,
    "micro_batch_size": 3,
    "max_new_tokens": 8,
}
TIMES = (
    "seconds",
    "tok_per_sec",
    "peak_memory_mb",
)  # what differs between two runs of the same trial


class Command:
    """`python -m kd_utils ...` in a process group of its own; every process that it starts can be
    told by its mark.
    """

    def __init__(self, home: Path, *arguments: str | Path, **environment: str) -> None:
        self.mark = f"KD_MARK={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kd_utils", *map(str, arguments)],
            cwd=ROOT,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "KD_ROOT": str(home),
                "OMP_NUM_THREADS": "1",
                name: value,
                **environment,
            },
        )

    def alive(self, kind: str = "") -> list[psutil.Process]:
        """Processes of the command that run: all, or its "kernel"s, the "slot"s' processes that
        fork trials, or Ray's "worker"s while they have a trial.
        """
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and self.mark in _environment(
                    process.pid
                ):
                    words = " ".join(process.cmdline())
                    if (
                        not kind
                        or kind == "kernel"
                        and (process.name() == "kd-kernel" or "ipykernel_launcher" in words)
                        or kind == "slot"
                        and process.name() == "kd-slot"
                        or kind == "worker"
                        and re.match("ray::.*_seed", words)
                    ):  # Ray's agents are "ray::" too
                        found.append(process)
            except psutil.Error:
                continue
        return found

    def wait(self, timeout: float = 1500) -> tuple[int, str]:
        """Status and what it printed."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output

    def kill(self, kind: str) -> bool:
        """SIGKILL to the "driver", or to one "kernel", "slot" or "worker"; False where there is none just
        now.
        """
        if kind == "driver":
            self.process.kill()
            return True
        for victim in self.alive(kind):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                victim.kill()
                return True
        return False

    def orphans(self, within: float) -> list[str]:
        """What still runs so many seconds after the command's end, by name."""
        until = time.monotonic() + within
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.2)
        return [str(process) for process in left]

    def interrupt(self, how: str = "Ctrl-C") -> None:
        """Ctrl-C as a terminal sends it, to the whole process group; or "to the driver" alone; or
        SIGTERM to it.
        """
        send = os.killpg if how == "Ctrl-C" else os.kill
        send(self.process.pid, signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def results(run_dir: Path) -> pd.DataFrame:
    """`results_summary.csv` without what two runs of the same trial differ in."""
    table = pd.read_csv(run_dir / "results_summary.csv")
    return table[[key for key in table if not key.startswith(TIMES)]]


def record(run_dir: Path, trial: str) -> tuple[list[dict], bytes]:
    """A trial's epochs without times, and its predictions' bytes."""
    from kd_utils.records.trial_record import read_record

    epochs = read_record(run_dir / "trials" / trial)["epochs"]
    return (
        [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in epochs],
        (run_dir / "trials" / trial / "predictions.parquet").read_bytes(),
    )
