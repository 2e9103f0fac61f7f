"""Greedy generation as lm-evaluation-harness 0.4.13 does it for `gsm8k`, and the number read from
the text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kd_utils.data.tasks import normalise_number

#: Texts that end a generation, beside the tokenizer's and the model's own end tokens.
STOP_STRINGS = ("Question:", "</s>", "<|im_end|>")


@torch.inference_mode()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: bool = False,
) -> list[str]:
    """Greedy continuation of each prompt up to the first stop string or end token, which is not
    part of it.

    Prompts are padded on the left; a prompt that leaves no room for `max_new_tokens` in the model's
    context loses tokens on the left, as in the harness, with a warning.
    """
    context = context_length(model, tokenizer)
    room = context - max_new_tokens
    if prompts and room < 1:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens} leaves no room for a prompt: the model's context "
            f"is "
            f"{context} tokens, lower max_new_tokens"
        )
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    if cut := sum(len(ids) > room for ids in encoded):
        warnings.warn(
            f"{cut} prompts leave no room for {max_new_tokens} new tokens and lost their beginning",
            stacklevel=2,
        )
    texts = [""] * len(prompts)
    places = list(range(len(prompts)))
    for batch in batches(
        places, lambda place: len(encoded[place]), batch_size, "generating", progress
    ):
        new_ids = _generate(
            model, tokenizer, [encoded[place][-room:] for place in batch], max_new_tokens
        )
        for place, ids in zip(batch, new_ids, strict=True):
            texts[place] = _cut(
                tokenizer.decode(ids, skip_special_tokens=True), _stop_strings(tokenizer)
            )
    return texts


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """New ids of each row up to the step at which it stopped; a row's result does not depend on the
    others.
    """
    from transformers import StoppingCriteriaList

    width = max(map(len, prompts))
    pads = [width - len(ids) for ids in prompts]
    input_ids = torch.tensor(
        [[0] * pad + ids for pad, ids in zip(pads, prompts, strict=True)], device=model.device
    )
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=model.device)
    stop = _stop_criterion(tokenizer, _end_ids(model, tokenizer), width, len(prompts))
    # As the harness calls it: greedy, of any length; what else the model's generation_config asks
    # for (a repetition penalty, suppressed tokens) counts in both.
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_length=width + max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    return [row[width:end] for row, end in zip(output.tolist(), stop.ends, strict=True)]


def _stop_criterion(tokenizer: Any, end_ids: set[int], prompt_width: int, rows: int) -> Any:
    from transformers import StoppingCriteria

    stop_strings = _stop_strings(tokenizer)
    # As many tokens as the longest stop string has bytes hold it whole, however it is split.
    tail = max(len(text.encode()) for text in stop_strings)

    class Stopped(StoppingCriteria):
        """Which rows have reached an end token or a stop string; `ends` has where each did."""

        def __init__(self) -> None:
            self.ends: list[int | None] = [None] * rows

        def __call__(
            self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
        ) -> torch.Tensor:
            length = input_ids.shape[1]
            recent = input_ids[:, max(prompt_width, length - tail) :].tolist()
            for row, ids in enumerate(recent):
                if self.ends[row] is None and (
                    ids[-1] in end_ids
                    or any(text in tokenizer.decode(ids) for text in stop_strings)
                ):
                    self.ends[row] = length
            return torch.tensor([end is not None for end in self.ends], device=input_ids.device)

    return Stopped()


def _stop_strings(tokenizer: Any) -> tuple[str, ...]:
    return STOP_STRINGS + ((tokenizer.eos_token,) if tokenizer.eos_token else ())


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {index for index in (*listed, tokenizer.eos_token_id) if index is not None}


def _cut(text: str, stop_strings: tuple[str, ...]) -> str:
    for stop in stop_strings:
        text = text.split(stop, 1)[0]
    return text


def extract_strict(text: str) -> str:
    """The number behind the first `#### `, or "[invalid]"."""
    found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    return found[0].strip() if found else "[invalid]"


def extract_flexible(text: str) -> str:
    """The last thing that looks like a number, or "[invalid]"."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return next(group for group in found[-1] if group).strip() if found else "[invalid]"


def score_generated(text: str, gold: str) -> dict[str, Any]:
    """Prediction of the strict match, and whether the strict and the flexible match are right."""
    strict, flexible = extract_strict(text), extract_flexible(text)
    gold = normalise_number(gold)
    return {
        "prediction": strict,
        "correct": normalise_number(strict) == gold,
        "correct_flexible": normalise_number(flexible) == gold,
    }


def context_length(model: Any, tokenizer: Any) -> int:
    """Most tokens that the model can read: as its config says, else the tokenizer, else the
    harness's 2048.
    """
    in_config = getattr(model.config, "max_position_embeddings", None)
    in_tokenizer = tokenizer.model_max_length
    # A tokenizer that knows no limit says 10^30.
    return int(in_config or (in_tokenizer if in_tokenizer < 10**20 else 2048))


def batches(
    items: list[Any], length: Callable[[Any], int], size: int, label: str, progress: bool
) -> Iterator[list[Any]]:
    """Batches of items of like length, the longest first: little padding, and memory runs out at
    once or never.
    """
    from tqdm.auto import tqdm

    ordered = sorted(items, key=length, reverse=True)
    with tqdm(
        total=len(ordered), desc=label, disable=not progress or not ordered, leave=False
    ) as bar:
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            yield batch
            bar.update(len(batch))
