"""Devices: which one a name means, copies to and from it, precision. What needs a GPU is scripted."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import late_copy

from kd_utils.models import devices

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(n)`: torch sees n GPUs; the list has those that became the current one."""
    current = []

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    return see


@pytest.mark.parametrize(
    "count, name, chosen",
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:0", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_a_device_by_its_name(gpus, count, name, chosen):
    current = gpus(count)
    device = devices.choose_device(name)
    assert str(device) == chosen
    assert current == ([device] if ":" in name else [])  # records name the current GPU


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages here"
)
@pytest.mark.parametrize("asked", ["", "0"])
def test_large_tensors_are_in_huge_pages_unless_the_environment_says_otherwise(asked):
    """In a process of its own: torch reads the variable once."""
    script = """
import resource, torch
from kd_utils.models import devices
devices.choose_device("cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": asked}
    if not asked:
        del environment["THP_MEM_ALLOC_ENABLE"]
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    pages = 2**25 * 4 // resource.getpagesize()
    assert int(said.stdout) < pages / 10 or (asked == "0" and int(said.stdout) >= pages)


def test_attention_is_never_cudnns():
    torch.backends.cuda.enable_cudnn_sdp(True)
    devices.choose_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize(
    "count, name, message",
    [
        (0, "cuda", "device = 'cuda', but torch sees no GPU here: use 'auto' or 'cpu'"),
        (0, "cuda:1", "device = 'cuda:1', but torch sees no GPU here: use 'auto' or 'cpu'"),
        (
            1,
            "cuda:7",
            "device = 'cuda:7', but torch sees 1 GPU here, numbered from 0: use 'cuda' or 'cuda:0'",
        ),
        (
            4,
            "cuda:4",
            "device = 'cuda:4', but torch sees 4 GPUs here, numbered from 0: use 'cuda' or 'cuda:3'",
        ),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_in_one_line(gpus, count, name, message):
    assert gpus(count) == []
    with pytest.raises(ValueError) as refused:
        devices.choose_device(name)
    assert str(refused.value) == message and gpus(count) == []


def test_an_array_on_a_device_has_its_values_and_is_read_only_for_nobody():
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    assert devices.to_device(array, "cpu").tolist() == array.tolist()
    array.flags.writeable = False
    devices.to_device(array, "cpu").add_(1)
    assert array[0, 0] == 0
    assert devices.to_device(array.T, torch.device("meta")).shape == (3, 2)


def test_what_is_copied_to_the_host_is_there_when_result_waited():
    tensors = {"a": torch.randn(3, requires_grad=True), "b": torch.tensor(5)}
    for kind in (devices.HostCopy, late_copy()):
        values = kind(tensors).result()
        assert list(values) == ["a", "b"] and values["b"].item() == 5
        assert torch.equal(values["a"], tensors["a"]) and not values["a"].requires_grad
    assert late_copy()(tensors)._values["b"].item() == 77, "too early"


def test_an_array_goes_to_a_gpu_from_page_locked_memory_without_a_wait(monkeypatch):
    calls = []

    def said(name):
        return lambda self, *given, **how: (calls.append((name, *given, *how.items())), self)[1]

    for name in ("pin_memory", "to"):
        monkeypatch.setattr(torch.Tensor, name, said(name))
    devices.to_device(np.ones(2), "cuda:1")
    assert calls == [("pin_memory",), ("to", "cuda:1", ("non_blocking", True))]
    calls.clear()
    devices.to_device(np.ones(2), "cpu")
    assert [name for name, *_ in calls] == ["to"]


def test_a_copy_from_a_gpu_is_read_after_the_event_that_follows_it(monkeypatch):
    calls = []

    class OnGpu:
        device = torch.device("cuda:1")

        def detach(self):
            return self

        def to(self, place, *, non_blocking):
            calls.append((place, non_blocking))
            return "host"

    class Event:
        def synchronize(self):
            calls.append("waited")

    class Stream:
        def record_event(self):
            calls.append("recorded")
            return Event()

    monkeypatch.setattr(torch.cuda, "current_stream", {OnGpu.device: Stream()}.get)
    copy = devices.HostCopy({"a": OnGpu(), "b": OnGpu()})
    assert calls == [("cpu", True), ("cpu", True), "recorded"]
    assert copy.result() == {"a": "host", "b": "host"} and calls[-1] == "waited"


@pytest.mark.parametrize(
    "device, precision, dtype",
    [
        ("cuda", "auto", torch.bfloat16),
        ("cuda:1", "auto", torch.bfloat16),
        ("cpu", "auto", torch.float32),
        ("cuda", "float32", torch.float32),
        ("cpu", "bfloat16", torch.bfloat16),
    ],
)
def test_the_type_of_matrix_products(device, precision, dtype):
    assert devices.amp_dtype(torch.device(device), precision) == dtype


def test_under_autocast_products_are_rounded_and_weights_are_not():
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with devices.autocast(torch.device("cpu"), "bfloat16"):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    with devices.autocast(torch.device("cpu"), "float32"):
        assert layer(x).dtype == torch.float32
