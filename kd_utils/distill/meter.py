"""What a trial's training is measured by: running means, speed, and one row of metrics per epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from kd_utils.config.trial import TrialConfig
from kd_utils.distill.batches import Batch
from kd_utils.distill.training import FiniteSteps, Mean


class Meter:
    """Counts steps, tokens and seconds of a trial and collects its epoch rows.

    Args:
        config: the trial's.
        state: what `state` returned in an earlier execution of this trial that was killed.
    """

    def __init__(self, config: TrialConfig, state: dict[str, Any] | None = None) -> None:
        self.config, self._began, state = config, time.perf_counter(), state or {}
        self.rows: list[dict[str, Any]] = state.get("rows", [])
        self.global_step: int = state.get("global_step", 0)
        self.evaluating: float = state.get("evaluating", 0.0)
        self._earlier: float = state.get("seconds", 0.0)
        self.resumed_after = self.rows[-1]["epoch"] if self.rows else None
        self._finite = FiniteSteps()

    @property
    def seconds(self) -> float:
        """Seconds spent on the trial, those of killed executions included."""
        return self._earlier + time.perf_counter() - self._began

    def state(self) -> dict[str, Any]:
        """Everything that a later execution needs to continue, as JSON values."""
        kept = {name: getattr(self, name) for name in ("rows", "global_step", "evaluating")}
        return kept | {"seconds": self.seconds}

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to do; the clock of each starts when it is handed out."""
        for epoch in self.config.epoch_numbers[len(self.rows) :]:
            self._epoch, self._means, self._tokens = epoch, Mean(), 0
            self._start = time.perf_counter()
            yield epoch

    def add(self, batch: Batch, loss: Tensor, terms: dict[str, Tensor], parts: int) -> None:
        """Add one micro-batch of the `parts` that make up an optimiser step."""
        named = {f"train_loss/{name}": value for name, value in terms.items()}
        self._means.add_part({"train_loss": loss, **named}, parts)
        self._tokens += sum(batch.lengths)

    def step(self, gradient_norm: Tensor, terms: dict[str, Tensor]) -> None:
        """Count one optimiser step.

        Raises:
            FloatingPointError: the loss or gradient of the step before was not finite.
        """
        self._finite.add(self.global_step, gradient_norm, terms)
        self.global_step += 1

    def trained(self) -> None:
        """The epoch's last step is done; what follows is evaluation.

        Raises:
            FloatingPointError: the loss or gradient of the last step was not finite.
        """
        self._finite.check()
        self._trained = time.perf_counter()

    def end_epoch(self, measures: dict[str, float]) -> str:
        """Add the epoch's row.

        Args:
            measures: of the validation rows, and each term's share of the gradient.

        Returns:
            One line to print: loss terms, accuracy, tokens per second, time left.
        """
        now, weights = time.perf_counter(), self.config.weights
        self.evaluating += now - self._trained
        speed = self._tokens / (self._trained - self._start)
        row = {
            "epoch": self._epoch,
            **self._means.result(),
            **{f"weight/{name}": weight for name, weight in weights.items()},
            **measures,
            "tok_per_sec": speed,
            "seconds": now - self._start,
        }
        self.rows.append(row)
        return self._line(row)

    def _line(self, row: dict[str, Any]) -> str:
        terms = [f"{name} {row[f'train_loss/{name}']:.3f}" for name in self.config.weights
                 if f"train_loss/{name}" in row]  # fmt: skip
        last = self.config.epoch_numbers[-1]
        left = (last - row["epoch"]) * row["seconds"]
        accuracy = row["validation_accuracy"]
        parts = [
            f"epoch {row['epoch']}/{last}",
            *([" ".join(["loss", *terms])] if terms else []),
            f"validation loss {row['validation_loss']:.3f}, accuracy {100 * accuracy:.1f} %",
            f"{row['tok_per_sec']:,.0f} tokens/s",
            f"{left:.0f} s left",
        ]
        return " | ".join(parts)
