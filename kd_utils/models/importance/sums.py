"""What importance is computed from: sums over training rows, taken in one forward pass.

For a row of T tokens and an activation X (T, n) the pass adds (mean |X|)^2, a number for each of
the n entries; for a layer it adds the mean over tokens of cos(input, output). `scores` says what
follows from the sums. They are float32, and padding is left out. They are kept apart for eight
groups of rows, so that rankings from disjoint rows can be compared.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from kd_utils.models.cut.sizes import head_dim
from kd_utils.models.cut.slots import FAMILIES
from kd_utils.models.signals import decoder_layers

GROUPS = 8

#: Columns of a table of sums, beside `kind`, `layer` (from 1) and `index` (from 0).
SUMS = [f"sum_{group}" for group in range(GROUPS)]

#: The kinds of sums: those of each layer, and how many rows were seen, of layer 0.
INPUT_NORM, ATTENTION_NORM, HEADS, MLP, LAYERS, ROWS = (
    "input_norm",
    "post_attention_norm",
    "heads",
    "mlp",
    "layers",
    "rows",
)


def group_of(example_id: str) -> int:
    """The group that a row belongs to, by its name alone."""
    return hashlib.sha256(example_id.encode()).digest()[0] % GROUPS


def new_sums(model: nn.Module) -> "UnitSums | None":
    """Sums for a model of the table's families; None for another, whose units are not known."""
    return UnitSums(model) if model.config.model_type in FAMILIES else None


class UnitSums:
    """Sums over rows, collected by hooks while a model of the table's families runs.

    Args:
        model: in eval mode, on its device, where the sums are kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self._sums = model, dict[tuple[str, int], Tensor]()

    @contextmanager
    def of_batch(self, example_ids: Sequence[str], lengths: Sequence[int]) -> Iterator[None]:
        """Count these rows in the next forward pass over them, and in no further one.

        A pass over other rows, such as the probe of `signals`, does not count.

        Args:
            example_ids, lengths: of the rows of the batch, which is padded on the right.
        """
        device = next(self.model.parameters()).device
        counts = torch.tensor(lengths, device=device, dtype=torch.float32)
        # (B, T): a row's real tokens weigh 1 / T_row each, its padding 0.
        real = torch.arange(max(lengths), device=device) < counts[:, None]
        self._weights = real / counts[:, None]
        groups = torch.tensor([group_of(name) for name in example_ids], device=device)
        # (GROUPS, B): a product adds up in one order, which `index_add_` does not on a GPU.
        self._groups = torch.nn.functional.one_hot(groups, GROUPS).T.float()
        self._seen: set[tuple[str, int]] = set()
        handles = self._hooks()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._add(ROWS, 0, self._weights, lambda weights: torch.ones_like(weights[:, :1]))

    def _hooks(self) -> list[Any]:
        handles = []
        for number, layer in enumerate(decoder_layers(self.model), 1):
            norms = layer.input_layernorm, layer.post_attention_layernorm
            for kind, norm in zip((INPUT_NORM, ATTENTION_NORM), norms, strict=True):
                handles.append(norm.register_forward_hook(partial(self._norm, kind, number)))
            output, down = layer.self_attn.o_proj, layer.mlp.down_proj
            handles += [
                output.register_forward_pre_hook(partial(self._heads, number)),
                down.register_forward_pre_hook(partial(self._mlp, number)),
                layer.register_forward_hook(partial(self._layer, number), with_kwargs=True),
            ]
        return handles

    def _norm(self, kind: str, layer: int, _module: Any, _args: Any, x: Tensor) -> None:
        self._add(kind, layer, x, self._squared_means)

    def _heads(self, layer: int, _module: Any, args: tuple[Tensor, ...]) -> None:
        self._add(HEADS, layer, args[0], self._squared_means_of_heads)

    def _mlp(self, layer: int, _module: Any, args: tuple[Tensor, ...]) -> None:
        self._add(MLP, layer, args[0], self._squared_means)

    def _layer(self, layer: int, _module: Any, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple | list) else output
        self._add(LAYERS, layer, before, partial(self._mean_cosine, after))

    def _squared_means(self, x: Tensor) -> Tensor:
        """(B, n) of (B, T, n): the square of mean |x| over each row's real tokens, in float32."""
        return torch.bmm(self._weights[:, None], x.abs().float())[:, 0].square()

    def _squared_means_of_heads(self, x: Tensor) -> Tensor:
        """(B, H) of (B, T, H P)."""
        return self._squared_means(x).unflatten(1, (-1, head_dim(self.model.config))).sum(-1)

    def _mean_cosine(self, after: Tensor, before: Tensor) -> Tensor:
        """(B, 1) of twice (B, T, d)."""
        before, after = before.float(), after.float()
        norms = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
        cos = torch.einsum("btd,btd->bt", before, after) / norms.clamp(min=1e-30)
        return (cos * self._weights).sum(1, keepdim=True)

    def _add(self, kind: str, layer: int, x: Tensor, per_row: Callable[[Tensor], Tensor]) -> None:
        place = kind, layer
        if place not in self._seen and x.shape[:2] == self._weights.shape:
            self._seen.add(place)
            found = per_row(x)
            sums = self._sums.setdefault(place, found.new_zeros(GROUPS, found.shape[1]))
            sums += self._groups @ found

    def table(self) -> pd.DataFrame:
        """The sums so far, a row a unit: `kind`, `layer`, `index` and the columns `SUMS`."""
        parts = []
        for (kind, layer), sums in sorted(self._sums.items()):
            values = pd.DataFrame(sums.T.cpu().numpy(), columns=SUMS)
            about = pd.DataFrame({"kind": kind, "layer": layer, "index": range(len(values))})
            parts.append(pd.concat([about, values], axis=1))
        return pd.concat(parts, ignore_index=True)


def added_up(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The sums over all rows, of the sums over the rows of each part, in this order."""
    total = tables[0].copy()
    for table in tables[1:]:
        total[SUMS] += table[SUMS]
    return total
