"""What a training step is fed and what it sums up; the loop itself stands in notebook 03."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .cache import CachedExample
from .losses import attention_mse, forward_kl_top_k, hidden_mse, kd_loss, task_cross_entropy
from .signals import Signals, causal_slice, forward_signals, lm_head_weight


@dataclass
class Batch:
    """Right-padded examples and the teacher's signals at the distilled tokens, in the same order.

    Attributes:
        input_ids: (B, T) int64.
        lengths: real tokens of each example.
        queries: per example, the slice of positions that is distilled.
        predicting: (A,) flat positions (b T + t) that predict an answer token; targets: (A,) those tokens.
        distilled: (N,) flat positions whose signals are compared.
        teacher: the cache's signals at those positions: `hidden` (N, d), `top_logits`, `top_ids`, `log_mass` (N, .).
        teacher_maps: per example (H, P), the query rows that are distilled, in the cache's dtype.
        counts: this batch's normaliser for each term.
        normalisers: the whole batch's, when this is a part of it.
    """

    input_ids: Tensor
    lengths: list[int]
    queries: list[tuple[int, int]]
    predicting: Tensor
    targets: Tensor
    distilled: Tensor
    teacher: dict[str, Tensor]
    teacher_maps: list[Tensor]
    counts: dict[str, int]
    normalisers: dict[str, int]


def collate(examples: list[CachedExample], *, distill_tokens: str = "all", attention_normaliser: str = "entries",
            device: torch.device | str = "cpu") -> Batch:
    """Examples as tensors.

    Args:
        examples: rows of the cache; rows without signals give a batch for the task loss alone.
        distill_tokens: "all" real tokens, or those that predict the "answer".
        attention_normaliser: what the maps' squared errors are divided by: their "entries" (a mean over all), or their
            "queries" (summed over a row's keys, averaged over rows and heads).
        device: where the tensors go.
    """
    device = torch.device(device)
    input_ids, lengths = right_padded(examples)
    width = input_ids.shape[1]
    answers = [(row.answer_start - 1, n - 1) for row, n in zip(examples, lengths)]
    queries = [(0, n) for n in lengths] if distill_tokens == "all" else answers

    def flat(slices: list[tuple[int, int]]) -> np.ndarray:
        return np.concatenate([np.arange(first, last) + b * width for b, (first, last) in enumerate(slices)])

    def tensor(array: np.ndarray) -> Tensor:
        # A copy where needed: rows read from Parquet are read-only, and torch wants memory that it may write to.
        host = torch.from_numpy(np.require(array, requirements=("C", "W")))
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)

    predicting = flat(answers)
    held = [c for c in ("hidden", "top_logits", "top_ids", "log_mass") if getattr(examples[0], c) is not None]
    teacher = {column: tensor(np.concatenate([getattr(row, column)[slice(*q)] for row, q in zip(examples, queries)]))
               for column in held}
    maps = [] if examples[0].attention is None else [
        row.attention[:, slice(*causal_slice(*q))] for row, q in zip(examples, queries)]
    if maps:  # one transfer for all
        packed = tensor(np.concatenate([part.reshape(-1) for part in maps]))
        maps = [part.view(shape) for part, shape in zip(packed.split([m.size for m in maps]), [m.shape for m in maps])]
    distilled = flat(queries)
    entries = sum(m.numel() for m in maps)
    rows = sum(m.shape[0] * (last - first) for m, (first, last) in zip(maps, queries))
    counts = {"task": len(predicting), "kd": len(distilled), "hidden": len(distilled),
              "attention": entries if attention_normaliser == "entries" else rows}
    return Batch(tensor(input_ids), lengths, queries, tensor(predicting), tensor(input_ids.reshape(-1)[predicting + 1]),
                 tensor(distilled), teacher, maps, counts, counts)


def right_padded(examples: list[CachedExample]) -> tuple[np.ndarray, list[int]]:
    """(B, T) int64 token ids, 0 behind each example's end, and the real lengths."""
    lengths = [len(row.tokens) for row in examples]
    input_ids = np.zeros((len(examples), max(lengths)), np.int64)
    for b, row in enumerate(examples):
        input_ids[b, :lengths[b]] = row.tokens
    return input_ids, lengths


def split_batch(examples: list[CachedExample], micro_batch_size: int, **options) -> list[Batch]:
    """One optimiser step's examples in parts that fit the memory; each part knows the whole batch's normalisers."""
    parts = [collate(examples[i:i + micro_batch_size], **options) for i in range(0, len(examples), micro_batch_size)]
    whole = {term: sum(part.counts[term] for part in parts) for term in parts[0].counts}
    for part in parts:
        part.normalisers = whole
    return parts


def epoch_batches(lengths: list[int], batch_size: int, seed: int, epoch: int, *, pool: int = 16) -> list[list[int]]:
    """Indices in batches of similar length, shuffled; the same for every method at one seed.

    The rows are shuffled, cut into pools of `pool` batches, sorted by length inside each pool, cut into batches,
    and the batches are shuffled: little padding, and which rows meet changes from epoch to epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pools = [order[i:i + pool * batch_size] for i in range(0, len(order), pool * batch_size)]
    by_length = np.concatenate([p[np.argsort(np.asarray(lengths)[p], kind="stable")] for p in pools])
    batches = [by_length[i:i + batch_size].tolist() for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def seed_step(seed: int, global_step: int) -> None:
    """Seed torch for one step, so that dropout is the same for all methods whatever else drew random numbers."""
    torch.manual_seed((seed << 32) + global_step)


def loss_terms(signals: Signals, head: Tensor, *, batch: Batch, terms: Iterable[str],
               teacher_head: Tensor | None = None, projector: nn.Linear | None = None, temperature: float = 1.0,
               temperatures: Sequence[float] = ()) -> dict[str, Tensor]:
    """The terms that a method has, each divided by the whole batch's normaliser. DESIGN section 4.

    Args:
        signals: the student's, for `batch.input_ids`.
        head: (V, d_s) the student's output layer.
        batch: with the teacher's signals at the distilled tokens.
        terms: of "task", "kd", "hidden", "attention".
        teacher_head: (V, d_t) for "kd"; None with a top-k cache.
        projector: student's width to the teacher's, for "hidden".
        temperature: T of "kd".
        temperatures: those for which a top-k cache holds the rest's mass.

    Returns:
        Scalars by term; units as in `losses`.
    """
    hidden = signals.hidden.flatten(0, 1)
    distilled, teacher, whole = hidden[batch.distilled], batch.teacher, batch.normalisers
    values = {}
    if "task" in terms:
        values["task"] = task_cross_entropy(hidden[batch.predicting] @ head.T, batch.targets, whole["task"])
    if "kd" in terms and "hidden" in teacher:
        values["kd"] = kd_loss(distilled, head, teacher["hidden"], teacher_head, temperature, whole["kd"])
    elif "kd" in terms:
        per_token = forward_kl_top_k(distilled @ head.T, teacher["top_logits"], teacher["top_ids"].long(),
                                     teacher["log_mass"][:, list(temperatures).index(temperature)], temperature)
        values["kd"] = per_token.sum() / whole["kd"]
    if "hidden" in terms:
        values["hidden"] = hidden_mse(projector(distilled), teacher["hidden"], whole["hidden"])
    if "attention" in terms:
        values["attention"] = attention_mse(signals.attention, batch.teacher_maps, batch.queries, whole["attention"])
    return values


def gradient_shares(terms: dict[str, Tensor], weights: dict[str, float], student: nn.Module) -> dict[str, float]:
    """Each weighted term's gradient norm on the student, over the sum of these norms; the graph is kept.

    A weight of 0.1 on a tiny mean squared error may do nothing at all: this is where a reader sees it.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(weights[name] * term, parameters, retain_graph=True, allow_unused=True)
        norms[name] = torch.stack([g.float().norm() for g in gradients if g is not None]).norm().item()
    total = sum(norms.values()) or 1.0
    return {f"grad_share/{name}": norm / total for name, norm in norms.items()}


class Mean:
    """Running means of named numbers; tensors are read only at the end, so that a GPU is not waited for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, float] = {}

    def add(self, values: dict[str, Tensor | float], counts: dict[str, float]) -> None:
        """Add totals: each value is a sum over `counts` elements."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0.0) + counts[name]

    def add_part(self, values: dict[str, Tensor], parts: int) -> None:
        """Add one micro-batch of `parts`; their values are divided by the whole batch's normaliser, so they add up."""
        self.add(values, dict.fromkeys(values, 1 / parts))

    def result(self, prefix: str = "") -> dict[str, float]:
        return {prefix + name: float(total) / self._counts[name] for name, total in self._sums.items()}


class FiniteSteps:
    """Stops a trial whose loss or gradient is not finite.

    Each step's numbers are looked at when the next step asks, since a GPU has them ready by then and is not waited for.
    """

    def __init__(self) -> None:
        self._last: tuple[int, Tensor, dict[str, Tensor]] | None = None

    def add(self, global_step: int, gradient_norm: Tensor, terms: dict[str, Tensor]) -> None:
        """A step's gradient norm, before clipping, and its (last micro-batch's) loss terms.

        Raises:
            FloatingPointError: the step before this one was not finite.
        """
        self.check()
        self._last = global_step, gradient_norm.detach(), {name: term.detach() for name, term in terms.items()}

    def check(self) -> None:
        """Look at the last step too.

        Raises:
            FloatingPointError: it was not finite.
        """
        if self._last is None:
            return
        global_step, norm, terms = self._last
        values = {"gradient norm": norm.item(), **{f"{name} loss": term.item() for name, term in terms.items()}}
        if not all(map(math.isfinite, values.values())):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise FloatingPointError(f"training diverged at step {global_step}: {shown}; lower learning_rate or the "
                                     "weight of the term that is not finite, or set precision to 'float32'")


@torch.no_grad()
def validation_losses(student: nn.Module, batches: Iterable[tuple[Batch, list[str]]],
                      terms_of: Callable[..., dict[str, Tensor]], *, want_map: bool) -> dict[str, float]:
    """Unweighted loss terms over the validation rows, and token accuracy under teacher forcing.

    Args:
        student: in eval mode.
        batches: (batch, task of each example).
        terms_of: `loss_terms` with everything but signals, head and batch filled in.
        want_map: the terms need the attention map.

    Returns:
        `validation_loss/TERM`: mean over the set's tokens (or entries), not over batches; `validation_loss`: the task
        term, nats per answer token, which all methods share; `token_accuracy/TASK`: share of answer tokens that are
        the argmax given the true ones before them. It is not accuracy.
    """
    losses, hits = Mean(), Mean()
    for batch, tasks in batches:
        signals = forward_signals(student, batch.input_ids, want_map=want_map)
        terms = terms_of(signals, lm_head_weight(student), batch=batch)
        losses.add({name: value * batch.counts[name] for name, value in terms.items()}, batch.counts)
        guesses = (signals.hidden.flatten(0, 1)[batch.predicting] @ lm_head_weight(student).T).argmax(-1)
        right = (guesses == batch.targets).cpu().numpy()
        rows = (batch.predicting // batch.input_ids.shape[1]).cpu().numpy()
        for b, task in enumerate(tasks):
            mine = right[rows == b]
            hits.add({task: float(mine.sum())}, {task: len(mine)})
    values = losses.result("validation_loss/")
    return {"validation_loss": values["validation_loss/task"], **values, **hits.result("token_accuracy/")}


def prefetched(make: Callable, items: Iterable, depth: int = 4) -> Iterator:
    """`make(item)` for each item, made ahead by a thread, so that reading and decoding overlap with the step."""
    with ThreadPoolExecutor(1) as pool:
        pending: deque = deque()
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
