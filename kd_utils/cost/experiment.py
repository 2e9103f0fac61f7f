"""What an experiment will take, as `--dry-run` prints it: from configs alone, nothing is loaded."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from kd_utils.config import stages
from kd_utils.config.trial import TrialConfig
from kd_utils.cost import cards, estimates, work
from kd_utils.cost.rows import expected_rows
from kd_utils.cost.shapes import local_model, shape_of
from kd_utils.models import devices, signal_kinds
from kd_utils.models.initial.ways import WAYS


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
    sized = lru_cache(_sized)  # most trials have the same student
    model = local_model(cache.teacher, cache.teacher_revision)
    teacher, layers = shape_of(model), layers_of(cache, model)
    total = teacher["num_hidden_layers"]
    columns = signal_kinds.columns_of(cache.signals, layers, total, cache.attention_dtype)
    students = [shape_of(sized(*_student(trial, cache))) for trial in trials]
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
        yield from cost.lines("02, the teacher's answers and its pass", here, cache.artifacts)
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
        of_02 = estimates.teacher_part(cache, teacher, columns, rows)
        of_03 = estimates.trial_part(trial, student, [teacher], rows)
        note = f" (03: {trial.distill_type}, float32 with AdamW)"
        yield from cards.lines({"02": of_02, "03": of_03}, note)


def _student(trial: TrialConfig, cache: stages.CacheConfig) -> tuple[Any, ...]:
    """What a trial's initial student is made of, and how: all that its sizes depend on."""
    name, revision = trial.student, ""
    if trial.student == "teacher" or trial.round > 1:  # whose source is not trained yet
        name, revision = cache.teacher, cache.teacher_revision
    settings = trial.initial_settings
    if trial.cuts > 1 and trial.round > 1:  # sized as the last cut of the teacher
        settings |= {"rounds": 1, "round": 1}
    return name, revision, trial.student_init, *settings.items()


def _sized(name: str, revision: str, way: str, *settings: tuple[str, Any]) -> torch.nn.Module:
    """The initial student on the `meta` device, as `_student` describes it."""
    if way == "pretrained":
        return local_model(name, revision)
    return local_model(name, revision, partial(WAYS[way].config, **dict(settings)))
