"""What training does over its steps: when it is measured, the learning rate, averaged weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import transformers
from torch.optim import swa_utils

#: Names of `lr_schedule` that `transformers` calls otherwise.
NAMES = {"constant": "constant_with_warmup"}


def stretches(steps: int, evaluations: int) -> list[range]:
    """Cut all optimiser steps into stretches; the student is measured after each of them.

    A stretch ends after each of `evaluations` equal parts of the steps, and at 90 % and 100 % of
    them. A part that is no whole number of steps is rounded down, so few steps have fewer stretches
    than were asked for: none is empty, and 90 % is there from two steps on.

    Returns:
        The steps of each stretch, counted from 0 over the whole training. Without any steps (the
        untrained student) there is one stretch, which has none.
    """
    ends = {steps * part // evaluations for part in range(1, evaluations + 1)}
    ends |= {steps * 9 // 10, steps}
    cuts = [0, *sorted(ends - {0})]
    return [range(*pair) for pair in zip(cuts, cuts[1:])] or [range(0)]


def learning_rate(
    optimizer: torch.optim.Optimizer, name: str, steps: int, warmup_ratio: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of `transformers` for all `steps`; call its `step()` after each of them.

    Args:
        name: "constant", "linear" (to 0) or "cosine" (half a period, to 0).
        warmup_ratio: share of the steps, rounded, over which the rate first rises linearly from 0
            (the first of them changes nothing).
    """
    warmup = warmup_steps(steps, warmup_ratio)
    return transformers.get_scheduler(
        NAMES.get(name, name), optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )


def warmup_steps(steps: int, warmup_ratio: float) -> int:
    """The share of the steps over which the rate rises, in steps."""
    return round(steps * warmup_ratio)


class Average:
    """The mean of the weights after each of the last steps, beside the weights that train.

    Nothing is kept before these steps. A tied weight is one parameter and is averaged once; buffers
    are not averaged, they stay those of the model.

    Args:
        parameters: those that the optimiser trains, in its order.
        steps: of the whole training.
        last: share of the steps, at the end, whose weights are averaged, rounded, at least one
            step; 0: none are.

    Attributes:
        values: the mean of each parameter; empty before the first of these steps.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], steps: int, last: float) -> None:
        self.parameters = list(dict.fromkeys(parameters))
        self.first = steps - max(round(steps * last), last > 0)
        self.values: list[torch.Tensor] = []
        self._update = swa_utils.get_swa_multi_avg_fn()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after `step`, counted from 0."""
        if step == self.first:
            self.values = [parameter.detach().clone() for parameter in self.parameters]
        elif step > self.first:
            self._update(self.values, self.parameters, step - self.first)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights while the block runs, where averaging has begun."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, parameter in enumerate(self.parameters[: len(self.values)]):
            parameter.data, self.values[index] = self.values[index], parameter.data
