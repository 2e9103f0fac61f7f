"""Notebooks on the device: a trial that is killed and resumed, two on one card, memory that ends."""

import json
import os
import time

import pytest
from papermill_cli import kill, start

from kd_utils.config import notebook_files, project_paths
from kd_utils.models import devices
from kd_utils.records.trial_record import read_record
from kd_utils.sweep import execution

TRIAL = "combined_seed0"  # all the terms, and a projector that trains
TIMES = ("seconds", "tok_per_sec")  # what differs between two runs of a trial
SMALL = {
    "train_rows": "sst2:24 mmlu:16 gsm8k:16",
    "validation_rows": "sst2:9 mmlu:8 gsm8k:7",
    "teacher_epochs": 1,
    "shard_examples": 20,
    "batch_size": 8,
    "micro_batch_size": 3,
    "max_new_tokens": 8,
    "workers": 1,
}


def run_here(stem, parameters):
    """A notebook's cells in this process, which has torch already."""
    names = {"display": lambda *_: None}
    for cell in json.loads(notebook_files.notebook_path(stem).read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), stem, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= {key: value for key, value in parameters.items() if key in names}


@pytest.fixture(scope="module")
def home(tmp_path_factory, with_toy, device):
    """A project root with the toy's data and a cache made on the device. The student drops
    attention weights, so that random numbers count.
    """
    home = tmp_path_factory.mktemp("gpu")
    with_toy(home)
    values = SMALL | {"device": str(device)}
    (home / "small.yaml").write_text("\n".join(f"{key}: {value}" for key, value in values.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project_paths, "ROOT", home)
        for stem in ("01_prepare_data", "02_cache_teacher"):
            run_here(stem, values)
    config = home / "artifacts" / "embedded" / "toy" / "student" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.3}))
    return home


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


def test_a_trial_killed_after_an_epoch_resumes_to_the_same_bits(home, device):
    """With deterministic algorithms, beside another trial on the same device."""
    how = {"distill_type": "combined", "epochs": 8}
    whole, killed = (start(home, run, how, KD_DETERMINISTIC="1") for run in ("whole", "killed"))
    saved = home / "artifacts" / "checkpoints" / "killed" / f"{TRIAL}.json"
    while not saved.exists():
        assert killed.poll() is None, killed.stdout.read()[-3000:]
        time.sleep(0.02)
    kill(killed)
    assert not (home / "runs" / "killed" / "trials" / TRIAL).exists()
    again = start(home, "killed", how, KD_DETERMINISTIC="1")
    for process in (whole, again):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    *wanted, undisturbed = left(home, "whole")
    *found, resumed = left(home, "killed")
    assert found == wanted
    assert resumed["resumed_after"] >= 1 and undisturbed["resumed_after"] is None
    assert resumed["device"].get("deterministic", True)
    # Of the last epoch the loss is lower than of the first: something was learned.
    assert wanted[0][-1]["train_loss/task"] < wanted[0][0]["train_loss/task"]
    gpu = resumed["device"].get("gpu")
    assert (gpu is None) == (device.type == "cpu" and "gpu" not in undisturbed["device"])


def test_deterministic_algorithms_are_asked_for_by_the_environment(device, monkeypatch):
    import torch

    monkeypatch.setenv("KD_DETERMINISTIC", "1")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
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
