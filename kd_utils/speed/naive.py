"""The plan's first design, kept as the baseline of notebook 05: the same loss, with nothing saved.

Every example is padded to `length` tokens. All layers run eager attention and return their maps.
The student's logits are computed at every position. The teacher's logits, hidden states and square
maps are stored in Parquet as nested lists of floats and are read as Python lists.
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_utils.distill import batches, training
from kd_utils.models import attention_maps, devices
from kd_utils.speed.step import WEIGHTS, StepBench
from kd_utils.tokens.encoding import Example


def write_rows(path: Path, examples: list[Example], teacher_head: Tensor, *, length: int) -> None:
    """Write examples and their signals as nested lists in Parquet, padded to `length`.

    The columns of a row are `input_ids` (L), `labels` (L; -100 where nothing is predicted), `mask`
    (L; 1 for real tokens), and of the teacher `logits` (L, V), `hidden` (L, d), the final hidden
    states, and `maps` (H, L, L), the attention maps of the last layer.

    Args:
        examples: with the signals of a cache; their values do not change.
        teacher_head: (V, d) the teacher's `lm_head`, which makes its logits.
    """
    padded = []
    for row in examples:
        n, hidden = len(row.tokens), torch.from_numpy(row.signals["hidden"].astype(np.float32))
        tokens = torch.from_numpy(row.tokens.astype(np.int64))
        labels = tokens.where(torch.arange(n) >= row.answer_start, -100)
        maps = attention_maps.decode_map(torch.from_numpy(row.signals["attention"].copy()), 0, n)
        end = (0, length - n)
        padded.append(
            {
                "input_ids": F.pad(tokens, end),
                "labels": F.pad(labels, end, value=-100),
                "mask": F.pad(torch.ones(n, dtype=torch.int64), end),
                "logits": F.pad(hidden @ teacher_head.float().T, (0, 0, *end)),
                "hidden": F.pad(hidden, (0, 0, *end)),
                "maps": F.pad(maps, (*end, *end)),
            }
        )
    table = {name: _nested(torch.stack([row[name] for row in padded])) for name in padded[0]}
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=1)


def _nested(values: Tensor) -> pyarrow.Array:
    """(N, a, b, ...) as N nested lists."""
    array = pyarrow.array(values.numpy().reshape(-1))
    for width in reversed(values.shape[1:]):
        starts = np.arange(0, len(array) + 1, width, dtype=np.int32)
        array = pyarrow.ListArray.from_arrays(starts, array)
    return array


def read_batch(
    path: Path, groups: list[int] | range, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Read rows by their number and make tensors of their Python lists, (B, ...) by column."""
    file = pyarrow.parquet.ParquetFile(path)
    rows = [file.read_row_group(group).to_pylist()[0] for group in groups]
    return {name: torch.tensor([row[name] for row in rows], device=device) for name in rows[0]}


def loss_terms(bench: StepBench, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The four loss terms over all tokens: the same values and gradients as `bench.loss_terms`."""
    bench.student.set_attn_implementation("eager")
    with devices.autocast(bench.device, bench.config.precision):
        output = bench.student(
            input_ids=batch["input_ids"],
            attention_mask=batch["mask"],
            output_attentions=True,
            output_hidden_states=True,
            use_cache=False,
        )
        T, real = bench.config.temperature, batch["mask"].bool()
        teacher = (batch["logits"] / T).softmax(-1)
        kd = F.kl_div((output.logits / T).log_softmax(-1), teacher, reduction="none").sum(-1)
        projected = bench.projector(output.hidden_states[-1])
        hidden = F.mse_loss(projected, batch["hidden"], reduction="none").mean(-1)
        causal = (real[:, :, None] & real[:, None, :]).tril()[:, None]  # (B, 1, L, L)
        maps = output.attentions[-1]
        attention = F.mse_loss(maps, batch["maps"], reduction="none") * causal
        student, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        return {
            "task": F.cross_entropy(student, labels),
            "kd": T**2 * (kd * real).sum() / real.sum(),
            "hidden": (hidden * real).sum() / real.sum(),
            "attention": attention.sum() / (causal.sum() * maps.shape[1]),
        }


def step(bench: StepBench, path: Path, count: int, reading_seconds: list[float]) -> None:
    """Train a bench's student on a file's first `count` rows; add the seconds that reading took."""
    start = time.perf_counter()
    batch = read_batch(path, range(count), bench.device)
    reading_seconds.append(time.perf_counter() - start)
    training.weighted_sum(loss_terms(bench, batch), WEIGHTS).backward()
    bench.update()


def beside_cached(bench: StepBench, path: Path, examples: list[Example]) -> pd.DataFrame:
    """The loss terms of `examples` (a row each) in both designs, "cached" and "naive".

    Args:
        path: of a file whose first rows are `examples`, which have the signals of the cache.

    Raises:
        AssertionError: the designs differ by more than rounding explains.
    """
    with torch.no_grad():
        cached = bench.loss_terms(batches.collate(examples, device=bench.device), WEIGHTS)
        naive = loss_terms(bench, read_batch(path, range(len(examples)), bench.device))
    table = pd.DataFrame({"cached": cached, "naive": naive}).map(Tensor.item)
    exact = devices.amp_dtype(bench.device, bench.config.precision) == torch.float32
    tolerance = {"atol": 1e-5, "rtol": 1e-3} if exact else {"atol": 1e-3, "rtol": 3e-2}
    pd.testing.assert_series_equal(table["cached"], table["naive"], check_names=False, **tolerance)
    return table
