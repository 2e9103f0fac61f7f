"""Estimated bytes beside those of a teacher cache, a checkpoint and a model that were written."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import example_rows, tiny_llama

from kd_utils.cache import writer
from kd_utils.cost import disk
from kd_utils.cost.shapes import shape_of
from kd_utils.distill import schedules
from kd_utils.distill.terms.hidden import make_projector
from kd_utils.models import signal_kinds
from kd_utils.records.checkpoint import Checkpoint
from kd_utils.teacher import extraction

LENGTHS = [20, 35, 50, 80, 120, 160]


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def teacher(request):
    """How far maps compress depends on the teacher: these are neither flat nor peaked."""
    model = tiny_llama(width=192, heads=8, kv_heads=8, vocab=300, initializer_range=0.08)
    return model.to(getattr(torch, request.param))


@pytest.mark.parametrize("attention_dtype", ["float16", "uint8"])
def test_a_cache_has_the_estimated_size(teacher, attention_dtype, tmp_path):
    layers = {"hidden": [1, 2], "attention": [2]}
    header = {
        "name": "cost",
        "signals": "white_box",
        "layers": layers,
        "heads": 8,
        "hidden_size": 192,
        "temperatures": [],
        "dtypes": {},
    }
    run = extraction.signal_function(
        teacher, signals="white_box", layers=layers, attention_dtype=attention_dtype
    )
    write = partial(writer.write_shards, tmp_path, signals_of=run, batch_tokens=400)
    writer.assemble_cache(
        tmp_path,
        {"train": example_rows(LENGTHS, vocab=300)},
        write,
        extraction.stored_lm_head(teacher),
        header,
        shard_examples=8,
    )
    columns = signal_kinds.columns_of("white_box", layers, 2, attention_dtype)
    half = teacher.dtype == torch.bfloat16
    estimate = disk.cache(columns, shape_of(teacher), LENGTHS, half=half)
    written = bytes_of(tmp_path)
    print(f"estimated {estimate:,.0f} bytes, written {written:,}: {estimate / written - 1:+.1%}")
    assert estimate == pytest.approx(written, rel=0.1)


def test_signals_before_compression_are_counted_exactly(teacher):
    [row] = extraction.signal_function(teacher, signals="white_box hidden")(example_rows([30]))
    columns = signal_kinds.columns_of("white_box hidden", {}, 2, "float16")
    assert disk.signal_bytes(columns, shape_of(teacher), [30]) == {
        column: array.nbytes for column, array in row.signals.items()
    }


def test_a_saved_state_and_a_saved_model_have_the_estimated_size(tmp_path):
    student, projector = tiny_llama(), make_projector(32, 48, seed=0)
    parameters = [*student.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    modules = {"student": student, "teacher_terms": projector}
    schedule = schedules.learning_rate(optimizer, "constant", 1, 0.0)
    average = schedules.Average(parameters, 1, 0.0)
    path = tmp_path / "state" / "t.json"
    Checkpoint(path, {}, modules, optimizer, schedule, average).save_if_due(1, {})
    trained = sum(parameter.numel() for parameter in parameters)
    # The names of the tensors take a part, which a real model's weights make small.
    assert disk.STATE_BYTES * trained == pytest.approx(bytes_of(tmp_path / "state"), rel=0.05)
    student.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    estimate = disk.MODEL_BYTES * shape_of(student)["weights"]
    assert estimate == pytest.approx(weights.stat().st_size, rel=0.05)


def test_free_disk_is_that_of_the_nearest_folder_that_exists(tmp_path):
    assert disk.free(tmp_path / "not" / "yet") == pytest.approx(disk.free(tmp_path), rel=0.01)
