"""Captured signals against eager attention's own, and the logits rebuilt from hidden states."""

import pytest
import torch
from tiny import eager_signals, tiny_llama

from kd_utils.models.attention_maps import Attention, causal_slice, decode_map, encode_map
from kd_utils.models.output_head import OutputHead, output_head, require_known_head
from kd_utils.models.signals import attention_module, decoder_layers, forward_signals


def eager_map(*inputs):
    """Eager attention's map of the last layer, and its final hidden state."""
    maps, hidden = eager_signals(*inputs)
    return maps[-1], hidden[-1]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_map_and_hidden_equal_eager(kv_heads):
    model, ids = tiny_llama(kv_heads=kv_heads, layers=3), torch.randint(3, 97, (2, 11))
    with torch.no_grad():
        signals = forward_signals(model, ids, map_layers=[3])
        maps, hidden = eager_map(model, ids)
    torch.testing.assert_close(signals.attentions[3].map(), maps, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(signals.hidden, hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_with_a_mask_equals_eager(side):
    model, ids = tiny_llama(), torch.randint(3, 97, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.int64)
    padded = slice(0, 4) if side == "left" else slice(5, 9)
    mask[1, padded] = 0
    with torch.no_grad():
        signals = forward_signals(model, ids, mask, map_layers=[2])
        maps, hidden = eager_map(model, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(signals.hidden[real], hidden[real], atol=1e-5, rtol=1e-5)
    for b in range(2):  # rows of padded queries mean nothing, in either implementation
        torch.testing.assert_close(
            signals.attentions[2].map()[b][:, real[b]], maps[b][:, real[b]], atol=1e-6, rtol=1e-5
        )


def test_right_padding_needs_no_mask():
    model, ids = tiny_llama(), torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        padded = forward_signals(model, ids, map_layers=[2])
        alone = forward_signals(model, ids[1:, :5], map_layers=[2])
    torch.testing.assert_close(padded.hidden[1, :5], alone.hidden[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        padded.attentions[2].map()[1, :, :5, :5], alone.attentions[2].map()[0], atol=1e-6, rtol=1e-5
    )


def test_sliding_window_is_in_the_map():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=3,
        )
    ).eval()
    ids = torch.randint(0, 50, (2, 10))
    with torch.no_grad():
        signals = forward_signals(model, ids, map_layers=[2])
        maps, _ = eager_map(model, ids)
    assert signals.attentions[2].map()[0, 0, 9, 2] == 0
    torch.testing.assert_close(signals.attentions[2].map(), maps, atol=1e-6, rtol=1e-5)


def test_gradient_through_the_map_equals_eager():
    ids, gradients = torch.randint(3, 97, (2, 7)), []
    for capture in (True, False):
        model = tiny_llama()
        if capture:
            maps = forward_signals(model, ids, map_layers=[2]).attentions[2].map()
        else:
            maps, _ = eager_map(model, ids)
        maps.square().sum().backward()
        gradients.append(model.model.layers[-1].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_no_map_is_kept_or_computed_when_not_asked_for():
    model = tiny_llama()
    signals = forward_signals(model, torch.tensor([[3, 4]]))
    assert signals.attentions == {} and signals.layers == {2: signals.hidden}
    forward_signals(model, torch.tensor([[3, 4]]), map_layers=[2])
    assert attention_module(decoder_layers(model)[1]).keep is None
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_named_layers_are_kept_and_no_others():
    model, ids = tiny_llama(layers=3), torch.randint(3, 97, (2, 7))
    signals = forward_signals(model, ids, hidden_layers=(1, 3), map_layers=(2, 1))
    assert signals.layers.keys() == {1, 3} and signals.attentions.keys() == {1, 2}
    assert signals.layers[3] is signals.hidden


@pytest.mark.parametrize(
    "asked",
    [{"hidden_layers": [0]}, {"hidden_layers": [1, 3]}, {"map_layers": [3]}, {"map_layers": [-1]}],
)
def test_a_layer_that_does_not_exist_is_named(asked):
    number = list(*asked.values())[-1]
    with pytest.raises(
        ValueError, match=f"^layer {number}: LlamaForCausalLM has 2 layers, numbered from 1$"
    ):
        forward_signals(tiny_llama(), torch.tensor([[3, 4]]), **asked)


def test_nothing_stays_behind_when_the_pass_fails():
    model = tiny_llama()
    with pytest.raises(IndexError):
        forward_signals(
            model, torch.tensor([[3, 97]]), hidden_layers=[1], map_layers=[1, 2]
        )  # no such token

    def fails(*_):
        raise RuntimeError("late")

    late = model.model.norm.register_forward_hook(fails)  # by then both layers have run
    with pytest.raises(RuntimeError, match="late"):
        forward_signals(model, torch.tensor([[3, 4]]), hidden_layers=[1], map_layers=[1, 2])
    late.remove()
    for layer in decoder_layers(model):
        assert not layer._forward_hooks
        assert attention_module(layer).keep is None


def test_map_rows_sum_to_one_and_hidden_rows_are_zero():
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(Attention(query, key, None, 0.3).map().sum(-1), torch.ones(1, 4, 5))
    hidden_row = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    hidden_row[0, 0, 0] = False
    assert Attention(query, key, hidden_row, 0.3).map()[0, :, 0].abs().max() == 0


def test_hidden_times_head_is_the_logits():
    model, ids = tiny_llama(), torch.randint(3, 97, (2, 6))
    with torch.no_grad():
        assert require_known_head(model, ids) < 1e-6
        hidden, head = forward_signals(model, ids).hidden, output_head(model)
        torch.testing.assert_close(head.logits(hidden), model(ids).logits)
        assert torch.equal(head.logits(hidden), hidden @ model.lm_head.weight.T)
    assert head.slope(torch.ones(3)) == 1.0


@pytest.mark.parametrize("scale, cap", [(1.0, None), (0.25, None), (1.0, 2.0), (0.5, 3.0)])
def test_a_heads_slope_is_autograds(scale, cap):
    head = OutputHead(torch.eye(4), scale, cap)
    hidden = torch.tensor(
        [[-3.0, -0.5, 0.25, 4.0]], requires_grad=True
    )  # the identity's u is h itself
    logits = head.logits(hidden)
    logits.sum().backward()
    torch.testing.assert_close(torch.ones_like(logits) * head.slope(logits.detach()), hidden.grad)


def test_a_capped_head_by_hand():
    logits = OutputHead(torch.eye(2), 0.5, 3.0).logits(torch.tensor([[6.0, -60.0]]))
    torch.testing.assert_close(logits, torch.tensor([[2.284782, -3.0]]))  # 3 tanh(1), 3 tanh(-10)


def test_a_head_that_does_something_unknown_is_refused():
    from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM, LlamaForCausalLM

    class Shifted(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.01 * torch.arange(97)
            return output

    torch.manual_seed(0)
    ids = torch.randint(3, 97, (1, 6))
    multiplies = HyperCLOVAXConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        logits_scaling=8.0,
    )  # Granite's name for another operation
    for model in (Shifted(tiny_llama().config).eval(), HyperCLOVAXForCausalLM(multiplies).eval()):
        with pytest.raises(
            ValueError,
            match="^[^\n]*more than a matrix product, scaling and soft-capping .*set signals to "
            ".top_k.*$",
        ):
            require_known_head(model, ids)


def test_a_head_with_a_bias_is_refused():
    model = tiny_llama()
    model.lm_head = torch.nn.Linear(32, 97)
    with pytest.raises(ValueError, match="lm_head has a bias: as a teacher, set signals to .top_k"):
        output_head(model)


def test_attention_sinks_are_refused():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    with pytest.raises(ValueError, match="^GptOssAttention uses attention sinks.*top_k.*$"):
        forward_signals(GptOssForCausalLM(config).eval(), torch.tensor([[3, 4]]))


def test_a_soft_capped_map_by_hand():
    query = torch.tensor(
        [[[[1.0], [2.0]]]]
    )  # scores of the second row: 2, 8; scaled by 0.5: 1, 4; capped at 2
    attention = Attention(query, torch.tensor([[[[1.0], [4.0]]]]), None, 0.5, 2.0)
    capped = 2 * torch.tensor([[0.5, 2.0]]).tanh()
    torch.testing.assert_close(attention.map()[0, 0, 1:], capped.softmax(-1))
    assert attention.map()[0, 0, 0].tolist() == [1, 0]


@pytest.mark.parametrize("window, softcap", [(None, None), (3, None), (None, 0.5), (3, 0.5)])
def test_one_examples_rows_are_those_of_the_whole_map(window, softcap):
    query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    mask = (
        None
        if window is None
        else torch.ones(7, 7, dtype=torch.bool).tril().triu(1 - window)[None, None]
    )
    attention = Attention(query, key, mask, 0.3, softcap)
    for b, first, last in ((0, 0, 7), (1, 0, 5), (1, 3, 6)):
        whole = attention.map()[b, :, first:last, :last]
        torch.testing.assert_close(attention.example(b, first, last).map()[0], whole)


def test_encoded_map_by_hand():
    rows = torch.tensor([[[1.0, 0, 0], [0.75, 0.25, 0], [0.04, 0.36, 0.6]]])
    assert encode_map(rows, torch.float16).tolist() == [
        pytest.approx([1, 0.75, 0.25, 0.04, 0.36, 0.6], abs=1e-3)
    ]
    assert encode_map(rows, torch.uint8).tolist() == [[255, 221, 128, 51, 153, 198]]  # 255 sqrt(p)
    packed = encode_map(rows, torch.float16)
    assert causal_slice(0, 3) == (0, 6) and causal_slice(1, 2) == (1, 3)
    assert decode_map(packed[:, 1:3], 1, 2).tolist() == [[[0.75, 0.25]]]
    assert (
        decode_map(packed[:, 1:6], 1, 3).shape == (1, 2, 3)
        and decode_map(packed[:, 1:6], 1, 3)[0, 0, 2] == 0
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-4), (torch.uint8, 8e-3)])
def test_a_map_comes_back_from_its_code(dtype, tolerance):
    torch.manual_seed(0)
    for scale in (
        0.0,
        1.0,
        5.0,
    ):  # flat rows too: each entry is rounded the same way, and their sum is mended
        rows = (
            (scale * torch.randn(4, 60, 60))
            .masked_fill(torch.ones(60, 60).triu(1).bool(), -torch.inf)
            .softmax(-1)
        )
        back = decode_map(encode_map(rows, dtype), 0, 60)
        assert (back - rows).norm() / rows.norm() < tolerance
        torch.testing.assert_close(back.sum(-1), torch.ones(4, 60), atol=2e-3, rtol=0)
