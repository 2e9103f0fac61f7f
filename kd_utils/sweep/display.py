"""Live progress of a sweep: a table that refreshes in a terminal, plain lines elsewhere."""

import codecs
import sys
import time
import unicodedata
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TextIO

#: Signs of the tables and verdicts -> what a terminal shows that does not have them.
PLAIN = {
    "\u00b1": "+/-",
    "\u2013": "-",
    "\u2212": "-",
    "\u00d7": "x",
    "\u00b7": "-",
    "\u2026": "...",
}


def print_plainly(*streams: TextIO) -> None:
    """Let these streams replace what their encoding does not have, as in ASCII terminals and logs,
    where printing it would end the command.
    """
    codecs.register_error("plain", _plain)
    for stream in streams:
        stream.reconfigure(errors="plain")  # type: ignore[attr-defined]


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for text that an encoding lacks: letters without accents, or a question mark."""
    assert isinstance(error, UnicodeEncodeError)
    shown = ""
    for sign in error.object[error.start : error.end]:
        letters = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
        shown += PLAIN.get(sign) or letters or "?"
    return shown, error.end


def say(text: str) -> None:
    """Print a line to stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Counts the trials of a sweep as they start, are measured, end or fail, and shows it.

    Args:
        planned: trial name -> its number of epochs, for the trials to run now.
        already: how many trials were done before and are not run.
    """

    def __init__(self, planned: dict[str, int], already: int = 0) -> None:
        self.planned, self.already = planned, already
        self.running: dict[str, dict[str, Any]] = {}
        self.done: list[str] = []
        self.failed: list[str] = []
        self.began, self.in_terminal = time.monotonic(), sys.stderr.isatty()

    def shown(self) -> AbstractContextManager[object]:
        """Shows the trials that run in a table while the block runs, if this is a terminal."""
        if not self.in_terminal:
            return nullcontext()
        from rich import console, live

        return live.Live(
            get_renderable=self._table,
            console=console.Console(stderr=True),  # puts above the table what `say` prints
            refresh_per_second=2,
            transient=True,
        )

    def reported(self, trial: str, row: dict[str, Any]) -> None:
        """A trial started, with an empty row, or was measured."""
        if not (self.running or self.done or self.failed):
            self.began = time.monotonic()  # the executor's own start is over now
        self.running[trial] = row
        if row and not self.in_terminal:  # the table shows it
            self._say(trial, self._epoch(trial, row))

    def finished(self, trial: str) -> None:
        self.done.append(trial)
        self.stopped(trial, f"done{_accuracy(self.running.get(trial, {}))}")

    def broke(self, trial: str, cause: str) -> None:
        self.failed.append(trial)
        self.stopped(trial, f"FAILED: {cause}")

    def stopped(self, trial: str, why: str) -> None:
        """A trial no longer runs; one that is neither done nor failed waits to start again."""
        self.running.pop(trial, None)
        self._say(trial, why)

    def summary(self) -> str:
        """The counts of trials and, after the first row, the time left: the time since the first
        trial began, scaled by the epochs to do over those done.
        """
        ended = self.done + self.failed
        counts = (
            f"{self.already + len(self.done)} of {self.already + len(self.planned)} done, "
            f"{len(self.running)} running, {len(self.failed)} failed, "
            f"{len(self.planned) - len(ended) - len(self.running)} waiting"
        )
        epochs = sum(self.planned[trial] for trial in ended)
        epochs += sum(row.get("epoch", 0) for row in self.running.values())
        if not epochs:
            return counts
        scale = (sum(self.planned.values()) - epochs) / epochs
        return f"{counts}, about {self._elapsed(scale)} left"

    def _elapsed(self, scale: float = 1) -> timedelta:  # shown as hours:minutes:seconds
        return timedelta(seconds=round((time.monotonic() - self.began) * scale))

    def _say(self, trial: str, text: str) -> None:
        say(f"{trial}: {text}" if self.in_terminal else f"[{self.summary()}] {trial}: {text}")

    def _epoch(self, trial: str, row: dict[str, Any]) -> str:
        if not row:
            return "starting"
        return f"epoch {row['epoch']:g}/{self.planned[trial]}{_accuracy(row)}"

    def _table(self) -> Any:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        for trial, row in list(self.running.items()):
            table.add_row("", trial, self._epoch(trial, row))
        table.add_row("", self.summary(), f"{self._elapsed()} so far")
        return table


def _accuracy(row: dict[str, Any]) -> str:
    for split in ("validation", "held_out"):  # validation rows are read at the end alone
        if f"{split}_accuracy" in row:
            named = split.replace("_", "-")
            return f", {named} accuracy {100 * row[f'{split}_accuracy']:.1f} %"
    return ""
