"""The sizes of a model, against sums by hand."""

import pytest
from tiny import example_rows, tiny_llama

from kd_utils.evaluation.footprint import footprint

ROWS = example_rows([6, 10])  # 8 tokens on average


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_weights(tied):
    model = tiny_llama(layers=3, width=32, heads=4, kv_heads=2, vocab=97, tie_word_embeddings=tied)
    found = footprint(model, ROWS)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    body = 3 * layer + 32
    embeddings = 97 * 32 * (1 if tied else 2)
    assert found["non_embedding"] == body
    assert found["parameters"] == body + embeddings == model.num_parameters()
    assert found["bytes"] == 4 * found["parameters"]
    # Queries times keys and weights times values, over 4 of 8 positions on average.
    attention = 3 * 2 * 2 * 4 * 8 * 4
    assert found["flops_per_token"] == 2 * (body + 97 * 32) + attention
    assert found["state_bytes_per_token"] == 3 * 2 * 2 * 8 * 4


def test_a_head_may_be_wider_than_the_models_share():
    found = footprint(tiny_llama(layers=1, width=32, heads=4, kv_heads=2, head_dim=16), ROWS)
    assert found["state_bytes_per_token"] == 2 * 2 * 16 * 4
    assert footprint(tiny_llama().bfloat16(), ROWS) == footprint(tiny_llama(), ROWS)
