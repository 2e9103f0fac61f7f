"""The table of signals: what a teacher cache can hold, one row per kind.

Writer, verifier, reader and alignment follow from the table. A column of the cache is named after
its kind (`hidden`), or after kind and layer where the layer is not the last one (`hidden_7`). A new
kind is one more row: `register(SignalKind("name", ...))`.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from kd_utils.models.attention_maps import encode_map
from kd_utils.models.output_head import model_logits
from kd_utils.models.signals import Signals, forward_signals


@dataclass
class TeacherPass:
    """The teacher's forward pass over one batch; each part is computed when a kind asks for it.

    Attributes:
        model: the teacher; input_ids: (B, T), padded on the right.
        captured: the layers that `signals` keeps, from `captured_layers`.
        top_k: k of the largest logits; temperatures: those of `log_mass`.
        attention_dtype: how maps are stored.
        signals: hidden states and attention, without the logits.
        logits: (B, T, V) as the model itself computes them, whatever its output layer does.
    """

    model: torch.nn.Module
    input_ids: torch.Tensor
    captured: dict[str, set[int]]
    top_k: int
    temperatures: Sequence[float]
    attention_dtype: str
    _largest: dict[int, Any] = field(default_factory=dict)

    @cached_property
    def signals(self) -> Signals:
        return forward_signals(self.model, self.input_ids, **self.captured)

    @cached_property
    def logits(self) -> torch.Tensor:
        return model_logits(self.model, self.input_ids)

    def largest(self, b: int, n: int) -> Any:
        """(values, indices) of the k largest logits of example b, each (n, k), computed once."""
        if b not in self._largest:
            self._largest[b] = self.logits[b, :n].float().topk(self.top_k, dim=-1)
        return self._largest[b]


@dataclass(frozen=True)
class SignalKind:
    """One row of the table: what a signal is.

    Attributes:
        name: its column in the cache, for the last layer.
        dtypes: numpy names of the types that it may be stored in, the default first.
        shape: (n tokens, manifest) -> (rows, columns) of one example's array.
        take: (teacher's forward pass, example b, n tokens, layer) -> one example's array.
        aligned: how it is compared with a student of other tokens: by the value at the "last_token"
            of each group, or as a "map" whose queries and keys are merged by groups.
        captures: what the forward pass must keep of a layer, the "hidden" state or the queries and
            keys of the "map"; the student's too, where a term compares the two. There is one column
            for each layer that 02's parameter NAME_layers chooses. None: the kind has no layers.
        check: (array, n) -> how far the array is from what `promise` says; raises ValueError if it
            is too far. That all values are finite is checked for every kind.
        promise: what `check` looks at, as the table of `verify` names it.
        recomputed: whether `verify` compares it with a second run of the teacher.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: Callable[[int, dict[str, Any]], tuple[int, int]]
    take: Callable[[TeacherPass, int, int, int], torch.Tensor]
    aligned: Literal["last_token", "map"] = "last_token"
    captures: Literal["hidden", "map"] | None = None
    check: Callable[[np.ndarray, int], float] | None = None
    promise: str = ""
    recomputed: bool = True


def map_rows_sum_to_1(packed: np.ndarray, n: int) -> float:
    """How far the rows of one example's packed map are from summing to 1.

    Raises:
        ValueError: further than rounding explains.
    """
    compact = packed.dtype == np.uint8
    probs = np.square(packed / np.float32(255)) if compact else packed.astype(np.float32)
    off = np.abs(np.add.reduceat(probs, np.cumsum(np.arange(n)), axis=1) - 1)
    keys = np.arange(1, n + 1)
    # Rounding sqrt(p) by at most 1/510, an entry at a time, moves a row of k keys by at most
    # sqrt(k) / 255 + k / 510^2.
    allowed = np.sqrt(keys) / 255 + keys / 510**2 + 1e-3 if compact else np.full(n, 5e-3)
    worst = float(off.max())
    if (off > allowed).any():
        raise ValueError(f"an attention row's sum differs from 1 by {worst:.4f}")
    return worst


def _map(teacher: TeacherPass, b: int, n: int, layer: int) -> torch.Tensor:
    attention = teacher.signals.attentions[layer].example(b, 0, n)
    return encode_map(attention.map()[0], getattr(torch, teacher.attention_dtype))


def _log_mass(teacher: TeacherPass, b: int, n: int, _layer: int) -> torch.Tensor:
    logits = teacher.logits[b, :n].float()
    return torch.stack([(logits / t).logsumexp(-1) for t in teacher.temperatures], dim=-1)


#: Kind by name.
SIGNAL_KINDS: dict[str, SignalKind] = {
    kind.name: kind
    for kind in (
        SignalKind(
            "hidden",
            dtypes=("float16",),
            shape=lambda n, manifest: (n, manifest["hidden_size"]),
            take=lambda teacher, b, n, layer: teacher.signals.layers[layer][b, :n],
            captures="hidden",
        ),
        SignalKind(
            "attention",
            dtypes=("float16", "uint8"),
            shape=lambda n, manifest: (manifest["heads"], n * (n + 1) // 2),
            take=_map,
            aligned="map",
            captures="map",
            check=map_rows_sum_to_1,
            promise="attention rows sum to 1",
        ),
        SignalKind(
            "top_logits",
            dtypes=("float32",),
            shape=lambda n, manifest: (n, manifest["top_k"]),
            take=lambda teacher, b, n, layer: teacher.largest(b, n).values,
        ),
        SignalKind(
            "top_ids",
            dtypes=("int32",),
            shape=lambda n, manifest: (n, manifest["top_k"]),
            take=lambda teacher, b, n, layer: teacher.largest(b, n).indices,
            recomputed=False,  # equal logits may change places
        ),
        SignalKind(
            "log_mass",
            dtypes=("float32",),
            shape=lambda n, manifest: (n, len(manifest["temperatures"])),
            take=_log_mass,
            recomputed=False,
        ),
    )
}

#: The sets of kinds that 02's parameter `signals` names with its first word.
SIGNAL_SETS = {"white_box": ("hidden", "attention"), "top_k": ("top_logits", "top_ids", "log_mass")}


def register(kind: SignalKind) -> None:
    """Add a row to the table.

    Raises:
        ValueError: the name could be read as a layer of another kind, or as no column at all.
    """
    if not re.fullmatch(r"[a-z]+(_[a-z]+)*", kind.name):
        raise ValueError(f"signal {kind.name!r}: use lower-case words joined by '_', no digits")
    SIGNAL_KINDS[kind.name] = kind


def column(kind: str, layer: int, total: int) -> str:
    """The column of this kind's layer, of `total` layers: the last layer has no number."""
    return kind if layer == total else f"{kind}_{layer}"


def kind_of(column: str) -> SignalKind:
    """The kind of a column: that of "attention_7" is attention.

    Raises:
        ValueError: no such kind is registered.
    """
    name = re.sub(r"_\d+$", "", column)
    if name not in SIGNAL_KINDS:
        raise ValueError(
            f"no signal is called {name!r} (known: {', '.join(SIGNAL_KINDS)}): register it with "
            "signal_kinds.register before the cache is written or read"
        )
    return SIGNAL_KINDS[name]


def kinds_of(signals: str) -> dict[str, SignalKind]:
    """The kinds that 02's parameter `signals` asks for: those of a set, then more by name."""
    first, *further = signals.split()
    return {name: kind_of(name) for name in (*SIGNAL_SETS.get(first, (first,)), *further)}


def columns_of(
    signals: str, layers: dict[str, list[int]], total: int, attention_dtype: str
) -> dict[str, tuple[SignalKind, int, str]]:
    """The columns of a cache with these signals, in the order in which they are written.

    Args:
        layers: for each kind that has layers, which are stored; missing: the last.
        total: how many layers the teacher has.

    Returns:
        Column -> its kind, its layer (the last one, for a kind without layers) and its type.
    """
    return {
        column(name, layer, total): (
            kind,
            layer,
            attention_dtype if name == "attention" else kind.dtypes[0],
        )
        for name, kind in kinds_of(signals).items()
        for layer in (layers.get(name, [total]) if kind.captures else [total])
    }


def captured_layers(chosen: Collection[tuple[SignalKind, int]]) -> dict[str, set[int]]:
    """The layers of which `forward_signals` must keep something, as its keyword arguments."""
    return {
        f"{part}_layers": {layer for kind, layer in chosen if kind.captures == part}
        for part in ("hidden", "map")
    }
