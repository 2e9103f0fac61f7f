"""From text to token ids, and what tells one tokenizer from another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_utils.store.files import sha256_file

if TYPE_CHECKING:
    from kd_utils.tokens.vocabulary import Vocabulary

import pandas as pd

from kd_utils.tokens.vocabulary import Vocabulary, byte_ends


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the answer that continues it, as lm-evaluation-harness splits
    them.

    Prompt and answer are encoded together, the prompt once more alone, and what the whole has
    beyond the prompt's length is the answer. Special tokens are put where the tokenizer itself puts
    them. White space at the prompt's end counts as the answer's.

    Returns:
        The prompt's ids and the answer's ids (no end token); both are non-empty.

    Raises:
        ValueError: the prompt is empty, the answer has no token of its own, or the tokenizer ends
            texts by itself.
    """
    stripped = prompt.rstrip()
    prompt, answer = stripped, prompt[len(stripped) :] + answer
    if not prompt:
        raise ValueError(
            f"the prompt before {answer[:40]!r} is empty: a model needs a token to start from"
        )
    prompt_ids = tokenizer.encode(prompt)
    if (
        len(prompt_ids) > 1
        and prompt_ids[-1] != tokenizer.unk_token_id
        and prompt_ids[-1] in tokenizer.all_special_ids
    ):
        last = tokenizer.convert_ids_to_tokens(prompt_ids[-1])
        if not prompt.endswith(last):  # it would stand between prompt and answer, and shift the cut
            raise ValueError(
                f"the tokenizer ends every text with {last!r}: set add_eos_token to false in its "
                "tokenizer_config.json, or choose another tokenizer"
            )
    answer_ids = tokenizer.encode(prompt + answer)[len(prompt_ids) :]
    if not answer_ids:
        raise ValueError(
            f"answer {answer[:40]!r} has no token of its own after {prompt[-40:]!r}: this "
            f"tokenizer "
            "joins them and cannot be used"
        )
    return prompt_ids, answer_ids


def encode_example(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a training sequence: the prompt's, and the answer's with the end token behind it."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end token (eos_token): a model trained with it would never stop"
        )
    prompt_ids, answer_ids = encode_pair(tokenizer, prompt, answer)
    return prompt_ids, answer_ids + [tokenizer.eos_token_id]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sixteen hex digits over all that decides which ids a text gets.

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
    """Digests of a folder's files that a tokenizer is read from, by name; beside them there may be
    a model.
    """
    return {
        path.name: sha256_file(path)
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab", "merges"))
    }


@dataclass
class Example:
    """One row, shaped: `signals` has those of its columns that are read, by name. Shapes as in the
    module's table.
    """

    example_id: str
    tokens: np.ndarray
    answer_start: int
    ends: np.ndarray | None = None
    signals: dict[str, np.ndarray] = field(default_factory=dict)


def encode_table(
    tokenizer: Any,
    table: pd.DataFrame,
    where: str = "the table",
    *,
    vocabulary: Vocabulary | None = None,
) -> list[Example]:
    """Each prepared row as tokens: prompt, answer, end token; its signals still to come.

    Args:
        vocabulary: the tokenizer's: then each row has `ends` too (none where the tokens do not
            spell the text).

    Raises:
        ValueError: names `where` and the row that this tokenizer cannot encode.
    """
    rows = []
    for example_id, prompt, answer in zip(table["example_id"], table["prompt"], table["answer"]):
        try:
            prompt_ids, answer_ids = encode_example(tokenizer, prompt, answer)
        except ValueError as error:
            raise ValueError(f"{where}, row {example_id}: {error}") from None
        if not prompt_ids:
            raise ValueError(
                f"{where}, row {example_id}: this tokenizer has no token for its prompt "
                f"{prompt[:40]!r}: "
                "leave the row out, or choose another tokenizer"
            )
        ids, ends = prompt_ids + answer_ids, None
        if vocabulary is not None:
            try:
                ends = byte_ends(tokenizer, vocabulary, prompt + answer, ids)
            except ValueError:  # of use to a student with the same tokens only, who needs no ends
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
    """(B, T) int64 token ids, 0 behind each example's end, and the real lengths."""
    lengths = [len(row.tokens) for row in examples]
    input_ids = np.zeros((len(examples), max(lengths)), np.int64)
    for b, row in enumerate(examples):
        input_ids[b, : lengths[b]] = row.tokens
    return input_ids, lengths
