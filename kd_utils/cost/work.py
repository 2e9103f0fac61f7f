"""How long: multiply-adds and operations, over the rates of a short probe on this machine."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import psutil
import torch

from kd_utils.cost.shapes import Shape, matrices
from kd_utils.models import devices

#: Share of a large matrix product's rate that a training step and a bare forward pass reach:
#: measured on 2 CPU cores at TinyLlama's proportions (docs/speed.md). No GPU was measured.
STEP_EFFICIENCY, FORWARD_EFFICIENCY = 0.40, 0.59

#: Operations of a training step for each layer and each term with a teacher, and of a forward pass
#: for each layer; those of a row's signals in the teacher's pass. Counted with torch's profiler
#: (docs/cost.md).
STEP_OPERATIONS, FORWARD_OPERATIONS, ROW_OPERATIONS = 200, 60, 25

#: Seconds of an operation in a model, Python included, for each second of the probe's.
OPERATION_FACTOR = 5.5


class Machine(NamedTuple):
    """Where something is to run.

    Attributes:
        half: products are in bfloat16.
        memory: bytes of the device.
        rate: multiply-adds per second of a large matrix product.
        operation: seconds that a small operation takes.
        overlaps: a device computes while the next operations are started, as a GPU does.
    """

    half: bool
    memory: float
    rate: float
    operation: float
    overlaps: bool

    @classmethod
    def here(cls, device: torch.device, precision: str) -> Self:
        """This machine, after a probe of a moment that draws no random number of torch's own."""
        on_gpu, dtype = device.type == "cuda", devices.amp_dtype(device, precision)
        small, factor = torch.ones(8, 32, 64, device=device), torch.ones(64, device=device)
        return cls(
            dtype == torch.bfloat16,
            torch.cuda.get_device_properties(device).total_memory
            if on_gpu
            else psutil.virtual_memory().total,
            matrix_rate(device, dtype, rows=4096 if on_gpu else 1024),
            1 / best_rate(lambda: torch.mul(small, factor), 1, device, times=200),
            on_gpu,
        )

    def seconds(self, work: float, operations: float, efficiency: float) -> float:
        """About how long this many multiply-adds in this many operations take."""
        computing = work / (self.rate * efficiency)
        starting = operations * self.operation * OPERATION_FACTOR
        return max(computing, starting) if self.overlaps else computing + starting


def matrix_rate(device: torch.device, dtype: torch.dtype, *, rows: int = 0) -> float:
    """Multiply-adds per second of a product of square matrices, the best of five.

    Args:
        rows: of each matrix; 0: 8192 on a GPU and 2048 on a CPU.
    """
    rows = rows or (8192 if device.type == "cuda" else 2048)
    # Of a generator of its own: torch's draws decide dropout and initial weights.
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(3, rows, rows, device=device, generator=generator)
    left, right, product = drawn.to(dtype)
    return best_rate(lambda: torch.mm(left, right, out=product), rows**3, device)


def best_rate(
    work: Callable[[], object], amount: float, device: torch.device, *, times: int = 0
) -> float:
    """The most of an amount per second: the best of five measurements, after one that warms up.

    Args:
        amount: of each call of `work`.
        times: how often a measurement calls it; 0: ten times on a GPU, or waiting counts, else 1.
    """
    times, seconds = times or (10 if device.type == "cuda" else 1), []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return times * amount / min(seconds[1:])


def part_multiply_adds(
    student: Shape,
    teacher: Shape,
    lengths: Sequence[tuple[int, int]],
    terms: Sequence[str],
    *,
    padded_to: int = 0,
) -> dict[str, float]:
    """Count the multiply-adds of one training epoch's matrix products, by part of the step.

    The gradients of "kd" and "attention" are computed with the loss and count there.

    Args:
        student, teacher: their sizes.
        lengths: (tokens, answer tokens) of each example.
        padded_to: if not 0, count the naive design: every example has this length, all pairs of
            positions count, student logits are computed everywhere, the teacher's are read.
    """
    if padded_to:
        lengths = [(padded_to, padded_to)] * len(lengths)
    tokens, predicted = map(sum, zip(*lengths))
    pairs = sum(n * n if padded_to else n * (n + 1) / 2 for n, _ in lengths)
    width, layers, size = student["hidden_size"], student["num_hidden_layers"], matrices(student)
    parts = {"body": size["body"] * tokens + 2 * layers * width * pairs}
    parts["task"] = size["head"] * predicted
    if "hidden" in terms:
        parts["hidden"] = width * teacher["hidden_size"] * tokens
    parts["backward"] = 2 * sum(parts.values())
    if "kd" in terms and not padded_to:
        teachers_head = teacher["hidden_size"] * teacher["vocab_size"]
        parts["kd"] = tokens * (3 * size["head"] + teachers_head)
    if "smoothing" in terms:  # its logits are computed twice
        parts["smoothing"] = 4 * size["head"] * tokens
    if "attention" in terms and not padded_to:
        parts["attention"] = 3 * width * pairs
    return parts


def multiply_adds(*work: Any, padded_to: int = 0) -> float:
    """The sum of `part_multiply_adds`, which has the same arguments."""
    return sum(part_multiply_adds(*work, padded_to=padded_to).values())


def forward_multiply_adds(shape: Shape, lengths: Sequence[int]) -> float:
    """Count the multiply-adds of a model's forward pass over real tokens, without its `lm_head`."""
    return multiply_adds({**shape, "vocab_size": 0}, shape, [(n, 0) for n in lengths], ()) / 3
