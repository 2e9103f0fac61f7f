"""Predictions and accuracies as lm-evaluation-harness 0.4.13 counts them."""

import warnings
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from kd_utils.data import task_rows, tasks
from kd_utils.evaluation import readiness
from kd_utils.evaluation.generation import batches, context_length, generate_answers
from kd_utils.models import devices, folder_checks, loading
from kd_utils.store.files import written_aside
from kd_utils.tokens.encoding import chat_template_notes, encode_pair


def evaluate(
    model: Any,
    tokenizer: Any,
    table: pd.DataFrame,
    *,
    batch_size: int,
    max_new_tokens: int = 256,
    progress: bool = False,
) -> pd.DataFrame:
    """One prediction per example.

    Of choices: the one with the largest sum of its tokens' natural-log probabilities, no length
    normalisation, the first of a tie. Without choices: greedy generation, read and compared as the
    task says. The batch size changes the speed and nothing else (in float32; lower precisions round
    with the shape). Wrap the call in autocast for mixed precision.

    Args:
        model: any causal `transformers` model, on any device, left in its mode (train or eval).
        tokenizer: its tokenizer; special tokens are those that it adds itself.
        table: rows of `load_task` or of prepared data.
        batch_size: sequences per forward pass.
        max_new_tokens: the longest generation, in tokens (the harness: 256).
        progress: show a bar.

    Returns:
        A row per example, in the table's order: `example_id`, `task`, `prompt`, `gold`;
        `prediction` (number of the choice as a string, or the strictly extracted answer,
        "[invalid]" if there is none), `correct` (bool), `loglikelihoods` (list of floats, nats, a
        value per choice; None without choices), `generated` (text up to the stop; None for
        choices), `correct_flexible` (bool, for the flexibly extracted answer; None for choices).

    Raises:
        ValueError: a count below 1, no room in the model's context for a prompt and
            `max_new_tokens`, an answer without a token of its own, or logits that are not finite.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size = {batch_size} and max_new_tokens = {max_new_tokens} must be at least 1"
        )
    answers: list[dict[str, Any]] = [{} for _ in range(len(table))]
    golds, names = table["gold"].tolist(), table["task"].tolist()
    chosen = [place for place, choices in enumerate(table["choices"]) if len(choices)]
    training = model.training
    model.eval()
    try:
        scores = choice_loglikelihoods(
            model, tokenizer, table.iloc[chosen], batch_size=batch_size, progress=progress
        )
        for place, values in zip(chosen, scores, strict=True):
            prediction = str(values.index(max(values)))
            answers[place] = {
                "prediction": prediction,
                "correct": prediction == golds[place],
                "loglikelihoods": values,
            }
        generated_places = sorted(set(range(len(table))) - set(chosen))
        for name in tasks.task_order(names[place] for place in generated_places):
            generation = tasks.find_task(name).generation
            assert generation, f"{name} has neither choices nor a way to read answers"
            task_places = [place for place in generated_places if names[place] == name]
            texts = generate_answers(
                model,
                tokenizer,
                table["prompt"].iloc[task_places].tolist(),
                stop_strings=generation.stop_strings,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
            for place, text in zip(task_places, texts, strict=True):
                answers[place] = {"generated": text, **generation.score(text, golds[place])}
    finally:
        model.train(training)
    # Object columns: a missing value is None, and a bool stays a bool beside it.
    columns = {
        column: pd.Series([row.get(column) for row in answers], dtype=object)
        for column in ("prediction", "correct", "loglikelihoods", "generated", "correct_flexible")
    }
    examples = table[["example_id", "task", "prompt", "gold"]].reset_index(drop=True)
    return examples.assign(**columns).astype({"correct": bool})


def accuracies(predictions: pd.DataFrame) -> dict[str, float]:
    """Fractions of right predictions, each in [0, 1].

    Returns:
        `validation_accuracy` (over examples), `validation_accuracy/macro` (mean over tasks),
        `validation_accuracy/TASK` for each task that is there, and
        `validation_accuracy/TASK_flexible` for those with generated answers.
    """
    if predictions.empty:
        raise ValueError("no predictions: an accuracy needs at least one example")
    per_task = predictions.groupby("task")["correct"].mean()
    flexible = predictions["correct_flexible"].dropna().astype(float).groupby(predictions["task"])
    values = {
        "": predictions["correct"].mean(),
        "/macro": per_task.mean(),
        **{f"/{task}": per_task[task] for task in tasks.task_order(per_task.index)},
        **{f"/{task}{tasks.FLEXIBLE}": share for task, share in flexible.mean().items()},
    }
    return {f"validation_accuracy{name}": float(value) for name, value in values.items()}


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
    for place, (prompt, choices) in enumerate(zip(table["prompt"], table["choices"], strict=True)):
        for number, choice in enumerate(choices):
            prompt_ids, choice_ids = encode_pair(tokenizer, prompt, choice)
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


def evaluate_folder(
    model_dir: str | Path,
    task: str,
    split: str,
    out: str | Path,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    precision: str = "float32",
    progress: bool = False,
) -> pd.DataFrame:
    """Evaluate a saved model and write one row per example, as `python -m kd_utils evaluate` does.

    Args:
        model_dir: folder with a causal `transformers` model and its tokenizer.
        out: parquet file to write, written aside and moved into place.
        precision: "float32", "bfloat16" autocast, or "auto" (bfloat16 on a GPU).
        The rest is as in `load_task` and `evaluate`.

    Returns:
        The table of the file: `row` (int), `prompt`, `gold`, `prediction`, `correct`. With choices,
        gold and prediction are ints and there is `loglikelihoods` (list of doubles, nats); else
        they are strings and there are `generated` and `correct_flexible`.

    Raises:
        FileNotFoundError: no model in the folder, or `out` is no place for a file.
        ValueError: the folder holds no causal model with a tokenizer; what `load_task` raises.
    """
    model_dir, out = Path(model_dir), Path(out)
    folder_checks.refuse_adapter(str(model_dir), model_dir)
    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {model_dir} (config.json is missing): give a folder that save_pretrained "
            "wrote"
        )
    if out.is_dir() or not out.parent.is_dir():
        raise FileNotFoundError(f"cannot write {out}: it must be a file in a folder that exists")
    table = task_rows.load_task(
        task, split, data_dir=data_dir, num_fewshot=num_fewshot, limit=limit
    )
    place = str(model_dir.absolute())
    try:
        tokenizer, model = loading.load_tokenizer(place), loading.load_causal_lm(place)
    except folder_checks.FolderError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{model_dir} is no causal model with its tokenizer: {error}; save both with "
            "save_pretrained"
        ) from None
    for note in chat_template_notes({str(model_dir): tokenizer}):
        warnings.warn(note, stacklevel=2)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    with devices.autocast(model.device, precision):
        for prompt in table["prompt"][:1]:
            readiness.require_causal(model, tokenizer, tokenizer.encode(prompt))
        predictions = evaluate(
            model,
            tokenizer,
            table,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    result = table[["row"]].join(predictions.drop(columns=["example_id", "task"]))
    if tasks.find_task(task).generation:
        result = result.drop(columns="loglikelihoods").astype({"correct_flexible": bool})
    else:
        result = result.drop(columns=["generated", "correct_flexible"]).astype(
            {"gold": int, "prediction": int}
        )
    with written_aside(out) as aside:
        result.to_parquet(aside, index=False)
    return result
