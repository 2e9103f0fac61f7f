"""Notebooks on the device: a trial that is killed and resumed, two on one card, memory that ends."""

import json
import os

import pytest
import torch
from trials import TRIAL

from kd_utils.config import project_paths
from kd_utils.models import devices
from kd_utils.records.trial_record import read_record
from kd_utils.sweep import execution

TIMES = ("seconds", "tok_per_sec")  # what differs between two runs of a trial


def left(home, run):
    """What a trial leaves, without times: its epochs, its predictions, the student's weights."""
    folder = home / "runs" / run / "trials" / TRIAL
    record = read_record(folder)
    epochs = [
        {key: value for key, value in row.items() if not key.startswith(TIMES)}
        for row in record["epochs"]
    ]
    student = home / "artifacts" / "students" / run / TRIAL / "model.safetensors"
    return epochs, (folder / "predictions.parquet").read_bytes(), student.read_bytes(), record


def test_a_trial_killed_after_a_stretch_resumes_to_the_same_bits(trials, device):
    """With deterministic algorithms, beside another trial on the same device."""
    trials.done()
    *wanted, undisturbed = left(trials.home, "whole")
    *found, resumed = left(trials.home, "killed")
    assert found == wanted
    assert resumed["resumed_after"] > 0 and undisturbed["resumed_after"] is None
    # In the last stretch the loss is lower than in the first: something was learned.
    assert wanted[0][-1]["train_loss/task"] < wanted[0][0]["train_loss/task"]
    if torch.cuda.is_available():
        assert resumed["device"]["gpu"] and resumed["device"]["deterministic"]


def test_deterministic_algorithms_are_asked_for_by_the_environment(device, monkeypatch):
    monkeypatch.setenv("KD_DETERMINISTIC", "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as before afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        devices.choose_device(str(device))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.set_deterministic_debug_mode("default")


#: More than any card has; without one, what torch says on one.
FILLS = {
    "cuda": "torch.empty(2**42, dtype=torch.uint8, device='cuda')",
    "cpu": "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 4096.00 GiB. GPU 0 "
    "has a total capacity of 79.11 GiB of which 78.58 GiB is free.')",
}


def test_a_full_card_is_told_in_one_line_with_the_remedy(stub_notebooks, device, monkeypatch):
    monkeypatch.setattr(project_paths, "CODE_ROOT", project_paths.Path(__file__).parents[2])
    path = stub_notebooks / "notebooks" / "03_train_student.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][-1]["source"] = f"import torch\n{FILLS[device.type]}"
    path.write_text(json.dumps(notebook))
    with pytest.raises(execution.NotebookFailed) as failed:
        execution.execute("03_train_student", stub_notebooks / "runs" / "a.ipynb", {}, dict)
    assert failed.value.cause == (
        "out of memory: the GPU's memory is full (4096.00 GiB more did not fit): lower the batch "
        "sizes (03: micro_batch_size, eval_batch_size; 02: batch_tokens, eval_batch_size, "
        "teacher_batch_size), or run fewer trials side by side"
    )
    assert "Traceback" in (stub_notebooks / "runs" / "a.failed.ipynb").read_text()
