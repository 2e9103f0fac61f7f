"""The plan's first design, kept as the baseline of notebook 05: the same loss, with nothing saved.

Every example is padded to `length` tokens; all layers run eager attention and hand out their maps;
the student's logits are computed at every position; the teacher's logits, hidden states and square
maps lie in Parquet as nested lists of floats and come back as Python lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_utils.models.attention_maps import decode_map
from kd_utils.tokens.encoding import Example


@dataclass
class PaddedBatch:
    """(B, L) `input_ids`, `labels` (-100 where nothing is predicted) and `mask`; the teacher's
    signals, padded with 0.

    Attributes:
        logits: (B, L, V); hidden: (B, L, d); maps: (B, H, L, L).
    """

    input_ids: Tensor
    labels: Tensor
    mask: Tensor
    logits: Tensor
    hidden: Tensor
    maps: Tensor


def write_rows(path: Path, examples: list[Example], teacher_head: Tensor, *, length: int) -> None:
    """Examples with their signals as nested lists of float32, padded to `length`; the same values
    as in the cache.
    """
    columns: dict[str, list] = {
        name: [] for name in ("input_ids", "labels", "mask", "logits", "hidden", "maps")
    }
    for row in examples:
        n = len(row.tokens)
        labels = np.where(np.arange(n) < row.answer_start, -100, row.tokens)
        hidden = torch.from_numpy(row.signals["hidden"].astype(np.float32))
        maps = decode_map(torch.from_numpy(row.signals["attention"].copy()), 0, n)
        padded = {
            "input_ids": F.pad(torch.from_numpy(row.tokens.astype(np.int64)), (0, length - n)),
            "labels": F.pad(torch.from_numpy(labels), (0, length - n), value=-100),
            "mask": F.pad(torch.ones(n, dtype=torch.int64), (0, length - n)),
            "logits": F.pad(hidden @ teacher_head.float().T, (0, 0, 0, length - n)),
            "hidden": F.pad(hidden, (0, 0, 0, length - n)),
            "maps": F.pad(maps, (0, length - n, 0, length - n)),
        }
        for name, values in padded.items():
            columns[name].append(values)
    table = pa.table(
        {name: _nested(torch.stack(values).numpy()) for name, values in columns.items()}
    )
    pq.write_table(table, path, row_group_size=1)


def _nested(values: np.ndarray) -> pa.Array:
    """(N, a, b, ...) as N nested lists."""
    array = pa.array(values.reshape(-1))
    for width in reversed(values.shape[1:]):
        array = pa.ListArray.from_arrays(
            pa.array(np.arange(0, len(array) + 1, width, dtype=np.int32)), array
        )
    return array


def read_batch(path: Path, groups: list[int], device: torch.device | str = "cpu") -> PaddedBatch:
    """Rows by their number, as tensors made from Python lists."""
    file = pq.ParquetFile(path)
    rows = [file.read_row_group(group).to_pylist()[0] for group in groups]
    return PaddedBatch(
        **{name: torch.tensor([row[name] for row in rows], device=device) for name in rows[0]}
    )


def loss_terms(
    student: nn.Module, batch: PaddedBatch, projector: nn.Linear, temperature: float
) -> dict[str, Tensor]:
    """The four terms of `training.loss_terms` with `distill_tokens` "all": same values, same
    gradients.

    Args:
        student: a causal LM whose attention is "eager".
    """
    output = student(
        input_ids=batch.input_ids,
        attention_mask=batch.mask,
        output_attentions=True,
        output_hidden_states=True,
        use_cache=False,
    )
    real = batch.mask.bool()
    tokens = real.sum()
    per_token = F.kl_div(
        (output.logits / temperature).log_softmax(-1),
        (batch.logits / temperature).softmax(-1),
        reduction="none",
    ).sum(-1)
    hidden = F.mse_loss(projector(output.hidden_states[-1]), batch.hidden, reduction="none").mean(
        -1
    )
    causal = (real[:, :, None] & real[:, None, :]).tril()[:, None]  # (B, 1, L, L)
    maps = output.attentions[-1]
    errors = F.mse_loss(maps, batch.maps, reduction="none") * causal
    return {
        "task": F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()),
        "kd": temperature**2 * (per_token * real).sum() / tokens,
        "hidden": (hidden * real).sum() / tokens,
        "attention": errors.sum() / (causal.sum() * maps.shape[1]),
    }
