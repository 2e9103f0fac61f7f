"""Notebooks executed through papermill: beside their place, then renamed; a failed one is kept with
its traceback.

An executed notebook gets `metadata.kd_utils`: what it was executed for, or why it failed, and its
seal.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from traitlets.config import Config

from kd_utils.cluster.machines import unlike_the_sweeps
from kd_utils.config import parameter_files, project_paths
from kd_utils.records import trial_record
from kd_utils.records.provenance import changed_files, code_of
from kd_utils.store.sealed import write_sealed

POLL_SECONDS = 0.2

# for a kernel to start, or to send an output: papermill's 60 and 4 are short beside 27 others
KERNEL_SECONDS = 300


class NotebookFailed(RuntimeError):
    """A notebook that did not run to its end: the `cause` in one line, and whether the notebook is
    `kept`.
    """

    def __init__(self, stem: str, cause: str, kept: str = "") -> None:
        super().__init__(f"{stem} failed: {cause}" + f" (notebook kept: {kept})" * bool(kept))
        self.cause, self.kept = cause, bool(kept)


def injected(stem: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Those of `parameters` that notebook `stem` declares and that differ from its defaults."""
    defaults = parameter_files.notebook_defaults(stem)
    return {
        key: value
        for key, value in parameters.items()
        if key in defaults and value != defaults[key]
    }


def execute(
    stem: str,
    target: Path,
    parameters: dict[str, Any],
    about: Callable[[], dict[str, Any]],
    *,
    progress_bar: bool = False,
) -> None:
    """Execute notebook `stem`, aside, and rename it to `target` when it ran to its end.

    Args:
        target: where the executed notebook goes; a failed one goes to `<target's
            stem>.failed.ipynb` beside it.
        parameters: what papermill injects.
        about: called after the last cell; its dict becomes `metadata.kd_utils`. A ValueError from
            it is a failure too.

    Raises:
        NotebookFailed: a cell raised, the kernel died, or `about` refused.
    """
    import papermill

    failed = target.with_name(f"{target.stem}.failed.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    for leftover in target.parent.glob(
        f".{target.stem}.partial-*"
    ):  # of an execution that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    aside = target.with_name(f".{target.stem}.partial-{os.getpid()}.ipynb")
    sockets = tempfile.TemporaryDirectory(prefix="kd-", ignore_cleanup_errors=True)
    try:
        # The kernel starts beside the code, so that on a cluster it imports what travelled, not the
        # shared folder's. papermill formats both paths, so that braces in a folder's name would be
        # taken for fields.
        source, out = (
            str(path).replace("{", "{{").replace("}", "}}")
            for path in (parameter_files.notebook_path(stem), aside)
        )
        papermill.execute_notebook(
            source,
            out,
            parameters,
            cwd=project_paths.CODE_ROOT,
            kernel_name="python3",
            progress_bar=progress_bar,
            **kernel_settings(sockets.name),
            coalesce_streams=True,  # of a progress bar the last state is kept
            # All is on disk by then, and torch takes a second to leave by itself.
            shutdown_kernel="immediate",
            extra_arguments=["--log-level=CRITICAL"],
        )
        _finish(aside, target, stem, about())
    except Exception as error:
        cause = _cause(error)
        kept = keep_failure(target, stem, cause, aside)
        raise NotebookFailed(
            target.stem, cause, project_paths.short_path(failed) if kept else ""
        ) from None
    finally:
        sockets.cleanup()


def kernel_settings(folder: str) -> dict[str, Any]:
    """How papermill talks to its kernel: with patience, and through sockets in `folder`, which only
    their owner reads.

    TCP ports, the default, are chosen first and bound by the kernel later: of kernels that start
    side by side on a machine two may choose one port, and the later dies. Where there can be no
    socket, it is left at ports: the path may be too long, or the file system of a kind that has
    none.
    """
    patience = {"start_timeout": KERNEL_SECONDS, "iopub_timeout": KERNEL_SECONDS}
    connection = os.path.join(folder, "kernel.json")
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{connection}-probe")  # longer than theirs
    except (OSError, AttributeError):
        return patience
    return {
        **patience,
        "config": Config(KernelManager={"transport": "ipc", "connection_file": connection}),
    }


def keep_failure(target: Path, stem: str, cause: str, aside: Path | None = None) -> bool:
    """Put what there is of a failed execution to `<target's stem>.failed.ipynb`, with the cause in
    its metadata.

    Args:
        aside: where papermill wrote, as far as it came; None: of a process that is gone, so it is
            looked for.

    Returns:
        Whether that could be done: the disk may be full.
    """
    failed = target.with_name(f"{target.stem}.failed.ipynb")
    # Nothing aside: it failed before papermill wrote anything, so the source stands for it.
    source = parameter_files.notebook_path(stem)
    # One's own alone: a process whose sweep was killed may outlive it, and the next sweep's be at
    # this trial already.
    aside = next(
        (
            target.parent.glob(f".{target.stem}.partial-*.ipynb")
            if aside is None
            else filter(Path.exists, [aside])
        ),
        source,
    )
    try:
        try:
            _finish(aside, failed, stem, {"failure": cause})
        except ValueError:  # killed while papermill wrote it
            _finish(source, failed, stem, {"failure": cause})
    except OSError:
        return False
    finally:
        if aside != source:
            aside.unlink(missing_ok=True)
    return True


class InThread:
    """Work in a thread of its own, waited for in steps.

    papermill in the main thread takes Ctrl-C for itself; from a thread it reaches the waiting
    caller, and the kernel ends with its parent process.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._raised = work, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._raised = error

    def goes_on(self) -> bool:
        """Wait for a moment; whether the work goes on. What it raised is raised here."""
        self._thread.join(POLL_SECONDS)
        if not self._thread.is_alive() and self._raised:
            raise self._raised
        return self._thread.is_alive()


def in_thread(work: Callable[[], None]) -> None:
    """Run `work` in a thread and wait for its end (see `InThread`)."""
    running = InThread(work)
    while running.goes_on():
        pass


def execute_trial(
    trial: dict[str, Any], run_dir: Path, threads: int, seen: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """One trial: notebook 03 executed into `RUN_DIR/trials`.

    Args:
        trial: its entry of `sweep.json`, with `parameters`, what is injected, and `code`, which it
            must be.
        threads: for torch and what is below it, so that trials side by side do not fight for cores.
        seen: files that must be here as the sweep saw them (`unlike_the_sweeps`).

    Yields:
        Each epoch's metrics, as the notebook tells of it.

    Raises:
        NotebookFailed: it did not run to its end, or did not leave the record that the plan
            expects.
    """
    stem, folder = "03_train_student", run_dir / "trials" / trial["trial"]
    target = folder.with_name(f"{trial['trial']}.ipynb")

    def about() -> dict[str, Any]:
        metrics = trial_record.read_record(folder)
        if metrics["config_hash"] != trial["config_hash"]:
            raise ValueError(
                f"its record has config {metrics['config_hash']}, the plan {trial['config_hash']}"
            )
        if files := changed_files(
            metrics.get("code", {}), trial["code"]
        ):  # it may have run the one and noted the other
            raise ValueError(f"the code changed while it ran ({files}): run the same command again")
        return {
            "trial": trial["trial"],
            "config_hash": trial["config_hash"],
            "record": metrics["checksums"]["sha256"],
        }

    problem = unlike_the_sweeps(seen)
    if files := changed_files(code_of(stem), trial["code"]):
        problem = f"the code changed since the sweep began ({files}): run the same command again"
    if problem:  # kept where the sweep is: here may be another folder
        raise NotebookFailed(target.stem, problem)
    with tempfile.TemporaryDirectory(prefix="kd-") as scratch:
        progress = Path(scratch) / "epochs.jsonl"
        os.environ.update(
            KD_PROGRESS=str(progress),
            KD_ROOT=str(project_paths.ROOT),
            TOKENIZERS_PARALLELISM="false",
            OMP_NUM_THREADS=str(threads),
            MKL_NUM_THREADS=str(threads),
        )
        rows = _new_rows(progress)
        running = InThread(lambda: execute(stem, target, trial["parameters"], about))
        goes_on = True
        while goes_on:
            goes_on = running.goes_on()
            for row in next(
                rows
            ):  # no `yield from`: Ray sends to its generators, and a list takes nothing
                yield row


def _new_rows(path: Path) -> Iterator[list[dict[str, Any]]]:
    """At each step, the JSON lines that were added to the file since the last."""
    read = 0
    while True:
        data = path.read_bytes()[read:] if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        read += len(whole)
        yield [json.loads(line) for line in whole.splitlines()]


def _finish(aside: Path, target: Path, stem: str, about: dict[str, Any]) -> None:
    """Give an executed notebook its metadata and its seal, and rename it into place."""
    notebook = json.loads(aside.read_text(encoding="utf-8"))
    metadata = notebook["metadata"]
    if "papermill" in metadata:  # papermill wrote this machine's paths, and the name aside
        inside = target.is_relative_to(project_paths.ROOT)
        metadata["papermill"] |= {
            "input_path": f"notebooks/{stem}.ipynb",
            "output_path": project_paths.short_path(target) if inside else target.name,
        }
    metadata["kd_utils"] = about
    write_sealed(target, notebook, "metadata.kd_utils")
    if aside.name.startswith("."):
        aside.unlink()


def _cause(error: Exception) -> str:
    """An error in one line; papermill's own text holds the whole traceback, which the notebook
    keeps.
    """
    if hasattr(error, "ename"):
        text = f"{error.ename}: {error.evalue}"
        if (
            "OutOfMemory" in error.ename
            or error.ename.endswith("MemoryError")
            or "can't allocate memory" in text
        ):
            text = f"out of memory, lower micro_batch_size and eval_batch_size ({text})"
    elif type(error).__name__ == "DeadKernelError" or str(error).startswith(
        "Kernel died"
    ):  # or while it started
        text = "the kernel died: killed, or out of memory"
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]
