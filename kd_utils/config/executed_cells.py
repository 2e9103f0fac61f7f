"""Which cells of a notebook ran since its config was made, in a kernel that a person drives.

In JupyterLab cells are run in any order, more than once, edited and interrupted. A record holds
only what one whole, unbroken execution of its config made, so a cell that writes first calls
`Config.require_unbroken`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from kd_utils.config import notebook_files


@dataclass
class Run:
    """One execution of a cell; `succeeded` is None while it runs.

    nbval runs a notebook's cells without a `history`, and so do tools that look at variables.
    """

    source: str
    succeeded: bool | None = None
    history: bool = True


#: What cells that write begin with.
GUARD = "require_unbroken()"

#: Every cell that this kernel ran since its first config was made.
_runs: list[Run] = []


class Execution:
    """The cells of a notebook from the one that makes the config on, as they were saved when that
    cell ran, and where in this kernel's history it ran.

    Outside of a kernel (in a script, a test) there is no history, and nothing is refused.

    Args:
        stem: the source notebook; a copy with the same cells counts as it.
        maker: the call that marks the cell that makes the config.
    """

    def __init__(self, stem: str, maker: str) -> None:
        self.file, self.maker = notebook_files.place(stem), maker
        self._first = _record_runs()
        self._stem = stem
        self._earlier, self._cells = self._saved() if self._first is not None else ([], [])

    def _saved(self) -> tuple[list[str], list[str]]:
        """The notebook's cells now: those before the one that makes the config, and the others."""
        cells = [source.strip() for source, _ in notebook_files.read_cells(self._stem).values()]
        cells = [source for source in cells if source]
        made = next((at for at, source in enumerate(cells) if self.maker in source), len(cells))
        return cells[:made], cells[made:]

    def require_as_saved(self) -> None:
        """Refuse if the notebook was saved with other cells since: what is read of the file now is
        not what runs. JupyterLab saves by itself, and runs cells as they were when it was asked to.

        Raises:
            ValueError: says so, and from which cell to run again.
        """
        if self._first is not None and self._saved()[1] != self._cells:
            raise ValueError(
                f"{self.file} was saved with other cells after the config was made: run again from "
                f"the cell with `{self.maker}` on"
            )

    def require_unbroken(self) -> None:
        """Refuse unless each cell, up to the one that runs, ran once after the one before it.

        A cell may run again right after itself: what was interrupted is done anew.

        Raises:
            ValueError: names the first cell that was left out, failed, ran out of turn or is not in
                the notebook, and says from which cell to run again.
        """
        if self._first is None:
            return
        at, before = -1, Run("", True)
        for run in _runs[self._first :]:
            if not run.history and run.source not in self._cells:  # a tool's
                continue
            following = self._cells[at + 1] if at + 1 < len(self._cells) else None
            if run.source == following and before.succeeded:
                at += 1
            elif at < 0 or run.source != self._cells[at]:
                raise ValueError(
                    f"{self._problem(run, at, before)}: nothing is written; run again from the "
                    f"cell with `{self.maker}` on"
                )
            before = run

    def _problem(self, run: Run, at: int, before: Run) -> str:
        """Why `run` may not follow cell `at`, which `before` ran last."""
        if run.source in self._earlier:
            return f"the cell {_named(run.source)} was run after the config was made"
        if run.source not in self._cells:
            return (
                f"the cell {_named(run.source)} is not in {self.file} as it was saved when the "
                "config was made (save the notebook first, or leave that cell out)"
            )
        if self._cells.index(run.source) <= at:
            return f"the cell {_named(run.source)} was run again after later cells"
        if not before.succeeded:
            return f"the cell {_named(before.source)} was not run to its end"
        return f"the cell {_named(self._cells[at + 1])} was left out"


def _named(source: str) -> str:
    """A cell by its first line that is its own."""
    line = next((line for line in source.splitlines() if GUARD not in line), source)
    return f"`{line if len(line) <= 60 else f'{line[:57]}...'}`"


def _record_runs() -> int | None:
    """Record every cell from now on; the number of the one that runs. None: this is no kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return None
    if not _runs:
        # This cell has begun already.
        _runs.append(Run(shell.get_parent()["content"]["code"].strip()))
        shell.events.register("pre_run_cell", _begins)
        shell.events.register("post_run_cell", _ended)
    return len(_runs) - 1


def _begins(info: Any) -> None:
    if not info.silent and info.raw_cell.strip():
        _runs.append(Run(info.raw_cell.strip(), history=info.store_history))


def _ended(result: Any) -> None:
    info = getattr(result, "info", None)
    if info is not None and not info.silent and info.raw_cell.strip():
        _runs[-1].succeeded = result.success
