"""From text to token ids, and what distinguishes one tokenizer from another."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.store.files import matching, sha256_file
from kd_utils.tokens import alignment
from kd_utils.tokens.vocabulary import Vocabulary, byte_ends

#: Pairs whose texts a tokenizer gets in one call: more of them only hold more memory.
PAIRS_AT_ONCE = 512


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of the answer that continues it, as lm-evaluation-harness splits them.

    Prompt and answer are encoded together, and the prompt once more alone. What the whole has
    beyond the prompt's length is the answer. Special tokens are where the tokenizer itself puts
    them. White space at the end of the prompt counts as part of the answer.

    Returns:
        The prompt's ids and the answer's ids (no end token); both are non-empty.

    Raises:
        ValueError: the prompt is empty, the answer has no token of its own, or the tokenizer ends
            texts by itself.
    """
    prompt, answer = _stripped(prompt, answer)
    ids = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    return _cut(tokenizer, _special_ids(tokenizer), prompt, answer, *ids)


def encode_pairs(
    tokenizer: Any, pairs: Sequence[tuple[str, str]]
) -> Iterator[tuple[list[int], list[int]]]:
    """`encode_pair` of each of many (prompt, answer), sooner: the tokenizer gets many texts in one
    call, and each text once. A pair that is wrong raises in its turn.
    """
    special = _special_ids(tokenizer)
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        split = [_stripped(*pair) for pair in pairs[start : start + PAIRS_AT_ONCE]]
        texts = dict.fromkeys(
            text for prompt, answer in split for text in (prompt, prompt + answer)
        )
        encoded = tokenizer(list(texts), return_attention_mask=False)
        ids = dict(zip(texts, encoded["input_ids"], strict=True))
        for prompt, answer in split:
            yield _cut(tokenizer, special, prompt, answer, ids[prompt], ids[prompt + answer])


def _stripped(prompt: str, answer: str) -> tuple[str, str]:
    """White space at the prompt's end goes to the answer's beginning."""
    stripped = prompt.rstrip()
    return stripped, prompt[len(stripped) :] + answer


def _special_ids(tokenizer: Any) -> set[int]:
    """All but that of an unknown piece, which any text may end with."""
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def _cut(
    tokenizer: Any,
    special: set[int],
    prompt: str,
    answer: str,
    prompt_ids: list[int],
    whole_ids: list[int],
) -> tuple[list[int], list[int]]:
    """The ids of both, of the prompt's own and those of the whole; the errors of `encode_pair`."""
    if not prompt:
        raise ValueError(
            f"the prompt before {answer[:40]!r} is empty: a model needs a token to start from"
        )
    last = prompt_ids[-1] if len(prompt_ids) > 1 else None
    if last in special:
        token = tokenizer.convert_ids_to_tokens(last)
        # It would be between prompt and answer, and shift the cut.
        if not prompt.endswith(token):
            raise ValueError(
                f"the tokenizer ends every text with {token!r}: set add_eos_token to false in its "
                "tokenizer_config.json, or choose another tokenizer"
            )
    answer_ids = whole_ids[len(prompt_ids) :]
    if not answer_ids:
        raise ValueError(
            f"answer {answer[:40]!r} has no token of its own after {prompt[-40:]!r}: this "
            "tokenizer joins prompt and answer: choose another tokenizer"
        )
    return prompt_ids, answer_ids


def encode_example(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a training sequence: the prompt's, and the answer's followed by the end token."""
    prompt_ids, answer_ids = encode_pair(tokenizer, prompt, answer)
    return prompt_ids, [*answer_ids, _end_token(tokenizer)]


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end token (eos_token): a model trained with it would never stop; "
            "choose a tokenizer with an eos_token"
        )
    return tokenizer.eos_token_id


def chat_template_notes(tokenizers: dict[str, Any]) -> list[str]:
    """A line for each tokenizer that has a chat template: prompts are plain text.

    Args:
        tokenizers: by the names of their models.
    """
    return [
        f"{name} has a chat template, which is not used: prompts are plain text"
        for name, tokenizer in tokenizers.items()
        if getattr(tokenizer, "chat_template", None)
    ]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sixteen hex digits over everything that decides which ids a text gets.

    These are the pieces with their ids (added tokens too), the end token, how text is normalised
    and split, where special tokens are put, and the ids of a probe text. Names, padding and chat
    templates do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        getattr(backend, part, None) for part in ("normalizer", "pre_tokenizer", "post_processor")
    ]
    probe = "A robe takes 2/2=<<2/2=1>>1 bolt,\n it isn't naïve: $1,080.50\tThe end.  #### -18"
    values = {
        "pieces": sorted(tokenizer.get_vocab().items()),
        "eos": tokenizer.eos_token_id,
        "parts": [part.__getstate__().decode() if part is not None else None for part in parts],
        "probe": tokenizer.encode(probe),
    }
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def tokenizer_files(folder: Path) -> dict[str, str]:
    """Digests by name of the files in a folder that a tokenizer is read from, not of a model's."""
    starts = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges")
    files = [path for path in matching(folder, "*") if path.is_file()]
    return {path.name: sha256_file(path) for path in files if path.name.startswith(starts)}


@dataclass
class Example:
    """One row as tokens, with the signals of the teacher that are read.

    Attributes:
        tokens: (T,) int32, prompt, answer and end token.
        answer_start: index of the answer's first token.
        ends: (T,) int32 of `byte_ends`; empty where the tokens do not spell the text.
        signals: by column of a cache's shards, in the shapes of `models/signal_kinds`.
        has_answer: the task loss counts its answer; other losses never ask.
    """

    example_id: str
    tokens: np.ndarray
    answer_start: int
    ends: np.ndarray | None = None
    signals: dict[str, np.ndarray] = field(default_factory=dict)
    has_answer: bool = True


def encode_table(
    tokenizer: Any,
    table: pd.DataFrame,
    where: str = "the table",
    *,
    vocabulary: Vocabulary | None = None,
) -> list[Example]:
    """Each row of a prepared table as tokens, still without signals.

    Args:
        where: what the table is called in an error.
        vocabulary: the tokenizer's, for examples with `ends`.

    Raises:
        ValueError: names `where` and the row that this tokenizer cannot encode.
    """
    rows: list[Example] = []
    end = None
    pairs = list(zip(table["prompt"], table["answer"], strict=True))
    encoded = encode_pairs(tokenizer, pairs)
    for example_id, (prompt, answer) in zip(table["example_id"], pairs, strict=True):
        try:
            prompt_ids, answer_ids = next(encoded)
            end = _end_token(tokenizer) if end is None else end
            answer_ids = [*answer_ids, end]
            if not prompt_ids:
                raise ValueError(
                    f"this tokenizer has no token for the prompt {prompt[:40]!r}: leave the row "
                    "out, or choose another tokenizer"
                )
        except ValueError as error:
            raise ValueError(f"{where}, row {example_id}: {error}") from None
        ids, ends = prompt_ids + answer_ids, None
        if vocabulary is not None:
            try:
                ends = byte_ends(tokenizer, vocabulary, prompt + answer, ids)
            except ValueError:  # a student with the same tokens needs no ends
                ends = np.zeros(0, np.int32)
        rows.append(Example(example_id, np.asarray(ids, np.int32), len(prompt_ids), ends))
    return rows


def encode_splits(
    tokenizer: Any, tables: dict[str, pd.DataFrame], vocabulary: Vocabulary
) -> dict[str, list[Example]]:
    """`encode_table` of each split of the prepared data."""
    return {
        split: encode_table(tokenizer, table, f"{split}.parquet", vocabulary=vocabulary)
        for split, table in tables.items()
    }


def right_padded(examples: list[Example]) -> tuple[np.ndarray, list[int]]:
    """(B, T) int64 token ids, padded with 0, and the real lengths."""
    lengths = [len(row.tokens) for row in examples]
    input_ids: np.ndarray = np.zeros((len(examples), max(lengths)), np.int64)
    for b, row in enumerate(examples):
        input_ids[b, : lengths[b]] = row.tokens
    return input_ids, lengths


def groups_of(teacher: Example, student: Example) -> alignment.Groups:
    """How the two tokenizations of an example line up.

    Raises:
        ValueError: an example whose tokens do not spell the same text on both sides.
    """
    if np.array_equal(teacher.tokens, student.tokens):
        return alignment.identity(len(student.tokens))
    ends = []
    for side, row in (("teacher", teacher), ("student", student)):
        if row.ends is None or len(row.ends) != len(row.tokens):
            raise ValueError(
                f"row {row.example_id}: the {side}'s tokens do not spell the row's text (prompt "
                "and answer share a token), so teacher and student cannot be aligned: leave the "
                "row out"
            )
        ends.append(row.ends)
    try:
        return alignment.align(*ends)
    except ValueError as error:
        raise ValueError(f"row {student.example_id}: {error}: run 01 and 02 again") from None
