"""Greedy generation as lm-evaluation-harness 0.4.13 does it."""

import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch

from kd_utils.evaluation import decoding
from kd_utils.models import folder_checks


class Generated(NamedTuple):
    """A generated text up to its stop, and whether it stopped by itself or was cut."""

    text: str
    whole: bool


def generate_answers(*arguments: Any, **options: Any) -> list[str]:
    """The texts of `generate`, which has the same arguments."""
    return [generated.text for generated in generate(*arguments, **options)]


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    stop_strings: tuple[str, ...],
    batch_size: int,
    max_new_tokens: int,
    progress: bool = False,
) -> list[Generated]:
    """Greedy continuation of each prompt up to the first stop string or end token.

    The stop is not part of the text. Prompts are padded on the left. A prompt that leaves no room
    for `max_new_tokens` in the model's context loses tokens on the left, as in the harness, with a
    warning.

    Args:
        stop_strings: texts that end a generation, beside the end tokens of tokenizer and model.

    Raises:
        ValueError: `max_new_tokens` leaves no room for any prompt, the model does not know a token,
            or its generation_config has a rule that cannot be followed.
    """
    context = context_length(model, tokenizer)
    room = context - max_new_tokens
    if prompts and room < 1:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens} leaves no room for a prompt: the model's context "
            f"is {context} tokens, lower max_new_tokens"
        )
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    folder_checks.require_known_ids(model, tokenizer, {token for ids in encoded for token in ids})
    if cut := sum(len(ids) > room for ids in encoded):
        warnings.warn(
            f"{cut} prompts leave no room for {max_new_tokens} new tokens and lost their beginning",
            stacklevel=2,
        )
    stops = stop_strings + ((tokenizer.eos_token,) if tokenizer.eos_token else ())
    found = [Generated("", False)] * len(prompts)
    places = range(len(prompts))
    for batch in batches(places, lambda i: len(encoded[i]), batch_size, "generating", progress):
        ids = [encoded[place][-room:] for place in batch]
        new_ids = _generate(model, tokenizer, ids, stops, max_new_tokens)
        for place, (row, whole) in zip(batch, new_ids, strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            for stop in stops:
                text = text.split(stop, 1)[0]
            found[place] = Generated(text, whole)
    return found


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    stop_strings: tuple[str, ...],
    max_new_tokens: int,
) -> list[tuple[list[int], bool]]:
    """New ids of each row up to the step at which it stopped, and whether it did, whatever the
    other rows are.
    """
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        StoppingCriteria,
        StoppingCriteriaList,
    )

    width = max(map(len, prompts))
    input_ids, mask = (
        torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
        for rows in (prompts, [[1] * len(ids) for ids in prompts])
    )
    end_ids = decoding.end_ids(model, tokenizer)
    rules = decoding.row_by_row(
        [decoding.own_rules(model, ids) for ids in prompts], [width - len(ids) for ids in prompts]
    )
    # As many tokens as the longest stop string has bytes hold it whole, however it is split.
    tail = max(len(text.encode()) for text in stop_strings)
    ends: list[int | None] = [None] * len(prompts)  # the length at which each row stopped

    class Stopped(StoppingCriteria):
        """Which rows have reached an end token or a stop string."""

        def __call__(
            self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
        ) -> torch.Tensor:
            length = input_ids.shape[1]
            for row, ids in enumerate(input_ids[:, max(width, length - tail) :].tolist()):
                if ends[row] is None:
                    said = tokenizer.decode(ids)
                    if ids[-1] in end_ids or any(text in said for text in stop_strings):
                        ends[row] = length
            return torch.tensor([end is not None for end in ends], device=input_ids.device)

    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=0
    )
    own, model.generation_config = model.generation_config, greedy
    try:  # `generate` takes what its argument leaves open from the model's
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=greedy,
            logits_processor=LogitsProcessorList([rules]),
            stopping_criteria=StoppingCriteriaList([Stopped()]),
        )
    finally:
        model.generation_config = own
    return [
        (row[width:end], end is not None) for row, end in zip(output.tolist(), ends, strict=True)
    ]


def context_length(model: Any, tokenizer: Any) -> int:
    """Most tokens that the model can read, by its config, its tokenizer, or the harness's 2048."""
    # A model that sees pictures too has its language model's config inside its own.
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        if length := getattr(config, name, None):
            return int(length)
    # A tokenizer that knows no limit says 10^30.
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**20 else 2048


def batches(
    items: Collection[Any], length: Callable[[Any], int], size: int, label: str, progress: bool
) -> Iterator[list[Any]]:
    """Batches of items of similar length, with a bar called `label` if `progress`.

    The longest come first, so that there is little padding and memory runs out at once or never.
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
