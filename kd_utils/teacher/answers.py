"""The teacher's answers to the training rows, which stand for the labels that some rows lack."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from kd_utils.cache import manifest, teacher_cache
from kd_utils.config.stages import CacheConfig
from kd_utils.data.answers import ANSWERS
from kd_utils.data.prepared_data import PreparedData
from kd_utils.evaluation.replies import replies
from kd_utils.tokens.encoding import encode_example


def answers_in(folder: Path, ask: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The answers in a finished cache; where there is none yet, what `ask` returns."""
    with suppress(manifest.CacheError):
        manifest.check_files(folder, every_byte=False)
        return teacher_cache.read_answers(folder)
    return ask()


def ask_teacher(
    config: CacheConfig,
    model: Any,
    tokenizer: Any,
    student_tokenizer: Any,
    prepared: PreparedData,
    *,
    progress: bool = False,
) -> pd.DataFrame:
    """The teacher's answer to every training row, as it answers when it is evaluated.

    Of choices it is the one with the largest log-likelihood; otherwise what it writes greedily, up
    to a stop string or an end token, with the one space before it that prepared answers have. No
    row's own answer is read.

    Args:
        model, tokenizer: the teacher, in eval mode.
        student_tokenizer: counts the lengths, as in 01.
        progress: show bars.

    Returns:
        A row per training row, in their order, with the columns of `ANSWERS`. A row fits if both
        tokenizers can encode it, for the student in at most the `max_length` of the data.
    """
    train = prepared.train
    said = replies(
        model,
        tokenizer,
        train,
        batch_size=config.eval_batch_size,
        max_new_tokens=config.max_new_tokens,
        progress=progress,
    )
    lines = []
    for row, reply in zip(train.itertuples(), said, strict=True):
        chosen = reply.choice is not None
        text = row.choices[reply.choice] if chosen else f" {reply.text.strip()}".rstrip()
        fits = _length(student_tokenizer, row.prompt, text) <= prepared.max_length
        fits = fits and _length(tokenizer, row.prompt, text) < float("inf")
        lines.append((row.example_id, text, reply.whole, fits))
    return pd.DataFrame(lines, columns=list(ANSWERS))


def _length(tokenizer: Any, prompt: str, answer: str) -> float:
    """Tokens of a row, end token included; infinite if it cannot be encoded."""
    try:
        return sum(map(len, encode_example(tokenizer, prompt, answer)))
    except ValueError:  # such as an answer without a token of its own
        return float("inf")
