"""The work that notebook 05 measures: random models in the shapes of real ones, rows of realistic
lengths, their teacher cache and its size, and the number of multiply-adds. No weights or data are
loaded: speed depends on shapes and lengths, not on the values of weights.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kd_utils.cache import teacher_cache, writer
from kd_utils.cost.rows import LENGTH_MIX, mixed_lengths
from kd_utils.cost.shapes import matrices
from kd_utils.cost.work import part_multiply_adds
from kd_utils.teacher import extraction
from kd_utils.tokens.encoding import Example, right_padded

_SIZES = """
hidden_size intermediate_size num_hidden_layers num_key_value_heads num_attention_heads vocab_size
""".split()


def _shape(*sizes: int) -> dict[str, int]:
    return dict(zip(_SIZES, sizes, strict=True))


#: Teacher and student by name. `llama2` is Llama-2-7B and TinyLlama-1.1B. `small` keeps
#: TinyLlama's proportions: 32 heads, 8 query heads for each key head, a feed-forward layer of 2.75
#: widths, 6 % of the multiply-adds in `lm_head`; its teacher is twice as wide and has 1.5 times
#: the layers.
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "tiny": {"teacher": _shape(64, 176, 2, 4, 4, 97), "student": _shape(32, 88, 2, 2, 4, 97)},
    "small": {
        "teacher": _shape(1024, 2816, 6, 32, 32, 1376),
        "student": _shape(512, 1408, 4, 4, 32, 1376),
    },
    "llama2": {
        "teacher": _shape(4096, 11008, 32, 32, 32, 32000),
        "student": _shape(2048, 5632, 22, 4, 32, 32000),
    },
}


def random_model(
    shape: dict[str, int],
    *,
    seed: int = 0,
    sharpness: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """Make a Llama of this shape (an entry of `SHAPES`) with random weights, in eval mode.

    Random weights give flat attention maps, which compress far better than those of a trained
    model; `sharpness` is a factor on the queries of the last layer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**shape, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
    with torch.device(device), torch.no_grad():
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
        model.model.layers[-1].self_attn.q_proj.weight.mul_(sharpness)
    return model


def random_rows(count: int, vocab_size: int, *, seed: int = 0) -> list[Example]:
    """Make rows of random tokens in the real proportions of tasks and lengths (`LENGTH_MIX`).

    Lengths are evenly spaced quantiles, whatever the seed: ten times the rows have ten times the
    tokens.
    """
    rng = np.random.default_rng(seed)
    task_rows = [rows for rows, _, _ in LENGTH_MIX.values()]
    ends = np.cumsum([0, *task_rows]) * count // sum(task_rows)
    examples: list[Example] = []
    for task, first, last in zip(LENGTH_MIX, ends, ends[1:], strict=False):
        for length, answer in mixed_lengths(task, last - first):
            tokens = rng.integers(3, vocab_size, length).astype(np.int32)
            examples.append(Example(f"{task}-{len(examples)}", tokens, length - answer))
    return examples


def part_bytes(
    student: dict[str, int], teacher: dict[str, int], lengths: Sequence[tuple[int, int]], steps: int
) -> dict[str, float]:
    """Count the bytes that one training epoch with all terms has to move, by part of the step.

    A weight, gradient or state of the optimiser (4 bytes) counts once in each part that reads or
    writes it, a cached signal (2 bytes) in the term that reads it. Activations do not count.
    """
    body, head = matrices(student).values()
    teachers_head = matrices(teacher)["head"]
    projector = student["hidden_size"] * teacher["hidden_size"]
    tokens, pairs = sum(n for n, _ in lengths), sum(n * (n + 1) / 2 for n, _ in lengths)
    used, trained = body + head + projector, body + 2 * head + projector  # with the embeddings
    return {
        "body": 4 * body * steps,
        "task": 4 * head * steps,
        "kd": 4 * (2 * head + teachers_head) * steps,  # the head's gradient, too
        "hidden": 4 * projector * steps + 2 * teacher["hidden_size"] * tokens,
        "attention": 2 * teacher["num_attention_heads"] * pairs,
        "backward": 4 * (used + trained) * steps,
        # Norm: reads the gradient. Clip: reads and writes it. AdamW: reads 4 numbers, writes 3.
        "clip and step": 4 * (1 + 2 + 7) * trained * steps,
    }


def step_limits(
    shape: dict[str, dict[str, int]],
    lengths: Sequence[tuple[int, int]],
    steps: int,
    rate: float,
    bandwidth: float,
) -> pd.DataFrame:
    """The least seconds of one epoch with all terms, a row per part of the step.

    Args:
        shape: of "student" and "teacher", an entry of `SHAPES`.
        lengths, steps: as in `part_bytes`.
        rate, bandwidth: the machine's multiply-adds and bytes per second.

    Returns:
        `multiply-adds` and `bytes`, each in seconds at its rate, and `limit`, the larger one.
    """
    sides, terms = (shape["student"], shape["teacher"], lengths), ("kd", "hidden", "attention")
    counted = {
        "bytes": pd.Series(part_bytes(*sides, steps)) / bandwidth,
        "multiply-adds": pd.Series(part_multiply_adds(*sides, terms)) / rate,
    }
    table = pd.DataFrame(counted).fillna(0.0)
    return table.assign(limit=table.max(axis=1))


def write_sample(
    folder: Path,
    rows: list[Example],
    teacher: torch.nn.Module,
    *,
    batch_tokens: int,
    attention_dtype: str = "float16",
) -> dict[str, Any]:
    """Run the teacher over the rows, in batches of at most `batch_tokens` with padding, and write
    their white-box cache to a new folder. Returns its manifest, which does not say where the cache
    comes from. Attention maps are stored as "float16" or "uint8".
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
    run = extraction.signal_function(teacher, signals="white_box", attention_dtype=attention_dtype)
    write = partial(writer.write_shards, folder, signals_of=run, batch_tokens=batch_tokens)
    lm_head = extraction.stored_lm_head(teacher)
    return writer.assemble_cache(
        folder, {"train": rows}, write, lm_head, header, shard_examples=256
    )


@torch.inference_mode()
def bare_forward(teacher: torch.nn.Module, rows: list[Example], batch_tokens: int) -> None:
    """Run the teacher over the rows in the cache's batches and keep nothing."""
    for batch in writer.token_batches(rows, batch_tokens):
        input_ids = torch.from_numpy(right_padded(batch)[0]).to(teacher.device)
        teacher.base_model(input_ids=input_ids, use_cache=False)


def cache_gigabytes(folder: Path, examples: int, naive_length: int) -> dict[str, float]:
    """Extrapolate the size of a small cache to `examples` rows of the real length mix.

    Hidden states grow with the tokens and attention maps with the causal pairs. Ids, tokens and
    Parquet footers are counted per token of the sample; `lm_head` counts once.

    Returns:
        GB: `bytes` and its parts `hidden`, `attention`, `lm_head` and `other`; `entropy`, the size
        with every byte plane coded at its order-0 entropy; `naive`, that of logits, hidden states
        and square maps in float16 with every example padded to `naive_length`.
    """
    cache = teacher_cache.TeacherCache(folder, memory_bytes=0)
    rows = [cache[example_id] for example_id in cache.lengths]
    lengths = np.array([len(row.tokens) for row in random_rows(examples, 10)])
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1) // 2).sum()
    sampled = sum(cache.lengths.values())
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
    """Sum of the byte planes' order-0 entropies: the fewest bits per value if bytes are coded."""
    planes: Iterable[np.ndarray] = (
        array.reshape(-1).view(np.uint8).reshape(array.size, -1).T for array in arrays
    )
    counts = sum(np.stack([np.bincount(p, minlength=256) for p in group]) for group in planes)
    shares = counts / counts.sum(1, keepdims=True)
    return float(-np.where(shares > 0, shares * np.log2(np.maximum(shares, 1e-300)), 0).sum())
