"""Predictions and accuracies as lm-evaluation-harness 0.4.13 counts them."""

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from kd_utils.data import task_rows, tasks
from kd_utils.evaluation import readiness
from kd_utils.evaluation.replies import replies
from kd_utils.models import devices, folder_checks, loading
from kd_utils.store.files import written_aside
from kd_utils.tokens.encoding import chat_template_notes


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
    said = replies(
        model,
        tokenizer,
        table,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    answers: list[dict[str, Any]] = []
    for task, gold, reply in zip(table["task"], table["gold"], said, strict=True):
        if reply.choice is None:
            generation = tasks.find_task(task).generation
            assert generation, f"{task} has neither choices nor a way to read answers"
            answers.append({"generated": reply.text, **generation.score(reply.text, gold)})
        else:
            prediction = str(reply.choice)
            answers.append(
                {
                    "prediction": prediction,
                    "correct": prediction == gold,
                    "loglikelihoods": reply.loglikelihoods,
                }
            )
    # Object columns: a missing value is None, and a bool stays a bool beside it.
    columns = {
        column: pd.Series([row.get(column) for row in answers], dtype=object)
        for column in ("prediction", "correct", "loglikelihoods", "generated", "correct_flexible")
    }
    examples = table[["example_id", "task", "prompt", "gold"]].reset_index(drop=True)
    return examples.assign(**columns).astype({"correct": bool})


def accuracies(predictions: pd.DataFrame, split: str = "validation") -> dict[str, float]:
    """Fractions of right predictions, each in [0, 1].

    Args:
        split: whose rows were predicted; the keys begin with it.

    Returns:
        `SPLIT_accuracy` (over examples), `SPLIT_accuracy/macro` (mean over tasks),
        `SPLIT_accuracy/TASK` for each task that is there, and `SPLIT_accuracy/TASK_flexible` for
        those with generated answers.
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
    return {f"{split}_accuracy{name}": float(value) for name, value in values.items()}


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
