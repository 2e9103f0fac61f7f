"""Batches: padded examples, their order, and the teachers' signals with them."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config.trial import TrialConfig
from kd_utils.data.other_rows import other_rows
from kd_utils.data.prepared_data import PreparedData
from kd_utils.distill.targets import NextTokens, Targets, next_tokens_of, targets_of
from kd_utils.models.devices import to_device
from kd_utils.tokens.encoding import Example, right_padded


@dataclass
class Batch:
    """Right-padded examples.

    Attributes:
        input_ids: (B, T) int64.
        lengths: real tokens of each example.
        predicting: (A,) flat positions b T + t that predict an answer token, of the examples that
            have an answer for the task loss.
        targets: (A,) those tokens.
        teachers: what the terms of each teacher compare the student with: its signals.
        whole: the number of "answers" (answer tokens), in the whole batch when this is a part.
    """

    input_ids: torch.Tensor
    lengths: list[int]
    predicting: torch.Tensor
    targets: torch.Tensor
    teachers: Sequence[Targets | NextTokens]
    whole: Counter[str]


def collate(
    examples: list[Example],
    teachers: Sequence[list[Example] | None] | None = None,
    *,
    distill_tokens: str = "all",
    device: torch.device | str = "cpu",
    other_rows: bool = False,
) -> Batch:
    """Examples, with the student's tokens, as tensors on `device`.

    Args:
        teachers: for each teacher, the rows of its cache for the same examples, in the same order.
            None: `examples` themselves hold the signals, if any, of a teacher with their tokens;
            in place of a teacher's rows: its terms take no signal from the batch.
        distill_tokens: compare "all" real tokens, or those that predict the "answer".
        other_rows: the rows of the caches are others than `examples` (`targets.targets_of`).
    """
    input_ids, lengths = right_padded(examples)
    width = input_ids.shape[1]
    predicting = np.concatenate(
        [
            np.arange(row.answer_start - 1 if row.has_answer else n - 1, n - 1) + b * width
            for b, (row, n) in enumerate(zip(examples, lengths))
        ]
    )
    if teachers is None:
        teachers = [examples] if examples[0].signals else []
    compared = [
        next_tokens_of(examples, input_ids, distill_tokens, device)
        if rows is None
        else targets_of(examples, rows, width, distill_tokens, device, other_rows=other_rows)
        for rows in teachers
    ]
    return Batch(
        to_device(input_ids, device),
        lengths,
        to_device(predicting, device),
        to_device(input_ids.reshape(-1)[predicting + 1], device),
        compared,
        Counter(answers=len(predicting)),
    )


def split_batch(
    examples: list[Example],
    micro_batch_size: int,
    teachers: Sequence[list[Example] | None] | None = None,
    **options,
) -> list[Batch]:
    """The examples of one optimiser step in parts that fit the memory.

    Each part knows the sizes of the whole batch, so that a split changes no gradient.
    """
    slices = [slice(i, i + micro_batch_size) for i in range(0, len(examples), micro_batch_size)]
    parts = [
        collate(examples[part], teachers and [rows and rows[part] for rows in teachers], **options)
        for part in slices
    ]
    for group in (parts, *zip(*(part.teachers for part in parts), strict=True)):
        whole: Counter[str] = sum((part.whole for part in group), Counter())
        for part in group:
            part.whole = whole
    return parts


def epoch_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices in batches of similar length, shuffled; the same for every method at one seed.

    Rows are shuffled, cut into pools of 16 batches, and sorted by length within a pool; then
    the batches are shuffled. This leaves little padding, and different rows meet in each epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pools = [order[i : i + 16 * batch_size] for i in range(0, len(order), 16 * batch_size)]
    by_length = np.concatenate(
        [p[np.argsort(np.asarray(lengths)[p], kind="stable")] for p in pools]
    )
    batches = [by_length[i : i + batch_size].tolist() for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def prefetched(make: Callable, items: Iterable, depth: int = 4) -> Iterator:
    """`make(item)` for each item, computed ahead in a thread while the training step runs."""
    with ThreadPoolExecutor(1) as pool:
        pending: deque = deque()
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class TrialData:
    """The batches of training and of measuring, read ahead by a thread.

    Which examples meet, and in which order, depends on the seed and the epoch alone and not on the
    teacher: rows start in the order of their length in the student's tokens. Rows without an answer
    for the method's task loss (`TrialConfig.task_answers`) are in the batches all the same.

    With the method `shuffled` a training row has the signals of another training row of its task
    (`data.other_rows`); rows of the other splits have their own, so that the losses that are
    measured on them mean what they mean for the other methods.

    Args:
        encoded: split -> its examples with the student's tokens.
        caches: one verified cache per teacher.

    Attributes:
        config: the trial's.
        tables: split -> its rows.
        total_steps: optimiser steps of the whole training.
    """

    def __init__(
        self,
        prepared: PreparedData,
        encoded: dict[str, list[Example]],
        caches: list[TeacherCache],
        config: TrialConfig,
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        signals = config.method.signals != "none"
        self.caches = [cache if signals else None for cache in caches if config.distils]
        self.student_examples = {row.example_id: row for rows in encoded.values() for row in rows}
        self._mark_answers(prepared.train)
        self.ids = {
            split: sorted(ids, key=lambda i: (len(self.student_examples[i].tokens), i))
            for split, ids in caches[0].splits.items()
        }
        self.tables = prepared.tables
        self._steps_per_epoch = -(-len(self.ids["train"]) // config.batch_size)
        self.total_steps = config.own_epochs * self._steps_per_epoch * config.trains
        self._others: dict[str, str] = {}
        if config.method.signals == "other":
            train = self.tables["train"]
            task_of = dict(zip(train["example_id"], train["task"], strict=True))
            lengths = {i: len(self.student_examples[i].tokens) for i in self.ids["train"]}
            tasks = {i: task_of[i] for i in self.ids["train"]}
            self._others = other_rows(tasks, lengths, config.seed)

    def _mark_answers(self, train: pd.DataFrame) -> None:
        """Say which rows have an answer for the task loss; the rest of the data has its own."""
        if self.config.task_answers == "teacher":
            return
        labelled = set(train["example_id"][train["labelled"]])
        if not labelled and not self.config.distils and self.config.trains:
            raise ValueError(
                f"no training row has a label, and {self.config.distill_type} learns from nothing "
                "else: set labelled in 01 above 0, or choose another distill_type"
            )
        for example_id in set(train["example_id"]).intersection(self.student_examples) - labelled:
            row = self.student_examples[example_id]
            self.student_examples[example_id] = replace(row, has_answer=False)

    def steps(self, stretch: range) -> Iterator[list[Batch]]:
        """The micro-batches of each optimiser step of a stretch, counted from 0 over all epochs."""
        first = stretch.start // self._steps_per_epoch
        last = -(-stretch.stop // self._steps_per_epoch)
        plan = [batch for epoch in range(first, last) for batch in self._plan(epoch + 1)]
        start = stretch.start - first * self._steps_per_epoch
        return prefetched(self._parts, plan[start : start + len(stretch)])

    def probe(self) -> Batch:
        """A fixed batch: the first of the first epoch, on which gradient shares are measured."""
        return self._parts(self._plan(1)[0])[0]

    def batches(self, split: str) -> Iterator[tuple[Batch, list[str]]]:
        """Each batch of a split with the task of each of its examples.

        Shorter rows share larger batches: none has more tokens, padding too, than `batch_size` of
        the split's longest rows, nor more answer tokens than as many of its longest answers.
        """
        ids, table = self.ids[split], self.tables[split]
        task_of = dict(zip(table["example_id"], table["task"], strict=True))
        rows = [self.student_examples[i] for i in ids]  # from short to long
        tokens = [len(row.tokens) for row in rows]
        answers = [len(row.tokens) - row.answer_start for row in rows]
        most_tokens, most_answers = (
            self.config.batch_size * max(counts) for counts in (tokens, answers)
        )
        plan, answered = [list[str]()], 0
        for example_id, length, answer in zip(ids, tokens, answers):
            answered += answer
            if (len(plan[-1]) + 1) * length > most_tokens or answered > most_answers:
                plan.append([])
                answered = answer
            plan[-1].append(example_id)
        tasks = ([task_of[i] for i in batch] for batch in plan)
        whole = prefetched(lambda batch: self._parts(batch, len(batch))[0], plan)
        return zip(whole, tasks, strict=True)

    def _plan(self, epoch: int) -> list[list[str]]:
        ids = self.ids["train"]
        lengths = [len(self.student_examples[i].tokens) for i in ids]
        plan = epoch_batches(lengths, self.config.batch_size, self.config.seed, epoch)
        return [[ids[k] for k in batch] for batch in plan]

    def _parts(self, ids: list[str], size: int | None = None) -> list[Batch]:
        """These rows in parts of `size`; None: in micro-batches."""
        return split_batch(
            [self.student_examples[i] for i in ids],
            size or self.config.micro_batch_size,
            [
                None if cache is None else [cache[self._others.get(i, i)] for i in ids]
                for cache in self.caches
            ],
            distill_tokens=self.config.distill_tokens,
            device=self.device,
            other_rows=ids[0] in self._others,
        )
