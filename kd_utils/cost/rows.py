"""The rows that an estimate is for: how many, and how long."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

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


class Rows(NamedTuple):
    """The lengths of the rows.

    Attributes:
        train, held_out, validation: (tokens, answer tokens) of each row, prompt and answer together
            first.
        question: tokens of the longest prompt whose answer is generated; 0: none is.
        written: training rows whose answer is generated: the teacher writes one for each.
    """

    train: list[tuple[int, int]]
    held_out: list[tuple[int, int]]
    validation: list[tuple[int, int]]
    question: int
    written: int = 0

    @property
    def tokens(self) -> list[int]:
        """Tokens of each row of all splits."""
        return [tokens for tokens, _ in self.train + self.held_out + self.validation]


def counted_rows(tables: dict[str, pd.DataFrame], examples: dict[str, list[Example]]) -> Rows:
    """The rows of prepared data, of which `examples` has the tokens, by split."""
    lengths = {
        split: [(len(row.tokens), len(row.tokens) - row.answer_start) for row in found]
        for split, found in examples.items()
    }
    generates = _generated_tasks()
    questions = [
        row.answer_start
        for split, rows in examples.items()
        for task, row in zip(tables[split]["task"], rows, strict=True)
        if task in generates
    ]
    written = int(tables["train"]["task"].isin(generates).sum())
    return Rows(**lengths, question=max(questions, default=0), written=written)


def _generated_tasks() -> set[str]:
    return {name for name, task in tasks.TASKS.items() if task.generation}


def expected_rows(config: stages.DataConfig) -> tuple[Rows, str]:
    """The rows that 01 makes, or made; and where their lengths come from.

    Lengths are those of `LENGTH_MIX`, at most `max_length`. With prepared data, they have the mean
    and the longest of each task that its manifest names. That answers are generated is assumed.
    """
    source, counts = "of the real rows with Llama-2's tokenizer", []
    with suppress(RecordError):
        counts = prepared_data.read_manifest(config.data_path)["counts"]
    if counts:
        source = "as counted in the prepared data"
    asked: list[dict[str, Any]] = counts or [
        {"split": split, "task": task, "taken": count}
        for split in prepared_data.SPLITS
        for task, count in config.rows(split).items()
    ]
    lengths: dict[str, list[tuple[int, int]]] = {split: [] for split in prepared_data.SPLITS}
    for line in asked:
        pairs = np.array([*mixed_lengths(line["task"], line["taken"])], float).reshape(-1, 2)
        if counts and len(pairs):
            pairs *= [line["mean_tokens"], line["mean_answer_tokens"]] / pairs.mean(0)
            pairs[-1, 0] = line["max_tokens"]
        pairs = pairs.round().clip(1, line.get("max_tokens", config.max_length))
        lengths[line["split"]] += [(int(n), int(min(answer, n))) for n, answer in pairs]
    longest = max((tokens for tokens, _ in lengths["validation"]), default=0)
    train = {line["task"]: line["taken"] for line in asked if line["split"] == "train"}
    written = sum(train[task] for task in train.keys() & _generated_tasks())
    return Rows(**lengths, question=min(longest, LONGEST_QUESTION), written=written), source
