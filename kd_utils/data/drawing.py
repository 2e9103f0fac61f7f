"""Which rows are drawn: in the order of a hash, without duplicates, few-shot rows and long ones."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pandas as pd

from kd_utils.config import project_paths, stages
from kd_utils.data import leakage, prepared_data, task_rows, tasks
from kd_utils.records import provenance
from kd_utils.tokens.encoding import encode_example, tokenizer_fingerprint


def prepare(config: stages.DataConfig, tokenizer: Any) -> prepared_data.PreparedData:
    """Draw the training, held-out and validation examples that the config asks for.

    Rows are taken in the order of a hash of `data_seed` and content, so an example's place depends
    neither on the counts nor on other rows. Validation takes from the front; training takes from
    the front of its own split, or from the back where both come from one split; held-out rows are
    those that follow the training rows. Examples with the content of an earlier one are dropped
    (between validation and training: from training), and so are those with the content of a
    few-shot row and those with more than `max_length` tokens, which are never cut. Of each task the
    first training rows have a label, so that fewer labels are some of those of more.

    Raises:
        ValueError: an unknown task, fewer rows than asked for, or no row that fits `max_length`.
    """
    known = [tasks.find_task(name) for name in tasks.task_order(config.tasks)]
    for name in config.labelled_tasks - config.tasks:
        tasks.find_task(name)  # a name that is no task's would leave its task all its labels
    # Taken before anything is read: a file that changes meanwhile must not count as the one read.
    made_from = prepared_data.ingredients(config)
    provenance.require_loaded(made_from["code"])
    drawn: dict[str, list[tuple[pd.DataFrame, dict[str, Any]]]] = {
        split: [] for split in prepared_data.SPLITS
    }
    for task in known:
        taken: set[str] = set()  # contents that training and held-out rows must not have
        for splits in (("validation",), ("train", "held_out")):
            asked = {split: config.rows(split).get(task.name, 0) for split in splits}
            for split, rows, count in _draw(config, tokenizer, task, asked, taken):
                taken |= set(task_rows.content_keys(rows))
                drawn[split].append((rows, count))
    tables = {
        split: pd.concat([rows for rows, _ in parts], ignore_index=True)
        for split, parts in drawn.items()
    }
    place, labels = tables["train"].groupby("task").cumcount(), tables["train"]["task"]
    tables["train"]["labelled"] = place < labels.map(config.labels)
    return prepared_data.PreparedData(
        **tables,
        counts=pd.DataFrame([count for parts in drawn.values() for _, count in parts]),
        config_fingerprint=config.fingerprint(),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        made_from=made_from,
    )


def _draw(
    config: stages.DataConfig,
    tokenizer: Any,
    task: tasks.Task,
    asked: dict[str, int],
    taken: set[str],
) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Each split with its rows and its line of the counts.

    Args:
        asked: rows of each of the splits that come from one source, the first of the order first.
        taken: contents of the rows that were drawn before.
    """
    source = task.splits[next(iter(asked))]
    data_dir = project_paths.project_path(config.data_dir) if config.data_dir else None
    table = task_rows.load_task(task.name, source, data_dir=data_dir)
    keys = task_rows.content_keys(table)
    repeated, barred = keys.duplicated(), keys.duplicated() | keys.isin(taken)
    few_shot = task_rows.content_keys(leakage.few_shot_rows(config.data_dir, [task.name]))
    shot = keys.isin(set(few_shot)) & ~barred
    # All splits from one source: rows of validation are no duplicates of themselves.
    shared_source = "train" in asked and source == task.splits["validation"]
    order = keys[~barred & ~shot].map(
        lambda key: hashlib.sha256(f"{config.data_seed}:{key}".encode()).hexdigest()
    )
    indices = iter(order.sort_values(ascending=not shared_source).index)
    used = 0
    for split, wanted in asked.items():
        chosen: dict[Any, tuple[int, int]] = {}  # row -> tokens of the whole, and of the answer
        long: list[int] = []
        while len(chosen) < wanted and (index := next(indices, None)) is not None:
            example = table.loc[index]
            prompt_ids, answer_ids = encode_example(tokenizer, example["prompt"], example["answer"])
            length = len(prompt_ids) + len(answer_ids)
            if length > config.max_length:
                long.append(length)
            else:
                chosen[index] = length, len(answer_ids)
        if long and not chosen and not used:
            raise ValueError(
                f"{task.name}: none of its {len(long)} {split} rows fits max_length = "
                f"{config.max_length} tokens with its whole answer (the longest has {max(long)}, "
                f"the shortest {min(long)}): set max_length to at least {min(long)}, better "
                f"{max(long)}"
            )
        if len(chosen) < wanted:
            in_training, remedy = "", f"{task.name} in {split}_rows"
            if split == "held_out":
                in_training = f"{used} are in training, "
                remedy = f"held_out_rows, or {task.name} in train_rows"
            raise ValueError(
                f"{split}_rows asks for {task.name}:{wanted}, but there are {len(chosen)} "
                f"({source} has {len(table)} rows, of which {int(barred.sum())} are duplicates or "
                f"in validation, {in_training}{int(shot.sum())} are few-shot rows and {len(long)} "
                f"longer than max_length): lower {remedy}"
            )
        if not wanted:
            continue
        used += len(chosen)
        tokens = pd.DataFrame(chosen.values(), columns=["tokens", "answer"])
        count = {
            "task": task.name,
            "split": split,
            "source": source,
            "available": len(table),
            "duplicates": int((repeated if shared_source else barred).sum()),
            "shots": int(shot.sum()),
            "too_long": len(long),
            "taken": len(chosen),
            "mean_tokens": round(float(tokens["tokens"].mean()), 1),
            "max_tokens": int(tokens["tokens"].max()),
            "mean_answer_tokens": round(float(tokens["answer"].mean()), 1),
        }
        yield split, table.loc[list(chosen)].drop(columns="row").reset_index(drop=True), count
