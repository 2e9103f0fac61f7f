"""Training on text alone: it learns, repeats itself, and its loss is the models' own."""

import torch
from tiny import example_rows, tiny_llama

from kd_utils.distill.batches import collate
from kd_utils.teacher.preparation import fine_tune, next_token_loss


def test_fine_tuning_learns_and_repeats_itself():
    rows = example_rows([6, 7, 8, 6], vocab=12)
    runs = []
    for _ in range(2):
        model = tiny_llama(seed=2)
        history = fine_tune(
            model,
            rows,
            epochs=12,
            learning_rate=1e-2,
            lr_schedule="linear",
            warmup_ratio=0.05,
            batch_size=2,
            prompt_weight=0.5,
            seed=0,
            autocast=torch.enable_grad,
            device=torch.device("cpu"),
        )
        runs.append((history, model.lm_head.weight.detach()))
    assert runs[0][0][-1]["train_loss"] < 0.2 * runs[0][0][0]["train_loss"]
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])


def test_next_token_loss_equals_the_models_own():
    model, rows = tiny_llama(seed=2), example_rows([6, 9])
    batch = collate(rows)
    labels = batch.input_ids.clone()
    labels[0, 6:] = -100
    with torch.no_grad():
        output = model(batch.input_ids, labels=labels)
        torch.testing.assert_close(next_token_loss(output.logits, batch), output.loss)
