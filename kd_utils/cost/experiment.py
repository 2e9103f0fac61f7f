"""What an experiment will take, as `--dry-run` prints it: from configs alone, nothing is loaded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kd_utils.config import stages
from kd_utils.config.trial import TrialConfig
from kd_utils.cost import cards, disk, estimates, memory
from kd_utils.cost.rows import Rows, expected_rows
from kd_utils.cost.shapes import Shape, local_model
from kd_utils.models import devices, signal_kinds


@dataclass(frozen=True)
class Experiment:
    """An experiment and what of it is still to run.

    Args:
        data, cache: the parameters of 01 and 02.
        cached: 02 is done.
        trials: those that are to run.
        layers_of: `teacher.extraction.cached_layers`.
    """

    data: stages.DataConfig
    cache: stages.CacheConfig
    cached: bool
    trials: Sequence[TrialConfig]
    layers_of: Callable[[stages.CacheConfig, torch.nn.Module], dict[str, list[int]]]

    def lines(self) -> Iterator[str]:
        """The estimates: rows, the teacher's pass, the trials, and what fits on which card.

        Where a model's config cannot be read on this machine, one line says so.
        """
        try:
            yield from self._lines()
        except ValueError as error:
            yield f"cost: not known: {error}"

    def _lines(self) -> Iterator[str]:
        teacher, (rows, source) = self._teacher[0], self._rows
        count, total = (
            sum(numbers)
            for numbers in zip(*((len(r.lengths), r.tokens) for r in rows.values()), strict=True)
        )
        device = devices.choose_device(self.cache.device)
        machine = estimates.Machine.here(device, self.cache.precision)
        costs = self._trials(machine)
        yield (
            "cost on this machine, about, and memory beside that of the process itself: "
            f"{count:,} rows, {total:,} tokens (lengths {source}), "
            f"{estimates.size(disk.free(self.cache.artifacts))} of disk free"
        )
        needed = 0.0
        if not self.cached:
            cost = estimates.teacher_pass(
                self.cache, *self._teacher, [*rows.values()], machine.half, machine.probe
            )
            tuned = bool(self.cache.teacher_epochs) * disk.saved_model(teacher.weights)
            needed += cost.cache + tuned
            yield (
                f"02: the teacher's pass {estimates.duration(cost.seconds)}, memory "
                f"{estimates.size(cost.memory)} (evaluation {self._evaluation(machine)}"
                f"{self._tuning(machine)}); disk {estimates.size(cost.cache)}"
            )
        if costs:
            state = max(cost.state for cost, *_ in costs)
            saved = sum(number * cost.saved for cost, _, number in costs)
            seconds = sum(number * epochs * cost.epoch for cost, epochs, number in costs)
            needed += saved + 2 * state
            yield (
                f"03: {len(self.trials)} trials, {estimates.duration(seconds)} of training one "
                f"after another, memory of each {estimates.size(max(c.memory for c, *_ in costs))}"
                f"; disk {estimates.size(state)} for each that runs at a time (a saved state, for "
                f"a moment twice), {estimates.size(saved)} for saved students"
            )
        yield from estimates.short_of_disk(needed, self.cache, "what is to run")
        if costs:
            yield from self._fitting()

    @cached_property
    def _teacher(self) -> tuple[Shape, dict[str, list[int]]]:
        """The teacher's shape, and the layers that its cache holds."""
        model = local_model(self.cache.teacher, self.cache.teacher_revision)
        return Shape.of(model), self.layers_of(self.cache, model)

    @cached_property
    def _rows(self) -> tuple[dict[str, Rows], str]:
        return expected_rows(self.data)

    def _student(self, config: TrialConfig) -> Shape:
        layers = config.student_layers if config.student_init == "layers" else 0
        name = config.teacher if config.student == "teacher" else config.student
        return Shape.of(local_model(name, layers=layers))

    def _trials(self, machine: estimates.Machine) -> list[tuple[estimates.Trial, int, int]]:
        """(cost, epochs, how many) of each kind of trial: other seeds cost the same."""
        kinds: dict[tuple, list[TrialConfig]] = {}
        for config in self.trials:
            values = config.model_dump(exclude={"seed", "trial", "run_dir"}).values()
            kinds.setdefault(tuple(values), []).append(config)
        costs = []
        for [config, *others] in kinds.values():
            student = self._student(config)
            sides = estimates.compared(config, student.layers, [self._teacher[0].sizes])
            cost = estimates.trial(
                config, student, sides, self._rows[0], machine.half, machine.probe
            )
            costs.append((cost, config.epochs, 1 + len(others)))
        return costs

    def _evaluation(self, machine: estimates.Machine) -> str:
        (teacher, _), (rows, _) = self._teacher, self._rows
        size = 2 if machine.half else 4
        held = memory.evaluation(
            teacher,
            self.cache.eval_batch_size,
            rows["validation"].longest,
            rows["validation"].longest_question,
            self.cache.max_new_tokens,
            size=size,
        )
        return estimates.size(size * teacher.weights + held)

    def _tuning(self, machine: estimates.Machine) -> str:
        """The memory of fine-tuning, if the teacher is to be tuned."""
        if not self.cache.teacher_epochs:
            return ""
        train = self._rows[0]["train"]
        answers = train.longest if self.cache.teacher_prompt_weight else train.longest_answer
        batch = memory.Batch(self.cache.teacher_batch_size, train.longest, answers)
        parts = memory.training(self._teacher[0], batch, half=machine.half)
        return f", fine-tuning {estimates.size(sum(parts.values()))}"

    def _fitting(self) -> Iterator[str]:
        """The table of cards, for the trial with the most terms."""
        (teacher, layers), (rows, _) = self._teacher, self._rows
        largest = max(self.trials, key=lambda config: len(config.weights))
        student = self._student(largest)
        table = cards.what_fits(
            teacher,
            student,
            signal_kinds.columns_of(
                self.cache.signals, layers, teacher.layers, self.cache.attention_dtype
            ),
            estimates.compared(largest, student.layers, [teacher.sizes]),
            max_length=max(split.longest for split in rows.values()),
            answer=rows["train"].longest_answer,
            question=rows["validation"].longest_question,
            max_new_tokens=self.cache.max_new_tokens,
            batch_size=largest.batch_size,
        )
        yield f"what fits on a card, in bfloat16 ({largest.distill_type}, float32 with AdamW):"
        yield table.to_string(index=False)
