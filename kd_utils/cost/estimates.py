"""The estimates that notebooks 02 and 03 and `--dry-run` print."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from kd_utils.config import project_paths, stages
from kd_utils.config.trial import TrialConfig
from kd_utils.cost import cards, disk, memory, work
from kd_utils.cost.rows import Rows, counted_rows
from kd_utils.cost.shapes import Shape, matrices, shape_of
from kd_utils.models import signal_kinds
from kd_utils.tokens.encoding import Example

READ_AHEAD = 6  # batches of signals on the device: `batches.prefetched`, and the one in use


class Cost(NamedTuple):
    """What something takes.

    Attributes:
        seconds: of the teacher's answers and its pass, or of all epochs; evaluation is not counted.
        memory: bytes of the device at most.
        disk: bytes that stay.
        running: bytes of disk beside them while a trial runs: two saved states, for a moment.
    """

    seconds: float
    memory: float
    disk: float
    running: float = 0.0

    def lines(
        self, what: str, machine: work.Machine, artifacts: Path, *, before: float = 0
    ) -> Iterator[str]:
        """The cost of `what` beside what there is, in one line; one more if the disk is too small.

        Args:
            before: bytes of disk that others take first.
        """
        room, needed = disk.free(artifacts), before + self.disk + self.running
        running = f" and {size(self.running)} while a trial runs" if self.running else ""
        yield (
            f"{what}: about {duration(self.seconds)}; memory at most about {size(self.memory)} of "
            f"{size(machine.memory)}; disk {size(self.disk)}{running} ({size(room)} free)"
        )
        if needed > room:
            yield (
                f"WARNING: about {size(needed)} are needed, but the disk of "
                f"{project_paths.short_path(artifacts)}/ has {size(room)} free: make room, or set "
                "artifacts_dir to a folder on another disk"
            )


def size(count: float) -> str:
    """Bytes as a reader takes them: `13 GB`, `5.4 GB`, `87 MB`."""
    value, unit = (count / 1e9, "GB") if count >= 1e8 else (count / 1e6, "MB")
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a reader takes them: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def teacher_memory(
    config: stages.CacheConfig, teacher: Shape, columns: disk.Columns, rows: Rows, half: bool
) -> dict[str, float]:
    """Bytes that each part of notebook 02 holds at most, by the parameter that decides them.

    Args:
        columns: of the cache, as `signal_kinds.columns_of` gives them.
    """
    longest, value = max(rows.tokens), 2 if half else 4
    batch = (max(config.batch_tokens // longest, 1), longest)
    answered = (config.eval_batch_size, longest, rows.question, config.max_new_tokens)
    held = memory.evaluation(teacher, *answered, size=value)
    parts = {
        "batch_tokens": memory.teacher_pass(teacher, columns, *batch, config.top_k, size=value),
        "eval_batch_size": value * teacher["weights"] + held,
    }
    if config.teacher_epochs:
        tuned = (config.teacher_batch_size, longest, longest)
        parts["teacher_batch_size"] = memory.training(teacher, tuned, half=half)
    return parts


def teacher_part(
    config: stages.CacheConfig, teacher: Shape, columns: disk.Columns, rows: Rows
) -> cards.Part:
    """Notebook 02 for `cards.what_fits`."""
    return config, lambda changed: teacher_memory(changed, teacher, columns, rows, True)


def teacher_cost(
    config: stages.CacheConfig,
    teacher: Shape,
    columns: disk.Columns,
    rows: Rows,
    machine: work.Machine,
) -> Cost:
    """The cost of notebook 02: the teacher's answers to the training rows, each as long as
    `max_new_tokens` allows where it is written, its pass over all rows, and its cache.
    """
    lengths = rows.tokens
    asked, written = [tokens for tokens, _ in rows.train], rows.written * config.max_new_tokens
    multiply_adds = work.forward_multiply_adds(teacher, [*lengths, *asked])
    multiply_adds += written * sum(matrices(teacher).values())
    batches = sum(lengths) / config.batch_tokens + len(lengths) / config.shard_examples
    batches += (len(asked) + written) / config.eval_batch_size
    operations = batches * work.FORWARD_OPERATIONS * teacher["num_hidden_layers"]
    operations += work.ROW_OPERATIONS * len(lengths)
    tuned = disk.MODEL_BYTES * teacher["weights"] if config.teacher_epochs else 0
    return Cost(
        machine.seconds(multiply_adds, operations, work.FORWARD_EFFICIENCY),
        max(teacher_memory(config, teacher, columns, rows, machine.half).values()),
        disk.cache(columns, teacher, lengths, config.top_k, half=machine.half) + tuned,
    )


def trial_memory(
    config: TrialConfig, student: Shape, teachers: Sequence[Shape], rows: Rows, half: bool
) -> dict[str, float]:
    """Bytes that each part of notebook 03 holds at most, by the parameter that decides them.

    Args:
        teachers: the sizes of those whose caches are read.
        half: bfloat16 autocast over float32 weights.
    """
    choices = (config.hidden_layers, config.attention_layers)
    spaced = bool({"uniform", "reversed", "random"}.intersection(choices))
    answered = (config.eval_batch_size, max(rows.tokens), rows.question, config.max_new_tokens)
    held = memory.evaluation(student, *answered, size=2 if half else 4)
    held += half * memory.copies(student)
    if not config.trains:
        return {"eval_batch_size": 4 * student["weights"] + held}
    longest, answer = map(max, zip(*rows.train))
    training = memory.training(
        student,
        (min(config.micro_batch_size, config.batch_size), longest, answer),
        config.weights,
        teachers,
        half=half,
        pairs=max(config.paired_layers * spaced, *(len(choice.split()) for choice in choices)),
        waiting=READ_AHEAD * config.batch_size,
    )
    averaged = disk.MODEL_BYTES * (config.average_last > 0) * student["weights"]
    held += averaged + disk.STATE_BYTES * student["weights"]
    return {"micro_batch_size": averaged + training, "eval_batch_size": held}


def trial_part(
    config: TrialConfig, student: Shape, teachers: Sequence[Shape], rows: Rows
) -> cards.Part:
    """Notebook 03 for `cards.what_fits`; weights that are trained are in float32, with AdamW."""
    return config, lambda changed: trial_memory(changed, student, teachers, rows, True)


def trial_cost(
    config: TrialConfig,
    student: Shape,
    teachers: Sequence[Shape],
    rows: Rows,
    machine: work.Machine,
) -> Cost:
    """The cost of one trial; an untrained student is only evaluated. `teachers`: as above."""
    terms = [term for term in config.weights if term != "task"]
    alone = work.multiply_adds(student, student, rows.train, ())
    multiply_adds = alone + sum(
        work.multiply_adds(student, teacher, rows.train, terms) - alone for teacher in teachers
    )
    steps = len(rows.train) / config.micro_batch_size
    operations = steps * work.STEP_OPERATIONS * (student["num_hidden_layers"] + len(terms))
    epoch = machine.seconds(multiply_adds, operations, work.STEP_EFFICIENCY)
    trained = config.trains
    averaged = disk.MODEL_BYTES * (config.average_last > 0)
    state = trained * (disk.STATE_BYTES + averaged) * student["weights"]
    return Cost(
        trained * config.own_epochs * epoch,
        max(trial_memory(config, student, teachers, rows, machine.half).values()),
        config.save_student * disk.MODEL_BYTES * student["weights"],
        2 * state,  # the next is written before the last one goes
    )


def teacher_lines(
    config: stages.CacheConfig,
    model: torch.nn.Module,
    layers: dict[str, list[int]],
    tables: dict[str, pd.DataFrame],
    examples: dict[str, list[Example]],
    device: torch.device,
) -> Iterator[str]:
    """What notebook 02 will take, as it prints it before it loads, tunes or runs the teacher.

    Args:
        model: the teacher, or one of its sizes on the `meta` device.
        layers: those that the cache will hold (`teacher.extraction.cached_layers`).
        tables, examples: the prepared data, and the same rows with the teacher's tokens.
    """
    here, teacher = work.Machine.here(device, config.precision), shape_of(model)
    rows = counted_rows(tables, examples)
    columns = signal_kinds.columns_of(
        config.signals, layers, teacher["num_hidden_layers"], config.attention_dtype
    )
    cost = teacher_cost(config, teacher, columns, rows, here)
    counts = f"{len(rows.tokens):,} rows, {sum(rows.tokens):,} tokens"
    what = f"{counts}; the teacher's answers and its pass"
    yield from cost.lines(what, here, config.artifacts)
    yield from cards.lines({"02": teacher_part(config, teacher, columns, rows)})


def trial_lines(
    config: TrialConfig,
    model: torch.nn.Module,
    manifests: Sequence[dict[str, Any]],
    tables: dict[str, pd.DataFrame],
    encoded: dict[str, list[Example]],
    device: torch.device,
) -> Iterator[str]:
    """What a trial will take, as notebook 03 prints it before it trains.

    Args:
        model: the student, loaded.
        manifests: of the teachers' caches.
        tables, encoded: the prepared data, and the same rows with the student's tokens.
    """
    here, teachers = work.Machine.here(device, config.precision), [m["shape"] for m in manifests]
    rows, student = counted_rows(tables, encoded), shape_of(model)
    cost = trial_cost(config, student, teachers, rows, here)
    what = f"training for {config.own_epochs} epochs" if config.trains else "no training"
    yield from cost.lines(what, here, config.artifacts)
    yield from cards.lines({"03": trial_part(config, student, teachers, rows)})
