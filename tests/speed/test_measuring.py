"""What the measurements rest on: real lengths, counted work, honest clocks. No time is tested."""

import time

import numpy as np
import pytest
import torch
from tiny import example_rows, tiny_llama

from kd_utils.config.parameter_files import notebook_config
from kd_utils.speed import measuring
from kd_utils.teacher.extraction import signal_function


def test_the_length_mix_is_that_of_the_real_rows(shared):
    from kd_utils.data.drawing import prepare
    from kd_utils.models.loading import load_tokenizer
    from kd_utils.tokens.encoding import encode_example

    tokenizer = load_tokenizer(str(shared / "tokenizers/llama2"))
    few = {
        "train_rows": "sst2=1000 mmlu=200 gsm8k=200",
        "validation_rows": "sst2=1 mmlu=1 gsm8k=1",
        "max_length": 512,
        "data_dir": str(shared / "data"),
        "build": "none",
    }
    train = prepare(notebook_config("01_prepare_data", few), tokenizer).train
    ours = measuring.random_rows(1400, 100)
    for task, rows in train.groupby("task"):
        real = [
            tuple(map(len, encode_example(tokenizer, *pair)))
            for pair in zip(rows["prompt"], rows["answer"])
        ]
        mine = [row for row in ours if row.example_id.startswith(task)]
        assert len(mine) == len(real)
        assert np.mean([len(row.tokens) for row in mine]) == pytest.approx(
            np.mean([p + a for p, a in real]), rel=0.08
        )
        answers = [len(row.tokens) - row.answer_start for row in mine]
        assert np.mean(answers) == pytest.approx(np.mean([a for _, a in real]), rel=0.08)


def test_random_rows_are_of_one_mix_at_every_size():
    few, many = (measuring.random_rows(count, 50, seed=seed) for count, seed in ((70, 0), (700, 1)))
    assert len(few) == 70 and len(many) == 700 and len({row.example_id for row in many}) == 700
    assert sum(len(row.tokens) for row in many) == pytest.approx(
        10 * sum(len(row.tokens) for row in few), rel=0.02
    )
    assert all(0 < row.answer_start < len(row.tokens) and row.tokens.max() < 50 for row in few)


def test_small_has_tinyllamas_proportions():
    for pair in (measuring.SHAPES["small"], measuring.SHAPES["llama2"]):
        student, teacher = pair["student"], pair["teacher"]
        assert (
            teacher["hidden_size"] == 2 * student["hidden_size"]
            and student["num_attention_heads"] == 32
        )
        whole = (
            measuring.forward_multiply_adds(student, [1])
            + student["hidden_size"] * student["vocab_size"]
        )
        assert student["hidden_size"] * student["vocab_size"] / whole == pytest.approx(
            0.06, abs=0.005
        )


def test_multiply_adds_by_hand():
    shape = dict(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=10,
    )
    layer = (
        4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6
    )  # queries; keys and values of one head; output; feed-forward
    assert measuring.forward_multiply_adds(shape, [3]) == 2 * (3 * layer + 2 * 4 * 6)
    task = measuring.multiply_adds(shape, shape, [(3, 1)], ("task",))
    assert task == 3 * (2 * (3 * layer + 2 * 4 * 6) + 40)
    assert measuring.multiply_adds(shape, shape, [(3, 1)], ("task", "kd")) - task == 3 * (
        3 * 40 + 40
    )
    assert (
        measuring.multiply_adds(shape, shape, [(3, 1)], ("task", "hidden", "attention")) - task
        == 3 * 16 * 3 + 3 * 4 * 6
    )
    padded = measuring.multiply_adds(shape, shape, [(3, 1)], ("task", "kd"), padded_to=8)
    assert padded == 3 * (2 * (8 * layer + 2 * 4 * 64) + 40 * 8)


def test_alternate_takes_turns_and_warms_up():
    order = []
    table = measuring.alternate(
        {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.01))}, 3
    )
    assert order == ["a", "b"] * 4 and list(table.columns) == ["a", "b"] and len(table) == 3
    assert (table["b"] >= 0.01).all()


def test_exact_rows_are_the_teachers_own_values():
    teacher, rows = tiny_llama(), example_rows([6, 9])
    for exact, stored in zip(
        measuring.exact_rows(teacher, rows), signal_function(teacher, signals="white_box")(rows)
    ):
        assert exact.signals["hidden"].dtype == exact.signals["attention"].dtype == np.float32
        np.testing.assert_allclose(stored.signals["hidden"], exact.signals["hidden"], atol=2e-3)
        np.testing.assert_allclose(
            stored.signals["attention"], exact.signals["attention"], atol=1e-3
        )


def test_peak_memory_sees_what_was_freed_again():
    assert 90 < measuring.peak_mb(lambda: torch.ones(25 * 2**20)) < 130
    assert measuring.peak_mb(lambda: None) < 20
