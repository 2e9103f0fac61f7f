"""Which rows are drawn: in the order of a hash, without duplicates, few-shot rows and long ones."""

import hashlib
from typing import Any

import pandas as pd

from kd_utils.config import project_paths, stages
from kd_utils.data import leakage, prepared_data, task_rows, tasks
from kd_utils.records import provenance
from kd_utils.tokens.encoding import encode_example, tokenizer_fingerprint


def prepare(config: stages.DataConfig, tokenizer: Any) -> prepared_data.PreparedData:
    """Draw the training and validation examples that the config asks for.

    Rows are taken in the order of a hash of `data_seed` and content, so an example's place depends
    neither on the counts nor on other rows. Validation takes from the front; training takes from
    the front of its own split, or from the back where both come from one split. Examples with the
    content of an earlier one are dropped (between the splits: from training), and so are those with
    the content of a few-shot row and those with more than `max_length` tokens, which are never cut.

    Raises:
        ValueError: an unknown task, fewer rows than asked for, or no row that fits `max_length`.
    """
    known = [tasks.find_task(name) for name in tasks.task_order(config.tasks)]
    # Taken before anything is read: a file that changes meanwhile must not count as the one read.
    made_from = prepared_data.ingredients(config)
    provenance.require_loaded(made_from["code"])
    drawn: dict[str, list[tuple[pd.DataFrame, dict[str, Any]]]] = {
        split: [] for split in prepared_data.SPLITS
    }
    for task in known:
        taken: set[str] = set()  # contents that training must not have
        for split in ("validation", "train"):
            if asked := config.rows(split).get(task.name):
                rows, count = _draw(config, tokenizer, task, split, asked, taken)
                taken = set(task_rows.content_keys(rows))
                drawn[split].append((rows, count))
    tables = {
        split: pd.concat([rows for rows, _ in parts], ignore_index=True)
        for split, parts in drawn.items()
    }
    return prepared_data.PreparedData(
        tables["train"],
        tables["validation"],
        pd.DataFrame([count for parts in drawn.values() for _, count in parts]),
        config.fingerprint(),
        tokenizer_fingerprint(tokenizer),
        made_from,
    )


def _draw(
    config: stages.DataConfig,
    tokenizer: Any,
    task: tasks.Task,
    split: str,
    asked: int,
    taken: set[str],
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """`asked` rows of a task for one split, and their line of the counts."""
    source = task.splits[split]
    data_dir = project_paths.project_path(config.data_dir) if config.data_dir else None
    table = task_rows.load_task(task.name, source, data_dir=data_dir)
    keys = task_rows.content_keys(table)
    duplicate = keys.duplicated() | keys.isin(taken)
    few_shot = task_rows.content_keys(leakage.few_shot_rows(config.data_dir, [task.name]))
    shot = keys.isin(set(few_shot)) & ~duplicate
    # Both splits from one source: rows of validation are no duplicates of themselves.
    shared_source = split == "train" and source == task.splits["validation"]
    order = keys[~duplicate & ~shot].map(
        lambda key: hashlib.sha256(f"{config.data_seed}:{key}".encode()).hexdigest()
    )
    chosen: dict[Any, tuple[int, int]] = {}  # row -> tokens of the whole, and of the answer
    long = []
    for index in order.sort_values(ascending=not shared_source).index:
        if len(chosen) == asked:
            break
        example = table.loc[index]
        prompt_ids, answer_ids = encode_example(tokenizer, example["prompt"], example["answer"])
        length = len(prompt_ids) + len(answer_ids)
        if length > config.max_length:
            long.append(length)
        else:
            chosen[index] = length, len(answer_ids)
    if long and not chosen:
        raise ValueError(
            f"{task.name}: none of its {len(long)} {split} rows fits max_length = "
            f"{config.max_length} tokens with its whole answer (the longest has {max(long)}, the "
            f"shortest {min(long)}): set max_length to at least {min(long)}, better {max(long)}"
        )
    if len(chosen) < asked:
        raise ValueError(
            f"{split}_rows asks for {task.name}:{asked}, but there are {len(chosen)} ({source} has "
            f"{len(table)} rows, of which {int(duplicate.sum())} are duplicates or in validation, "
            f"{int(shot.sum())} are few-shot rows and {len(long)} longer than max_length): lower "
            f"{task.name} in {split}_rows"
        )
    tokens = pd.DataFrame(chosen.values(), columns=["tokens", "answer"])
    count = {
        "task": task.name,
        "split": split,
        "source": source,
        "available": len(table),
        "duplicates": int((keys.duplicated() if shared_source else duplicate).sum()),
        "shots": int(shot.sum()),
        "too_long": len(long),
        "taken": len(chosen),
        "mean_tokens": round(float(tokens["tokens"].mean()), 1),
        "max_tokens": int(tokens["tokens"].max()),
        "mean_answer_tokens": round(float(tokens["answer"].mean()), 1),
    }
    return table.loc[list(chosen)].drop(columns="row").reset_index(drop=True), count
