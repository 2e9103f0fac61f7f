"""Bits per byte: against a loop, and against the entropy of counts."""

import math

import numpy as np
import pytest
import torch
from tiny import example_rows, tiny_llama

from kd_utils.evaluation import text
from kd_utils.evaluation.footprint import tokens_per_second

ROWS = example_rows([9, 5, 12, 7, 5] * 9)


def test_bits_are_those_of_a_loop_over_rows_and_tokens():
    model = tiny_llama().eval()
    nats = 0.0
    for row in ROWS:
        with torch.no_grad():
            log_p = model(torch.tensor(row.tokens[None])).logits[0].log_softmax(-1)
        nats -= sum(log_p[t - 1, row.tokens[t]].item() for t in range(1, len(row.tokens)))
    found = text.bits_per_byte(model, ROWS, size=1000)
    assert found == pytest.approx(nats / math.log(2) / 1000, rel=1e-5)


def test_the_unigram_model_knows_frequencies_alone():
    rows = example_rows([3, 3])
    rows[0].tokens, rows[1].tokens = np.array([3, 4, 4]), np.array([4, 4, 5])
    # Counted once more: 0, 1, 2 once each, 3 twice, 4 five times, 5 twice; 12 in all.
    expected = -(3 * math.log2(5 / 12) + math.log2(2 / 12))
    assert text.unigram_bits_per_byte(rows, rows, size=2) == pytest.approx(expected / 2)


def test_a_token_that_training_does_not_have_has_a_finite_price():
    seen, new = example_rows([3]), example_rows([3])
    seen[0].tokens, new[0].tokens = np.array([3, 4, 4]), np.array([3, 9, 4])
    assert math.isfinite(text.unigram_bits_per_byte(seen, new, size=1))


def test_speed_counts_real_tokens(monkeypatch):
    ticks = iter([0.0, 0.0, 1.0, 1.0, 1.5, 1.5, 2.5, 2.5] + [99.0] * 9)
    monkeypatch.setattr("kd_utils.evaluation.footprint.time.perf_counter", lambda: next(ticks))
    rows = example_rows([4, 6])
    # The first pass warms up; the fastest of the others took half a second.
    assert tokens_per_second(tiny_llama().eval(), rows, seconds=0.0) == pytest.approx(10 / 0.5)
