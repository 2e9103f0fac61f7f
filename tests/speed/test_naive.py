"""The naive baseline says the same as the code that is used: otherwise their speeds would not
compare.
"""

import torch
from tiny import all_terms, example_rows, tiny_llama

from kd_utils.distill.batches import collate
from kd_utils.distill.training import loss_terms, weighted_sum
from kd_utils.models.output_head import OutputHead, lm_head_weight, output_head
from kd_utils.models.signals import forward_signals
from kd_utils.speed import naive
from kd_utils.teacher.extraction import signal_function

WEIGHTS = {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}


def test_the_naive_loss_and_its_gradient_are_ours(tmp_path):
    teacher = tiny_llama(width=48, layers=3)
    head = lm_head_weight(teacher).detach()
    for dtype in ("float16", "uint8"):
        rows = list(
            signal_function(teacher, signals="white_box", attention_dtype=dtype)(
                example_rows([9, 5, 14])
            )
        )
        naive.write_rows(tmp_path / "naive.parquet", rows, head, length=20)
        results = []
        for side in ("naive", "ours"):
            student = tiny_llama(seed=1)
            teacher_terms = all_terms(OutputHead(head))
            [projector] = teacher_terms["hidden"].projectors
            if side == "naive":
                student.set_attn_implementation("eager")
                batch = naive.read_batch(tmp_path / "naive.parquet", [0, 1, 2])
                assert batch.maps.shape == (3, 4, 20, 20) and batch.logits.shape == (3, 20, 97)
                terms = naive.loss_terms(student, batch, projector, 2.0)
            else:
                batch = collate(rows)
                terms = loss_terms(
                    forward_signals(student, batch.input_ids),
                    output_head(student),
                    batch=batch,
                    terms=tuple(WEIGHTS),
                    teachers=[teacher_terms],
                )
            weighted_sum(terms, WEIGHTS).backward()
            results.append(
                (terms, [p.grad for p in (*student.parameters(), *projector.parameters())])
            )
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def test_rows_are_read_in_the_order_asked_for(tmp_path):
    teacher = tiny_llama()
    rows = list(signal_function(teacher, signals="white_box")(example_rows([4, 7])))
    naive.write_rows(tmp_path / "naive.parquet", rows, lm_head_weight(teacher).detach(), length=8)
    batch = naive.read_batch(tmp_path / "naive.parquet", [1, 0])
    assert batch.mask.sum(1).tolist() == [7, 4]
    assert batch.labels[1].tolist() == [
        -100,
        -100,
        -100,
        int(rows[0].tokens[3]),
        -100,
        -100,
        -100,
        -100,
    ]
