"""What of a model's own generation_config.json counts in our greedy decoding.

Its end tokens count, and what changes the scores of tokens: a repetition penalty, n-grams that may
not repeat, suppressed, bad and biased words, as in lm-evaluation-harness. Everything else (lengths,
time, beams, sampling, caches, what is returned) is ours.
"""

from collections.abc import Callable
from typing import Any

import torch

from kd_utils.models import folder_checks

#: Keys that change the scores of tokens, each with the value that changes nothing.
RULES = {
    "sequence_bias": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
#: Such keys, too, but of no causal model that we know of.
UNKNOWN = {
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
}


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's end token, and the model's own.

    Raises:
        ValueError: the model's own are no token ids.
    """
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    if any(type(token) is not int for token in listed if token is not None):
        raise _refused("eos_token_id", configured, "it must be a token id, or a list of them")
    return {*listed, tokenizer.eos_token_id} - {None}


def own_rules(model: Any, prompt: list[int]) -> Any:
    """A `LogitsProcessorList` of what the model's own generation_config changes for one row.

    These are transformers' processors, in the order in which `generate` applies them.

    Args:
        prompt: the row's ids, without padding.

    Raises:
        ValueError: names the key whose value cannot be used.
    """
    from transformers.generation import logits_process

    config, device = model.generation_config, model.device
    asked = {
        key: getattr(config, key)
        for key, neutral in (UNKNOWN | RULES).items()
        if getattr(config, key, None) not in (None, [], neutral)
    }
    for key in UNKNOWN.keys() & asked.keys():
        raise _refused(key, asked[key], "our greedy decoding does not have it")
    makers: dict[str, Callable[[Any], Any]] = {
        "sequence_bias": logits_process.SequenceBiasLogitsProcessor,
        "repetition_penalty": lambda factor: logits_process.RepetitionPenaltyLogitsProcessor(
            float(factor)
        ),
        "no_repeat_ngram_size": logits_process.NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda words: logits_process.NoBadWordsLogitsProcessor(
            words, config.eos_token_id
        ),
        "suppress_tokens": lambda ids: logits_process.SuppressTokensLogitsProcessor(ids, device),
        "begin_suppress_tokens": lambda ids: logits_process.SuppressTokensAtBeginLogitsProcessor(
            ids, len(prompt), device
        ),
    }
    rules, sizes = logits_process.LogitsProcessorList(), (1, folder_checks.known_ids(model))
    for key, value in asked.items():
        try:
            rules.append(makers[key](value))
            # Some values are looked at only when they are used.
            rules[-1](torch.tensor([prompt], device=device), torch.zeros(sizes, device=device))
        except (ValueError, TypeError, RuntimeError) as error:
            raise _refused(key, value, str(error)) from None
    return rules


def _refused(key: str, value: Any, why: str) -> ValueError:
    return ValueError(
        f"the model's own generation_config.json has {key} = {value!r}: {' '.join(why.split())}: "
        "correct it there, or remove it"
    )


def row_by_row(rules: list[Any], starts: list[int]) -> Any:
    """A `LogitsProcessor` that applies each row's rules to that row without its padding.

    transformers counts padding as text: an id that pads would be one that was said before.

    Args:
        rules: of `own_rules`, one per row.
        starts: where each row begins, after its padding.
    """
    from transformers import LogitsProcessor

    class RowByRow(LogitsProcessor):
        """(B, T) ids and (B, V) scores to (B, V) scores."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not any(rules):
                return scores
            rows = [
                rule(input_ids[b : b + 1, start:], scores[b : b + 1])
                for b, (rule, start) in enumerate(zip(rules, starts, strict=True))
            ]
            return torch.cat(rows)

    return RowByRow()
