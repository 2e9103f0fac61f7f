"""Devices, copies to and from them, precision, memory and seeds."""

import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers, all of which count in the lower 32 bits that torch uses."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def choose_device(name: str) -> torch.device:
    """The device that a parameter names: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".

    A GPU with a number becomes torch's current one, which records name. cuDNN's attention, which
    plans anew for every shape of a batch, is turned off: batches here have hundreds of shapes.

    On a CPU, torch asks Linux for huge pages, unless THP_MEM_ALLOC_ENABLE is set already: the
    gradient of an output layer of 49,152 tokens is 100 MB, new in every step, and Linux clears new
    memory page by page. torch reads the variable once, so this comes before the first tensor.

    With KD_DETERMINISTIC=1 in the environment torch uses deterministic algorithms only, so that the
    same trial has the same numbers to the last bit on one kind of GPU (not yet run on CUDA).

    Raises:
        ValueError: a GPU that is asked for is not there.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if os.environ.get("KD_DETERMINISTIC") == "1":
        # cuBLAS reads it when the first product is computed, which is later than this.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_deterministic_debug_mode("error")  # without a second for torch.compile's modules
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}, but torch sees no GPU here: use 'auto' or 'cpu'")
    if device.type == "cuda" and device.index is not None:
        if device.index >= (count := torch.cuda.device_count()):
            seen = "1 GPU" if count == 1 else f"{count} GPUs"
            raise ValueError(
                f"device = {name!r}, but torch sees {seen} here, numbered from 0: use 'cuda' or "
                f"'cuda:{count - 1}'"
            )
        torch.cuda.set_device(device)
    return device


@contextmanager
def reproducible() -> Iterator[None]:
    """Meanwhile the same operations on the same tensors give the same bits, on a GPU too.

    Without it sums over the experts of a mixture, for one, are taken in any order there.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(max(before, 1))
    try:
        with warnings.catch_warnings():  # about operations that have no such form
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)


def to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The array on the device; on a CPU they share memory where they can.

    To a GPU it goes from page-locked memory, and the program does not wait: torch keeps that memory
    until the copy is done.
    """
    # Rows read from Parquet are read-only, and torch wants memory that it may write to.
    host = torch.from_numpy(np.require(array, requirements=("C", "W")))
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class HostCopy:
    """Tensors of one device on their way to the host, where `result` waits for them.

    A GPU writes them into page-locked memory when it has computed them, and the program does not
    wait before.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        device = next(iter(tensors.values())).device
        self._values = {
            name: tensor.detach().to("cpu", non_blocking=True) for name, tensor in tensors.items()
        }
        on_gpu = device.type == "cuda"
        self._copied = torch.cuda.current_stream(device).record_event() if on_gpu else None

    def result(self) -> dict[str, torch.Tensor]:
        """The tensors on the CPU, in the same order."""
        if self._copied:
            self._copied.synchronize()
        return self._values


def amp_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The type of matrix products; "auto" means bfloat16 on a GPU and float32 on a CPU."""
    half = precision == "bfloat16" or (precision == "auto" and device.type != "cpu")
    return torch.bfloat16 if half else torch.float32


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast over float32 weights where `amp_dtype` says so; else autocast is off."""
    half = amp_dtype(device, precision) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: the GPU's allocations, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
