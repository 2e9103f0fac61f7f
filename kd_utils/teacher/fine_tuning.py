"""Training on text alone, for teachers that know too little and for the models of the toy."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_utils.distill.batches import Batch, collate, epoch_batches
from kd_utils.distill.meter import Mean
from kd_utils.distill.training import loss_terms, seed_step, weighted_sum
from kd_utils.models.output_head import output_head
from kd_utils.models.signals import forward_signals
from kd_utils.tokens.encoding import Example


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of every real token but the first: nats per token of prompt and answer.

    Args:
        logits: (B, T, V) for `batch.input_ids`.
    """
    places = torch.arange(batch.input_ids.shape[1], device=logits.device)
    padding = places[None] >= torch.tensor(batch.lengths, device=logits.device)[:, None]
    labels = batch.input_ids.masked_fill(padding, -100)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )


def fine_tune(
    model: nn.Module,
    examples: list[Example],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    prompt_weight: float,
    seed: int,
    autocast: Callable,
    device: torch.device,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[dict[str, float]]:
    """Train a teacher on text: AdamW, 5 % linear warm-up, then linearly to 0, clipping at 1.0.

    The loss is the task loss on the answers plus `prompt_weight` times the next-token loss over
    prompt and answer, since a model with random weights must learn to read the prompts too.

    Returns:
        A row per epoch: `epoch`, `train_loss` (nats per answer token), `next_token_loss`.
    """
    plan = [
        (epoch, batch)
        for epoch in range(epochs)
        for batch in epoch_batches([len(row.tokens) for row in examples], batch_size, seed, epoch)
    ]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True
    )
    warmup = max(len(plan) // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (len(plan) - step) / max(len(plan) - warmup, 1)),
    )
    means = [Mean() for _ in range(epochs)]
    model.train()
    for step, (epoch, indices) in enumerate(progress(plan)):
        seed_step(seed, step)
        batch = collate([examples[i] for i in indices], device=device)
        with autocast():
            signals = forward_signals(model, batch.input_ids, want_map=False)
            terms = loss_terms(signals, output_head(model), batch=batch, terms=("task",))
            if prompt_weight:
                terms["next_token"] = next_token_loss(
                    output_head(model).logits(signals.hidden), batch
                )
        weighted_sum(terms, {"task": 1.0, "next_token": prompt_weight}).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        means[epoch].add(terms, 1)
    model.eval()
    results = [mean.result() for mean in means]
    names = {"task": "train_loss", "next_token": "next_token_loss"}
    return [
        {"epoch": epoch, **{names[key]: value for key, value in result.items()}}
        for epoch, result in enumerate(results, 1)
    ]
