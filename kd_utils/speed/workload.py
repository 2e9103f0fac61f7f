"""The work that notebook 05 measures: model shapes, random models, rows of realistic lengths, and
the number of multiply-adds that they need.

No weights or data are loaded: speed depends on shapes and lengths, not on the values of weights.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from kd_utils.tokens.encoding import Example

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_attention_heads",
    "vocab_size",
)


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

#: For each task its number of rows, then the quantiles 0, 1/20, ..., 1 of tokens in a row and of
#: tokens in its answer: the training rows of `papermill_params/llama2.yaml` under Llama-2's
#: tokenizer.
# fmt: off
LENGTH_MIX: dict[str, tuple[int, list[int], list[int]]] = {
    "sst2": (
        5000,
        [16, 21, 24, 26, 28, 30, 32, 33, 35, 37, 38, 40, 42, 44, 46, 48, 50, 53, 56, 61, 90],
        [2] * 21,
    ),
    "mmlu": (
        1000,
        [45, 59, 63, 67, 72, 76, 81, 86, 93, 97, 104,
         112, 122, 132, 139, 150, 171, 210, 258, 324, 493],
        [2] * 21,
    ),
    "gsm8k": (
        1000,
        [72, 106, 118, 127, 137, 146, 155, 166, 173, 180, 190,
         201, 209, 218, 227, 241, 254, 275, 305, 340, 495],
        [31, 59, 69, 76, 82, 89, 95, 101, 106, 112, 119,
         126, 136, 145, 152, 161, 171, 185, 209, 241, 368],
    ),
}
# fmt: on


def random_model(
    shape: dict[str, int],
    *,
    seed: int = 0,
    sharpness: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Make a Llama of this shape with random weights, in eval mode.

    Args:
        shape: an entry of `SHAPES`.
        sharpness: factor on the queries of the last layer. Random weights give flat attention maps,
            which compress far better than those of a trained model.
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
    """Make rows of random tokens whose lengths follow `LENGTH_MIX`.

    The tasks keep their real proportions, and the lengths are evenly spaced quantiles. They do not
    depend on `seed`, so ten times the rows have ten times the tokens.
    """
    rng = np.random.default_rng(seed)
    task_rows = [rows for rows, _, _ in LENGTH_MIX.values()]
    ends = np.cumsum([0, *task_rows]) * count // sum(task_rows)
    examples = []
    for task, first, last in zip(LENGTH_MIX, ends, ends[1:], strict=False):
        _, *quantiles = LENGTH_MIX[task]
        for place in (np.arange(last - first) + 0.5) / max(last - first, 1) * 20:
            length, answer = (round(np.interp(place, range(21), q)) for q in quantiles)
            ids = rng.integers(3, vocab_size, length).astype(np.int32)
            examples.append(Example(f"{task}-{len(examples)}", ids, length - answer))
    return examples


def multiply_adds(
    student: dict[str, int],
    teacher: dict[str, int],
    lengths: Sequence[tuple[int, int]],
    terms: Sequence[str],
    *,
    padded_to: int = 0,
) -> float:
    """Count the multiply-adds of one training epoch: matrix products of forward and backward.

    Args:
        student, teacher: shapes.
        lengths: (tokens, answer tokens) of each example.
        terms: names of the loss terms, such as "kd".
        padded_to: 0 counts real tokens only. Otherwise count the naive design: every example has
            this length, all pairs of positions count, student logits are computed at every
            position, and the teacher's logits are read rather than computed.
    """
    tokens = sum(n for n, _ in lengths)
    pairs = sum(n * (n + 1) / 2 for n, _ in lengths)
    predicted = sum(answer for _, answer in lengths)
    if padded_to:
        tokens = predicted = padded_to * len(lengths)
        pairs = float(padded_to**2 * len(lengths))
    width, heads = student["hidden_size"], student["num_attention_heads"]
    key_width = width * student["num_key_value_heads"] // heads
    layer = 2 * width**2 + 2 * width * key_width + 3 * width * student["intermediate_size"]
    body = student["num_hidden_layers"] * (layer * tokens + 2 * width * pairs)
    head = width * student["vocab_size"]
    total = 3 * (body + head * predicted)
    hidden = ("hidden" in terms) * 3 * width * teacher["hidden_size"] * tokens
    if padded_to:
        return total + hidden
    kd = ("kd" in terms) * tokens * (3 * head + teacher["hidden_size"] * teacher["vocab_size"])
    attention = ("attention" in terms) * 3 * width * pairs
    return total + kd + hidden + attention


def forward_multiply_adds(shape: dict[str, int], lengths: Sequence[int]) -> float:
    """Count the multiply-adds of a model's forward pass over real tokens, without its `lm_head`."""
    without_head = {**shape, "vocab_size": 0}
    return multiply_adds(without_head, shape, [(n, 0) for n in lengths], ()) / 3
