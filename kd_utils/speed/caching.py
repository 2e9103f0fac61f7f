"""Writing a teacher cache of the benchmark's rows: its time and its size."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.cache.writer import assemble_cache, token_batches, write_shards
from kd_utils.speed.workload import random_rows
from kd_utils.teacher.extraction import signal_function, stored_lm_head
from kd_utils.tokens.encoding import Example, right_padded


def write_sample(
    folder: str | Path,
    rows: list[Example],
    teacher: nn.Module,
    *,
    batch_tokens: int,
    attention_dtype: str = "float16",
) -> dict[str, Any]:
    """Run the teacher over the rows, write their white-box cache and return its manifest.

    The manifest says what is needed to read the cache and nothing about where it comes from.

    Args:
        folder: of the cache; missing or empty.
        batch_tokens: most tokens in one teacher batch, padding included.
        attention_dtype: "float16" or "uint8".
    """
    last = [teacher.config.num_hidden_layers]
    header = {
        "name": "speed",
        "signals": "white_box",
        "layers": {"hidden": last, "attention": last},
        "heads": teacher.config.num_attention_heads,
        "hidden_size": teacher.config.hidden_size,
        "temperatures": [],
        "dtypes": {"hidden": "float16", "attention": attention_dtype},
    }
    run = signal_function(teacher, signals="white_box", attention_dtype=attention_dtype)
    write = partial(write_shards, Path(folder), signals_of=run, batch_tokens=batch_tokens)
    lm_head = stored_lm_head(teacher)
    return assemble_cache(Path(folder), {"train": rows}, write, lm_head, header, shard_examples=256)


@torch.inference_mode()
def bare_forward(teacher: nn.Module, rows: list[Example], batch_tokens: int) -> None:
    """Run the teacher over the rows in the cache's batches and keep nothing."""
    device = next(teacher.parameters()).device
    for batch in token_batches(rows, batch_tokens):
        input_ids = torch.from_numpy(right_padded(batch)[0]).to(device)
        teacher.base_model(input_ids=input_ids, use_cache=False)


def cache_gigabytes(folder: Path, examples: int, naive_length: int) -> dict[str, float]:
    """Extrapolate the size of a small cache to `examples` rows of the real length mix.

    Hidden states grow with the tokens and attention maps with the causal pairs. Ids, tokens and
    Parquet footers are counted per token of the sample; `lm_head` counts once.

    Returns:
        GB: `bytes` and its parts `hidden`, `attention`, `lm_head` and `other`; `entropy`, the size
        if every byte plane were coded at its order-0 entropy; `naive`, the size of logits, hidden
        states and square maps in float16 with every example padded to `naive_length`.
    """
    cache = TeacherCache(folder, memory_bytes=0)
    rows = [cache[example_id] for example_id in cache.lengths]
    lengths = np.array([len(row.tokens) for row in random_rows(examples, 10)])
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
    sampled = sum(len(row.tokens) for row in rows)
    sampled_pairs = sum(row.signals["attention"].shape[1] for row in rows)
    stored, heads = cache.stored_bytes(), cache.manifest["heads"]
    vocab, width = cache.lm_head().shape
    parts = {
        "hidden": stored["hidden"] / sampled * tokens,
        "attention": stored["attention"] / sampled_pairs * pairs,
        "lm_head": (folder / "lm_head.safetensors").stat().st_size,
        "other": stored["other"] / sampled * tokens,
    }
    hidden_bits = entropy_bits(row.signals["hidden"] for row in rows) * width * tokens
    map_bits = entropy_bits(row.signals["attention"] for row in rows) * heads * pairs
    sizes = {
        "bytes": sum(parts.values()),
        **parts,
        "entropy": parts["lm_head"] + (hidden_bits + map_bits) / 8,
        "naive": 2 * examples * naive_length * (vocab + width + heads * naive_length),
    }
    return {name: size / 1e9 for name, size in sizes.items()}


def entropy_bits(arrays: Iterable[np.ndarray]) -> float:
    """Bits per value that a coder of single bytes needs at least: the sum of the order-0 entropies
    of the byte planes.
    """
    counts: np.ndarray | int = 0
    for array in arrays:
        planes = array.reshape(-1).view(np.uint8).reshape(array.size, -1).T
        counts = counts + np.stack([np.bincount(plane, minlength=256) for plane in planes])
    shares = counts / counts.sum(1, keepdims=True)
    return float(-np.where(shares > 0, shares * np.log2(np.maximum(shares, 1e-300)), 0).sum())
