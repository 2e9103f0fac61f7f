"""The training step of notebook 03 with the terms of each method, and the gradient that it takes.

Only this module of the room knows how a student is compared with its teacher.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config.stages import SpeedConfig
from kd_utils.distill.batches import Batch, collate, epoch_batches, prefetched
from kd_utils.distill.teacher_terms import TeacherTerms
from kd_utils.distill.terms.attention import AttentionMaps
from kd_utils.distill.terms.hidden import Hidden
from kd_utils.distill.terms.kd import KD
from kd_utils.distill.training import loss_terms, weighted_sum
from kd_utils.models.attention_maps import encode_map
from kd_utils.models.devices import autocast
from kd_utils.models.output_head import OutputHead, output_head
from kd_utils.models.signals import forward_signals
from kd_utils.speed.meters import Laps, peak_mb
from kd_utils.speed.workload import random_model
from kd_utils.teacher.extraction import signal_function
from kd_utils.tokens.encoding import Example

#: The loss terms of each method. "task" alone is plain fine-tuning.
METHODS = {
    "task": ("task",),
    "black_box": ("task", "kd"),
    "hidden_state": ("task", "kd", "hidden"),
    "attention": ("task", "kd", "attention"),
    "combined": ("task", "kd", "hidden", "attention"),
}
WEIGHTS = {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}


class StepBench:
    """A random student that trains on the benchmark's rows, from a teacher's cache of them.

    Teacher and student are compared in their last layers. Every batch is read from the cache and
    decoded anew, as in the first epoch of a trial.

    Args:
        shape: of "student" and "teacher", an entry of `SHAPES`.
        rows: the examples, without signals.
        folder: their cache.
        config: parameters of notebook 05.
        device: where the student trains.

    Attributes:
        plan: the batches of one epoch, as indices of rows.
        student, parameters, optimizer: made anew by `restart`; `parameters` are all that train.
        projector: from the student's width to the teacher's.
    """

    def __init__(
        self,
        shape: dict[str, dict[str, int]],
        rows: list[Example],
        folder: str | Path,
        config: SpeedConfig,
        device: torch.device,
    ) -> None:
        self.shape, self.rows, self.config, self.device = shape, rows, config, device
        lengths = [len(row.tokens) for row in rows]
        self.plan = epoch_batches(lengths, config.batch_size, config.seed, epoch=1)
        self._cache = TeacherCache(Path(folder), memory_bytes=0)
        self._without_maps = TeacherCache(Path(folder), memory_bytes=0)
        self._without_maps.read_only({"hidden"})
        student, teacher = shape["student"], shape["teacher"]
        last = [(teacher["num_hidden_layers"], student["num_hidden_layers"])]
        layers, widths = last[0][0], (student["hidden_size"], teacher["hidden_size"])
        self.kd = KD(OutputHead(self._cache.lm_head().float().to(device)), config.temperature)
        hidden = Hidden(last, layers, widths, [0])
        maps = AttentionMaps(last, layers, teacher["num_attention_heads"])
        self.teacher_terms = TeacherTerms([self.kd, hidden, maps]).to(device)
        [self.projector] = hidden.projectors
        self.restart()

    def restart(self, terms: Collection[str] = tuple(WEIGHTS)) -> None:
        """Make student and optimiser anew; the projector trains if a term uses it."""
        shape, seed = self.shape["student"], self.config.seed + 1
        self.student = random_model(shape, seed=seed, device=self.device).train()
        trained = self.projector.parameters() if "hidden" in terms else ()
        self.parameters = [*self.student.parameters(), *trained]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.01, fused=True)

    def examples(self, indices: list[int], terms: Collection[str]) -> list[Example]:
        """Rows by index, with the signals that the terms need."""
        if "kd" not in terms:
            return [self.rows[i] for i in indices]
        cache = self._cache if "attention" in terms else self._without_maps
        return [cache[self.rows[i].example_id] for i in indices]

    def loss_terms(
        self, batch: Batch, terms: Collection[str], temperature: float | None = None
    ) -> dict[str, Tensor]:
        """The unweighted loss terms of a batch, at the config's temperature if none is given."""
        self.kd.temperature = temperature or self.config.temperature
        with autocast(self.device, self.config.precision):
            last = [self.student.config.num_hidden_layers] if "attention" in terms else []
            return loss_terms(
                forward_signals(self.student, batch.input_ids, map_layers=last),
                output_head(self.student),
                batch=batch,
                terms=terms,
                teachers=[self.teacher_terms],
            )

    def gradient(self, examples: list[Example], temperature: float, term: str) -> Tensor:
        """The flat gradient of the weighted loss ("all") or of one unweighted term."""
        terms = self.loss_terms(collate(examples, device=self.device), tuple(WEIGHTS), temperature)
        loss = weighted_sum(terms, WEIGHTS) if term == "all" else terms[term]
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in gradients if g is not None])

    def update(self) -> None:
        """Clip the gradient, step and zero, as notebook 03 does."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def epoch(
        self,
        terms: Collection[str],
        plan: list[list[int]] | None = None,
        *,
        synchronize: bool = False,
    ) -> Counter[str]:
        """Train with the loop of notebook 03.

        Args:
            terms: of the loss, an entry of `METHODS`.
            plan: batches as indices of rows; None: the whole epoch.
            synchronize: wait for a GPU after each part of a step.

        Returns:
            Seconds by part of the step.
        """

        def make(indices: list[int]) -> Batch:
            return collate(self.examples(indices, terms), device=self.device)

        laps = Laps(self.device if synchronize else "cpu")
        for batch in prefetched(make, plan or self.plan):
            laps.lap("wait")
            loss = weighted_sum(self.loss_terms(batch, terms), WEIGHTS)
            laps.lap("forward and loss")
            loss.backward()
            laps.lap("backward")
            self.update()
            laps.lap("clip and step")
        return laps.seconds

    def fresh_epoch_mb(self, terms: Collection[str]) -> float:
        """Peak memory in MB of making student and optimiser and training them for one epoch.

        The bench has no student afterwards: call `restart` before it is used again.
        """

        def fresh_epoch() -> None:
            self.restart(terms)
            self.epoch(terms)

        self.student = self.parameters = self.optimizer = None
        peak = peak_mb(fresh_epoch, device=self.device)
        self.student = self.parameters = self.optimizer = None
        return peak


def exact_rows(teacher: nn.Module, rows: list[Example]) -> list[Example]:
    """Rows with the teacher's signals in float32, as a teacher run beside the student gives them.

    The teacher runs over one row at a time.
    """
    device, last = next(teacher.parameters()).device, teacher.config.num_hidden_layers
    full = []
    for row in rows:
        ids = torch.from_numpy(row.tokens).long()[None].to(device)
        with torch.no_grad():
            signals = forward_signals(teacher, ids, map_layers=[last])
        attention_map = encode_map(signals.attentions[last].map()[0], torch.float32)
        hidden = signals.hidden[0].float()
        arrays = {"hidden": hidden.cpu().numpy(), "attention": attention_map.cpu().numpy()}
        full.append(replace(row, signals=arrays))
    return full


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
        Cosines, a row per temperature; columns: the weighted loss ("all"), and each term that
        reads the cache.
    """
    run = signal_function(teacher, signals="white_box", attention_dtype="uint8")
    compact, dtype = list(run(rows)), teacher.dtype
    exact = exact_rows(teacher.float(), rows)
    teacher.to(dtype)
    index = pd.Index(temperatures, name="T")
    cosines = pd.DataFrame(index=index, columns=["all", "kd", "hidden", "attention"], dtype=float)
    for T in cosines.index:
        for term in cosines.columns:
            sides = [bench.gradient(examples, T, term) for examples in (compact, exact)]
            cosines.loc[T, term] = cosine(*sides)
    return cosines
