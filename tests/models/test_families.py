"""Families of transformers, as teacher and student: what is captured against the same model's eager
attention.
"""

import copy
import dataclasses

import pytest
import torch
from tiny import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from kd_utils.models.cut.layers import keep_layers
from kd_utils.models.loading import load_causal_lm, with_soft_capping
from kd_utils.models.output_head import output_head, require_known_head
from kd_utils.models.signals import IMPLEMENTATION, decoder_layers, forward_signals

LAYERS, TOKENS, WINDOW = SIZES["num_hidden_layers"], 17, 5
ALL = range(1, LAYERS + 1)
GROUPED = dict(num_key_value_heads=2)
CAPPED = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)

FAMILIES = {
    "llama": GROUPED,
    "mistral": dict(GROUPED, sliding_window=None),
    "mistral_window": dict(GROUPED, sliding_window=WINDOW),
    "qwen2": dict(GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": dict(
        GROUPED, head_dim=16, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "gemma2": dict(GROUPED, head_dim=16, query_pre_attn_scalar=10, sliding_window=WINDOW, **CAPPED),
    "phi3": GROUPED,
    "phi3_window": dict(GROUPED, sliding_window=WINDOW),
    "gpt_neox": dict(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    ),
    "gpt_neox_sequential": dict(use_parallel_residual=False),
    "olmo2": GROUPED,
    "granite": dict(
        GROUPED,
        attention_multiplier=0.3,
        residual_multiplier=0.7,
        embedding_multiplier=3.0,
        logits_scaling=6.0,
    ),
    "cohere": dict(GROUPED, logit_scale=0.3, use_qk_norm=True),
    "cohere2": dict(GROUPED, logit_scale=0.3, sliding_window=WINDOW),
    "smollm3": dict(
        GROUPED, no_rope_layer_interval=2
    ),  # a second list in its configuration with an entry a layer
    "gpt2": dict(n_inner=64),  # its layers have another name and place
}
#: Layers (1..L) with a sliding window shorter than the sequence.
WINDOWED = {
    "mistral_window": [1, 2, 3, 4],
    "qwen2": [3, 4],
    "qwen3": [3, 4],
    "gemma2": [1, 3],
    "phi3_window": [1, 2, 3, 4],
    "cohere2": [1, 2, 3],
}
HEADS = {
    "gemma2": (1.0, 3.0),
    "granite": (1 / 6, None),
    "cohere": (0.3, None),
    "cohere2": (0.3, None),
}

every_family = pytest.mark.parametrize("family", FAMILIES)


def tiny(family, **config):
    """A random model of the family; its norms and biases are random too, as ones and zeros would
    hide a mistake.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model_type = family.removesuffix("_window").removesuffix("_sequential")
    values = SIZES | FAMILIES[family] | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    model = with_soft_capping(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(batch=2, seed=1):
    return torch.randint(3, 97, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def captured(model, ids, attention_mask=None):
    return forward_signals(model, ids, attention_mask, hidden_layers=ALL, map_layers=ALL)


def eager(model):
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    assert other.config._attn_implementation == "eager"
    return other


def eager_output(model, ids, **kwargs):
    return model(
        input_ids=ids, output_attentions=True, output_hidden_states=True, use_cache=False, **kwargs
    )


@every_family
@torch.no_grad()
def test_every_layers_map_and_hidden_state_equal_eager(family):
    model, ids = tiny(family), tokens()
    expected, signals = eager_output(eager(model), ids), captured(model, ids)
    assert (
        model.config._attn_implementation == IMPLEMENTATION and len(decoder_layers(model)) == LAYERS
    )
    assert (
        len(expected.attentions) == LAYERS and len(expected.hidden_states) == LAYERS + 1
    )  # [0] is the embedding
    for number in ALL:
        torch.testing.assert_close(
            signals.attentions[number].map(), expected.attentions[number - 1], atol=5e-6, rtol=0
        )
        torch.testing.assert_close(
            signals.layers[number], expected.hidden_states[number], atol=2e-5, rtol=1e-5
        )
    assert signals.layers[LAYERS] is signals.hidden


@every_family
@torch.no_grad()
def test_one_examples_rows_are_those_of_the_whole_map(family):
    for attention in captured(tiny(family), tokens()).attentions.values():
        rows = attention.example(1, 6, 12).map()[0]
        torch.testing.assert_close(rows, attention.map()[1, :, 6:12, :12], atol=1e-6, rtol=0)


@every_family
@torch.no_grad()
def test_each_layers_window_is_in_its_map(family):
    signals = captured(tiny(family), tokens())
    for number in ALL:
        seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        if number in WINDOWED.get(family, []):
            seen = seen.triu(1 - WINDOW)
        assert torch.equal(signals.attentions[number].map() > 0, seen.expand(2, 4, TOKENS, TOKENS))


@torch.no_grad()
def test_gemmas_cap_is_in_every_map():
    for attention in captured(tiny("gemma2"), tokens()).attentions.values():
        assert attention.softcap == attention.example(0, 2, 9).softcap == 2.0
        uncapped = dataclasses.replace(attention, softcap=None).map()
        assert (attention.map() - uncapped).abs().max() > 0.01


@torch.no_grad()
def test_a_model_that_soft_caps_keeps_its_cap_when_it_is_loaded(tmp_path):
    model, ids = tiny("gemma2"), tokens()
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path))
    assert torch.equal(loaded(input_ids=ids).logits, eager(model)(input_ids=ids).logits)


@every_family
@torch.no_grad()
def test_rebuilt_logits_are_the_models(family):
    model, ids = tiny(family), tokens()
    plain_eager = eager(model)(input_ids=ids).logits
    assert require_known_head(model, ids) < 1e-6
    hidden, head = forward_signals(model, ids).hidden, output_head(model)
    torch.testing.assert_close(head.logits(hidden), plain_eager, atol=2e-5, rtol=1e-5)
    scale, cap = HEADS.get(family, (1.0, None))
    assert head.scale == pytest.approx(scale) and head.cap == cap
    if family in HEADS:  # these configurations do change the logits
        assert (hidden @ head.weight.T - plain_eager).norm() > 0.1 * plain_eager.norm()


@every_family
def test_gradients_equal_those_under_eager(family):
    model, ids, gradients = tiny(family), tokens(), []
    other = eager(model)
    weights = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(2))
    signals, expected = captured(model, ids), eager_output(other, ids)
    rebuilt = output_head(model).logits(signals.hidden)
    for maps, states, logits, owner in (
        (
            [signals.attentions[n].map() for n in ALL],
            [signals.layers[n] for n in ALL],
            rebuilt,
            model,
        ),
        (expected.attentions, expected.hidden_states[1:], expected.logits, other),
    ):
        loss = sum(10 * m.square().sum() for m in maps) + sum((h * weights).sum() for h in states)
        (loss + logits[..., 5].sum()).backward()
        gradients.append({name: p.grad for name, p in owner.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        difference = float((gradients[0][name] - gradient).norm() / gradient.norm().clamp(min=1e-3))
        assert difference < 1e-4, name


@every_family
@torch.no_grad()
def test_right_padding_needs_no_mask(family):
    model, ids, real = tiny(family), tokens(), 11
    ids[1, real:] = 0
    padded, alone = captured(model, ids), captured(model, ids[1:, :real])
    for number in ALL:
        torch.testing.assert_close(
            padded.layers[number][1, :real], alone.layers[number][0], atol=2e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            padded.attentions[number].map()[1, :, :real, :real],
            alone.attentions[number].map()[0],
            atol=5e-6,
            rtol=0,
        )


@pytest.mark.parametrize("family", ["gemma2", "mistral_window", "gpt_neox"])
@torch.no_grad()
def test_left_padding_with_a_mask_equals_eager(family):
    model, ids = tiny(family), tokens()
    mask = torch.ones_like(ids)
    ids[1, :6], mask[1, :6] = 0, 0
    expected, signals = (
        eager_output(eager(model), ids, attention_mask=mask),
        captured(model, ids, mask),
    )
    for number in ALL:
        torch.testing.assert_close(
            signals.layers[number][1, 6:],
            expected.hidden_states[number][1, 6:],
            atol=2e-5,
            rtol=1e-5,
        )
        torch.testing.assert_close(
            signals.attentions[number].map()[1, :, 6:],
            expected.attentions[number - 1][1, :, 6:],
            atol=5e-6,
            rtol=0,
        )


@pytest.mark.parametrize("family", ["gemma2", "mistral_window", "cohere2", "gpt_neox"])
@torch.no_grad()
def test_generation_after_capture_equals_eager(family):
    """With a cache a query is alone with all the keys, and a window moves."""
    model, ids = tiny(family), tokens()
    mask = torch.ones_like(ids)
    ids[1, :6], mask[1, :6] = 0, 0
    captured(model, ids, mask)
    wanted = dict(
        attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(model.generate(ids, **wanted), eager(model).generate(ids, **wanted))


def test_dropout_in_capped_attention_is_eagers():
    model = tiny("gemma2", attention_dropout=0.4).train()
    other, ids, hidden = eager(model), tokens(), []
    for run in (
        lambda: forward_signals(model, ids).hidden,
        lambda: other.base_model(ids).last_hidden_state,
    ):
        torch.manual_seed(3)
        hidden.append(run())
    assert torch.equal(*hidden) and not torch.equal(
        hidden[0], forward_signals(model.eval(), ids).hidden
    )


@torch.no_grad()
def test_capped_attention_in_bfloat16_is_eagers():
    model, ids = tiny("gemma2").bfloat16(), tokens()
    expected, signals = eager_output(eager(model), ids), captured(model, ids)
    assert torch.equal(signals.hidden, expected.hidden_states[-1])
    for number in ALL:  # a map is computed in float32, eager's in bfloat16
        torch.testing.assert_close(
            signals.attentions[number].map(),
            expected.attentions[number - 1].float(),
            atol=0.02,
            rtol=0,
        )


@every_family
@torch.no_grad()
def test_a_saved_model_loads_and_is_captured_alike(family, tmp_path):
    model, ids = tiny(family), tokens()
    before = captured(model, ids)
    model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    after = captured(AutoModelForCausalLM.from_pretrained(tmp_path), ids)
    for number in ALL:
        torch.testing.assert_close(after.layers[number], before.layers[number])
        torch.testing.assert_close(after.attentions[number].map(), before.attentions[number].map())


@every_family
@torch.no_grad()
def test_a_student_of_some_layers(family, tmp_path):
    ids, kept = (
        tokens(),
        [1, 3],
    )  # with these, the first entries of a pattern of layers are not the kept layers'
    whole = tiny(family)
    inputs = eager_output(eager(whole), ids).hidden_states
    signals = captured(whole, ids)
    student = keep_layers(copy.deepcopy(whole), kept)
    assert len(decoder_layers(student)) == student.config.num_hidden_layers == len(kept)
    made = forward_signals(student, ids, hidden_layers=[1, 2], map_layers=[1, 2])
    for number, index in enumerate(kept, 1):  # a layer keeps its window
        seen = signals.attentions[index + 1].map() > 0
        assert torch.equal(made.attentions[number].map() > 0, seen)
    assert not torch.allclose(
        made.layers[1], inputs[2]
    )  # its first layer no longer stands behind another
    student.save_pretrained(tmp_path)
    # Built anew from the configuration, layer by layer.
    loaded = with_soft_capping(AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, output_head(student).logits(made.hidden), atol=2e-5, rtol=1e-5
    )
    assert student.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (
        2,
        TOKENS + 3,
    )


@every_family
@torch.no_grad()
def test_a_student_of_the_first_layers_computes_what_they_compute(family):
    ids, whole = tokens(), tiny(family)
    expected = captured(whole, ids)
    made = forward_signals(
        keep_layers(whole, [0, 1, 2]), ids, hidden_layers=[1, 2], map_layers=[1, 2, 3]
    )
    for number in (1, 2):
        torch.testing.assert_close(
            made.layers[number], expected.layers[number], atol=1e-6, rtol=1e-5
        )
    for number in (1, 2, 3):
        torch.testing.assert_close(made.attentions[number].map(), expected.attentions[number].map())
