"""What notebook 05 holds the project to: the cache's bytes, a sweep's overhead, and the floor of
each measurement.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config import project_paths
from kd_utils.config.trial import DISTILLATIONS
from kd_utils.records.trial_record import read_record
from kd_utils.speed.measuring import random_rows

#: What the project asks of each measurement: at most ("<=") or at least (">=") this much.
FLOORS = {
    "cache_bytes_vs_naive": ("<=", 0.018),
    "cache_bytes_vs_naive/compact": ("<=", 0.013),
    "cache_grad_cosine": (">=", 0.999),
    "cache_write_vs_forward": (">=", 0.90),
    "data_wait_share": ("<=", 0.03),
    "black_box_vs_finetune": ("<=", 1.25),
    "combined_vs_black_box": ("<=", 1.15),
    "peak_memory_vs_finetune": ("<=", 1.25),
    "speedup_vs_naive": (">=", 8.0),
    "sweep_overhead_s": ("<=", 8.0),
}


def header(teacher: nn.Module, attention_dtype: str) -> dict[str, Any]:
    """What a white-box manifest must say so that the cache can be read; where it comes from is left
    out.
    """
    last = [teacher.config.num_hidden_layers]
    return {
        "name": "speed",
        "signals": "white_box",
        "layers": {"hidden": last, "attention": last},
        "heads": teacher.config.num_attention_heads,
        "hidden_size": teacher.config.hidden_size,
        "temperatures": [],
        "dtypes": {"hidden": "float16", "attention": attention_dtype},
    }


def cache_bytes(folder: Path, examples: int, naive_length: int) -> dict[str, float]:
    """GB that a cache like this sample would have for `examples` rows of the real length mix.

    Hidden states grow with the tokens, maps with the causal pairs; ids, tokens and footers are
    counted as they are in the sample, per token; `lm_head` counts once.

    Returns:
        `bytes` and its parts `hidden`, `attention`, `lm_head`; `entropy`, what coding every byte
        plane at its order-0 entropy would leave; `naive`, logits, hidden states and square maps in
        float16, each example at `naive_length`.
    """
    cache = TeacherCache(folder, memory_bytes=0)
    rows = [cache[example_id] for example_id in cache.lengths]
    stored = cache.stored_bytes()
    lengths = np.array([len(row.tokens) for row in random_rows(examples, 10)])
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
    sampled = sum(len(row.tokens) for row in rows)
    sampled_pairs = sum(row.signals["attention"].shape[1] for row in rows)
    head = (folder / "lm_head.safetensors").stat().st_size
    manifest, (vocab, width) = cache.manifest, cache.lm_head().shape
    parts = {
        "hidden": stored["hidden"] / sampled * tokens,
        "attention": stored["attention"] / sampled_pairs * pairs,
        "lm_head": head,
        "other": stored["other"] / sampled * tokens,
    }
    entropy = (
        head
        + (
            entropy_bits(row.signals["hidden"] for row in rows) * width * tokens
            + entropy_bits(row.signals["attention"] for row in rows) * manifest["heads"] * pairs
        )
        / 8
    )
    naive = 2 * examples * naive_length * (vocab + width + manifest["heads"] * naive_length)
    return {
        name: value / 1e9
        for name, value in {
            "bytes": sum(parts.values()),
            **parts,
            "entropy": entropy,
            "naive": naive,
        }.items()
    }


def entropy_bits(arrays: Iterable[np.ndarray]) -> float:
    """Bits per value that a coder of single bytes could not go below: the order-0 entropies of the
    byte planes.
    """
    counts: np.ndarray | int = 0
    for array in arrays:
        planes = array.reshape(-1).view(np.uint8).reshape(array.size, -1).T
        counts = counts + np.stack([np.bincount(plane, minlength=256) for plane in planes])
    shares = counts / counts.sum(1, keepdims=True)
    return float(-np.where(shares > 0, shares * np.log2(np.maximum(shares, 1e-300)), 0).sum())


def measure_sweep(trials: int, *, artifacts_dir: str, folder: Path) -> dict[str, float]:
    """What a trial of a toy sweep costs beyond its own training and evaluation; two slots, one
    epoch a trial.

    It is an experiment of its own, "bench": data and cache of "toy" stay as they are. The first
    command makes data, cache and one trial and is not counted; the second runs the others.

    Returns:
        `wall_s` of the second command, `inside_s` that its trials trained and evaluated for,
        `trials`, `overhead_s` = (2 x wall_s - inside_s) / trials, and `import_s`, what a process
        needs for the imports alone.
    """
    seeds = max(round(trials / len(DISTILLATIONS)), 1)
    (folder / "toy.yaml").write_text(
        "name: bench\nteacher_epochs: 2\nepochs: 1\nsave_student: false\n"
        f"artifacts_dir: {json.dumps(artifacts_dir)}\n"
    )
    (folder / "grid.yaml").write_text(
        f"distill_type: [{', '.join(DISTILLATIONS)}]\nseed: {list(range(seeds))}\n"
    )
    command = [
        sys.executable,
        "-m",
        "kd_utils",
        "sweep",
        str(folder / "toy.yaml"),
        "--grid",
        str(folder / "grid.yaml"),
        "--run-dir",
        str(folder / "sweep"),
        "--cpus-per-trial",
        str(os.cpu_count() / 2),
    ]

    def wall(*further: str) -> float:
        start = time.perf_counter()
        done = subprocess.run(
            [*command, *further], cwd=project_paths.CODE_ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(
                f"the sweep failed: {' '.join((done.stdout + done.stderr).split())[-500:]}"
            )
        return time.perf_counter() - start

    wall("--only", "distill_type=black_box,seed=0")
    seconds = wall()
    names = [f"{method}_seed{seed}" for method in DISTILLATIONS for seed in range(seeds)]
    names.remove("black_box_seed0")
    spent = [read_record(folder / "sweep" / "trials" / name)["seconds"] for name in names]
    inside = sum(trial["training"] + trial["evaluation"] for trial in spent)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "import pandas, transformers.models.llama.modeling_llama"],
        check=True,
    )
    return {
        "trials": len(names),
        "wall_s": seconds,
        "inside_s": inside,
        "overhead_s": (2 * seconds - inside) / len(names),
        "import_s": time.perf_counter() - start,
    }


def against_floors(measured: dict[str, float], limits: dict[str, float]) -> pd.DataFrame:
    """One row per measurement that has a floor: `key`, `measured`, `floor`, `limit`, `met`,
    `margin`.

    `margin` says how many times better than its floor the measurement is; below 1 it is missed.
    """
    rows = []
    for key, (sense, floor) in FLOORS.items():
        if key in measured:
            value = measured[key]
            margin = value / floor if sense == ">=" else floor / max(value, 1e-9)
            rows.append(
                {
                    "key": key,
                    "measured": value,
                    "": sense,
                    "floor": floor,
                    "limit": limits[key],
                    "met": bool(margin >= 1),
                    "margin": margin,
                }
            )
    return pd.DataFrame(rows)
