"""The teacher's weights: as they are in their folder or on the hub, or fine-tuned on text first."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from kd_utils.cache import manifest
from kd_utils.config import project_paths, stages
from kd_utils.distill import batches, meter, schedules, training
from kd_utils.evaluation import readiness
from kd_utils.models import devices, loading, output_head, signals
from kd_utils.models.signal_kinds import kinds_of
from kd_utils.records.arithmetic import arithmetic
from kd_utils.records.provenance import Ingredients
from kd_utils.store import files, locks, sealed
from kd_utils.tokens.encoding import Example, right_padded

#: Parameters of 02 that decide a fine-tuned teacher.
TUNING = {
    "teacher_epochs",
    "teacher_labels",
    "teacher_learning_rate",
    "teacher_lr_schedule",
    "teacher_warmup_ratio",
    "teacher_batch_size",
    "teacher_prompt_weight",
    "teacher_seed",
    "precision",
}


def tuning_rows(
    config: stages.CacheConfig, train: pd.DataFrame, examples: list[Example]
) -> list[Example]:
    """The training rows that the teacher may be fine-tuned on, as `teacher_labels` says.

    Args:
        train: `PreparedData.train`; examples: the same rows as tokens, with their own answers.

    Raises:
        ValueError: there are none.
    """
    pairs = zip(examples, train["labelled"], strict=True)
    rows = [row for row, labelled in pairs if labelled or config.teacher_labels == "all"]
    if not rows and config.teacher_epochs:
        raise ValueError(
            "teacher_labels = 'labelled', but no training row has a label: set labelled in 01 "
            "above 0, teacher_labels to 'all', or teacher_epochs to 0"
        )
    return rows


def prepare_teacher(
    config: stages.CacheConfig,
    train: list[Example],
    data_hash: str,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[str, pd.DataFrame]:
    """Fine-tune the teacher on the training rows if `teacher_epochs` is above 0.

    A fine-tuned teacher is kept in `artifacts/teachers/NAME-DIGEST`. It is used again while nothing
    that it was made from changes, and no byte of it.

    Args:
        train: the rows to train on, as tokens (`tuning_rows`).
        data_hash: of the prepared data.
        progress: wraps the list of steps, e.g. `tqdm`.

    Returns:
        The teacher's name, relative to the project's root if it is a folder, and the table of
        `fine_tune`, a row per epoch.

    Raises:
        ValueError: another process is fine-tuning this teacher.
    """
    if config.teacher_epochs == 0:
        return config.teacher, pd.DataFrame({"epoch": [], "train_loss": []})
    made_from = Ingredients(
        teacher={"weights": loading.model_fingerprint(config.teacher, config.teacher_revision)},
        data={"rows": data_hash},
        config=config.model_dump(include=TUNING),
        code=manifest.cache_code(),
    )
    name = f"{config.artifacts_dir}/teachers/{config.name}-{made_from.digest}"
    folder = sealed.SealedFolder(project_paths.project_path(name), "fine_tuning.json")
    # The lock is beside the folder, which is replaced as a whole.
    with locks.locked(folder.path.with_name(f".{folder.path.name}.lock"), "a fine-tuning run"):
        files.remove_leftovers(folder.path)
        try:
            history = folder.check()["history"]
        except sealed.RecordError:
            tokenizer = loading.load_tokenizer(config.teacher, config.teacher_revision)
            device = devices.choose_device(config.device)
            model = loading.load_causal_lm(config.teacher, config.teacher_revision).to(device)
            readiness.require_ready(model, tokenizer, {"train": train})
            probe = torch.from_numpy(right_padded(train[:8])[0]).to(device)
            also = " and signals to 'top_k'" * ("hidden" in kinds_of(config.signals))
            output_head.require_known_head(model, probe, f"set teacher_epochs to 0{also}")
            history = fine_tune(
                model,
                train,
                epochs=config.teacher_epochs,
                learning_rate=config.teacher_learning_rate,
                lr_schedule=config.teacher_lr_schedule,
                warmup_ratio=config.teacher_warmup_ratio,
                batch_size=config.teacher_batch_size,
                prompt_weight=config.teacher_prompt_weight,
                seed=config.teacher_seed,
                autocast=lambda: devices.autocast(device, config.precision),
                device=device,
                progress=progress,
            )
            about = {"history": history, "arithmetic": arithmetic(device.type)}
            with folder.replaced(about) as aside:
                loading.write_model(model, tokenizer, aside)
    return name, pd.DataFrame(history)


def fine_tune(
    model: torch.nn.Module,
    examples: list[Example],
    *,
    epochs: int,
    learning_rate: float,
    lr_schedule: str,
    warmup_ratio: float,
    batch_size: int,
    prompt_weight: float,
    seed: int,
    autocast: Callable,
    device: torch.device,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[dict[str, float]]:
    """Train a model on text: AdamW, a schedule of `schedules.learning_rate`, clipping at 1.0.

    The loss is the task loss on the answers plus `prompt_weight` times the next-token loss over
    prompt and answer, since a model with random weights must learn to read the prompts too.

    Returns:
        A row per epoch: `epoch`, `train_loss` (nats per answer token), `next_token_loss`.
    """
    lengths = [len(row.tokens) for row in examples]
    plan = [
        (epoch, batch)
        for epoch in range(epochs)
        for batch in batches.epoch_batches(lengths, batch_size, seed, epoch)
    ]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True
    )
    schedule = schedules.learning_rate(optimizer, lr_schedule, len(plan), warmup_ratio)
    means = [meter.Mean() for _ in range(epochs)]
    model.train()
    for step, (epoch, indices) in enumerate(progress(plan)):
        training.seed_step(seed, step)
        batch = batches.collate([examples[i] for i in indices], device=device)
        with autocast():
            captured = signals.forward_signals(model, batch.input_ids)
            head = output_head.output_head(model)
            terms = training.loss_terms(captured, head, batch=batch, terms=("task",))
            if prompt_weight:
                terms["next_token"] = next_token_loss(head.logits(captured.hidden), batch)
        training.weighted_sum(terms, {"task": 1.0, "next_token": prompt_weight}).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        means[epoch].add(terms, 1)
    model.eval()
    names = {"task": "train_loss", "next_token": "next_token_loss"}
    return [
        {"epoch": epoch, **{names[key]: value for key, value in mean.result().items()}}
        for epoch, mean in enumerate(means, 1)
    ]


def next_token_loss(logits: torch.Tensor, batch: batches.Batch) -> torch.Tensor:
    """Cross-entropy of every real token but the first, from (B, T, V) logits: nats per token."""
    places = torch.arange(batch.input_ids.shape[1], device=logits.device)
    lengths = devices.to_device(np.array(batch.lengths), logits.device)
    padding = places[None] >= lengths[:, None]
    labels = batch.input_ids.masked_fill(padding, -100)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )
