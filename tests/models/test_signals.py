"""Captured signals against eager attention's own, and the logits rebuilt from hidden states."""

from types import SimpleNamespace

import pytest
import torch
from tiny import eager_signals, tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
)

from kd_utils.models.attention_maps import (
    IMPLEMENTATION,
    Attention,
    causal_slice,
    decode_map,
    encode_map,
)
from kd_utils.models.output_head import (
    OutputHead,
    model_logits,
    output_head,
    require_causal,
    require_known_head,
)
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
    class Shifted(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.01 * torch.arange(97)
            return output

    torch.manual_seed(0)
    model, ids = Shifted(tiny_llama().config).eval(), torch.randint(3, 97, (1, 6))
    more = "^Shifted: the output head does more than a matrix product, a bias, scaling and soft-cap"
    with pytest.raises(ValueError, match=f"{more}.*%\\): it cannot be a student[^\n]*$"):
        require_known_head(model, ids)
    with pytest.raises(ValueError, match=f"{more}.*%\\): set teacher_epochs to 0$"):
        require_known_head(model, ids, "set teacher_epochs to 0")
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="^Shifted has no output layer that is one matrix$"):
        output_head(model)


def test_a_model_that_sees_later_tokens_is_refused():
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_attention_heads=4)
    ids = torch.randint(3, 97, (2, 9))
    for decoder in (False, True):
        model = BertLMHeadModel(BertConfig(**sizes, num_hidden_layers=2, is_decoder=decoder)).eval()
        if decoder:
            assert require_causal(model, ids).shape == (2, 9, 97)
        else:
            with pytest.raises(ValueError, match="^BertLMHeadModel sees tokens that come later.*$"):
                require_causal(model, ids)


def test_a_probe_is_short_and_damaged_weights_are_called_so():
    model, ids, widths = tiny_llama(), torch.randint(3, 97, (2, 300)), []
    model.register_forward_pre_hook(
        lambda _, args, options: widths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    assert require_known_head(model, ids) < 1e-6
    assert len(widths) == 2 and max(widths) <= 64  # logits of whole rows would be gigabytes
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="^LlamaForCausalLM gives logits that are not finite.*$"):
        require_known_head(model, ids)


def test_what_has_another_shape_is_told_and_not_indexed():
    class Last(LlamaForCausalLM):
        """It gives the last position's logits, whatever it is asked for."""

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits[:, -1:]
            return output

    ids = torch.tensor([[3, 4, 5]])
    wrong = r"^Last: the logits has the shape \(1, 1, 97\), expected \(1, 3, 97\): choose another"
    with pytest.raises(ValueError, match=wrong):
        model_logits(Last(tiny_llama().config).eval(), ids)
    model = tiny_llama()
    model.model.norm = torch.nn.Flatten()
    wrong = r"^LlamaForCausalLM: the final hidden state has the shape \(1, 96\), expected .*any\)"
    with pytest.raises(ValueError, match=f"{wrong}$"):
        forward_signals(model, ids)
    with pytest.raises(ValueError, match=f"{wrong}: it cannot be a student.*$"):
        model.lm_head = torch.nn.Flatten(0, 1)  # never mind the logits
        model.forward = lambda **_: SimpleNamespace(logits=torch.ones(1, 3, 97))
        require_known_head(model, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_with_a_bias_gives_the_models_logits(dtype):
    model, ids = tiny_llama(), torch.randint(3, 97, (2, 6))
    model.lm_head = torch.nn.Linear(32, 97)
    model = model.to(dtype)
    assert require_known_head(model, ids) == 0  # one operation: bfloat16 is rounded once
    head, hidden = output_head(model), forward_signals(model, ids).hidden
    assert head.bias is model.lm_head.bias and head.is_plain
    assert torch.equal(head.logits(hidden), model(ids).logits)


def test_attention_sinks_have_no_maps_and_everything_else():
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
    model, ids = GptOssForCausalLM(config).eval(), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(ids).logits
        assert require_known_head(model, ids) < 1e-6
        with pytest.raises(
            ValueError, match="^GptOssAttention uses attention sinks.*'black_box'.*$"
        ):
            forward_signals(model, ids, map_layers=[2])
        assert torch.equal(model(ids).logits, before)  # it attends as it did


def test_maps_that_the_model_does_not_attend_with_are_refused():
    """DeepSeek V3.2 picks a few keys for each query, and only its own attention knows them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v32",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_head_dim=8,
        index_n_heads=2,
        index_topk=3,
        initializer_range=0.2,
    )
    model, ids = AutoModelForCausalLM.from_config(config).train(), torch.randint(3, 97, (2, 12))
    with pytest.raises(ValueError, match="^DeepseekV32ForCausalLM computes attention .*'top_k'$"):
        forward_signals(model, ids, map_layers=[2])
    assert model.config._attn_implementation != IMPLEMENTATION
    assert all(module.training for module in model.modules())
    assert require_known_head(model.eval(), ids) < 1e-6


def test_large_scores_are_no_reason_to_refuse_maps():
    """Scores of some hundreds, as of trained models, which bfloat16 rounds by one and more."""
    model, ids = tiny_llama(seed=1), torch.arange(3, 20)[None]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)
            layer.self_attn.k_proj.weight.mul_(40)
    with torch.autocast("cpu", torch.bfloat16):
        found = forward_signals(model, ids, map_layers=[1, 2]).attentions[1]
    assert (found.query[:, :1].float() @ found.key[:, :1].float().mT).abs().max() > 256


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
