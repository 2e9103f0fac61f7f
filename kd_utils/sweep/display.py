"""Live progress of a sweep: a table that refreshes in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Counts a sweep's trials as they start, report an epoch, end or fail, and shows it.

    Args:
        planned: trial name -> its number of epochs, for the trials to run now.
        already: how many trials were done before and are not run.
    """

    def __init__(self, planned: dict[str, int], already: int = 0) -> None:
        self.planned, self.already = planned, already
        self.running: dict[str, dict[str, Any]] = {}
        self.done: list[str] = []
        self.failed: list[str] = []
        self.began = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                get_renderable=self._table,
                console=Console(stderr=True),
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def started(self, trial: str) -> None:
        if not (self.running or self.done or self.failed):
            self.began = time.monotonic()  # Ray's own start is over now
        self.running[trial] = {}

    def reported(self, trial: str, row: dict[str, Any]) -> None:
        self.running[trial] = row
        self._say(f"{trial}: {self._epoch(trial)}", lasting=False)

    def finished(self, trial: str) -> None:
        self.done.append(trial)
        last = self.running.pop(trial, {})
        self._say(f"{trial}: done{_accuracy(last)}")

    def lost(self, trial: str, why: str) -> None:
        self.running.pop(trial, None)
        self._say(f"{trial}: {why}")

    def broke(self, trial: str, cause: str) -> None:
        self.running.pop(trial, None)
        self.failed.append(trial)
        self._say(f"{trial}: FAILED: {cause}")

    def say(self, text: str) -> None:
        """A line of its own, above the table where there is one."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def seconds_left(self) -> float | None:
        """Time since the first trial, scaled by the epochs still to do over those done; None before
        the first epoch.
        """
        total = sum(self.planned.values())
        ended = sum(self.planned[trial] for trial in self.done + self.failed)
        epochs = ended + sum(row.get("epoch", 0) for row in self.running.values())
        return (time.monotonic() - self.began) * (total - epochs) / epochs if epochs else None

    def summary(self) -> str:
        left = len(self.planned) - len(self.done) - len(self.failed) - len(self.running)
        counts = (
            f"{self.already + len(self.done)} of {self.already + len(self.planned)} done, "
            f"{len(self.running)} running, {len(self.failed)} failed, {left} waiting"
        )
        seconds = self.seconds_left()
        return counts if seconds is None else f"{counts}, about {_duration(seconds)} left"

    def _say(self, text: str, lasting: bool = True) -> None:
        if self._live is None:
            self.say(f"[{self.summary()}] {text}")
        elif lasting:
            self.say(text)

    def _epoch(self, trial: str) -> str:
        row = self.running[trial]
        if not row:
            return "starting"
        return f"epoch {row['epoch']}/{self.planned[trial]}{_accuracy(row)}"

    def _table(self) -> Any:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for trial in self.running:
            table.add_row("", trial, self._epoch(trial))
        table.add_row("", self.summary(), f"{_duration(time.monotonic() - self.began)} so far")
        return table


def _accuracy(row: dict[str, Any]) -> str:
    value = row.get("validation_accuracy")
    return "" if value is None else f", validation accuracy {100 * value:.1f} %"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
