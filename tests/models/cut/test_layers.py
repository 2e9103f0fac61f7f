"""Some layers of a model as a model of their own: what depends on a layer's number is found."""

import pytest
import torch
from tiny import logits, tiny_llama, tiny_of_family, tiny_tokenizer

from kd_utils.models.cut import layers
from kd_utils.models.cut.layers import keep_layers
from kd_utils.models.loading import load_causal_lm, save_model

KEPT = [0, 2, 5]  # of six
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LLAMA4 = dict(num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=8)
#: What says something by the number of a layer -> the same for the kept ones.
RENUMBERED = {
    "a first number of layers": ("afmoe", dict(EXPERTS, num_dense_layers=3), dict(num_dense_layers=2)),
    "a step": (
        "qwen3_moe",
        dict(EXPERTS, decoder_sparse_step=2),
        dict(decoder_sparse_step=1, mlp_only_layers=[0, 1]),
    ),
    "numbers of layers": ("qwen3_moe", dict(EXPERTS, mlp_only_layers=[1, 2]), dict(mlp_only_layers=[1])),
    "numbers, one a layer": ("llama4_text", dict(LLAMA4, interleave_moe_layer_step=1), dict(moe_layers=[0, 1, 2])),
    "numbers and a list": (
        "llama4_text",
        dict(LLAMA4, interleave_moe_layer_step=2, no_rope_layers=[1, 0, 0, 1, 1, 0]),
        dict(moe_layers=[2], no_rope_layers=[1, 0, 0]),
    ),
    "the first and the last": (
        "ernie4_5_moe",
        dict(EXPERTS, moe_num_experts=4, moe_k=2, moe_layer_start_index=1, moe_layer_end_index=3),
        dict(moe_layer_start_index=1, moe_layer_end_index=1),
    ),
    "a pattern": (
        "gpt_neo",
        dict(num_layers=6, num_heads=4, window_size=8, attention_types=[[["global", "local"], 3]]),
        dict(attention_types=[[["global", "global", "local"], 1]]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("family", "config", "said"), RENUMBERED.values(), ids=RENUMBERED.keys())
def test_the_folder_is_the_model_with_the_kept_layers(family, config, said, tmp_path):
    whole, tokenizer = tiny_of_family(family, **config), tiny_tokenizer(begin=False)
    before = logits(whole)
    save_model(keep_layers(whole, KEPT), tokenizer, tmp_path / "made")
    assert torch.equal(logits(whole), before)  # it is as it was
    made = load_causal_lm(str(tmp_path / "made"))
    assert {key: getattr(made.config, key) for key in said} == said
    in_a_tuple = family == "gpt_neo"
    for number, layer in enumerate(layers._layer_list(whole)[1]):
        if number not in KEPT:
            layer.forward = lambda hidden, *_, **__: (hidden,) if in_a_tuple else hidden
    torch.testing.assert_close(logits(made), logits(whole), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, logits(whole), atol=1e-2)


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("diffllama", {}, "self_attn.lambda_init was 0.47"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "attn.scaling was 0.11"),
        ("ernie4_5_moe", dict(moe_num_experts=4, moe_k=2, moe_layer_interval=2), "Missing key"),
    ],
)
def test_layers_that_no_config_describes_are_refused_by_name(family, config, why):
    with pytest.raises(
        ValueError, match=f"3 of 6 layers of .*{why}.*set student_init to"
    ) as raised:
        keep_layers(tiny_of_family(family, **config), KEPT)
    assert "\n" not in str(raised.value)


def test_a_window_that_is_longer_than_the_probe_is_compared_too(monkeypatch):
    windows = dict(use_sliding_window=True, sliding_window=32, max_window_layers=2)
    whole = tiny_of_family("qwen2", **windows)
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    assert keep_layers(whole, KEPT).config.layer_types == kinds

    def first_entries(settings, kept, total):
        return settings | {"layer_types": settings["layer_types"][: len(kept)]}

    monkeypatch.setattr(layers, "renumbered", first_entries)
    with pytest.raises(ValueError, match="self_attn.layer_type was .sliding_attention., is .full"):
        keep_layers(whole, KEPT)


def test_a_tie_is_kept_and_none_is_made():
    tied = keep_layers(tiny_llama(layers=3, tie_word_embeddings=True), [0, 2])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    model = tiny_llama(layers=3)
    model.config.tie_word_embeddings = True  # as of a folder whose file has a head all the same
    assert torch.equal(keep_layers(model, [0, 2]).lm_head.weight, model.lm_head.weight)


def test_random_numbers_are_drawn_from_no_one():
    model, state = tiny_llama(layers=3), torch.get_rng_state()
    keep_layers(model, [0, 1])
    assert torch.equal(torch.get_rng_state(), state)
