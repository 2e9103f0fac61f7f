"""The estimates that notebooks 02 and 03 print, each as a few lines of text."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
import psutil
import torch

from kd_utils.config import project_paths, stages
from kd_utils.config.trial import TrialConfig
from kd_utils.cost import disk, memory, work
from kd_utils.cost.rows import Rows
from kd_utils.cost.shapes import Shape
from kd_utils.models import devices, layer_pairs, signal_kinds
from kd_utils.tokens.encoding import Example

READ_AHEAD = 6  # batches of signals on the device: `batches.prefetched`, and the one in use


class Machine(NamedTuple):
    """Where something is to run.

    Attributes:
        half: products are in bfloat16.
        probe: its rates; memory: bytes of the device, and of the process so far on a CPU.
    """

    half: bool
    probe: work.Probe
    memory: float
    taken: float = 0

    @classmethod
    def here(cls, device: torch.device, precision: str) -> "Machine":
        """This machine, after a probe of a moment that draws no random number of torch's own."""
        dtype = devices.amp_dtype(device, precision)
        rates, half = work.probe(device, dtype), dtype == torch.bfloat16
        if device.type == "cuda":
            return cls(half, rates, torch.cuda.get_device_properties(device).total_memory)
        taken = psutil.Process().memory_info().rss
        return cls(half, rates, psutil.virtual_memory().total, taken)


def size(count: float) -> str:
    """Bytes as a reader takes them: `13 GB`, `5.4 GB`, `87 MB`."""
    value, unit = (count / 1e9, "GB") if count >= 1e8 else (count / 1e6, "MB")
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a reader takes them: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def compared(
    config: TrialConfig, student_layers: int, shapes: Sequence[dict[str, int]]
) -> list[memory.Compared]:
    """What the trial compares its student with, from shapes as caches' manifests have them."""
    terms = [name for name in config.weights if name != "task"]
    return [
        memory.Compared(
            terms,
            shape["hidden_size"],
            shape["num_attention_heads"],
            shape["vocab_size"],
            max(
                len(
                    layer_pairs.layer_pairs(
                        choice,
                        config.paired_layers,
                        shape["num_hidden_layers"],
                        student_layers,
                        config.seed,
                    )
                )
                for choice in (config.hidden_layers, config.attention_layers)
            ),
        )
        for shape in shapes
        if terms
    ]


class Trial(NamedTuple):
    """What one trial takes: seconds of an epoch, bytes of memory at most, bytes of a saved state
    and of the saved student.
    """

    epoch: float
    memory: float
    state: float
    saved: float


def trial(
    config: TrialConfig,
    student: Shape,
    teachers: Sequence[memory.Compared],
    rows: dict[str, Rows],
    half: bool,
    probe: work.Probe,
) -> Trial:
    """The cost of a trial; an untrained student is only evaluated.

    Args:
        rows: of "train" and "validation".
        half: bfloat16 autocast over float32 weights.
    """
    train, both = rows["train"], [rows["train"], rows["validation"]]
    batch = memory.Batch(
        min(config.micro_batch_size, config.batch_size), train.longest, train.longest_answer
    )
    training = memory.training(
        student, batch, teachers, half=half, waiting=READ_AHEAD * config.batch_size
    )
    evaluation = memory.evaluation(
        student,
        config.eval_batch_size,
        max(split.longest for split in both),
        rows["validation"].longest_question,
        config.max_new_tokens,
        size=2 if half else 4,
    )
    trains, trained = len(config.epoch_numbers) and config.distill_type != "untrained", 0.0
    if trains:
        trained = training["weights"] / 4
        held = max(sum(training.values()), 12 * trained + half * 2 * student.matrices + evaluation)
    else:
        held = 4 * student.weights + half * 2 * student.matrices + evaluation
    names = ["task", *(teachers[0].terms if teachers else ())]
    alone = work.multiply_adds(student.sizes, _NOTHING, train.lengths, names[:1])
    multiply_adds = alone + sum(
        work.multiply_adds(student.sizes, _sizes(teacher), train.lengths, names) - alone
        for teacher in teachers
    )
    steps = -(-len(train.lengths) // config.micro_batch_size)
    operations = work.STEP_OPERATIONS[0] + work.STEP_OPERATIONS[1] * student.layers
    operations += work.TERM_OPERATIONS * (len(names) - 1)
    seconds = probe.seconds(multiply_adds, steps * operations, work.STEP_EFFICIENCY)
    return Trial(
        seconds if trains else 0.0,
        held,
        disk.saved_state(int(trained)) if trains and config.epochs > 1 else 0.0,
        config.save_student * disk.saved_model(student.weights),
    )


_NOTHING = dict.fromkeys(Shape.NAMES, 0) | {"num_attention_heads": 1}


def _sizes(teacher: memory.Compared) -> dict[str, int]:
    """A teacher of which only the output layer is run."""
    return _NOTHING | {"hidden_size": teacher.width, "vocab_size": teacher.vocabulary}


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
    student, here = Shape.of(model), Machine.here(device, config.precision)
    rows = {split: Rows.of(table, encoded[split]) for split, table in tables.items()}
    shapes = [manifest["shape"] for manifest in manifests]
    teachers = compared(config, student.layers, shapes)
    cost = trial(config, student, teachers, rows, here.half, here.probe)
    # On a CPU the process has its libraries and the student in memory already.
    held = cost.memory + max(here.taken - 4 * student.weights, 0)
    about = f"memory at most about {size(held)} of {size(here.memory)}"
    if cost.epoch:
        about = (
            f"about {duration(cost.epoch)} of training an epoch, {config.epochs} epochs; " + about
        )
    yield about
    needed = 2 * cost.state + cost.saved  # a state is written before the last one is removed
    if needed:
        yield f"disk: a saved state {size(cost.state)}, the saved student {size(cost.saved)}"
    yield from short_of_disk(needed, config, "the trial")


def pass_lines(
    config: stages.CacheConfig,
    model: torch.nn.Module,
    layers: dict[str, list[int]],
    tables: dict[str, pd.DataFrame],
    examples: dict[str, list[Example]],
) -> Iterator[str]:
    """What the teacher's pass and its cache will take, as notebook 02 prints it before the pass.

    Args:
        model: the teacher, loaded, on its device.
        layers: those that the cache holds, as its header has them.
        tables, examples: the prepared data, and the same rows with the teacher's tokens.
    """
    teacher, device = Shape.of(model), next(model.parameters()).device
    here = Machine.here(device, config.precision)
    rows = [Rows.of(table, examples[split]) for split, table in tables.items()]
    cost = teacher_pass(config, teacher, layers, rows, here.half, here.probe)
    count, tokens = sum(len(split.lengths) for split in rows), sum(split.tokens for split in rows)
    room = disk.free(config.artifacts)
    yield (
        f"{count:,} rows, {tokens:,} tokens: a cache of about {size(cost.cache)} "
        f"({size(room)} are free)"
    )
    held = cost.memory + max(here.taken - 4 * teacher.weights, 0)
    yield (
        f"the teacher's pass takes about {duration(cost.seconds)}, and memory of at most about "
        f"{size(held)} of {size(here.memory)}"
    )
    yield from short_of_disk(cost.cache, config, "the cache")


class Pass(NamedTuple):
    """What the teacher's pass takes: seconds, bytes of memory at most, bytes of the cache."""

    seconds: float
    memory: float
    cache: float


def teacher_pass(
    config: stages.CacheConfig,
    teacher: Shape,
    layers: dict[str, list[int]],
    rows: Sequence[Rows],
    half: bool,
    probe: work.Probe,
) -> Pass:
    """The cost of the teacher's pass over these rows."""
    columns = signal_kinds.columns_of(
        config.signals, layers, teacher.layers, config.attention_dtype
    )
    lengths = [n for split in rows for n, _ in split.lengths]
    longest = max(lengths)
    batch = memory.Batch(max(config.batch_tokens // longest, 1), longest, 0)
    signals = disk.signal_bytes(columns, teacher, [longest] * batch.examples, top_k=config.top_k)
    kinds = [kind for kind, *_ in columns.values()]
    held = memory.teacher_pass(
        teacher,
        batch,
        sum(signals.values()),
        size=2 if half else 4,
        layers=sum(kind.captures == "map" for kind in kinds),
        whole_logits=any(kind.captures is None for kind in kinds),
    )
    multiply_adds = work.forward_multiply_adds(teacher.sizes, lengths)
    batches = sum(lengths) / config.batch_tokens + len(lengths) / config.shard_examples
    operations = work.FORWARD_OPERATIONS[0] + work.FORWARD_OPERATIONS[1] * teacher.layers
    started = batches * operations + len(lengths) * work.EXAMPLE_OPERATIONS
    return Pass(
        probe.seconds(multiply_adds, started, work.FORWARD_EFFICIENCY),
        sum(held.values()),
        disk.cache(
            columns,
            teacher,
            lengths,
            teacher_dtype="bfloat16" if half else "float32",
            top_k=config.top_k,
        ),
    )


def short_of_disk(
    needed: float, config: stages.CacheConfig | TrialConfig, what: str
) -> Iterator[str]:
    """One line if the disk of the artifacts has less room than is needed; a warning, no error."""
    room = disk.free(config.artifacts)
    if needed > room:
        place = project_paths.short_path(config.artifacts)
        yield (
            f"WARNING: {what} needs about {size(needed)}, but the disk of {place}/ has "
            f"{size(room)} free: make room, or set artifacts_dir to a folder on another disk"
        )
