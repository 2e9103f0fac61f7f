"""The rows of one trial as batches: the student's tokens beside each teacher's cached signals."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config.trial import TrialConfig
from kd_utils.data.prepared_data import PreparedData
from kd_utils.distill.batches import Batch, collate, epoch_batches, prefetched, split_batch
from kd_utils.tokens.encoding import Example


class TrialData:
    """Training and validation batches, read ahead by a thread.

    Which examples meet, and in which order, depends on the seed and the epoch alone and not on the
    teacher: rows start in the order of their length in the student's tokens.

    Args:
        prepared: the prepared data.
        students: example id -> the example with the student's tokens.
        caches: one verified cache per teacher.
        config: the trial's.
        device: where batches go.
    """

    def __init__(
        self,
        prepared: PreparedData,
        students: dict[str, Example],
        caches: list[TeacherCache],
        config: TrialConfig,
        device: torch.device,
    ) -> None:
        self.config, self.students = config, students
        self.caches = caches if "kd" in config.weights else []
        self.train_ids, self.validation_ids = (
            sorted(caches[0].splits[split], key=lambda i: (len(students[i].tokens), i))
            for split in ("train", "validation")
        )
        self.lengths = [len(students[i].tokens) for i in self.train_ids]
        table = prepared.validation
        self.task_of = dict(zip(table["example_id"], table["task"], strict=True))
        self.options = {
            "distill_tokens": config.distill_tokens,
            "attention_normaliser": config.attention_normaliser,
            "device": device,
        }

    def steps(self, epoch: int) -> Iterator[list[Batch]]:
        """The micro-batches of each optimiser step of an epoch; none in epoch 0."""
        return prefetched(self._step, self._plan(epoch) if epoch else [])

    def probe(self) -> Batch:
        """A fixed batch: the first of the first epoch, on which gradient shares are measured."""
        return self._step(self._plan(1)[0])[0]

    def validation(self) -> Iterator[tuple[Batch, list[str]]]:
        """Each validation batch with the task of each of its examples."""
        size, ids = self.config.batch_size, self.validation_ids
        return prefetched(self._validation, [ids[i : i + size] for i in range(0, len(ids), size)])

    def _plan(self, epoch: int) -> list[list[int]]:
        return epoch_batches(self.lengths, self.config.batch_size, self.config.seed, epoch)

    def _rows(self, ids: list[str]) -> tuple[list[Example], list[list[Example]]]:
        return [self.students[i] for i in ids], [[cache[i] for i in ids] for cache in self.caches]

    def _step(self, indices: list[int]) -> list[Batch]:
        examples, teachers = self._rows([self.train_ids[i] for i in indices])
        return split_batch(examples, self.config.micro_batch_size, teachers, **self.options)

    def _validation(self, ids: list[str]) -> tuple[Batch, list[str]]:
        return collate(*self._rows(ids), **self.options), [self.task_of[i] for i in ids]
