"""What notebook 05 measures with: shapes, random models, rows of the real lengths, clocks, peak
memory, counted work.

Nothing is loaded or downloaded: speed depends on shapes and lengths, not on what the weights say.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from kd_utils.models.attention_maps import encode_map
from kd_utils.models.signals import forward_signals
from kd_utils.tokens.encoding import Example

#: Teacher and student by name: `llama2` is Llama-2-7B and TinyLlama-1.1B; `small` keeps TinyLlama's
#: proportions (32 heads, 8 of them sharing a key, a feed-forward of 2.75 widths, `lm_head` 6 % of
#: the multiply-adds; a teacher twice as wide with 1.5 times the layers).
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "tiny": {
        "teacher": dict(
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_key_value_heads=4,
            num_attention_heads=4,
            vocab_size=97,
        ),
        "student": dict(
            hidden_size=32,
            intermediate_size=88,
            num_hidden_layers=2,
            num_key_value_heads=2,
            num_attention_heads=4,
            vocab_size=97,
        ),
    },
    "small": {
        "teacher": dict(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=6,
            num_key_value_heads=32,
            num_attention_heads=32,
            vocab_size=1376,
        ),
        "student": dict(
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=4,
            num_key_value_heads=4,
            num_attention_heads=32,
            vocab_size=1376,
        ),
    },
    "llama2": {
        "teacher": dict(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_key_value_heads=32,
            num_attention_heads=32,
            vocab_size=32000,
        ),
        "student": dict(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_key_value_heads=4,
            num_attention_heads=32,
            vocab_size=32000,
        ),
    },
}

#: Rows of each task, and tokens (whole, and of the answer) at the quantiles 0, 1/20, ... 1: the
#: training rows of `papermill_params/llama2.yaml`, counted with Llama-2's tokenizer.
LENGTH_MIX: dict[str, tuple[int, list[int], list[int]]] = {
    "sst2": (
        5000,
        [16, 21, 24, 26, 28, 30, 32, 33, 35, 37, 38, 40, 42, 44, 46, 48, 50, 53, 56, 61, 90],
        [2] * 21,
    ),
    "mmlu": (
        1000,
        [
            45,
            59,
            63,
            67,
            72,
            76,
            81,
            86,
            93,
            97,
            104,
            112,
            122,
            132,
            139,
            150,
            171,
            210,
            258,
            324,
            493,
        ],
        [2] * 21,
    ),
    "gsm8k": (
        1000,
        [
            72,
            106,
            118,
            127,
            137,
            146,
            155,
            166,
            173,
            180,
            190,
            201,
            209,
            218,
            227,
            241,
            254,
            275,
            305,
            340,
            495,
        ],
        [
            31,
            59,
            69,
            76,
            82,
            89,
            95,
            101,
            106,
            112,
            119,
            126,
            136,
            145,
            152,
            161,
            171,
            185,
            209,
            241,
            368,
        ],
    ),
}


def random_model(
    shape: dict[str, int],
    *,
    seed: int = 0,
    sharpness: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A Llama of this shape with random weights, in eval mode.

    Args:
        sharpness: of the last layer's map, a factor on its queries: random weights give flat maps,
            which compress far better than a trained model's.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**shape, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.model.layers[-1].self_attn.q_proj.weight.mul_(sharpness)
    return model


def random_rows(count: int, vocab_size: int, *, seed: int = 0) -> list[Example]:
    """Random tokens in the lengths of the real rows: tasks in their real proportions, quantiles
    evenly spaced.

    Args:
        count: rows; their lengths do not depend on `seed`, so ten times the rows is ten times the
            tokens.
    """
    rng = np.random.default_rng(seed)
    whole = sum(rows for rows, _, _ in LENGTH_MIX.values())
    ends = np.cumsum([0] + [rows for rows, _, _ in LENGTH_MIX.values()]) * count // whole
    examples = []
    for task, first, last in zip(LENGTH_MIX, ends, ends[1:]):
        _, tokens, answers = LENGTH_MIX[task]
        for place in (np.arange(last - first) + 0.5) / max(last - first, 1) * 20:
            length, answer = (
                round(np.interp(place, range(21), quantiles)) for quantiles in (tokens, answers)
            )
            ids = rng.integers(3, vocab_size, length).astype(np.int32)
            examples.append(Example(f"{task}-{len(examples)}", ids, length - answer))
    return examples


def alternate(
    sides: dict[str, Callable[[], Any]],
    repeats: int,
    *,
    device: torch.device | str = "cpu",
    warm_up: bool = True,
) -> pd.DataFrame:
    """Seconds of each side, taken in turn so that what else the machine does falls on all of them.

    Args:
        warm_up: run every side once before, unmeasured.

    Returns:
        A row per repeat, a column per side.
    """

    def seconds(side: Callable[[], Any]) -> float:
        start = time.perf_counter()
        side()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for side in sides.values() if warm_up else ():
        seconds(side)
    gc.collect()
    return pd.DataFrame(
        [{name: seconds(side) for name, side in sides.items()} for _ in range(repeats)]
    )


def peak_mb(work: Callable[[], Any], *, device: torch.device | str = "cpu") -> float:
    """Most memory that `work` held beyond what was held before: a GPU's allocations, or the
    resident set (Linux).
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(
        0
    )  # freed memory that the allocator still keeps would hide what is new
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident_kb("VmRSS")
    work()
    return (_resident_kb("VmHWM") - before) / 2**10


def _resident_kb(field: str) -> int:
    [line] = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    ]
    return int(line.split()[1])


def exact_rows(teacher: nn.Module, rows: list[Example]) -> list[Example]:
    """Rows with the teacher's signals in float32, one by one: what a teacher run beside the student
    would give.
    """
    device = next(teacher.parameters()).device
    full = []
    for row in rows:
        with torch.no_grad():
            signals = forward_signals(teacher, torch.from_numpy(row.tokens).long()[None].to(device))
        full.append(
            replace(
                row,
                signals={
                    "hidden": signals.hidden[0].float().cpu().numpy(),
                    "attention": encode_map(signals.attention.map()[0], torch.float32)
                    .cpu()
                    .numpy(),
                },
            )
        )
    return full


def cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of two flat gradients, summed in float64."""
    left, right = left.double(), right.double()
    return float(left @ right / (left.norm() * right.norm()))


def multiply_adds(
    student: dict[str, int],
    teacher: dict[str, int],
    lengths: Sequence[tuple[int, int]],
    terms: Sequence[str],
    *,
    padded_to: int = 0,
) -> float:
    """Multiply-adds of one training epoch's matrix products, forward and backward, over real
    tokens.

    Args:
        student, teacher: shapes.
        lengths: (tokens, answer tokens) of each example.
        terms: of the loss, as in `training.loss_terms`.
        padded_to: count the naive design instead: every example at this length, all causal pairs
            twice, student logits at every position, the teacher's logits stored.
    """
    tokens = sum(n for n, _ in lengths)
    pairs = sum(n * (n + 1) / 2 for n, _ in lengths)
    looked_at = sum(answer for _, answer in lengths)
    if padded_to:
        tokens = looked_at = padded_to * len(lengths)
        pairs = float(padded_to**2 * len(lengths))
    width, heads = student["hidden_size"], student["num_attention_heads"]
    key_width = width * student["num_key_value_heads"] // heads
    layer = 2 * width**2 + 2 * width * key_width + 3 * width * student["intermediate_size"]
    body = student["num_hidden_layers"] * (layer * tokens + 2 * width * pairs)
    head = width * student["vocab_size"]
    total = 3 * (body + head * looked_at)
    if padded_to:
        return total + 3 * width * teacher["hidden_size"] * tokens * ("hidden" in terms)
    total += ("kd" in terms) * tokens * (3 * head + teacher["hidden_size"] * teacher["vocab_size"])
    total += ("hidden" in terms) * 3 * width * teacher["hidden_size"] * tokens
    return total + ("attention" in terms) * 3 * width * pairs


def forward_multiply_adds(shape: dict[str, int], lengths: Sequence[int]) -> float:
    """Multiply-adds of a model's forward pass over real tokens, without its `lm_head`."""
    whole = multiply_adds({**shape, "vocab_size": 0}, shape, [(n, 0) for n in lengths], ())
    return whole / 3


def matrix_rate(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, size: int = 2048
) -> float:
    """Multiply-adds per second of a large matrix product, the best of several."""
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    seconds = alternate({"product": lambda: left @ right}, 5, device=device)["product"].min()
    return size**3 / seconds


class Laps:
    """Seconds between calls of `lap`, summed by part; on a GPU each lap waits for the device if one
    is given.
    """

    def __init__(self, parts: dict[str, float], device: torch.device | None = None) -> None:
        self.parts, self.device, self._last = parts, device, time.perf_counter()

    def lap(self, part: str) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.parts[part] += now - self._last
        self._last = now
