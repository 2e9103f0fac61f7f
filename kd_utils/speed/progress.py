"""The record of notebook 05: on disk after every section, and its time limit."""

import time
from typing import Any

import torch

from kd_utils.config import project_paths, stages
from kd_utils.records import provenance
from kd_utils.store import files


class SpeedRecord:
    """What notebook 05 has measured so far, in `RUN_DIR/speed.json`.

    A section begins with `begins`, which writes the file: a notebook that is killed leaves all
    sections before the one that its file says is "running". The clock of the time limit starts when
    the record is made.

    Attributes:
        measured: values by key, at the top level of the file.
        limits: the best that is possible, for some of these keys.
        tables: what else the file holds, by name.
        left_out: what the time limit left out.
    """

    def __init__(self, config: stages.SpeedConfig, device: torch.device) -> None:
        self.file = project_paths.project_path(config.run_dir) / "speed.json"
        self.measured: dict[str, float] = {}
        self.limits: dict[str, float] = {}
        self.tables: dict[str, Any] = {}
        self.left_out: list[str] = []
        self._limit, self._start, self._running = config.seconds, time.perf_counter(), ""
        self._config = config
        self._seconds: dict[str, float] = {}
        ran = provenance.environment()
        self._about = {
            "device": str(device),
            "threads": torch.get_num_threads(),
            "shapes": config.shapes,
            "config": config.model_dump(),
            "commit": ran["git_commit"],
            "machine": ran["device"],
            "versions": ran["versions"],
        }

    @property
    def has_time(self) -> bool:
        """Whether a section may still begin: always, if there is no limit."""
        return not self._limit or time.perf_counter() - self._start < self._limit

    def begins(self, section: str) -> bool:
        """End the section before, write the file, and say whether there is time for this one."""
        self._end_section()
        begins = self.has_time
        if begins:
            self._running, self._began = section, time.perf_counter()
        else:
            self.left_out.append(section)
        self.write()
        return begins

    def finish(self) -> None:
        """End the last section and write the whole record."""
        self._end_section()
        self.write(complete=True)

    def _end_section(self) -> None:
        if self._running:
            self._seconds[self._running] = time.perf_counter() - self._began
        self._running = ""

    def write(self, *, complete: bool = False) -> None:
        """Write what is measured so far, unless cells were run out of turn."""
        self._config.require_unbroken()
        record = {
            **self.measured,
            **self.tables,
            "limits": self.limits,
            "section_seconds": self._seconds,
            "running": self._running,
            "left_out": self.left_out,
            "complete": complete,
            **self._about,
        }
        files.write_json(self.file, record)
