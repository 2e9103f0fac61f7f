"""Notebooks executed through papermill: beside their place, then renamed; a failed one is kept with its traceback.

An executed notebook gets `metadata.kd_utils`: what it was executed for, or why it failed, and its seal.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import config, records
from . import parameters as parameter_files
from .sealed import write_sealed

POLL_SECONDS = 0.2


class NotebookFailed(RuntimeError):
    """A notebook that did not run to its end; the message says which cell's error, and where the notebook is kept."""


def code_root() -> Path:
    """The folder of the code that runs: the checkout, or on a cluster what Ray unpacked on this node."""
    return Path(config.__file__).resolve().parents[1]


def injected(stem: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Those of `parameters` that notebook `stem` declares and that differ from its defaults."""
    defaults = parameter_files.notebook_defaults(stem)
    return {key: value for key, value in parameters.items() if key in defaults and value != defaults[key]}


def execute(stem: str, target: Path, parameters: dict[str, Any], about: Callable[[], dict[str, Any]], *,
            progress_bar: bool = False) -> None:
    """Execute notebook `stem`, aside, and rename it to `target` when it ran to its end.

    Args:
        target: where the executed notebook goes; a failed one goes to `<target's stem>.failed.ipynb` beside it.
        parameters: what papermill injects.
        about: called after the last cell; its dict becomes `metadata.kd_utils`. A ValueError from it is a failure too.

    Raises:
        NotebookFailed: a cell raised, the kernel died, or `about` refused.
    """
    import papermill

    failed = target.with_name(f"{target.stem}.failed.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    for leftover in target.parent.glob(f".{target.stem}.partial-*"):  # of an execution that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    aside = target.with_name(f".{target.stem}.partial-{os.getpid()}.ipynb")
    try:
        # The kernel starts beside the code, so that on a cluster it imports what travelled, not the shared folder's.
        papermill.execute_notebook(parameter_files.notebook_path(stem), aside, parameters, cwd=code_root(),
                                   kernel_name="python3", progress_bar=progress_bar,
                                   coalesce_streams=True,  # of a progress bar the last state is kept
                                   # All is on disk by then, and torch takes a second to leave by itself.
                                   shutdown_kernel="immediate",
                                   extra_arguments=["--log-level=CRITICAL"])
        _finish(aside, target, stem, about())
    except Exception as error:
        cause = _cause(error)
        keep_failure(target, stem, cause)
        raise NotebookFailed(f"{target.stem} failed: {cause} (notebook kept: {config.short_path(failed)})") from None


def keep_failure(target: Path, stem: str, cause: str) -> None:
    """Put what there is of a failed execution to `<target's stem>.failed.ipynb`, with the cause in its metadata."""
    failed = target.with_name(f"{target.stem}.failed.ipynb")
    if failed.exists():
        return
    # Nothing aside: it failed before papermill wrote anything, so the source stands for it.
    aside = next(target.parent.glob(f".{target.stem}.partial-*.ipynb"), None) or parameter_files.notebook_path(stem)
    try:
        _finish(aside, failed, stem, {"failure": cause})
    except ValueError:  # killed while papermill wrote it
        _finish(parameter_files.notebook_path(stem), failed, stem, {"failure": cause})
    if aside.name.startswith("."):
        aside.unlink(missing_ok=True)


def in_thread(work: Callable[[], None], while_waiting: Callable[[], None] = lambda: None) -> None:
    """Run `work` in a thread and call `while_waiting` meanwhile; what `work` raised is raised here.

    papermill in the main thread takes Ctrl-C for itself; from a thread it reaches the waiting caller, and the kernel
    ends with its parent process.
    """
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        while_waiting()
    while_waiting()
    if raised:
        raise raised[0]


def execute_trial(trial: dict[str, Any], run_dir: Path, threads: int, report: Callable[[dict[str, Any]], None],
                  scratch: Path) -> None:
    """One trial: notebook 03 executed into `RUN_DIR/trials`, every epoch it tells of handed to `report`.

    Args:
        trial: its entry of `sweep.json`, with `parameters`, what is injected.
        threads: for torch and what is below it, so that trials side by side do not fight for cores.
        scratch: a folder of this process, for the file that the notebook reports its epochs to.

    Raises:
        NotebookFailed: it did not run to its end, or did not leave the record that the plan expects.
    """
    stem, folder = "03_train_student", run_dir / "trials" / trial["trial"]

    def about() -> dict[str, Any]:
        metrics = records.read_record(folder)
        if metrics["config_hash"] != trial["config_hash"]:
            raise ValueError(f"its record has config {metrics['config_hash']}, the plan {trial['config_hash']}")
        return {"trial": trial["trial"], "config_hash": trial["config_hash"], "record": metrics["checksums"]["sha256"]}

    progress = scratch / f"{trial['trial']}.epochs.jsonl"
    progress.unlink(missing_ok=True)
    os.environ.update(KD_PROGRESS=str(progress), KD_ROOT=str(config.ROOT), TOKENIZERS_PARALLELISM="false",
                      OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    rows = _new_rows(progress)
    in_thread(lambda: execute(stem, folder.with_name(f"{trial['trial']}.ipynb"), trial["parameters"], about),
              while_waiting=lambda: [report(row) for row in next(rows)])


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
        inside = target.is_relative_to(config.ROOT)
        metadata["papermill"] |= {"input_path": f"notebooks/{stem}.ipynb",
                                  "output_path": config.short_path(target) if inside else target.name}
    metadata["kd_utils"] = about
    write_sealed(target, notebook, "metadata.kd_utils")
    if aside.name.startswith("."):
        aside.unlink()


def _cause(error: Exception) -> str:
    """An error in one line; papermill's own text holds the whole traceback, which the notebook keeps."""
    if hasattr(error, "ename"):
        text = f"{error.ename}: {error.evalue}"
    elif type(error).__name__ == "DeadKernelError":
        text = "the kernel died: killed, or out of memory"
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]
