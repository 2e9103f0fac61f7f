"""What a model says to each prompt, as lm-evaluation-harness 0.4.13 asks it; no answer is read."""

import warnings
from bisect import bisect_left
from collections import defaultdict
from typing import Any, NamedTuple

import pandas as pd
import torch

from kd_utils.data import tasks
from kd_utils.evaluation import readiness
from kd_utils.evaluation.generation import batches, context_length, generate
from kd_utils.models import folder_checks
from kd_utils.tokens.encoding import encode_pairs


class Reply(NamedTuple):
    """What a model says to one prompt.

    Attributes:
        loglikelihoods: of each choice, nats; None without choices.
        text: what it generated up to the stop; "" of choices.
        whole: it stopped by itself, and was not cut at `max_new_tokens`.
    """

    loglikelihoods: list[float] | None
    text: str = ""
    whole: bool = True

    @property
    def choice(self) -> int | None:
        """The number of the choice with the largest log-likelihood, the first of a tie."""
        values = self.loglikelihoods
        return None if values is None else values.index(max(values))


def replies(
    model: Any,
    tokenizer: Any,
    table: pd.DataFrame,
    *,
    batch_size: int,
    max_new_tokens: int = 256,
    progress: bool = False,
) -> list[Reply]:
    """What the model says to each prompt of the table; no row's answer or gold is read.

    The arguments and errors are those of `evaluate`.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size = {batch_size} and max_new_tokens = {max_new_tokens} must be at least 1"
        )
    found, names = [Reply(None)] * len(table), table["task"].tolist()
    chosen = [place for place, choices in enumerate(table["choices"]) if len(choices)]
    training = model.training
    model.eval()
    try:
        scores = choice_loglikelihoods(
            model, tokenizer, table.iloc[chosen], batch_size=batch_size, progress=progress
        )
        for place, values in zip(chosen, scores, strict=True):
            found[place] = Reply(values)
        generated_places = sorted(set(range(len(table))) - set(chosen))
        for name in tasks.task_order(names[place] for place in generated_places):
            generation = tasks.find_task(name).generation
            assert generation, f"{name} has neither choices nor a way to read answers"
            task_places = [place for place in generated_places if names[place] == name]
            texts = generate(
                model,
                tokenizer,
                table["prompt"].iloc[task_places].tolist(),
                stop_strings=generation.stop_strings,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
            for place, generated in zip(task_places, texts, strict=True):
                found[place] = Reply(None, *generated)
    finally:
        model.train(training)
    return found


@torch.inference_mode()
def choice_loglikelihoods(
    model: Any, tokenizer: Any, table: pd.DataFrame, *, batch_size: int, progress: bool = False
) -> list[list[float]]:
    """Sums of the natural-log probabilities of each choice's tokens, a list per example.

    Choices that share all their tokens but the last (" A" to " D") share one forward pass. A
    sequence longer than the model's context loses tokens on the left, as in the harness, with a
    warning.
    """
    limit = context_length(model, tokenizer)
    requests: dict[tuple[int, ...], list[tuple[int, int, list[int]]]] = defaultdict(list)
    cut, used = 0, set[int]()
    places, pairs = [], []
    for place, (prompt, choices) in enumerate(zip(table["prompt"], table["choices"], strict=True)):
        places += [(place, number) for number in range(len(choices))]
        pairs += [(prompt, choice) for choice in choices]
    encoded = encode_pairs(tokenizer, pairs)
    for (place, number), (prompt_ids, choice_ids) in zip(places, encoded, strict=True):
        ids = (prompt_ids + choice_ids)[:-1]
        cut += len(ids) > limit
        requests[tuple(ids[-limit:])].append((place, number, choice_ids))
        used.update(prompt_ids, choice_ids)
    folder_checks.require_known_ids(model, tokenizer, used)
    if cut:
        warnings.warn(
            f"{cut} sequences have more than the model's {limit} tokens and lost their beginning",
            stacklevel=2,
        )
    scores = [[0.0] * len(choices) for choices in table["choices"]]
    for batch in batches(requests, len, batch_size, "scoring", progress):
        longest = [max(len(ids) for *_, ids in requests[key]) for key in batch]
        asked = [request for key in batch for request in requests[key]]
        # One copy to a GPU and one back for all of them: each waits for what the GPU was given.
        flat = torch.tensor([token for *_, ids in asked for token in ids], device=model.device)
        tokens = iter(flat[:, None].split([len(ids) for *_, ids in asked]))
        sums = [
            log_probs[-len(ids) :].gather(1, next(tokens)).sum()
            for key, log_probs in zip(batch, _continuation_log_probs(model, batch, longest))
            for *_, ids in requests[key]
        ]
        for (place, number, _), score in zip(asked, torch.stack(sums).tolist()):
            scores[place][number] = score
    if any(value != value for values in scores for value in values):
        raise ValueError(
            "a log-likelihood is not a number: the model's training diverged, or its weights are "
            "damaged"
        )
    return scores


def _continuation_log_probs(
    model: Any, batch: list[tuple[int, ...]], counts: list[int]
) -> list[torch.Tensor]:
    """(counts[i], V) float32 natural-log probabilities at row i's last positions."""
    width = max(map(len, batch))
    # Right padding needs no mask in a causal model: no real position can see it.
    input_ids = torch.tensor(
        [[*ids, *[0] * (width - len(ids))] for ids in batch], device=model.device
    )
    # Only these positions go through the head: (B, kept, V) in place of (B, T, V).
    wanted = [range(len(ids) - n, len(ids)) for ids, n in zip(batch, counts, strict=True)]
    kept = sorted(set().union(*wanted))
    logits = readiness.logits_at(model, input_ids, kept)
    # Positions that follow one another do so in `kept`, too.
    starts = [bisect_left(kept, positions.start) for positions in wanted]
    return [
        logits[b, start : start + count].float().log_softmax(-1)
        for b, (start, count) in enumerate(zip(starts, counts))
    ]
