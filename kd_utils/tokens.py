"""From text to token ids, and what tells one tokenizer from another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .files import sha256_file


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the answer that continues it, as lm-evaluation-harness splits them.

    Prompt and answer are encoded together, the prompt once more alone, and what the whole has beyond the prompt's
    length is the answer. Special tokens are put where the tokenizer itself puts them. White space at the prompt's
    end counts as the answer's.

    Returns:
        The prompt's ids and the answer's ids (no end token); both are non-empty.

    Raises:
        ValueError: the prompt is empty, the answer has no token of its own, or the tokenizer ends texts by itself.
    """
    stripped = prompt.rstrip()
    prompt, answer = stripped, prompt[len(stripped):] + answer
    if not prompt:
        raise ValueError(f"the prompt before {answer[:40]!r} is empty: a model needs a token to start from")
    prompt_ids = tokenizer.encode(prompt)
    if len(prompt_ids) > 1 and prompt_ids[-1] != tokenizer.unk_token_id and prompt_ids[-1] in tokenizer.all_special_ids:
        last = tokenizer.convert_ids_to_tokens(prompt_ids[-1])
        if not prompt.endswith(last):  # it would stand between prompt and answer, and shift the cut
            raise ValueError(f"the tokenizer ends every text with {last!r}: set add_eos_token to false in its "
                             "tokenizer_config.json, or choose another tokenizer")
    answer_ids = tokenizer.encode(prompt + answer)[len(prompt_ids):]
    if not answer_ids:
        raise ValueError(f"answer {answer[:40]!r} has no token of its own after {prompt[-40:]!r}: this tokenizer "
                         "joins them and cannot be used")
    return prompt_ids, answer_ids


def encode_example(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a training sequence: the prompt's, and the answer's with the end token behind it."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token): a model trained with it would never stop")
    prompt_ids, answer_ids = encode_pair(tokenizer, prompt, answer)
    return prompt_ids, answer_ids + [tokenizer.eos_token_id]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sixteen hex digits over all that decides which ids a text gets.

    These are the pieces with their ids (added tokens too), the end token, how text is normalised and split, where
    special tokens are put, and the ids of a probe text. Names, padding and chat templates do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [getattr(backend, part, None) for part in ("normalizer", "pre_tokenizer", "post_processor")]
    probe = "A robe takes 2/2=<<2/2=1>>1 bolt,\n it isn't naïve: $1,080.50\tThe end.  #### -18"
    values = {
        "pieces": sorted(tokenizer.get_vocab().items()),
        "eos": tokenizer.eos_token_id,
        "parts": [part.__getstate__().decode() if part is not None else None for part in parts],
        "probe": tokenizer.encode(probe),
    }
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def tokenizer_files(folder: Path) -> dict[str, str]:
    """Digests of a folder's files that a tokenizer is read from, by name; beside them there may be a model."""
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()
            and path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab", "merges"))}
