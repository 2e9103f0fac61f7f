"""A slot's process: it imports what a trial needs, and forks a process for each trial.

    python -m kd_utils.sweep.slots.server DESCRIPTOR

Jobs come and reports go through the pipe with this descriptor; after a trial's last report and its
end comes None. The process ends with the other end of the pipe. A trial runs in a fork of it and
its notebook in another one, so that nothing of a trial stays behind for the next. If a trial's
process is lost, this one ends like it: whoever started it starts another.

Where forks are not safe, or with KD_FORK=0 in the environment, it runs one trial itself, with a
kernel of its own, and ends.
"""

import ast
import gc
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from kd_utils.config import notebook_files, stages
from kd_utils.records import provenance
from kd_utils.sweep.executor import Job, Report, execute_trial
from kd_utils.sweep.slots import drawing, forks

TOLD = 86  # status of a trial's process that gave its last report

#: What a trial's process and its kernel load when they start.
KERNEL = (
    "papermill.engines",
    "ipykernel.kernelapp",
    "ipykernel_launcher",
    "ipykernel.debugger",
    "ipykernel.zmqshell",
    "IPython.core.completerlib",
    "IPython.core.logger",
)

#: What a trial loads after its imports, by the library that its notebook imports.
LATER = {
    "torch": (
        "narwhals._pandas_like.namespace",
        "pandas.io.formats.html",
        "pyarrow.dataset",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.optimization",
    )
}

LOOK_SECONDS = 0.3


def import_all() -> None:
    """Import what notebook 03 and its kernel import. Any error is the kernel's to tell."""
    for node in ast.walk(ast.parse(notebook_files.code_without(stages.TRAIN, ()))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), stages.TRAIN, "exec"), {})
    import papermill.iorw

    later = (name for library in LATER if library in sys.modules for name in LATER[library])
    for name in (*KERNEL, *later):
        with suppress(ModuleNotFoundError):  # another version of a library has other modules
            importlib.import_module(name)
    if conversion := sys.modules.get("transformers.conversion_mapping"):
        # It compiles 900 patterns for the first model that is loaded, and keeps them.
        with suppress(AttributeError):
            conversion.get_checkpoint_conversion_mapping("llama")
    for stem in (stages.TRAIN, stages.CACHE):  # a trial asks for its own code and its cache's
        provenance.code_of(stem)  # it keeps what it has read of each source
    papermill.iorw.load_notebook_node(str(notebook_files.notebook_path(stages.TRAIN)))  # its schema


def can_fork(pipe: Connection) -> bool:
    """Import everything; whether trials can then be forked."""
    if os.environ.get("KD_FORK") == "0" or sys.platform != "linux":
        return False
    before = dict(os.environ)
    try:
        with _ending_with(pipe):
            import_all()
    except Exception:
        return False
    if forks.why_not():
        return False
    forks.set_by_imports.update(os.environ.items() - before.items())
    gc.collect()
    gc.freeze()  # so that no fork copies pages only to look for garbage in them
    return True


def main() -> None:
    forks.show_as("kd-slot")
    pipe: Any = Connection(int(sys.argv[1]))
    if forking := can_fork(pipe):
        drawing.draw_beside(unused=pipe)
    while (asked := _next(pipe)) is not None:
        if not forking:
            _run(pipe, *asked)
            return
        if not (trial := forks.fork("kd-trial")):
            forks.waiting.append(forks.ForkedKernel(unused=pipe))
            _run(pipe, *asked)
            os._exit(TOLD)
        status = os.waitstatus_to_exitcode(os.waitpid(trial, 0)[1])
        if status < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if status != TOLD:
            os._exit(status)
        pipe.send(None)


def _next(pipe: Any) -> tuple[Job, int, dict[str, str]] | None:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def _run(pipe: Any, job: Job, threads: int, environment: dict[str, str]) -> None:
    """Run a trial in this process, and report."""
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=[pipe], daemon=True).start()
    try:
        for report in execute_trial(job, threads):
            pipe.send(report)
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        pipe.send(Report(job.name, "failed", cause=cause))


def _end_with(pipe: Connection) -> None:
    """Wait for the other end to be gone; what comes through the pipe is for others to read."""
    gone = select.poll()
    gone.register(pipe, 0)
    gone.poll()
    os._exit(1)  # the kernel notices by itself, within a second


@contextmanager
def _ending_with(pipe: Connection) -> Iterator[None]:
    """Meanwhile look now and then whether the other end is gone, without a thread."""
    gone = select.poll()
    gone.register(pipe, 0)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1) if gone.poll(0) else None)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS, LOOK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


if __name__ == "__main__":
    main()
