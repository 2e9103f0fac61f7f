"""What an experiment will take, as `--dry-run` prints it: from configs alone, nothing is loaded."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd
import torch

from kd_utils.config import stages
from kd_utils.config.trial import TrialConfig
from kd_utils.cost import disk, estimates, work
from kd_utils.cost.rows import Rows, expected_rows
from kd_utils.cost.shapes import Shape, local_model, shape_of
from kd_utils.models import devices, signal_kinds

CARDS = (16, 24, 40, 80)  # GB

#: Share of a card that torch can use, beside the driver's context and what lies between tensors.
USABLE = 0.95

#: The values of each parameter that are tried on a card.
TRIED = {
    "batch_tokens": (16384, 8192, 4096, 2048, 1024),
    "eval_batch_size": (128, 64, 32, 16, 8),
    "micro_batch_size": (8, 4, 2, 1),
    "teacher_batch_size": (8, 4, 2, 1),
}


def experiment_lines(
    data: stages.DataConfig,
    cache: stages.CacheConfig,
    trials: Sequence[TrialConfig],
    layers_of: Callable[[stages.CacheConfig, torch.nn.Module], dict[str, list[int]]],
    *,
    with_cache: bool,
) -> Iterator[str]:
    """The estimates: rows, notebook 02, the trials, and what fits on which card.

    Args:
        data, cache, trials: the parameters of 01, of 02, and of the trials that are to run.
        layers_of: `teacher.extraction.cached_layers`.
        with_cache: 02 is to run.

    Raises:
        ValueError: a model's config cannot be read on this machine, in one line.
    """
    sized = lru_cache(local_model)  # most trials have the same student
    model = sized(cache.teacher, cache.teacher_revision)
    teacher, layers = shape_of(model), layers_of(cache, model)
    total = teacher["num_hidden_layers"]
    columns = signal_kinds.columns_of(cache.signals, layers, total, cache.attention_dtype)
    students = [shape_of(sized(*_source(trial, cache))) for trial in trials]
    rows, source = expected_rows(data)
    here = work.Machine.here(devices.choose_device(cache.device), cache.precision)
    yield (
        f"cost on this machine, without evaluation: {len(rows.tokens):,} rows, "
        f"{sum(rows.tokens):,} tokens (lengths {source})"
    )
    before = 0.0
    if with_cache:
        cost = estimates.teacher_cost(cache, teacher, columns, rows, here)
        before = cost.disk
        yield from cost.lines("02, the teacher's pass", here, cache.artifacts)
    if trials:
        costs = [
            estimates.trial_cost(trial, student, [teacher], rows, here)
            for trial, student in zip(trials, students, strict=True)
        ]
        seconds, memory, kept, running = zip(*costs)
        cost = estimates.Cost(sum(seconds), max(memory), sum(kept), max(running))
        what = f"03, {len(trials)} trials in turn"
        yield from cost.lines(what, here, cache.artifacts, before=before)
        trial, student = max(zip(trials, students), key=lambda pair: len(pair[0].weights))
        yield f"what fits on a card, in bfloat16 (03: {trial.distill_type}, float32 with AdamW):"
        table = what_fits(cache, trial, teacher, student, columns, rows)
        yield table.to_string(index=False)


def _source(trial: TrialConfig, cache: stages.CacheConfig) -> tuple[str, str, int]:
    """A student's name, revision and number of layers, for `local_model`."""
    layers = trial.student_layers if trial.student_init == "layers" else 0
    if trial.student == "teacher":
        return cache.teacher, cache.teacher_revision, layers
    return trial.student, "", layers


def what_fits(
    cache: stages.CacheConfig,
    trial: TrialConfig,
    teacher: Shape,
    student: Shape,
    columns: disk.Columns,
    rows: Rows,
) -> pd.DataFrame:
    """The largest settings with which each card can do each part, all in bfloat16.

    Returns:
        A row per card; for each parameter of 02 and 03 that decides about memory, the largest of
        those in `TRIED`, or "does not fit". Weights that are trained are in float32, with AdamW.
    """

    def of_02(config: stages.CacheConfig) -> dict[str, float]:
        return estimates.teacher_memory(config, teacher, columns, rows, True)

    def of_03(config: TrialConfig) -> dict[str, float]:
        return estimates.trial_memory(config, student, [teacher], rows, True)

    parts: dict[str, tuple[Any, Callable[[Any], dict[str, float]]]]
    parts = {"02": (cache, of_02), "03": (trial, of_03)}
    table = pd.DataFrame({"card": [f"{card} GB" for card in CARDS]})
    for notebook, (config, memory_of) in parts.items():
        for name in memory_of(config):
            changed = {n: config.model_copy(update={name: n}) for n in TRIED[name]}
            needed = {n: memory_of(changed[n])[name] / 1e9 for n in changed}
            table[f"{notebook}: {name}"] = [
                next((f"{n}" for n in needed if needed[n] <= USABLE * card), "does not fit")
                for card in CARDS
            ]
    return table
