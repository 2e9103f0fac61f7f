"""Notebooks executed through papermill: what is kept of one that fails, and how papermill talks to
its kernel.
"""

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client import LocalPortCache

from kd_utils.config import project_paths
from kd_utils.sweep import execution


@pytest.fixture
def notebook(stub_notebooks, monkeypatch):
    """Where notebook 04 goes, and a function that gives its stub another last cell."""
    monkeypatch.setattr(project_paths, "CODE_ROOT", Path(__file__).parents[1])

    def does(source):
        path = stub_notebooks / "notebooks" / "04_analyse_results.ipynb"
        document = nbformat.read(path, 4)
        document.cells[-1].source = source
        nbformat.write(document, path)

    return stub_notebooks / "runs" / "stub" / "04_analyse_results.ipynb", does


def test_a_failed_notebook_is_kept_with_its_cause_and_no_place_is_taken(notebook):
    target, _ = notebook
    with pytest.raises(
        execution.NotebookFailed,
        match="04_analyse_results failed: ValueError: AnalysisConfig: name",
    ):
        execution.execute("04_analyse_results", target, {"name": "../up"}, dict)
    assert [path.name for path in target.parent.iterdir()] == ["04_analyse_results.failed.ipynb"]
    assert "Traceback" in (target.parent / "04_analyse_results.failed.ipynb").read_text()


def test_one_that_fails_does_not_take_what_another_process_writes(notebook):
    """A worker whose sweep was killed may outlive it, and the next sweep be at its trial
    already.
    """
    target, does = notebook
    others = target.with_name(f".{target.stem}.partial-1.ipynb")
    does(
        f"import pathlib; pathlib.Path({str(others)!r}).write_text('others'); raise "
        f"ValueError('late')"
    )
    with pytest.raises(execution.NotebookFailed, match="ValueError: late"):
        execution.execute("04_analyse_results", target, {}, dict)
    assert others.read_text() == "others"
    assert "ValueError: late" in target.with_name(f"{target.stem}.failed.ipynb").read_text()


def test_what_a_notebook_printed_is_on_disk_while_it_runs_and_after_its_kernel_died(
    notebook, monkeypatch
):
    target, does = notebook
    monkeypatch.setattr(execution, "SAVE_SECONDS", 0.5)
    does(
        "import os, pathlib, time\n"
        "time.sleep(0.6)\n"
        "print('so', 'far')\n"
        f"[aside] = pathlib.Path({str(target.parent)!r}).glob('.*.partial-*.ipynb')\n"
        "until = time.monotonic() + 30\n"
        "while 'so far' not in aside.read_text() and time.monotonic() < until:\n"
        "    time.sleep(0.1)\n"
        "print('found' if time.monotonic() < until else 'missing')\n"
        "time.sleep(2)\n"
        "os.kill(os.getpid(), 9)"
    )
    with pytest.raises(execution.NotebookFailed, match="the kernel was killed"):
        execution.execute("04_analyse_results", target, {}, dict)
    kept = target.with_name(f"{target.stem}.failed.ipynb")
    shown = nbformat.read(kept, 4).cells[-1].outputs
    assert "".join(output.text for output in shown) == "so far\nfound\n"


def test_kernels_that_start_side_by_side_take_no_port_of_each_other(notebook, monkeypatch):
    target, does = notebook
    does(
        "from ipykernel.connect import "
        "get_connection_info\nget_connection_info(unpack=True)['transport']"
    )
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as others:  # which another kernel chose too, and bound first
        monkeypatch.setattr(
            LocalPortCache, "find_available_port", lambda *_: others.getsockname()[1]
        )
        execution.execute("04_analyse_results", target, {}, dict)
    [shown] = nbformat.read(target, 4).cells[-1].outputs
    assert shown.data["text/plain"] == "'ipc'"


def test_a_kernel_that_dies_while_it_starts_is_told_like_one_that_dies_later(notebook, monkeypatch):
    target, _ = notebook
    monkeypatch.setattr(execution, "kernel_settings", lambda folder: {})  # over ports
    with socket.create_server(("127.0.0.1", 0)) as others:
        monkeypatch.setattr(
            LocalPortCache, "find_available_port", lambda *_: others.getsockname()[1]
        )
        with pytest.raises(
            execution.NotebookFailed,
            match="04_analyse_results failed: the kernel was killed or ran",
        ):
            execution.execute("04_analyse_results", target, {}, dict)


def test_a_folder_too_deep_for_sockets_does_not_stop_a_notebook(notebook, tmp_path, monkeypatch):
    target, does = notebook
    does("2 + 2")
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    execution.execute("04_analyse_results", target, {}, dict)
    assert nbformat.read(target, 4).cells[-1].outputs[0].data["text/plain"] == "4"
    assert list(deep.iterdir()) == []


ALLOCATES = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"
)


@pytest.mark.parametrize(
    "name, message, whose, size",
    [
        ("OutOfMemoryError", f"{ALLOCATES} of which 1 GiB is free.\nSee", "the GPU's", "2.50 GiB"),
        (
            "RuntimeError",
            f"train-00000.parquet: OutOfMemoryError: {ALLOCATES}",
            "the GPU's",
            "2.50 GiB",
        ),
        ("AcceleratorError", "CUDA error: out of memory\nCompile with", "the GPU's", ""),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "the GPU's", ""),
        (
            "RuntimeError",
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 4096 bytes. Error code 12",
            "this machine's",
            "4096 bytes",
        ),
        (
            "_ArrayMemoryError",
            "Unable to allocate 2.00 GiB for an array",
            "this machine's",
            "2.00 GiB",
        ),
        ("MemoryError", "", "this machine's", ""),
    ],
)
def test_memory_that_ends_is_told_in_one_line_with_the_remedy(name, message, whose, size):
    error = SimpleNamespace(ename=name, evalue=message)
    asked = f" ({size} more did not fit)" if size else ""
    line = (
        f"out of memory: {whose} memory is full{asked}: lower the batch sizes (03: micro_batch_si"
    )
    assert execution._cause(error).startswith(line)


@pytest.mark.parametrize("name, message", [("ValueError", "no memory"), ("FloatingPointError", "")])
def test_other_errors_are_told_as_they_are(name, message):
    error = SimpleNamespace(ename=name, evalue=message)
    assert execution._cause(error) == f"{name}: {message}".strip()


@pytest.mark.parametrize("argv", [["/no/such/python"], ["/bin/false"]], ids=["missing", "another"])
@pytest.mark.parametrize("variable", ["JUPYTER_PATH", "JUPYTER_DATA_DIR"])
def test_kernels_are_of_this_python_whatever_kernelspec_stands_first(
    notebook, tmp_path, monkeypatch, variable, argv
):
    target, does = notebook
    does("import sys\nsys.executable")
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    execution.execute("04_analyse_results", target, {}, dict)
    [shown] = nbformat.read(target, 4).cells[-1].outputs
    assert shown.data["text/plain"] == repr(sys.executable)


def test_a_failed_import_names_the_interpreter():
    error = SimpleNamespace(ename="ModuleNotFoundError", evalue="No module named 'torch'")
    assert execution._cause(error) == (
        f"ModuleNotFoundError: No module named 'torch' (in {sys.executable})"
    )


def test_a_python_without_ipykernel_is_named(notebook, monkeypatch):
    target, _ = notebook
    monkeypatch.setitem(sys.modules, "ipykernel.kernelspec", None)
    with pytest.raises(
        execution.NotebookFailed, match=f"failed: {sys.executable} has no ipykernel: install it"
    ):
        execution.execute("04_analyse_results", target, {}, dict)
