"""The rows that an estimate is for: how many, and how long."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from kd_utils.config import stages
from kd_utils.data import prepared_data, tasks
from kd_utils.store.sealed import RecordError
from kd_utils.tokens.encoding import Example

#: For each task its number of rows, then the quantiles 0, 1/20, ..., 1 of tokens in a row and of
#: tokens in its answer: the training rows of `papermill_params/llama2.yaml` under Llama-2's
#: tokenizer.
LENGTH_MIX = {
    "sst2": (
        5000,
        "16 21 24 26 28 30 32 33 35 37 38 40 42 44 46 48 50 53 56 61 90",
        "2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2",
    ),
    "mmlu": (
        1000,
        "45 59 63 67 72 76 81 86 93 97 104 112 122 132 139 150 171 210 258 324 493",
        "2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2",
    ),
    "gsm8k": (
        1000,
        "72 106 118 127 137 146 155 166 173 180 190 201 209 218 227 241 254 275 305 340 495",
        "31 59 69 76 82 89 95 101 106 112 119 126 136 145 152 161 171 185 209 241 368",
    ),
}

#: Tokens of the longest prompt of GSM8K's test split under the same tokenizer. The mix pairs long
#: prompts with long answers and cannot tell it.
LONGEST_QUESTION = 195


def mixed_lengths(task: str, count: int) -> Iterator[tuple[int, int]]:
    """(tokens, answer tokens) of `count` rows of a task, at evenly spaced quantiles.

    Ten times the rows have ten times the tokens. A task that is not in `LENGTH_MIX` is taken to be
    as long as MMLU.
    """
    quantiles = [np.array(q.split(), int) for q in LENGTH_MIX.get(task, LENGTH_MIX["mmlu"])[1:]]
    for place in (np.arange(count) + 0.5) / max(count, 1) * 20:
        length, answer = (round(np.interp(place, range(21), q)) for q in quantiles)
        yield length, answer


@dataclass(frozen=True)
class Rows:
    """The lengths of the rows of one split.

    Attributes:
        by_task: task -> (tokens, answer tokens) of each row, prompt and answer together first.
        most_question: what is known of the longest prompts, where rows are expected only.
    """

    by_task: dict[str, list[tuple[int, int]]]
    most_question: int = 0

    @classmethod
    def of(cls, table: pd.DataFrame, examples: list[Example]) -> Self:
        """Of a split of prepared data and the same rows as tokens, in the same order."""
        by_task: dict[str, list[tuple[int, int]]] = {task: [] for task in table["task"].unique()}
        for task, row in zip(table["task"], examples, strict=True):
            by_task[task].append((len(row.tokens), len(row.tokens) - row.answer_start))
        return cls(by_task)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(tokens, answer tokens) of each row."""
        return [pair for pairs in self.by_task.values() for pair in pairs]

    @property
    def tokens(self) -> int:
        return sum(n for n, _ in self.lengths)

    @property
    def longest(self) -> int:
        return max(n for n, _ in self.lengths)

    @property
    def longest_answer(self) -> int:
        return max(n for _, n in self.lengths)

    @property
    def longest_question(self) -> int:
        """Tokens of the longest prompt whose answer is generated; 0 if there is none."""
        generated = [
            (n, n - answer)
            for task, pairs in self.by_task.items()
            if task in tasks.TASKS and tasks.TASKS[task].generation
            for n, answer in pairs
        ]
        if self.most_question and generated:
            return min(self.most_question, max(n for n, _ in generated))
        return max((question for _, question in generated), default=0)


def expected_rows(config: stages.DataConfig) -> tuple[dict[str, Rows], str]:
    """The rows that 01 makes, or made, by split; and where their lengths come from.

    With prepared data, the lengths have the mean of each task that its manifest names; without,
    those of `LENGTH_MIX`, at most `max_length`.
    """
    asked: list[dict[str, Any]] = [
        {"split": split, "task": task, "taken": count}
        for split in prepared_data.SPLITS
        for task, count in config.rows(split).items()
    ]
    source = "of the real rows with Llama-2's tokenizer"
    try:
        counts = prepared_data.read_manifest(config.data_path)["counts"]
        if counts:
            asked, source = counts, "as counted in the prepared data"
    except RecordError:
        pass
    splits: dict[str, dict[str, list[tuple[int, int]]]] = {s: {} for s in prepared_data.SPLITS}
    for line in asked:
        lengths = list(mixed_lengths(line["task"], line["taken"]))
        if "mean_tokens" in line:
            lengths = _with_mean(lengths, line)
        limit = config.max_length
        splits[line["split"]][line["task"]] = [
            (min(n, limit), min(a, n, limit)) for n, a in lengths
        ]
    found = {split: Rows(by_task, LONGEST_QUESTION) for split, by_task in splits.items()}
    return found, source


def _with_mean(lengths: list[tuple[int, int]], line: dict[str, Any]) -> list[tuple[int, int]]:
    """The lengths, moved and stretched to the mean and the longest that a line of counts names."""
    tokens, answers = np.array(lengths, float).T
    mean, longest = line["mean_tokens"], line["max_tokens"]
    stretch = (longest - mean) / max(tokens.max() - tokens.mean(), 1)
    tokens = (mean + (tokens - tokens.mean()) * stretch).round().clip(2)
    answers = (answers * line["mean_answer_tokens"] / answers.mean()).round().clip(1, tokens - 1)
    return [(int(n), int(answer)) for n, answer in zip(tokens, answers, strict=True)]
