"""What a training step computes and adds up; the loop itself is in notebook 03."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pandas as pd
import torch

from kd_utils.distill.batches import Batch, TrialData
from kd_utils.distill.meter import Mean
from kd_utils.distill.schedules import Average
from kd_utils.distill.teacher_terms import TeacherTerms
from kd_utils.distill.terms.task import Task
from kd_utils.evaluation import calibration, scoring
from kd_utils.models.devices import autocast, mixed_seed
from kd_utils.models.output_head import OutputHead, output_head
from kd_utils.models.signals import Signals

#: The terms that need no teacher: a batch's labels take the place of a teacher's targets.
LABELS = TeacherTerms([Task()])


def seed_step(seed: int, global_step: int) -> None:
    """Seed torch for one step, so that all methods have the same dropout. A GPU is seeded if it is
    in use already.
    """
    number = mixed_seed(seed, global_step)
    # `torch.manual_seed` also takes a stack trace for each kind of device that is not in use: half
    # a millisecond of every step without a GPU.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def loss_terms(
    signals: Signals,
    head: OutputHead,
    *,
    batch: Batch,
    terms: Collection[str],
    teachers: Sequence[TeacherTerms] = (),
) -> dict[str, torch.Tensor]:
    """The terms of the loss, each divided by the whole batch's normaliser.

    A term of several teachers is the weighted sum over them, or the term of their mixture where
    they can be mixed (`Term.mixes`).

    Args:
        signals, head: the student's, for `batch.input_ids`, with the layers that are compared.
        batch: with the teachers' signals.
        terms: names, such as "task" and "kd".
        teachers: in the order in which `batch.teachers` has them.

    Returns:
        Scalars by term, in the order of `terms`; units as in `distill.terms`.
    """
    mixed = [
        name
        for name in terms
        if len(teachers) > 1
        and name in teachers[0]
        and teachers[0][name].mixes([teacher[name] for teacher in teachers], batch.teachers)
    ]
    values: dict[str, torch.Tensor] = {}
    for teacher, targets in zip([LABELS, *teachers], [batch, *batch.teachers]):
        for name, term in teacher.items():
            if name in terms and name not in mixed:
                values[name] = values.get(name, 0.0) + teacher.weight * term(signals, head, targets)
    for name in mixed:
        members, weights = zip(*((teacher[name], teacher.weight) for teacher in teachers))
        values[name] = members[0].mixed(members, weights, signals, head, batch.teachers)
    return {name: values[name] for name in terms}


def weighted_sum(terms: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """L: each term times its weight."""
    return sum(weights[name] * term for name, term in terms.items())


def gradient_norms(terms: dict[str, torch.Tensor], student: torch.nn.Module) -> dict[str, float]:
    """The norm of each unweighted term's gradient on the student; the graph is kept."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        parts = [gradient.float().norm() for gradient in gradients if gradient is not None]
        norms[name] = torch.stack(parts).norm().item()
    return norms


def gradient_shares(
    terms: dict[str, torch.Tensor], weights: dict[str, float], student: torch.nn.Module
) -> dict[str, float]:
    """Each weighted term's gradient norm on the student, divided by the sum of these norms.

    It shows whether a term does anything: a weight of 0.1 on a tiny squared error may not. The
    graph is kept.
    """
    norms = gradient_norms(terms, student)
    weighted = {f"grad_share/{name}": weights[name] * norm for name, norm in norms.items()}
    total = sum(weighted.values()) or 1.0
    return {name: norm / total for name, norm in weighted.items()}


@torch.no_grad()
def split_losses(
    split: str,
    student: torch.nn.Module,
    batches: Iterable[tuple[Batch, list[str]]],
    signals_of: Callable[[torch.Tensor], Signals],
    terms_of: Callable[..., dict[str, torch.Tensor]],
    teachers: Sequence[TeacherTerms] = (),
) -> dict[str, float]:
    """Unweighted loss terms over the rows of a split.

    Args:
        student: in eval mode; signals_of: its signals for input ids.
        batches: (batch, task of each example).
        terms_of: `loss_terms` with everything but signals, head and batch filled in.
        teachers: those of `terms_of`.

    Returns:
        `SPLIT_loss/TERM`: mean over the set's elements, of the first teacher where there are
        several; `SPLIT_loss`: the task term, in nats per answer token. Of "validation" also
        `token_accuracy/TASK`: share of answer tokens that are the argmax given the true tokens
        before them (teacher forcing).
    """
    losses, hits, head = Mean(), Mean(), output_head(student)
    for batch, tasks in batches:
        signals = signals_of(batch.input_ids)
        sides: list[Any] = [batch, *batch.teachers]
        counts = {
            name: term.count(targets.whole)
            for teacher, targets in zip([LABELS, *teachers[:1]], sides)
            for name, term in teacher.items()
        }
        for name, value in terms_of(signals, head, batch=batch).items():
            losses.add({name: value * counts[name]}, counts[name])
        if split == "validation":
            guesses = head.logits(signals.hidden.flatten(0, 1)[batch.predicting]).argmax(-1)
            rows = batch.predicting // batch.input_ids.shape[1]
            for row, right in zip(rows.tolist(), (guesses == batch.targets).tolist()):
                hits.add({tasks[row]: float(right)}, 1)
    values = losses.result(f"{split}_loss/")
    return {
        f"{split}_loss": values[f"{split}_loss/task"],
        **values,
        **hits.result("token_accuracy/"),
    }


def evaluate(
    splits: Sequence[str],
    weights: dict[str, float],
    learning_rate: float,
    model: torch.nn.Module,
    average: Average,
    tokenizer: Any,
    data: TrialData,
    signals_of: Callable[[torch.Tensor], Signals],
    terms_of: Callable[..., dict[str, torch.Tensor]],
    teachers: Sequence[TeacherTerms],
) -> tuple[dict[str, float], pd.DataFrame]:
    """What a trial measures after a stretch, with the averaged weights and the trial's precision.

    The student, `model`, is left in eval mode.

    Args:
        splits: whose rows are read: "held_out" while the student trains, "validation" at the end.
        weights: of the terms; learning_rate: where its schedule is: both are noted.

    Returns:
        `learning_rate`, `weight/TERM`, what terms fixed (`Term.numbers`), `grad_share/TERM`
        on a fixed batch; of each split `split_losses` and `accuracies`, of "validation" also
        `calibration_errors`; and one prediction per row of the last split.
    """
    model.eval()
    probe, config = data.probe(), data.config
    measured = {"learning_rate": learning_rate}
    measured |= {f"weight/{name}": weight for name, weight in weights.items()}
    for term in (term for teacher in teachers[:1] for term in teacher.values()):
        measured |= term.numbers()
    sizes: dict[str, Any] = {
        "batch_size": config.eval_batch_size,
        "max_new_tokens": config.max_new_tokens,
    }
    with autocast(data.device, config.precision), average.in_place():
        terms = terms_of(signals_of(probe.input_ids), output_head(model), batch=probe)
        measured |= gradient_shares(terms, weights, model)
        for split in splits:
            batches = data.batches(split)
            measured |= split_losses(split, model, batches, signals_of, terms_of, teachers)
            predictions = scoring.evaluate(model, tokenizer, data.tables[split], **sizes)
            measured |= scoring.accuracies(predictions, split)
            if split == "validation":
                measured |= calibration.calibration_errors(predictions)
    return measured, predictions
