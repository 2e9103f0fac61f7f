"""Live progress of a sweep: a table that refreshes in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any


def say(text: str) -> None:
    """Print a line to stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Counts the trials of a sweep as they start, report an epoch, end or fail, and shows it.

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

    def started(self, trial: str) -> None:
        if not (self.running or self.done or self.failed):
            self.began = time.monotonic()  # the executor's own start is over now
        self.running[trial] = {}

    def reported(self, trial: str, row: dict[str, Any]) -> None:
        self.running[trial] = row
        if self._live is None:  # the table shows it
            self._line(trial, self._epoch(trial))

    def finished(self, trial: str) -> None:
        self.done.append(trial)
        self._line(trial, f"done{_accuracy(self.running.pop(trial, {}))}")

    def restarted(self, trial: str, number: int, most: int) -> None:
        self.running.pop(trial, None)
        self._line(trial, f"its process or machine was lost; starting again ({number} of {most})")

    def broke(self, trial: str, cause: str) -> None:
        self.running.pop(trial, None)
        self.failed.append(trial)
        self._line(trial, f"FAILED: {cause}")

    def say(self, text: str) -> None:
        """Print a line of its own, above the table where there is one."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            say(text)

    def seconds_left(self) -> float | None:
        """Time since the first trial, scaled by the epochs to do over those done; None before the
        first epoch.
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

    def _line(self, trial: str, text: str) -> None:
        self.say(f"{trial}: {text}" if self._live else f"[{self.summary()}] {trial}: {text}")

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


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))  # shown as hours:minutes:seconds
