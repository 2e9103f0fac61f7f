"""Execute notebooks through papermill: written aside, then renamed into place after the last cell.

An executed notebook gets `metadata.kd_utils`: its seal, and what it was executed for or why it
failed.
"""

import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from traitlets import default
from traitlets.config import Config

from kd_utils.config import notebook_files, project_paths
from kd_utils.store.sealed import write_sealed
from kd_utils.sweep.slots import forks

POLL_SECONDS = 0.2

#: Least time between two writings of a notebook that runs; papermill would write it twice a cell.
SAVE_SECONDS = 5

#: Whose memory is full -> how torch, CUDA, numpy and Python say so. A context or a library that
#: finds no room on a card where others run has words of its own.
FULL = {
    "the GPU's": "OutOfMemoryError|CUDA (error: )?out of memory|ALLOC_FAILED",
    "this machine's": "MemoryError: |can't allocate memory",
}

ENGINE = "kd_utils"  # papermill's own, which writes the notebook less often

#: For a kernel to start or to send an output: papermill's 60 and 4 are too short beside 27 others.
KERNEL_SECONDS = 300


class OwnKernel(AsyncKernelManager):
    """Starts kernels of this very Python: Jupyter would take whatever the first `python3` of its
    folders (JUPYTER_PATH, the user's, the environment's) names, or nothing that exists. In a forked
    trial the kernel is the fork that waits for it.
    """

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.provisioner = forks.provisioner(self)

    @default("kernel_spec_manager")
    def _of_this_python(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])  # what is left is ipykernel's own, for this Python


class NotebookFailed(RuntimeError):
    """A notebook did not run to its end: the `cause` in one line, and whether it was `kept`."""

    def __init__(self, stem: str, cause: str, kept: str = "") -> None:
        super().__init__(f"{stem} failed: {cause}" + f" (notebook kept: {kept})" * bool(kept))
        self.cause, self.kept = cause, bool(kept)


def injected(stem: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Those of `parameters` that notebook `stem` declares and that differ from its defaults."""
    defaults = notebook_files.notebook_defaults(stem)
    return {
        key: value
        for key, value in parameters.items()
        if key in defaults and value != defaults[key]
    }


def execute_stage(
    stem: str, run_dir: Path, parameters: dict[str, Any], about: Callable[[], dict[str, Any]] = dict
) -> None:
    """Execute notebook `stem` into `run_dir`, with those of `parameters` that it declares (see
    `execute`); Ctrl-C reaches the caller.
    """
    values, target = injected(stem, parameters), run_dir / f"{stem}.ipynb"
    os.environ["KD_ROOT"] = str(project_paths.ROOT)
    list(in_thread(lambda: execute(stem, target, values, about)))


def execute(
    stem: str, target: Path, parameters: dict[str, Any], about: Callable[[], dict[str, Any]]
) -> None:
    """Execute notebook `stem` aside, and rename it to `target` when it ran to its end; one that
    failed goes to `TARGET.failed.ipynb`.

    Args:
        parameters: what papermill injects.
        about: called after the last cell; its dict becomes `metadata.kd_utils`. When it raises, the
            notebook has failed.

    Raises:
        NotebookFailed: a cell raised, the kernel died, or `about` raised.
    """
    import papermill

    _register_engine()
    target.parent.mkdir(parents=True, exist_ok=True)
    _failed(target).unlink(missing_ok=True)
    for leftover in target.parent.glob(f".{target.stem}.partial-*"):  # of a killed execution
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    aside = target.with_name(f".{target.stem}.partial-{os.getpid()}.ipynb")
    # papermill formats both paths, so that braces in a folder's name would be taken for fields.
    source, out = (
        str(path).replace("{", "{{").replace("}", "}}")
        for path in (notebook_files.notebook_path(stem), aside)
    )
    try:
        with tempfile.TemporaryDirectory(prefix="kd-", ignore_cleanup_errors=True) as sockets:
            papermill.execute_notebook(
                source,
                out,
                parameters,
                # On a cluster the kernel imports the code that travelled, not the shared folder's.
                cwd=project_paths.CODE_ROOT,
                engine_name=ENGINE,
                autosave_cell_every=SAVE_SECONDS,
                kernel_name="python3",
                progress_bar=sys.stderr.isatty(),
                **kernel_settings(sockets),
                coalesce_streams=True,  # of a progress bar the last state is kept
                # Everything is on disk by then, and torch takes a second to leave by itself.
                shutdown_kernel="immediate",
                extra_arguments=["--log-level=CRITICAL"],
            )
        _finish(aside, target, stem, about())
        aside.unlink()
    except Exception as error:
        cause = _cause(error)
        kept = keep_failure(target, stem, cause, aside)
        where = project_paths.short_path(_failed(target)) if kept else ""
        raise NotebookFailed(target.stem, cause, where) from None


def _register_engine() -> None:
    """Tell papermill of `ENGINE`. It writes a notebook when a cell begins, ends or prints, if
    `SAVE_SECONDS` are over, and at the end: what happened sooner waits for the next of them.
    """
    from papermill.engines import NBClientEngine, papermill_engines

    class SeldomSaved(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, *args: Any, **kwargs: Any) -> None:
            save = nb_man.save

            def save_if_due() -> None:
                if (nb_man.now() - nb_man.last_save_time).total_seconds() >= SAVE_SECONDS:
                    save()

            nb_man.save = save_if_due
            try:
                super().execute_managed_notebook(nb_man, *args, **kwargs)
            finally:
                del nb_man.save  # what follows is the last one

    papermill_engines.register(ENGINE, SeldomSaved)


def kernel_settings(folder: str) -> dict[str, Any]:
    """Which kernel papermill starts, and how it talks to it: patiently, and through sockets in
    `folder`, which only their owner can read.

    By default it uses TCP ports, which are chosen first and bound by the kernel later: of kernels
    that start side by side two may choose the same port, and the later one dies. Ports remain where
    there can be no socket: the path is too long, or the file system has none.
    """
    settings: dict[str, Any] = {"start_timeout": KERNEL_SECONDS, "iopub_timeout": KERNEL_SECONDS}
    settings["kernel_manager_class"] = OwnKernel
    connection = os.path.join(folder, "kernel.json")
    with suppress(OSError, AttributeError), socket.socket(socket.AF_UNIX) as probe:
        probe.bind(f"{connection}-probe")  # a longer name than any of the kernel's sockets
        sockets = {"transport": "ipc", "connection_file": connection}
        settings["config"] = Config(KernelManager=sockets)  # of which OwnKernel is a kind
    return settings


def keep_failure(target: Path, stem: str, cause: str, aside: Path | None = None) -> bool:
    """Keep a failed execution as `TARGET.failed.ipynb`, with the cause in its metadata; False if
    that was not possible, as on a full disk.

    Args:
        aside: what papermill wrote so far. None: the process is gone, and its file is looked for. A
            process must name its own file: one whose sweep was killed may outlive it, while the
            next sweep already runs the same trial.
    """
    asides = [aside] if aside else target.parent.glob(f".{target.stem}.partial-*.ipynb")
    written = list(filter(Path.exists, asides))[:1]
    try:
        # The source notebook stands in for a file that is missing or half written.
        for notebook in (*written, notebook_files.notebook_path(stem)):
            with suppress(ValueError):
                _finish(notebook, _failed(target), stem, {"failure": cause})
                return True
    except OSError:
        return False
    finally:
        for path in written:
            path.unlink(missing_ok=True)
    return False


def in_thread(work: Callable[[], None]) -> Iterator[None]:
    """Run `work` in a thread: yields every moment while it runs and once after its end, and then
    raises what it raised.

    In the main thread papermill catches Ctrl-C itself. From here it reaches the waiting caller, and
    the kernel ends with its parent process.
    """
    result: Future[None] = Future()

    def run() -> None:
        try:
            work()
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while wait([result], POLL_SECONDS).not_done:
        yield
    yield
    result.result()


def _failed(target: Path) -> Path:
    return target.with_name(f"{target.stem}.failed.ipynb")


def _finish(aside: Path, target: Path, stem: str, about: dict[str, Any]) -> None:
    """Write an executed notebook to `target`, with its metadata and its seal."""
    notebook = json.loads(aside.read_text(encoding="utf-8"))
    metadata = notebook["metadata"]
    if "papermill" in metadata:  # papermill wrote paths of this machine, and the name aside
        inside = target.is_relative_to(project_paths.ROOT)
        metadata["papermill"] |= {
            "input_path": f"notebooks/{stem}.ipynb",
            "output_path": project_paths.short_path(target) if inside else target.name,
        }
    for cell in notebook["cells"]:  # of papermill's notes on each cell only the seconds are kept
        if noted := cell["metadata"].pop("papermill", None):
            tags = cell["metadata"].get("tags", [])
            cell["metadata"] = {"tags": tags, "seconds": round(noted["duration"] or 0, 2)}
    metadata["kd_utils"] = about
    write_sealed(target, notebook, "metadata.kd_utils")


def _cause(error: Any) -> str:
    """An error in one line; the traceback in papermill's own text is kept in the notebook."""
    text = f"{type(error).__name__}: {error}"
    if hasattr(error, "ename"):  # raised in a cell
        text = f"{error.ename}: {error.evalue}"
        text = _out_of_memory(text) or text
        if error.ename in ("ModuleNotFoundError", "ImportError"):
            text += f" (in {sys.executable})"
    elif text.startswith("DeadKernelError"):
        text = "the kernel was killed or ran out of memory"
    elif str(error).startswith("Kernel died"):
        text = (
            "the kernel was killed or ran out of memory while it started: see whether "
            f"`{sys.executable} -m ipykernel_launcher --version` answers"
        )
    elif text.startswith("NoSuchKernel"):
        text = f"{sys.executable} has no ipykernel: install it there"
    return " ".join(text.split())[:500]


def _out_of_memory(text: str) -> str:
    """The line for an error that says that memory is full, with the remedy; "" for others."""
    full = next((whose for whose, said in FULL.items() if re.search(said, text)), "")
    size = re.search(r"(?:tried|unable) to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    asked = f" ({size[1]} more did not fit)" if size else ""
    return full and (
        f"out of memory: {full} memory is full{asked}: lower the batch sizes (03: "
        "micro_batch_size, eval_batch_size; 02: batch_tokens, eval_batch_size, "
        "teacher_batch_size), or run fewer trials side by side"
    )
