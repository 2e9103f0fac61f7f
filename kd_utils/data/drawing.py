"""Which rows are drawn: in the order of a hash, without duplicates, few-shot rows and long ones."""

from __future__ import annotations

import hashlib
from typing import Any

import pandas as pd

from kd_utils.config.project_paths import project_path
from kd_utils.config.stages import TASK_NAMES, DataConfig
from kd_utils.data.leakage import few_shot_rows
from kd_utils.data.prepared_data import (
    SPLITS,
    PreparedData,
    _made_from,
    _require_disjoint,
)
from kd_utils.data.tasks import SOURCES, content_key, load_task
from kd_utils.tokens.encoding import encode_example, tokenizer_fingerprint


def prepare(config: DataConfig, tokenizer: Any) -> PreparedData:
    """Draw the training and validation examples that the config asks for.

    Rows are taken in the order of a hash of `data_seed` and content, so an example's place depends
    neither on the counts nor on other rows: validation takes from the front; training from the
    front of its own split, or from the back where both come from one split. Examples with the
    content of an earlier one are dropped (between the
    splits: from training), and so are those with the content of a few-shot row and those with more
    than `max_length` tokens, never cut.

    Raises:
        ValueError: fewer rows than asked for, no row that fits `max_length`, or a content in both
            splits.
    """
    made_from = _made_from(
        config
    )  # before it is read: a file that changes meanwhile must not count as the one read
    drawn = {split: [] for split in SPLITS}
    counts = []
    for task in TASK_NAMES:
        taken: set[str] = set()  # contents that training must not have
        for split in ("validation", "train"):
            if asked := config.rows(task, split):
                rows, count = _draw(config, tokenizer, task, split, asked, taken)
                taken |= {content_key(task, prompt) for prompt in rows["prompt"]}
                drawn[split].append(rows)
                counts.append(count)
    tables = [pd.concat(drawn[split], ignore_index=True) for split in SPLITS]
    counts = (
        pd.DataFrame(counts).sort_values(["split", "task"], key=_as_listed).reset_index(drop=True)
    )
    _require_disjoint(*tables, "the drawn rows")
    return PreparedData(
        *tables, counts, config.fingerprint(), tokenizer_fingerprint(tokenizer), made_from
    )


def _draw(
    config: DataConfig, tokenizer: Any, task: str, split: str, asked: int, taken: set[str]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """`asked` rows of a task for one split, and their line of the counts."""
    source = SOURCES[task][split]
    table = load_task(
        task, source, data_dir=project_path(config.data_dir) if config.data_dir else None
    )
    keys = pd.Series([content_key(task, prompt) for prompt in table["prompt"]], index=table.index)
    shown = {
        content_key(task, prompt) for prompt in few_shot_rows(config.data_dir, [task])["prompt"]
    }
    duplicate = keys.duplicated() | keys.isin(taken)
    shot = keys.isin(shown) & ~duplicate
    free = ~duplicate & ~shot
    # Both splits from one source: rows of validation are no duplicates of themselves.
    shared_source = split == "train" and source == SOURCES[task]["validation"]
    duplicates = int((keys.duplicated() if shared_source else duplicate).sum())
    order = keys[free].map(
        lambda key: hashlib.sha256(f"{config.data_seed}:{key}".encode()).hexdigest()
    )
    chosen, lengths, long = [], [], []
    for index in order.sort_values(ascending=not shared_source).index:
        if len(chosen) == asked:
            break
        prompt_ids, answer_ids = encode_example(
            tokenizer, table.at[index, "prompt"], table.at[index, "answer"]
        )
        length = len(prompt_ids) + len(answer_ids)
        if length > config.max_length:
            long.append(length)
        else:
            chosen.append(index)
            lengths.append((length, len(answer_ids)))
    why = (
        f"{source} has {len(table)} rows, of which {int(duplicate.sum())} are duplicates or in "
        f"validation, "
        f"{int(shot.sum())} are few-shot rows and {len(long)} longer than max_length"
    )
    _require_enough(task, split, asked, config.max_length, len(chosen), long, why)
    tokens = pd.DataFrame(lengths, columns=["tokens", "answer"])
    count = {
        "task": task,
        "split": split,
        "source": source,
        "available": len(table),
        "duplicates": duplicates,
        "shots": int(shot.sum()),
        "too_long": len(long),
        "taken": len(chosen),
        "mean_tokens": round(float(tokens["tokens"].mean()), 1),
        "max_tokens": int(tokens["tokens"].max()),
        "mean_answer_tokens": round(float(tokens["answer"].mean()), 1),
    }
    return table.loc[chosen].drop(columns="row").reset_index(drop=True), count


def _require_enough(
    task: str, split: str, asked: int, max_length: int, found: int, long: list[int], why: str
) -> None:
    if long and not found:
        raise ValueError(
            f"{task}: none of its {len(long)} {split} rows fits max_length = {max_length} tokens "
            f"with its "
            f"whole answer (the longest has {max(long)}, the shortest {min(long)}): set max_length "
            f"to at "
            f"least {min(long)}, better {max(long)}"
        )
    if found < asked:
        raise ValueError(
            f"{task}_{split} = {asked}, but there are {found} ({why}): lower {task}_{split}"
        )


def _as_listed(column: pd.Series) -> pd.Series:
    """Sort key: tasks and splits in the order in which the project lists them."""
    return column.map({name: place for place, name in enumerate((*TASK_NAMES, *SPLITS))})
