"""Devices, precision, memory and seeds."""

import resource

import numpy as np
import torch


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers, all of which count in the lower 32 bits that torch uses."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one; a GPU that is asked for and is not there is refused."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}, but torch sees no GPU here: use 'auto' or 'cpu'")
    return device


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
