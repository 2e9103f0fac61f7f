"""Pruning and narrowing: what must be exact, what is refused, and whether a plain folder loads."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import logits, tiny_llama, tiny_of_family, tiny_tokenizer

from kd_utils.models.attention_maps import relative_difference
from kd_utils.models.cut import bases, narrowing, pruning, sizes, slots
from kd_utils.models.initial.ways import random_weights
from kd_utils.models.loading import load_causal_lm, save_model

ALL = dict.fromkeys(("keep_layers", "keep_heads", "keep_mlp", "keep_width"), "all")
#: Families of the table, with what distinguishes each one's weights.
FAMILIES = {
    "llama": {},
    "llama with biases and a tied output layer": dict(
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral": dict(sliding_window=4),
    "qwen2": dict(
        layer_types=["full_attention", "sliding_attention"] * 3,
        use_sliding_window=True,
        sliding_window=4,
    ),
    "qwen3": {},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A random model of a family, and where it is stored."""
    folder = tmp_path_factory.mktemp("source") / "model"
    model = tiny_of_family(request.param.split()[0], **FAMILIES[request.param])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.rand_like(parameter))
    save_model(model, tiny_tokenizer(begin=False), folder)
    return model, slots.StoredModel(str(folder))


def units_of(config, order=lambda n: list(range(n))):
    """All units, in an order of their own."""
    whole, groups = sizes.sizes_of(config), config.num_key_value_heads
    size = whole.heads // groups
    heads = [
        [group * size + place for group in range(groups) for place in order(size)]
        for _ in range(whole.layers)
    ]
    neurons = [order(whole.mlp) for _ in range(whole.layers)]
    return pruning.Units(list(range(whole.layers)), order(whole.width), heads, neurons)


def test_pruning_nothing_gives_the_source_to_the_bit(family):
    model, source = family
    made = pruning.pruned(source, units_of(model.config))
    assert torch.equal(logits(made), logits(model))
    assert made.config.to_diff_dict() == model.config.to_diff_dict()


def test_the_order_of_units_does_not_matter(family):
    model, source = family
    torch.manual_seed(1)
    made = pruning.pruned(source, units_of(model.config, lambda n: torch.randperm(n).tolist()))
    assert not torch.equal(made.model.norm.weight, model.model.norm.weight)
    # Norms are computed in float32 whatever the weights are.
    assert relative_difference(logits(made), logits(model)) < 4e-6


def test_what_is_dropped_could_as_well_be_zero(family):
    """Heads and neurons that are dropped, against the source with zeros in their places."""
    model, source = family
    units = units_of(model.config)
    heads, neurons = [1, 2], [0, 5, 6, 40]
    made = pruning.pruned(source, units._replace(heads=[heads] * 6, mlp=[neurons] * 6))
    zeroed = load_causal_lm(source.name).eval()
    with torch.no_grad():
        for layer in zeroed.model.layers:
            gone = [n for n in range(4 * 8) if n // 8 not in heads]
            layer.self_attn.o_proj.weight[:, gone] = 0
            layer.mlp.down_proj.weight[:, [n for n in range(48) if n not in neurons]] = 0
    # In float64: in float32 the order of a sum alone moved one of the logits by 1.3e-5 on one CPU.
    found, expected = logits(made.double()), logits(zeroed.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert made.config.num_attention_heads == 2 and made.config.head_dim == 8


def test_a_pruned_model_is_a_plain_folder_of_its_family(family, tmp_path):
    model, source = family
    kept = sizes.Sizes(layers=3, heads=2, mlp=20, width=24)
    units = pruning.Units([0, 2, 5], list(range(24)), [[0, 2]] * 3, [list(range(20))] * 3)
    made = pruning.pruned(source, units)
    assert sizes.sizes_of(made.config) == units.sizes == kept
    save_model(made, tiny_tokenizer(begin=False), tmp_path / "made")
    code = (
        "import sys, torch, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "assert 'kd_utils' not in sys.modules\n"
        "with torch.no_grad(): x = m(torch.arange(3, 40)[None], use_cache=False).logits\n"
        "print(type(m).__name__, x.double().sum().item())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "made")],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    name, total = ran.stdout.split()
    assert name == type(model).__name__
    assert float(total) == pytest.approx(logits(made).double().sum().item(), rel=1e-6)
    if layer_types := getattr(model.config, "layer_types", None):
        assert made.config.layer_types == [layer_types[number] for number in (0, 2, 5)]


@pytest.mark.parametrize("basis", ["identity", "random", "weights"])
def test_a_full_basis_gives_the_sources_logits(family, basis):
    model, source = family
    size = model.config.hidden_size
    made = {
        "identity": lambda: torch.eye(size),
        "random": lambda: bases.at_random(size, size, seed=3),
        "weights": lambda: bases.of_weights(source, size),
    }[basis]()
    torch.testing.assert_close(made.T @ made, torch.eye(size), atol=1e-5, rtol=0)
    turned = narrowing.narrowed(source, made)
    torch.testing.assert_close(logits(turned), logits(model), rtol=1e-4, atol=2e-4)
    assert (turned.model.norm.weight == 1).all()


def test_a_narrower_model_equals_the_source_on_the_kept_directions(tmp_path):
    """A source whose residual stream lies in k directions loses nothing when it keeps these."""
    model = tiny_llama(layers=2)
    hidden = bases.at_random(32, 8, seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ hidden @ hidden.T)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(hidden @ hidden.T @ writer.weight)
    save_model(model, tiny_tokenizer(begin=False), tmp_path / "source")
    made = narrowing.narrowed(slots.StoredModel(str(tmp_path / "source")), hidden)
    assert made.config.hidden_size == 8 and made.config.head_dim == 8
    torch.testing.assert_close(logits(made), logits(model.eval()), rtol=1e-3, atol=1e-3)
    # The same number of directions elsewhere does not do.
    other = narrowing.narrowed(
        slots.StoredModel(str(tmp_path / "source")), bases.at_random(32, 8, seed=6)
    )
    assert (logits(other) - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("gains", ["equal", "of all sizes"])
def test_a_tied_output_layer_may_stay_tied(gains, tmp_path):
    """Exact where all gains of the final norm are equal; an output layer of its own always is."""
    model = tiny_of_family("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.copy_(
            torch.full((32,), 1.5) if gains == "equal" else torch.rand(32)
        )
    save_model(model, tiny_tokenizer(begin=False), tmp_path / "source")
    source = slots.StoredModel(str(tmp_path / "source"))
    whole = bases.at_random(32, 32, seed=1)
    own, tied = (narrowing.narrowed(source, whole, tied) for tied in (False, True))
    assert relative_difference(logits(own), logits(model)) < 1e-5
    assert (relative_difference(logits(tied), logits(model)) < 1e-5) == (gains == "equal")
    assert own.num_parameters() - tied.num_parameters() == model.lm_head.weight.numel()

    narrow = narrowing.narrowed(source, whole[:, :16], tied=True)
    gain = model.model.norm.weight.mean() * 2**0.5
    torch.testing.assert_close(narrow.model.norm.weight, gain.expand(16))
    save_model(narrow, tiny_tokenizer(begin=False), tmp_path / "narrow")
    assert torch.equal(logits(load_causal_lm(str(tmp_path / "narrow")).eval()), logits(narrow))


def test_an_output_layer_of_its_own_cannot_become_tied():
    with pytest.raises(ValueError, match=r"student_output = 'tied', but .* set it to 'own'"):
        narrowing.narrow_config(tiny_of_family("llama").config, 16, tied=True)


def test_the_weights_basis_finds_the_directions_that_the_weights_use(tmp_path):
    model = tiny_llama(layers=2)
    used = bases.at_random(32, 8, seed=5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            axes = slots.slot_of(name).axes
            if len(axes) == 2:
                projected = weight @ used @ used.T if axes[1] == "width" else used @ used.T @ weight
                weight.copy_(projected)
    save_model(model, tiny_tokenizer(begin=False), tmp_path / "source")
    found = bases.of_weights(slots.StoredModel(str(tmp_path / "source")), 8)
    torch.testing.assert_close(found @ found.T, used @ used.T, atol=1e-4, rtol=0)


def test_a_random_basis_is_one_of_its_seed():
    assert torch.equal(bases.at_random(9, 4, seed=1), bases.at_random(9, 4, seed=1))
    assert not torch.equal(bases.at_random(9, 4, seed=1), bases.at_random(9, 4, seed=2))


@pytest.mark.parametrize(
    "keep, kept",
    [
        ({}, (6, 4, 48, 32)),
        ({"keep_layers": "0.5"}, (3, 4, 48, 32)),
        ({"keep_heads": "0.5", "keep_width": "0.3"}, (6, 2, 48, 10)),  # 9.6: a multiple of 2
        ({"keep_heads": "0.1"}, (6, 2, 48, 32)),  # a head for each of the two groups
        ({"keep_mlp": "0.001"}, (6, 4, 1, 32)),
        ({"keep_width": "24", "keep_mlp": "7"}, (6, 4, 7, 24)),
    ],
)
def test_counts_and_shares(keep, kept):
    assert sizes.kept_sizes(tiny_of_family("llama").config, **(ALL | keep)) == kept


@pytest.mark.parametrize(
    "keep, message",
    [
        ({"keep_layers": "7"}, "keep_layers = 7: choose 1 to 6, or 'all'"),
        (
            {"keep_heads": "3"},
            "keep_heads = 3: the 4 query heads share 2 key/value heads, and each of these groups "
            "must keep as many: set it to 4",
        ),
        ({"keep_heads": "1"}, "keep_heads = 1: .* set it to 2"),
        (
            {"keep_width": "30"},
            r"keep_width = 30: The hidden size \(30\) is not a .*: set it to 32",
        ),
        ({"keep_width": "33"}, "keep_width = 33: choose 1 to 32"),
    ],
)
def test_what_is_not_possible_is_refused_with_the_nearest_that_is(keep, message):
    with pytest.raises(ValueError, match=message) as told:
        sizes.kept_sizes(tiny_of_family("llama").config, **(ALL | keep))
    assert "\n" not in str(told.value)


def test_a_family_may_have_any_width():
    assert (
        sizes.kept_sizes(tiny_of_family("qwen3").config, **ALL | {"keep_width": "29"}).width == 29
    )
    with pytest.raises(ValueError, match=r"student_width = 30: .*set it to 32"):
        narrowing.narrow_config(tiny_of_family("llama").config, 30)


def test_a_config_that_says_tied_beside_a_head_of_its_own_is_not_believed(tmp_path):
    model = tiny_of_family("llama", tie_word_embeddings=True)
    save_model(model, tiny_tokenizer(begin=False), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    head = torch.randn_like(model.lm_head.weight)
    save_file({**load_file(file), "lm_head.weight": head}, file, {"format": "pt"})
    loaded = load_causal_lm(str(tmp_path / "m")).eval()
    assert torch.equal(loaded.lm_head.weight, head)
    source = slots.StoredModel(str(tmp_path / "m"))
    made = pruning.pruned(source, units_of(source.config))
    assert torch.equal(logits(made), logits(loaded)) and not made.config.tie_word_embeddings
    save_model(made, tiny_tokenizer(begin=False), tmp_path / "made")
    turned = narrowing.narrowed(source, torch.eye(32))
    assert relative_difference(logits(turned), logits(loaded)) < 1e-5


def test_a_tied_output_layer_counts_in_the_basis_with_its_own_gain(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.arange(32) / 32 + 0.1)
    save_model(model, tiny_tokenizer(begin=False), tmp_path / "tied")
    untied = tiny_llama(tie_word_embeddings=False)
    untied.load_state_dict(model.state_dict())
    save_model(untied, tiny_tokenizer(begin=False), tmp_path / "untied")
    found = [bases.of_weights(slots.StoredModel(str(tmp_path / n)), 8) for n in ("tied", "untied")]
    torch.testing.assert_close(found[0] @ found[0].T, found[1] @ found[1].T, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "keep, share",
    [
        ({"keep_heads": "0.9"}, "0.9 of 4"),
        ({"keep_mlp": "0.999"}, "0.999 of 48"),
        ({"keep_width": "0.95"}, "0.95 of 32"),  # 30, which four heads do not divide
    ],
)
def test_a_share_that_cuts_nothing_is_refused(keep, share):
    with pytest.raises(ValueError, match=f"{share} rounds to all of them: give a smaller share"):
        sizes.kept_sizes(tiny_of_family("llama").config, **(ALL | keep))


def test_other_families_are_refused_by_name(tmp_path):
    save_model(
        tiny_of_family("gpt_neox", num_attention_heads=4),
        tiny_tokenizer(begin=False),
        tmp_path / "m",
    )
    with pytest.raises(ValueError, match="a gpt_neox model cannot be cut: .*llama, mistral"):
        slots.StoredModel(str(tmp_path / "m"))
    with pytest.raises(ValueError, match="a gpt_neox model cannot be cut"):
        random_weights(str(tmp_path / "m"), **(ALL | {"keep_mlp": "0.5"}))
    assert random_weights(str(tmp_path / "m"), **ALL).config.model_type == "gpt_neox"


def test_weights_that_are_not_the_configs_are_refused(tmp_path):
    save_model(tiny_of_family("llama"), tiny_tokenizer(begin=False), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "1.mlp.up" not in k}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="its weights lack model.layers.1.mlp.up_proj.weight"):
        slots.StoredModel(str(tmp_path / "m"))
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"its model.norm.weight is \(3,\), .* \(32,\)"):
        slots.StoredModel(str(tmp_path / "m"))


def test_several_cuts_of_one_ratio_end_at_the_sizes_that_are_asked_for():
    config, keep = tiny_of_family("llama").config, ALL | {"keep_mlp": "6", "keep_layers": "3"}
    found = []
    for cuts in (3, 2, 1):
        found.append(sizes.kept_sizes(config, cuts, **keep))
        config = sizes.cut_config(config, found[-1])
    assert [(made.mlp, made.layers) for made in found] == [(24, 5), (12, 4), (6, 3)]


def test_a_size_on_the_way_is_one_that_is_possible():
    """2.8 heads are none of whole groups: they go in the first cut."""
    keep = ALL | {"keep_heads": "2", "keep_width": "8"}
    assert sizes.kept_sizes(tiny_of_family("llama").config, 2, **keep)[1::2] == (2, 16)


@pytest.mark.parametrize("cuts", [1, 2, 3])
@pytest.mark.parametrize("keep", [{"keep_width": "6"}, {"keep_heads": "3"}])
def test_what_the_last_cut_could_not_have_is_refused_by_the_first(cuts, keep):
    with pytest.raises(ValueError, match="keep_(width|heads) = .*set it to (8|4)"):
        sizes.kept_sizes(tiny_of_family("llama").config, cuts, **(ALL | keep))
