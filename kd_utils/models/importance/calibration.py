"""The training rows that a cut is measured on, and what is measured beside the sums."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_utils.models import loading
from kd_utils.models.cut.layers import passed_over
from kd_utils.models.importance.sums import UnitSums
from kd_utils.models.signals import decoder_layers
from kd_utils.store.files import sha256_json
from kd_utils.tokens.encoding import Example, right_padded

#: Rows for what needs more than one pass, or more than sums: Minitron uses 512 to 1024.
FEW_ROWS = 512
BATCH_ROWS = 32


@dataclass(frozen=True)
class Calibration:
    """The training rows, and what is known already of one model on them.

    Attributes:
        teacher: fingerprint of the cached teacher.
        teacher_sums: gives the table of `UnitSums` that 02's pass left, or None.
        rows: the training rows, in the tokens of the model that is cut.
    """

    teacher: str
    teacher_sums: Callable[[], pd.DataFrame | None]
    rows: list[Example]

    def require_known(self, config: Any, name: str) -> None:
        """Refuse rows with token ids that the model `name` with this config does not know.

        Raises:
            ValueError: the rows are in the tokens of another model.
        """
        largest = max(int(row.tokens.max()) for row in self.rows)
        if largest >= config.vocab_size:
            raise ValueError(
                f"the training rows have the token id {largest}, and {name} knows the ids below "
                f"{config.vocab_size}: set tokenizer to the one that belongs to the student"
            )

    def sums_of(self, name: str, revision: str = "") -> pd.DataFrame:
        """The sums of a model over the training rows: the cache's if it is the cached teacher,
        else those of a pass that is made here.
        """
        if loading.model_fingerprint(name, revision) == self.teacher:
            if (known := self.teacher_sums()) is not None:
                return known
        return sums_over(loading.load_causal_lm(name, revision).eval(), self.rows)

    @property
    def few_rows(self) -> list[Example]:
        """`FEW_ROWS` of the rows; which ones follows from their names alone."""
        return sorted(self.rows, key=lambda row: sha256_json(row.example_id))[:FEW_ROWS]


@torch.inference_mode()
def sums_over(model: nn.Module, rows: list[Example]) -> pd.DataFrame:
    """The table of `UnitSums` of a model over these rows."""
    sums = UnitSums(model)
    for batch, input_ids, lengths in batches(rows):
        with sums.of_batch([row.example_id for row in batch], lengths):
            model.base_model(input_ids=input_ids, use_cache=False)
    return sums.table()


def batches(rows: list[Example]) -> Iterator[tuple[list[Example], Tensor, list[int]]]:
    """Rows of similar lengths: the rows, (B, T) token ids padded on the right, and lengths."""
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    for start in range(0, len(ordered), BATCH_ROWS):
        batch = ordered[start : start + BATCH_ROWS]
        input_ids, lengths = right_padded(batch)
        yield batch, torch.from_numpy(input_ids), lengths


@torch.inference_mode()
def leave_one_out(model: nn.Module, rows: list[Example]) -> np.ndarray:
    """(L,) by how much the loss on the rows' answers rises without each layer, nats per token."""
    layers, whole = decoder_layers(model), answer_loss(model, rows)
    losses = []
    for layer in layers:
        with passed_over([layer]):
            losses.append(answer_loss(model, rows) - whole)
    return np.array(losses)


@torch.inference_mode()
def answer_loss(model: nn.Module, rows: list[Example]) -> float:
    """Cross-entropy of the answers' tokens, and of the end token: nats per token."""
    total, count = 0.0, 0
    for batch, input_ids, lengths in batches(rows):
        logits = model(input_ids=input_ids, use_cache=False).logits
        for row, scores, ids, length in zip(batch, logits, input_ids, lengths, strict=True):
            answer = slice(row.answer_start, length)
            before = slice(row.answer_start - 1, length - 1)
            total += F.cross_entropy(scores[before].float(), ids[answer], reduction="sum").item()
            count += length - row.answer_start
    return total / count


@torch.inference_mode()
def second_moments(model: nn.Module, rows: list[Example]) -> Tensor:
    """(d, d) float64 sum of h h^T over all tokens and over the norms before attention and MLP.

    h is a norm's input divided by its root mean square: what the norm gives without its gain.
    """
    size = model.config.hidden_size
    moments, real = torch.zeros(size, size, dtype=torch.float64), torch.empty(0)

    def add(_norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        h = args[0][real]  # (tokens, d)
        h = h * h.square().mean(-1, keepdim=True).rsqrt()
        moments.add_((h.T @ h).double())

    norms = [
        norm
        for layer in decoder_layers(model)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    try:
        for _, input_ids, lengths in batches(rows):
            real = torch.arange(input_ids.shape[1]) < torch.tensor(lengths)[:, None]
            model.base_model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return moments
