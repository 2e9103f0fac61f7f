"""How well a model predicts text, in bits per byte, so that tokenizers do not matter."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from kd_utils.tokens.encoding import Example, right_padded

ROWS_AT_ONCE = 32


@torch.inference_mode()
def bits_per_byte(model: torch.nn.Module, rows: list[Example], size: int) -> float:
    """Cross-entropy of every token but the first of each row, in bits per byte of text.

    Args:
        model: in eval mode.
        rows: prompt and answer of each row, as the model's tokens.
        size: bytes of their texts.
    """
    device, nats = next(model.parameters()).device, 0.0
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(ordered), ROWS_AT_ONCE):
        padded, lengths = right_padded(ordered[start : start + ROWS_AT_ONCE])
        input_ids = torch.from_numpy(padded).to(device)
        ends = torch.tensor(lengths, device=device)[:, None]
        padding = torch.arange(input_ids.shape[1], device=device) >= ends
        labels = input_ids.masked_fill(padding, -100)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        nats += F.cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / size


def unigram_bits_per_byte(train: list[Example], rows: list[Example], size: int) -> float:
    """The same of a model that knows only how frequent each token is in the training rows, each
    counted once more than it occurs.

    Args:
        train: rows in the same tokens.
        size: bytes of the texts of `rows`.
    """
    tokens = np.concatenate([row.tokens[1:] for row in rows])
    seen = np.concatenate([row.tokens for row in train])
    counts = np.bincount(seen, minlength=int(max(tokens.max(), seen.max())) + 1) + 1
    return float(-np.log2(counts[tokens] / counts.sum()).sum() / size)
