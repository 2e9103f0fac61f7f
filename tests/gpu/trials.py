"""A small project, and notebook 03 executed in it by kernels of their own."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
from papermill_cli import kill, start
from small_project import small_project

from kd_utils.config import notebook_files

TRIAL = "combined_seed0"  # all the terms, and a projector that trains
SECONDS = 300  # for a trial of a few seconds


class Trials:
    """The project, with a cache made on the device. The student drops attention weights, so that
    random numbers count, and answers are generated after each stretch.

    Args:
        home: the project's root.
        device: 03's parameter.
    """

    def __init__(self, home: Path, device: str) -> None:
        self.home, self._processes = home, list[subprocess.Popen[str]]()
        self._stopped = False
        rows = {"train_rows": "sst2:16 gsm8k:8", "validation_rows": "sst2:4 gsm8k:2"}
        project = small_project(home, device=device, **rows)
        project.cache()
        declared = notebook_files.notebook_defaults("03_train_student")
        sizes = {"batch_size": 6, "micro_batch_size": 4, "max_new_tokens": 8}
        values = project.parameters | sizes
        (home / "small.yaml").write_text(
            "\n".join(f"{key}: {value}" for key, value in values.items() if key in declared)
        )
        config = home / "student" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.3}))

    def _start(self, run: str) -> subprocess.Popen[str]:
        assert not self._stopped
        how = {
            "distill_type": "combined",
            "epochs": 8,
            "lr_schedule": "cosine",
            "warmup_ratio": 0.2,
            "average_last": 1.0,
        }
        self._processes.append(start(self.home, run, how, KD_DETERMINISTIC="1"))
        return self._processes[-1]

    def _end(self, process: subprocess.Popen[str]) -> None:
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, output[-3000:]

    def whole(self) -> None:
        """A trial that nobody disturbs, as `runs/whole`."""
        self._end(self._start("whole"))

    def killed_and_resumed(self) -> None:
        """The same trial as `runs/killed`: killed when its first state is saved, started again."""
        process = self._start("killed")
        saved = self.home / "artifacts" / "checkpoints" / "killed" / f"{TRIAL}.json"
        while not saved.exists():
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.02)
        kill(process)
        assert not (self.home / "runs" / "killed" / "trials" / TRIAL).exists()
        self._end(self._start("killed"))

    def stop(self) -> None:
        """End what still runs, if a test failed before."""
        self._stopped = True
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                if process.poll() is None:
                    kill(process)
