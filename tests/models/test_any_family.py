"""Families without attention maps, or with text inside: what they can have is right, and what they
cannot have is one line.
"""

import pytest
import torch
from tiny import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from kd_utils.models.output_head import output_head, require_known_head
from kd_utils.models.signals import decoder_layers, forward_signals, size_of, text_model

LAYERS, TOKENS = SIZES["num_hidden_layers"], 13
GROUPED = dict(num_key_value_heads=2, head_dim=8)
MAMBA = dict(mamba_d_state=8, mamba_d_conv=4, mamba_expand=2)
PICTURES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
NO_INTERFACE = "does not use transformers' attention interface"
NO_ATTENTION = "has no attention that transformers could hand over"

#: Family -> its configuration, and the layers that have maps, or why none has.
FAMILIES = {
    "bloom": ({}, NO_INTERFACE),
    "falcon": (dict(new_decoder_architecture=False), NO_INTERFACE),
    "gptj": (dict(n_inner=64, rotary_dim=4), NO_INTERFACE),
    "mpt": (dict(d_model=32, n_heads=4, n_layers=LAYERS), NO_INTERFACE),
    "mamba": (dict(state_size=8), NO_ATTENTION),
    "mamba2": (dict(num_heads=8, head_dim=8, n_groups=1, state_size=8), NO_ATTENTION),
    "falcon_mamba": (dict(state_size=8), NO_ATTENTION),
    "rwkv": (dict(attention_hidden_size=32), NO_ATTENTION),
    "recurrent_gemma": (
        dict(lru_width=32, block_types=["recurrent", "attention"], **GROUPED),
        [2, 4],
    ),
    "jamba": (
        dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, **GROUPED, **MAMBA),
        [2, 4],
    ),
    "bamba": (
        dict(attn_layer_indices=[1, 3], mamba_n_heads=4, mamba_d_head=16, **GROUPED, **MAMBA),
        [2, 4],
    ),
    "lfm2": (dict(layer_types=["conv", "full_attention"] * 2, **GROUPED), [2, 4]),
    "opt": (dict(ffn_dim=64, word_embed_proj_dim=32), [1, 2, 3, 4]),
    "phi": ({}, [1, 2, 3, 4]),  # its head has a bias
    "doge": (GROUPED, [1, 2, 3, 4]),  # it passes the mask by name
    "afmoe": (
        dict(GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        [1, 2, 3, 4],
    ),
    "nanochat": (GROUPED, [1, 2, 3, 4]),
    "hyperclovax": (dict(GROUPED, logits_scaling=8.0), [1, 2, 3, 4]),
    "llama4_text": (
        dict(GROUPED, num_local_experts=2, intermediate_size_mlp=64, interleave_moe_layer_step=2),
        [1, 2, 3, 4],
    ),
    "gemma3": ({}, [1, 2, 3, 4]),
}


def tiny(family):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = {**SIZES, **FAMILIES[family][0]}
    if family == "gemma3":  # text inside
        pictures = dict(PICTURES, image_size=16, patch_size=8)
        values = dict(text_config={**SIZES, **GROUPED}, vision_config=pictures)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases too
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), torch.randint(3, 97, (2, TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_head_hidden_states_and_maps_are_the_models_own(family):
    (model, ids), maps = tiny(family), FAMILIES[family][1]
    logits = model(input_ids=ids).logits
    assert require_known_head(model, ids) < 1e-6
    found = forward_signals(model, ids, hidden_layers=range(1, LAYERS + 1))
    torch.testing.assert_close(output_head(model).logits(found.hidden), logits)
    whole = text_model(model)(input_ids=ids, output_hidden_states=True, use_cache=False)
    first = (
        0 if family in ("mamba", "mamba2", "falcon_mamba", "rwkv") else 1
    )  # whether with the embedding
    for number in range(1, LAYERS):
        expected = whole.hidden_states[first + number - 1]
        torch.testing.assert_close(found.layers[number], expected, atol=1e-5, rtol=1e-4)
    assert len(decoder_layers(model)) == LAYERS and size_of(model.config, "hidden_size") == 32
    if isinstance(maps, str):
        with pytest.raises(ValueError, match=f"^[^\n]* {maps}, [^\n]*use distill_type[^\n]*$"):
            forward_signals(model, ids, map_layers=[LAYERS])
        assert torch.equal(model(input_ids=ids).logits, logits)  # it attends as it did
    else:
        check_maps(model, ids, maps)


def check_maps(model, ids, layers):
    found = forward_signals(model, ids, map_layers=layers).attentions
    if lacking := {*range(1, LAYERS + 1)} - {*layers}:
        with pytest.raises(ValueError, match="no attention.*choose attention_layers among 2, 4; "):
            forward_signals(model, ids, map_layers=lacking)
    model.set_attn_implementation("eager")
    output = text_model(model)(input_ids=ids, output_attentions=True, use_cache=False)
    eager = [each for each in output.attentions if each is not None]
    assert len(eager) == len(layers)
    for number, expected in zip(layers, eager):
        torch.testing.assert_close(found[number].map(), expected, atol=5e-6, rtol=0)
