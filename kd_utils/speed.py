"""What notebook 05 measures with: shapes, random models, rows of the real lengths, alternating timings, peak memory.

Nothing is loaded or downloaded: speed depends on shapes and lengths, not on what the weights say.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from torch import nn

from .cache import CachedExample, TeacherCache
from .config import METHODS, TASK_NAMES
from .execution import code_root
from .records import read_record
from .signals import encode_map, forward_signals

#: Teacher and student by name: `llama2` is Llama-2-7B and TinyLlama-1.1B; `small` keeps TinyLlama's proportions (32 heads,
#: 8 of them sharing a key, a feed-forward of 2.75 widths, `lm_head` 6 % of the multiply-adds, a teacher twice as wide).
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "tiny": {"teacher": dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_key_value_heads=4,
                             num_attention_heads=4, vocab_size=97),
             "student": dict(hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_key_value_heads=2,
                             num_attention_heads=4, vocab_size=97)},
    "small": {"teacher": dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_key_value_heads=32,
                              num_attention_heads=32, vocab_size=1376),
              "student": dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_key_value_heads=4,
                              num_attention_heads=32, vocab_size=1376)},
    "llama2": {"teacher": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_key_value_heads=32,
                               num_attention_heads=32, vocab_size=32000),
               "student": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4,
                               num_attention_heads=32, vocab_size=32000)},
}

#: Rows of each task, and tokens (whole, and of the answer) at the quantiles 0, 1/20, ... 1: the training rows of
#: `papermill_params/llama2.yaml`, counted with Llama-2's tokenizer.
LENGTH_MIX: dict[str, tuple[int, list[int], list[int]]] = {
    "sst2": (5000, [16, 21, 24, 26, 28, 30, 32, 33, 35, 37, 38, 40, 42, 44, 46, 48, 50, 53, 56, 61, 90], [2] * 21),
    "mmlu": (1000, [45, 59, 63, 67, 72, 76, 81, 86, 93, 97, 104, 112, 122, 132, 139, 150, 171, 210, 258, 324, 493],
             [2] * 21),
    "gsm8k": (1000, [72, 106, 118, 127, 137, 146, 155, 166, 173, 180, 190, 201, 209, 218, 227, 241, 254, 275, 305, 340, 495],
              [31, 59, 69, 76, 82, 89, 95, 101, 106, 112, 119, 126, 136, 145, 152, 161, 171, 185, 209, 241, 368]),
}


def random_model(shape: dict[str, int], *, seed: int = 0, sharpness: float = 1.0, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama of this shape with random weights, in eval mode.

    Args:
        sharpness: of the last layer's map, a factor on its queries: random weights give flat maps, which compress far
            better than a trained model's.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**shape, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.model.layers[-1].self_attn.q_proj.weight.mul_(sharpness)
    return model


def random_rows(count: int, vocab_size: int, *, seed: int = 0) -> list[CachedExample]:
    """Random tokens in the lengths of the real rows: tasks in their real proportions, quantiles evenly spaced.

    Args:
        count: rows; their lengths do not depend on `seed`, so ten times the rows is ten times the tokens.
    """
    rng = np.random.default_rng(seed)
    whole = sum(rows for rows, _, _ in LENGTH_MIX.values())
    ends = np.cumsum([0] + [rows for rows, _, _ in LENGTH_MIX.values()]) * count // whole
    examples = []
    for task, first, last in zip(TASK_NAMES, ends, ends[1:]):
        _, tokens, answers = LENGTH_MIX[task]
        for place in (np.arange(last - first) + 0.5) / max(last - first, 1) * 20:
            length, answer = (round(np.interp(place, range(21), quantiles)) for quantiles in (tokens, answers))
            examples.append(CachedExample(f"{task}-{len(examples)}", rng.integers(3, vocab_size, length).astype(np.int32),
                                          length - answer))
    return examples


def alternate(sides: dict[str, Callable[[], Any]], repeats: int, *, device: torch.device | str = "cpu",
              warm_up: bool = True) -> pd.DataFrame:
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
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for side in sides.values() if warm_up else ():
        seconds(side)
    gc.collect()
    return pd.DataFrame([{name: seconds(side) for name, side in sides.items()} for _ in range(repeats)])


def peak_mb(work: Callable[[], Any], *, device: torch.device | str = "cpu") -> float:
    """Most memory that `work` held beyond what was held before: a GPU's allocations, or the resident set (Linux)."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator still keeps would hide what is new
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident_kb("VmRSS")
    work()
    return (_resident_kb("VmHWM") - before) / 2**10


def _resident_kb(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1])


def exact_rows(teacher: nn.Module, rows: list[CachedExample]) -> list[CachedExample]:
    """Rows with the teacher's signals in float32, one by one: what a teacher run beside the student would give."""
    device = next(teacher.parameters()).device
    full = []
    for row in rows:
        with torch.no_grad():
            signals = forward_signals(teacher, torch.from_numpy(row.tokens).long()[None].to(device))
        full.append(replace(row, hidden=signals.hidden[0].float().cpu().numpy(),
                            attention=encode_map(signals.attention.map()[0], torch.float32).cpu().numpy()))
    return full


def entropy_bits(arrays: Iterable[np.ndarray]) -> float:
    """Bits per value that a coder of single bytes could not go below: the order-0 entropies of the byte planes."""
    counts: np.ndarray | int = 0
    for array in arrays:
        planes = array.reshape(-1).view(np.uint8).reshape(array.size, -1).T
        counts = counts + np.stack([np.bincount(plane, minlength=256) for plane in planes])
    shares = counts / counts.sum(1, keepdims=True)
    return float(-np.where(shares > 0, shares * np.log2(np.maximum(shares, 1e-300)), 0).sum())


def multiply_adds(student: dict[str, int], teacher: dict[str, int], lengths: Sequence[tuple[int, int]],
                  terms: Sequence[str], *, padded_to: int = 0) -> float:
    """Multiply-adds of one training epoch's matrix products, forward and backward, over real tokens.

    Args:
        student, teacher: shapes.
        lengths: (tokens, answer tokens) of each example.
        terms: of the loss, as in `training.loss_terms`.
        padded_to: count the naive design instead: every example at this length, all causal pairs twice, student
            logits at every position, the teacher's logits stored.
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


def matrix_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, size: int = 2048) -> float:
    """Multiply-adds per second of a large matrix product, the best of several."""
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    seconds = alternate({"product": lambda: left @ right}, 5, device=device)["product"].min()
    return size**3 / seconds


class Laps:
    """Seconds between calls of `lap`, summed by part; on a GPU each lap waits for the device if one is given."""

    def __init__(self, parts: dict[str, float], device: torch.device | None = None) -> None:
        self.parts, self.device, self._last = parts, device, time.perf_counter()

    def lap(self, part: str) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[part] += now - self._last
        self._last = now


# ------------------------------------------------------------------------------------------ the cache and the sweep

def header(teacher: nn.Module, attention_dtype: str) -> dict[str, Any]:
    """What a white-box manifest must say so that the cache can be read; where it comes from is left out."""
    return {"name": "speed", "signals": "white_box", "heads": teacher.config.num_attention_heads,
            "hidden_size": teacher.config.hidden_size, "temperatures": [],
            "dtypes": {"hidden": "float16", "attention": attention_dtype}}


def cache_bytes(folder: Path, examples: int, naive_length: int) -> dict[str, float]:
    """GB that a cache like this sample would have for `examples` rows of the real length mix.

    Hidden states grow with the tokens, maps with the causal pairs; ids, tokens and footers are counted as they are in
    the sample, per token; `lm_head` counts once.

    Returns:
        `bytes` and its parts `hidden`, `attention`, `lm_head`; `entropy`, what coding every byte plane at its order-0
        entropy would leave; `naive`, logits, hidden states and square maps in float16, each example at `naive_length`.
    """
    cache = TeacherCache(folder, memory_bytes=0)
    rows = [cache[example_id] for example_id in cache.lengths]
    stored = {"hidden": 0, "attention": 0, "other": 0}
    for shard in cache.manifest["shards"]:
        metadata = pq.read_metadata(folder / shard["file"])
        for group in range(metadata.num_row_groups):
            for place in range(metadata.num_columns):
                column = metadata.row_group(group).column(place)
                name = column.path_in_schema.split(".")[0]
                stored[name if name in stored else "other"] += column.total_compressed_size
        stored["other"] += shard["bytes"] - sum(metadata.row_group(g).column(c).total_compressed_size
                                                for g in range(metadata.num_row_groups)
                                                for c in range(metadata.num_columns))
    lengths = np.array([len(row.tokens) for row in random_rows(examples, 10)])
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
    sampled = sum(len(row.tokens) for row in rows)
    sampled_pairs = sum(row.attention.shape[1] for row in rows)
    head = (folder / "lm_head.safetensors").stat().st_size
    manifest, (vocab, width) = cache.manifest, cache.lm_head().shape
    parts = {"hidden": stored["hidden"] / sampled * tokens, "attention": stored["attention"] / sampled_pairs * pairs,
             "lm_head": head, "other": stored["other"] / sampled * tokens}
    entropy = head + (entropy_bits(row.hidden for row in rows) * width * tokens
                      + entropy_bits(row.attention for row in rows) * manifest["heads"] * pairs) / 8
    naive = 2 * examples * naive_length * (vocab + width + manifest["heads"] * naive_length)
    return {name: value / 1e9 for name, value in
            {"bytes": sum(parts.values()), **parts, "entropy": entropy, "naive": naive}.items()}


def measure_sweep(trials: int, *, artifacts_dir: str, folder: Path) -> dict[str, float]:
    """What a trial of the toy sweep costs beyond its own training and evaluation; one epoch a trial.

    The first command makes data, cache and one trial and is not counted; the second runs the others.

    Returns:
        `wall_s` of the second command, `inside_s` that its trials trained and evaluated for, `trials`, `overhead_s` =
        (slots x wall_s - inside_s) / trials, and `import_s`, what a process needs for the imports alone.
    """
    seeds = max(round(trials / len(METHODS)), 1)
    (folder / "toy.yaml").write_text(f"epochs: 1\nsave_student: false\nartifacts_dir: {json.dumps(artifacts_dir)}\n")
    (folder / "grid.yaml").write_text(f"distill_type: [{', '.join(METHODS)}]\nseed: {list(range(seeds))}\n")
    command = [sys.executable, "-m", "kd_utils", "sweep", str(folder / "toy.yaml"), "--grid", str(folder / "grid.yaml"),
               "--run-dir", str(folder / "sweep")]

    def wall(*further: str) -> float:
        start = time.perf_counter()
        done = subprocess.run([*command, *further], cwd=code_root(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the sweep failed: {' '.join((done.stdout + done.stderr).split())[-500:]}")
        return time.perf_counter() - start

    wall("--only", "distill_type=black_box,seed=0")
    seconds = wall()
    names = [f"{method}_seed{seed}" for method in METHODS for seed in range(seeds) if (method, seed) != ("black_box", 0)]
    spent = [read_record(folder / "sweep" / "trials" / name)["seconds"] for name in names]
    inside = sum(trial["training"] + trial["evaluation"] for trial in spent)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import pandas, transformers.models.llama.modeling_llama"], check=True)
    return {"trials": len(names), "wall_s": seconds, "inside_s": inside,
            "overhead_s": (os.cpu_count() * seconds - inside) / len(names), "import_s": time.perf_counter() - start}


#: What the project asks of each measurement: at most ("<=") or at least (">=") this much.
FLOORS = {"cache_bytes_vs_naive/exact": ("<=", 0.018), "cache_bytes_vs_naive/compact": ("<=", 0.013),
          "cache_grad_cosine": (">=", 0.999), "cache_write_vs_forward": (">=", 0.90), "data_wait_share": ("<=", 0.03),
          "black_box_vs_finetune": ("<=", 1.25), "combined_vs_black_box": ("<=", 1.15),
          "peak_memory_vs_finetune": ("<=", 1.25), "speedup_vs_naive": (">=", 8.0), "sweep_overhead_s": ("<=", 8.0)}


def against_floors(measured: dict[str, float], limits: dict[str, float]) -> pd.DataFrame:
    """One row per measurement that has a floor: `key`, `measured`, `floor`, `limit`, `met`, `margin`.

    `margin` says how many times better than its floor the measurement is; below 1 it is missed.
    """
    rows = []
    for key, (sense, floor) in FLOORS.items():
        if key in measured:
            value = measured[key]
            margin = value / floor if sense == ">=" else floor / max(value, 1e-9)
            rows.append({"key": key, "measured": value, "": sense, "floor": floor, "limit": limits[key],
                         "met": bool(margin >= 1), "margin": margin})
    return pd.DataFrame(rows)
