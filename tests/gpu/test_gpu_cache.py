"""The teacher's signals: a cache written on the device equals the CPU's, and copies to and from a
device that nobody waits for arrive whole, whenever they are read.
"""

import random
from functools import partial

import numpy as np
import pytest
import torch
from references import error
from tiny import example_rows, tiny_llama

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.cache.verification import verify
from kd_utils.cache.writer import assemble_cache, write_shards
from kd_utils.distill.batches import collate, prefetched
from kd_utils.distill.meter import Mean
from kd_utils.models.devices import HostCopy, to_device
from kd_utils.models.signal_kinds import columns_of
from kd_utils.models.signals import forward_signals
from kd_utils.teacher.extraction import signal_function, stored_lm_head

LENGTHS = [5, 60, 33, 12, 7, 48, 4, 29, 17, 80]
#: Largest error of a column by the precision of the teacher, and half a step of the type that it
#: is stored in: float16 has 11 bits, uint8 keeps a root in steps of 1/255.
NEAR = {"float32": 0.0, "bfloat16": 5e-2}
STORED = {"float16": 5e-4, "uint8": 2e-2, "float32": 1e-5}


def written(folder, device, precision, signals, attention_dtype, batch_tokens):
    """The cache of a small teacher, written on a device as 02 writes it."""
    teacher = tiny_llama(width=48, layers=3, kv_heads=2).to(device, getattr(torch, precision))
    layers = {"hidden": [1, 3], "attention": [2, 3]}
    how = dict(signals=signals, top_k=8, temperatures=[1.0, 2.0], attention_dtype=attention_dtype)
    columns = columns_of(signals, layers, 3, attention_dtype)
    header = {
        "signals": signals,
        "heads": 4,
        "hidden_size": 48,
        "top_k": 8,
        "temperatures": [1.0, 2.0],
        "dtypes": {name: dtype for name, (_, _, dtype) in columns.items()},
    }
    run = signal_function(teacher, layers=layers, **how)
    assemble_cache(
        folder,
        {"train": example_rows(LENGTHS), "validation": example_rows([9, 21], seed=1)[1:]},
        partial(write_shards, folder, signals_of=run, batch_tokens=batch_tokens),
        stored_lm_head(teacher),
        header,
        shard_examples=4,
    )
    verify(folder)
    return TeacherCache(folder)


@pytest.mark.parametrize("batch_tokens", [64, 4096])
@pytest.mark.parametrize(
    "signals, attention_dtype, precision",
    [
        ("white_box", "float16", "float32"),
        ("white_box", "uint8", "float32"),
        ("white_box", "float16", "bfloat16"),
        ("top_k", "float16", "float32"),
    ],
)
def test_a_cache_is_that_of_the_cpu(
    device, tmp_path, batch_tokens, signals, attention_dtype, precision
):
    """In small and large batches: the same rows and ids, and values near within their type."""
    options = (signals, attention_dtype)
    found = written(tmp_path / "device", device, precision, *options, batch_tokens)
    wanted = written(tmp_path / "cpu", torch.device("cpu"), precision, *options, 256)
    assert found.splits == wanted.splits
    assert found.manifest["dtypes"] == wanted.manifest["dtypes"]
    assert torch.equal(found.lm_head(), wanted.lm_head())
    for example_id in wanted.lengths:
        row, expected = found[example_id], wanted[example_id]
        np.testing.assert_array_equal(row.tokens, expected.tokens)
        assert row.answer_start == expected.answer_start
        assert set(row.signals) == set(expected.signals) == set(found.manifest["dtypes"])
        for column, array in row.signals.items():
            assert array.dtype == expected.signals[column].dtype
            if column == "top_ids":  # equal logits may change places
                assert np.mean(array == expected.signals[column]) > 0.95
                continue
            sides = (
                torch.from_numpy(side.astype(np.float64))
                for side in (array, expected.signals[column])
            )
            assert error(*sides) <= NEAR[precision] + STORED[found.manifest["dtypes"][column]]


def small_batches(count):
    rows = example_rows([int(n) for n in np.random.default_rng(0).integers(3, 40, 3 * count)])
    return [rows[3 * k : 3 * k + 3] for k in range(count)]


def test_hundreds_of_small_batches_that_are_read_late_and_out_of_order_are_whole(device):
    """Copies into page-locked memory are under way for all batches before one is read: nothing is
    read early, and no buffer is used again while somebody holds it.
    """
    teacher = tiny_llama(width=48, layers=3).to(device)
    run = signal_function(teacher, signals="white_box")
    batches = small_batches(200)
    started = [run(batch) for batch in batches]
    order = list(range(len(batches)))
    random.Random(0).shuffle(order)
    read = {k: list(started[k]) for k in order}
    for batch, rows in zip(batches, (read[k] for k in range(len(batches))), strict=True):
        assert [row.example_id for row in rows] == [row.example_id for row in batch]
    for k in range(0, len(batches), 10):  # one after the other, as if nothing were asynchronous
        for row, found in zip(batches[k], read[k], strict=True):
            ids = torch.from_numpy(row.tokens).long()[None].to(device)
            with torch.no_grad():
                signals = forward_signals(teacher, ids, map_layers=[3])
            hidden = torch.from_numpy(found.signals["hidden"])
            assert error(hidden, signals.hidden[0]) <= 1e-3
            n = len(row.tokens)
            rows_of_map = torch.tril(torch.ones(n, n, dtype=torch.bool))
            maps = signals.attentions[3].map()[0].cpu()[:, rows_of_map]
            assert error(torch.from_numpy(found.signals["attention"]), maps) <= 1e-3


def test_hundreds_of_small_arrays_arrive_whole_from_a_thread(device):
    """Their page-locked copies are dropped at once, while a GPU still reads them."""
    arrays = [np.random.default_rng(k).standard_normal((k % 50 + 1, 33)) for k in range(500)]
    busy = torch.randn(500, 500, device=device)
    for _ in range(20):  # the stream has work, so that copies wait
        busy = torch.tanh(busy @ busy)
    found = list(prefetched(lambda array: to_device(array.astype(np.float32), device), arrays))
    assert {tensor.device.type for tensor in found} == {device.type}
    for tensor, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), array.astype(np.float32))


def test_a_copy_to_the_host_is_page_locked_and_whole(device):
    tensors = {"a": torch.randn(1000, 1000, device=device), "b": torch.arange(7, device=device)}
    copies = []
    for _ in range(100):  # each of another value, read when all are under way
        tensors = {name: tensor + 1 for name, tensor in tensors.items()}
        copies.append(HostCopy({name: tensor[:3] for name, tensor in tensors.items()}))
    for k, copy in reversed(list(enumerate(copies))):
        values = copy.result()
        assert values["b"].tolist() == [k + 1, k + 2, k + 3]
        assert values["a"].is_pinned() == (device.type == "cuda")


def test_a_batch_is_the_same_on_the_device(device):
    """Every tensor that `collate` makes: ids, places, values and maps, in small batches."""
    teacher = tiny_llama(width=48, layers=3)
    run = signal_function(teacher, signals="white_box")
    for batch in small_batches(20):
        rows = list(run(batch))
        found, wanted = collate(rows, device=device), collate(rows)
        for name in ("input_ids", "predicting", "targets"):
            assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name))
        [ours], [expected] = found.teachers, wanted.teachers
        assert torch.equal(ours.places.cpu(), expected.places)
        assert torch.equal(ours.signals["hidden"].cpu(), expected.signals["hidden"])
        for a, b in zip(ours.maps["attention"].packed, expected.maps["attention"].packed):
            assert torch.equal(a.cpu(), b)
        assert found.lengths == wanted.lengths and found.whole == wanted.whole


def test_means_add_up_in_float32(device):
    """Thousands of losses in bfloat16: sums in that type would stop growing."""
    mean = Mean()
    for _ in range(3000):
        mean.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16, device=device)}, 1)
    assert mean.result() == {"loss": 1.0}
