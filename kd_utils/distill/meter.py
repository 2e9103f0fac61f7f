"""What a trial's training is measured by: running means, speed, a row of metrics per stretch."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from kd_utils.config.trial import TrialConfig
from kd_utils.distill.batches import Batch
from kd_utils.models.devices import HostCopy


class Mean:
    """Running means of named numbers; tensors are read at the end, so that no step waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    def add(self, values: dict[str, Tensor | float], count: float) -> None:
        """Add totals, each a sum over `count` elements.

        One of n micro-batches, with values divided by the whole batch's normaliser, counts 1 / n.
        """
        for name, value in values.items():
            self._sums[name] += value.detach().float() if isinstance(value, Tensor) else value
            self._counts[name] += count

    def result(self, prefix: str = "") -> dict[str, float]:
        return {
            prefix + name: float(total) / self._counts[name] for name, total in self._sums.items()
        }


class Meter:
    """Counts a trial's steps, tokens and seconds, and collects one row of metrics per stretch.

    It stops a trial whose loss or gradient is not finite, and never counts a part of a stretch. The
    numbers of a step are read when the next step is added, so that a GPU always has work.

    Args:
        config: the trial's.
        stretches: the steps of each, as `schedules.stretches` cuts them.
        started: when the trial began; loading is over when the meter is made.
        restore: puts student and optimizer back to the last state that was kept, and returns what
            `state` gave then; None if none was kept. Called at once, for a trial that was killed,
            and when `stretches` begins again after an interrupt inside a stretch.

    Attributes:
        rows: a row per stretch that is done.
        global_step: optimiser steps so far.
        resumed_after: the epoch after which training was resumed; None if it was not.
    """

    def __init__(
        self,
        config: TrialConfig,
        stretches: list[range],
        started: datetime,
        restore: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        self.config, self.started, self._restore = config, started, restore
        self._stretches = stretches
        self._loading = (datetime.now(UTC) - started).total_seconds()
        self._began = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.global_step, self._evaluating, self._earlier = 0, 0.0, 0.0
        self.resumed_after: float | None = None
        self._last_step: HostCopy | None = None
        self._within_stretch = False
        if state := restore():
            self._resume(state)
            self._earlier = state["seconds"]

    def _resume(self, state: dict[str, Any]) -> None:
        self.rows, self.global_step = state["rows"], state["global_step"]
        self._evaluating = state["evaluating"]
        self.resumed_after = self.rows[-1]["epoch"]
        self._last_step, self._within_stretch = None, False

    @property
    def remaining(self) -> list[range]:
        """The stretches that are still to do."""
        return self._stretches[len(self.rows) :]

    @property
    def splits(self) -> tuple[str, ...]:
        """What the student is measured on now: no validation row before the last step is done."""
        at_the_end = self.global_step == self._stretches[-1].stop
        return ("held_out", "validation") if at_the_end else ("held_out",)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds in all (killed executions included), of loading, training and evaluation."""
        return {
            "load": self._loading,
            "evaluation": self._evaluating,
            "total": self._earlier + self._loading + time.perf_counter() - self._began,
            "training": sum(row["seconds"] for row in self.rows) - self._evaluating,
        }

    def state(self) -> dict[str, Any]:
        """What a later execution needs to continue, as JSON values."""
        return {
            "rows": self.rows,
            "global_step": self.global_step,
            "evaluating": self._evaluating,
            "seconds": self.seconds["total"],
        }

    def stretches(self) -> Iterator[range]:
        """The remaining stretches; the clock of each starts when it is handed out.

        Raises:
            ValueError: a stretch was left in its middle, and no state before it was kept.
        """
        if self._within_stretch:
            state = self._restore()
            if state is None:
                steps = self.remaining[0]
                raise ValueError(
                    f"steps {steps.start + 1} to {steps.stop} were left in their middle, and no "
                    "state before them was kept: run again from the cell that makes the config on"
                )
            self._resume(state)
        for stretch in self.remaining:
            self._within_stretch = True
            self._means, self._tokens, self._start = Mean(), 0, time.perf_counter()
            yield stretch

    def add(self, batch: Batch, loss: Tensor, terms: dict[str, Tensor], parts: int) -> None:
        """Add one micro-batch of the `parts` that make up an optimiser step."""
        counted = {name for name in terms if name != "task" or batch.whole["answers"]}
        named = {f"train_loss/{name}": terms[name] for name in terms if name in counted}
        self._means.add({"train_loss": loss, **named}, 1 / parts)
        self._tokens += sum(batch.lengths)

    def step(self, gradient_norm: Tensor, terms: dict[str, Tensor]) -> None:
        """Count one optimiser step, by its norm before clipping and its last micro-batch's terms.

        Raises:
            FloatingPointError: the step before this one was not finite.
        """
        self._require_finite()
        named = {f"{name} loss": value for name, value in terms.items()}
        self._last_step = HostCopy({"gradient norm": gradient_norm, **named})
        self.global_step += 1

    def stop_training(self) -> None:
        """The stretch's last step is done; what follows is evaluation.

        Raises:
            FloatingPointError: the last step was not finite.
        """
        self._require_finite()
        self._trained = time.perf_counter()

    def _require_finite(self) -> None:
        last_step = self._last_step.result() if self._last_step else {}
        values = {name: value.item() for name, value in last_step.items()}
        if not all(map(math.isfinite, values.values())):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise FloatingPointError(
                f"training diverged at step {self.global_step - 1}: {shown}; lower learning_rate "
                "or the weight of the term that is not finite, or set precision to 'float32'"
            )

    def end_stretch(self, measured: dict[str, float]) -> dict[str, float]:
        """Add the stretch's row and return it.

        Args:
            measured: by `training.evaluate`.
        """
        now, steps = time.perf_counter(), self._stretches[-1].stop
        self._evaluating += now - self._trained
        share = self.global_step / steps if steps else 0.0
        self.rows.append(
            {
                "epoch": round(self.config.own_epochs * share, 4),
                "step": self.global_step,
                **self._means.result(),
                **measured,
                "tok_per_sec": self._tokens / (self._trained - self._start),
                "seconds": now - self._start,
            }
        )
        self._within_stretch = False
        return self.rows[-1]

    def line(self) -> str:
        """The last row in one line: loss terms, accuracy, tokens per second, time left."""
        row, done = self.rows[-1], self._stretches[len(self.rows) - 1]
        terms = [
            f"{name} {row[f'train_loss/{name}']:.3f}"
            for name in self.config.weights
            if f"train_loss/{name}" in row
        ]
        left = self._stretches[-1].stop - done.stop
        return " | ".join(
            [
                f"epoch {row['epoch']:g} of {self.config.own_epochs * self.config.trains}",
                *([f"loss {', '.join(terms)}"] if terms else []),
                *(
                    f"{split.replace('_', '-')} loss {row[f'{split}_loss']:.3f}, "
                    f"accuracy {100 * row[f'{split}_accuracy']:.1f} %"
                    for split in self.splits
                ),
                f"{row['tok_per_sec']:,.0f} tokens/s",
                f"{left * row['seconds'] / max(len(done), 1):.0f} s left",
            ]
        )
