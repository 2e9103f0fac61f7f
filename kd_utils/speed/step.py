"""The training step of notebook 03 with the terms of each method, and its gradient."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config import stages, trial
from kd_utils.distill import batches, teacher_terms, training
from kd_utils.distill.terms import attention, hidden, kd
from kd_utils.models import attention_maps, devices, output_head, signals
from kd_utils.speed import meters
from kd_utils.speed.workload import random_model
from kd_utils.teacher.extraction import signal_function
from kd_utils.tokens.encoding import Example

#: The loss terms of each method. "task" alone is plain fine-tuning.
METHODS = {
    "task": ("task",),
    **{name: tuple(trial.METHODS[name].terms) for name in trial.DISTILLATIONS},
}

WEIGHTS = {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}


class StepBench:
    """A random student that trains on the benchmark's rows, from a teacher's cache of them.

    Teacher and student are compared in their last layers.

    Args:
        shape: of "student" and "teacher", an entry of `SHAPES`.
        rows: the examples, without signals; `folder` has their cache.
        memory_bytes: how much of the cache is kept in memory. 0: every batch is read from the cache
            and decoded anew, as in the first epoch of a trial.

    Attributes:
        plan: the batches of the first epoch, as indices of rows.
        student, parameters, optimizer: made anew by `restart`; `parameters` are all that train.
        projector: from the student's width to the teacher's.
    """

    def __init__(
        self,
        shape: dict[str, dict[str, int]],
        rows: list[Example],
        folder: str | Path,
        config: stages.SpeedConfig,
        device: torch.device,
        *,
        memory_bytes: int = 0,
    ) -> None:
        self.shape, self.rows, self.config, self.device = shape, rows, config, device
        self.plan = self.plan_of(epoch=1)
        self._cache = TeacherCache(Path(folder), memory_bytes=memory_bytes)
        self._reads: set[str] = set()
        student, teacher = shape["student"], shape["teacher"]
        total = teacher["num_hidden_layers"]
        last = [(total, student["num_hidden_layers"])]
        widths = (student["hidden_size"], teacher["hidden_size"])
        head = output_head.OutputHead(self._cache.lm_head().float().to(device))
        self.teacher_terms = teacher_terms.TeacherTerms(
            [
                kd.KD(head, config.temperature),
                hidden.Hidden(last, total, widths, [0]),
                attention.AttentionMaps(last, total, teacher["num_attention_heads"]),
            ]
        ).to(device)
        [self.projector] = self.teacher_terms["hidden"].projectors
        self.restart()

    def restart(self, terms: Collection[str] = WEIGHTS) -> None:
        """Make student and optimiser anew; the projector trains if a term uses it."""
        seed = self.config.seed + 1
        self.student = random_model(self.shape["student"], seed=seed, device=self.device).train()
        trained = self.projector.parameters() if "hidden" in terms else ()
        self.parameters = [*self.student.parameters(), *trained]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.01, fused=True)

    def plan_of(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, counted from 1, as indices of rows."""
        lengths = [len(row.tokens) for row in self.rows]
        return batches.epoch_batches(lengths, self.config.bench_batch_size, self.config.seed, epoch)

    def examples(self, indices: list[int], terms: Collection[str]) -> list[Example]:
        """Rows by index, with the signals that the terms need."""
        if "kd" not in terms:
            return [self.rows[i] for i in indices]
        needed = {"hidden", "attention"} if "attention" in terms else {"hidden"}
        if self._reads != needed:  # what is kept in memory is lost
            self._cache.read_only(needed)
            self._reads = needed
        return [self._cache[self.rows[i].example_id] for i in indices]

    def read(self, plan: list[list[int]], terms: Collection[str]) -> Iterator[batches.Batch]:
        """The batches of a plan, with the signals that the terms need, read ahead by a thread."""
        return batches.prefetched(
            lambda indices: batches.collate(self.examples(indices, terms), device=self.device), plan
        )

    def loss_terms(
        self,
        batch: batches.Batch,
        terms: Collection[str],
        temperature: float | None = None,
        *,
        lap: Callable[[str], object] = lambda part: None,
    ) -> dict[str, Tensor]:
        """The unweighted loss terms of a batch, at the config's temperature if none is given.

        Args:
            lap: is called after the student's forward pass with "body", after each term with its
                name.
        """
        self.teacher_terms["kd"].temperature = temperature or self.config.temperature
        values: dict[str, Tensor] = {}
        with devices.autocast(self.device, self.config.precision):
            last = [self.student.config.num_hidden_layers] if "attention" in terms else []
            found = signals.forward_signals(self.student, batch.input_ids, map_layers=last)
            lap("body")
            head, teachers = output_head.output_head(self.student), [self.teacher_terms]
            for term in terms:
                values |= training.loss_terms(
                    found, head, batch=batch, terms=[term], teachers=teachers
                )
                lap(term)
        return values

    def gradient(self, examples: list[Example], temperature: float, term: str) -> Tensor:
        """The flat gradient of the weighted loss ("all") or of one unweighted term."""
        terms = self.loss_terms(batches.collate(examples, device=self.device), WEIGHTS, temperature)
        loss = training.weighted_sum(terms, WEIGHTS) if term == "all" else terms[term]
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in gradients if g is not None])

    def update(self) -> Tensor:
        """Clip the gradient, step and zero, as notebook 03 does; returns the norm before it."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def epoch(
        self,
        terms: Collection[str],
        plan: list[list[int]] | None = None,
        *,
        synchronize: bool = False,
    ) -> dict[str, float]:
        """Train with the loop of notebook 03 and return the seconds by part of the step.

        The parts are "wait", "body" (the student's forward pass without its head), each term,
        "backward", and "clip and step".

        Args:
            terms: of the loss, an entry of `METHODS`.
            plan: batches as indices of rows; None: the whole epoch.
            synchronize: wait for a GPU after each part of a step.
        """
        laps = meters.Laps(self.device if synchronize else "cpu")
        for batch in self.read(plan or self.plan, terms):
            laps.lap("wait")
            loss = training.weighted_sum(self.loss_terms(batch, terms, lap=laps.lap), WEIGHTS)
            loss.backward()
            laps.lap("backward")
            self.update()
            laps.lap("clip and step")
        return laps.seconds

    def fresh_epoch_mb(self, terms: Collection[str]) -> float:
        """Peak memory in MB of making student and optimiser and training them for one epoch."""

        def fresh_epoch() -> None:
            self.restart(terms)
            self.epoch(terms)

        self.student = self.optimizer = None
        self.parameters = []
        return meters.peak_mb(fresh_epoch, device=self.device)


@torch.no_grad()
def exact_rows(teacher: nn.Module, rows: list[Example]) -> list[Example]:
    """Rows with the signals of a teacher beside the student: in float32, taken row by row."""
    exact, last = [], teacher.config.num_hidden_layers
    for row in rows:
        input_ids = torch.from_numpy(row.tokens).long()[None].to(teacher.device)
        found = signals.forward_signals(teacher, input_ids, map_layers=[last])
        packed = attention_maps.encode_map(found.attentions[last].map()[0], torch.float32)
        arrays = {
            "hidden": found.hidden[0].float().cpu().numpy(),
            "attention": packed.cpu().numpy(),
        }
        exact.append(replace(row, signals=arrays))
    return exact


def cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of two flat gradients, summed in float64."""
    left, right = left.double(), right.double()
    return float(left @ right / (left.norm() * right.norm()))


def gradient_cosines(
    bench: StepBench, teacher: nn.Module, rows: list[Example], temperatures: Sequence[float]
) -> pd.DataFrame:
    """Compare the student's gradients from a compact cache with those from the exact signals.

    Args:
        teacher: is run in its own dtype for the cache, and in float32 for the exact signals.
        rows: of one batch, without signals.

    Returns:
        A row per temperature; columns: the weighted loss ("all"), each term that reads the cache.
    """
    run = signal_function(teacher, signals="white_box", attention_dtype="uint8")
    compact, dtype = list(run(rows)), teacher.dtype
    exact = exact_rows(teacher.float(), rows)
    teacher.to(dtype)
    cosines = {
        term: [
            cosine(bench.gradient(compact, T, term), bench.gradient(exact, T, term))
            for T in temperatures
        ]
        for term in ("all", "kd", "hidden", "attention")
    }
    return pd.DataFrame(cosines, index=pd.Index(temperatures, name="T"))
