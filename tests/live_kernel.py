"""A notebook in a live kernel, driven as a person in JupyterLab drives it: any cell, in any order,
again, changed, interrupted.
"""

from __future__ import annotations

import json
import os
import queue
import tempfile
import time
from types import TracebackType
from typing import Any

from jupyter_client.manager import KernelManager

from kd_utils.config.notebook_files import notebook_path
from kd_utils.config.project_paths import CODE_ROOT


class Lab:
    """One kernel, and the code cells of one source notebook.

    Args:
        stem: the notebook.
        parameters: what the user changes in its parameters cell.
        environment: further variables of the kernel's environment.
    """

    def __init__(self, stem: str, parameters: dict[str, Any], **environment: str) -> None:
        cells = json.loads(notebook_path(stem).read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        self.sources = ["".join(cell["source"]) for cell in code]
        tags = [cell["metadata"].get("tags", []) for cell in code]
        self.parameters_cell = tags.index(["parameters"])
        self.parameters = parameters
        self._sockets = tempfile.TemporaryDirectory(prefix="kd-", ignore_cleanup_errors=True)
        self._manager = KernelManager(
            transport="ipc", connection_file=os.path.join(self._sockets.name, "kernel.json")
        )
        self._manager.start_kernel(
            cwd=CODE_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=120)

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        self._sockets.cleanup()

    def number(self, text: str) -> int:
        """The number of the one code cell that contains this text."""
        [found] = [number for number, source in enumerate(self.sources) if text in source]
        return found

    def execute(self, source: str, interrupt_at: str = "") -> tuple[str, str]:
        """Run a source; returns what it printed and showed, and its error in one line, or "".

        Args:
            interrupt_at: interrupt the kernel once this has been printed.
        """
        asked = self._client.execute(source)
        shown, error, end = "", "", time.monotonic() + 300
        while time.monotonic() < end:
            try:
                message = self._client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                shown += content["text"]
                if interrupt_at and interrupt_at in shown:
                    self._manager.interrupt_kernel()
                    interrupt_at = ""
            elif kind == "error":
                error = f"{content['ename']}: {content['evalue']}"
            elif kind == "status" and content["execution_state"] == "idle":
                return shown, error
        raise TimeoutError(source)

    def cell(self, number: int, interrupt_at: str = "") -> tuple[str, str]:
        """Run the cell with this number; the parameters cell has the user's changes at its end."""
        source = self.sources[number]
        if number == self.parameters_cell:
            changes = (f"{key} = {value!r}" for key, value in self.parameters.items())
            source = "\n".join([source, *changes])
        return self.execute(source, interrupt_at)

    def run(self, first: int = 0, last: int | None = None) -> str:
        """Run cells in their order; the first error, with its cell's number, ends it."""
        for number in range(len(self.sources))[first : None if last is None else last + 1]:
            if error := self.cell(number)[1]:
                return f"cell {number}: {error}"
        return ""
