"""Captured signals against eager attention's own, and the logits rebuilt from hidden states."""

import pytest
import torch
from tiny import tiny_llama

from kd_utils.signals import (Attention, attention_map, capture_layer, causal_slice, decode_map, encode_map,
                              forward_signals, lm_head_weight, require_linear_head)


def eager_map(model, input_ids, attention_mask=None):
    model.set_attn_implementation("eager")
    output = model(input_ids=input_ids, attention_mask=attention_mask, output_attentions=True,
                   output_hidden_states=True)
    return output.attentions[-1], output.hidden_states[-1]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_map_and_hidden_equal_eager(kv_heads):
    model, ids = tiny_llama(kv_heads=kv_heads, layers=3), torch.randint(3, 97, (2, 11))
    with torch.no_grad():
        signals = forward_signals(model, ids)
        maps, hidden = eager_map(model, ids)
    torch.testing.assert_close(signals.attention.map(), maps, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(signals.hidden, hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_with_a_mask_equals_eager(side):
    model, ids = tiny_llama(), torch.randint(3, 97, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.int64)
    padded = slice(0, 4) if side == "left" else slice(5, 9)
    mask[1, padded] = 0
    with torch.no_grad():
        signals = forward_signals(model, ids, mask)
        maps, hidden = eager_map(model, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(signals.hidden[real], hidden[real], atol=1e-5, rtol=1e-5)
    for b in range(2):  # rows of padded queries mean nothing, in either implementation
        torch.testing.assert_close(signals.attention.map()[b][:, real[b]], maps[b][:, real[b]], atol=1e-6, rtol=1e-5)


def test_right_padding_needs_no_mask():
    model, ids = tiny_llama(), torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        padded, alone = forward_signals(model, ids), forward_signals(model, ids[1:, :5])
    torch.testing.assert_close(padded.hidden[1, :5], alone.hidden[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded.attention.map()[1, :, :5, :5], alone.attention.map()[0], atol=1e-6, rtol=1e-5)


def test_sliding_window_is_in_the_map():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                             num_attention_heads=4, num_key_value_heads=2, sliding_window=3)).eval()
    ids = torch.randint(0, 50, (2, 10))
    with torch.no_grad():
        signals = forward_signals(model, ids)
        maps, _ = eager_map(model, ids)
    assert signals.attention.map()[0, 0, 9, 2] == 0
    torch.testing.assert_close(signals.attention.map(), maps, atol=1e-6, rtol=1e-5)


def test_gradient_through_the_map_equals_eager():
    ids, gradients = torch.randint(3, 97, (2, 7)), []
    for capture in (True, False):
        model = tiny_llama()
        maps = forward_signals(model, ids).attention.map() if capture else eager_map(model, ids)[0]
        maps.square().sum().backward()
        gradients.append(model.model.layers[-1].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_no_map_is_kept_or_computed_when_not_asked_for():
    model = tiny_llama()
    assert forward_signals(model, torch.tensor([[3, 4]]), want_map=False).attention is None
    forward_signals(model, torch.tensor([[3, 4]]))
    layer = capture_layer(model)
    assert layer.kept is None and layer.layer_idx == 1
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_map_rows_sum_to_one_and_hidden_rows_are_zero():
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(attention_map(query, key, None, 0.3).sum(-1), torch.ones(1, 4, 5))
    hidden_row = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    hidden_row[0, 0, 0] = False
    assert attention_map(query, key, hidden_row, 0.3)[0, :, 0].abs().max() == 0


def test_hidden_times_head_is_the_logits():
    model, ids = tiny_llama(), torch.randint(3, 97, (2, 6))
    with torch.no_grad():
        assert require_linear_head(model, ids) < 1e-6
        hidden = forward_signals(model, ids).hidden
        torch.testing.assert_close(hidden @ lm_head_weight(model).T, model(ids).logits)


def test_a_head_that_scales_its_logits_is_refused():
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                             num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0)).eval()
    ids = torch.randint(0, 50, (1, 6))
    with pytest.raises(ValueError, match="more than a matrix product.*top_k"):
        require_linear_head(model, ids)


@pytest.mark.parametrize("window", [None, 3])
def test_one_examples_rows_are_those_of_the_whole_map(window):
    query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    mask = None if window is None else torch.ones(7, 7, dtype=torch.bool).tril().triu(1 - window)[None, None]
    attention = Attention(query, key, mask, 0.3)
    for b, first, last in ((0, 0, 7), (1, 0, 5), (1, 3, 6)):
        whole = attention.map()[b, :, first:last, :last]
        torch.testing.assert_close(attention.example(b, first, last).map()[0], whole)


def test_encoded_map_by_hand():
    rows = torch.tensor([[[1.0, 0, 0], [0.75, 0.25, 0], [0.04, 0.36, 0.6]]])
    assert encode_map(rows, torch.float16).tolist() == [pytest.approx([1, 0.75, 0.25, 0.04, 0.36, 0.6], abs=1e-3)]
    assert encode_map(rows, torch.uint8).tolist() == [[255, 221, 128, 51, 153, 198]]  # 255 sqrt(p)
    packed = encode_map(rows, torch.float16)
    assert causal_slice(0, 3) == (0, 6) and causal_slice(1, 2) == (1, 3)
    assert decode_map(packed[:, 1:3], 1, 2).tolist() == [[[0.75, 0.25]]]
    assert decode_map(packed[:, 1:6], 1, 3).shape == (1, 2, 3) and decode_map(packed[:, 1:6], 1, 3)[0, 0, 2] == 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-4), (torch.uint8, 8e-3)])
def test_a_map_comes_back_from_its_code(dtype, tolerance):
    torch.manual_seed(0)
    for scale in (0.0, 1.0, 5.0):  # flat rows too: each entry is rounded the same way, and their sum is mended
        rows = (scale * torch.randn(4, 60, 60)).masked_fill(torch.ones(60, 60).triu(1).bool(), -torch.inf).softmax(-1)
        back = decode_map(encode_map(rows, dtype), 0, 60)
        assert (back - rows).norm() / rows.norm() < tolerance
        torch.testing.assert_close(back.sum(-1), torch.ones(4, 60), atol=2e-3, rtol=0)
