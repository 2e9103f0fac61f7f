"""Sums over rows, scores, and what is chosen by them: against loops that follow the definitions."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import example_rows, tiny_llama, tiny_of_family, tiny_tokenizer

from kd_utils.models import loading
from kd_utils.models.cut.sizes import Sizes
from kd_utils.models.importance import calibration, choosing, sums
from kd_utils.models.importance.scores import Scores, agreement, scores
from kd_utils.models.signals import forward_signals

ROWS = example_rows([9, 5, 7, 12, 5, 8, 11, 6, 9, 4, 7, 13, 6, 5, 10, 8, 9, 7])


def activations(model, row):
    """What the scores are of, for one row without padding: (kind, layer) -> (T, n)."""
    found = {}
    hooks = []
    for number, layer in enumerate(model.model.layers, 1):
        for kind, norm in (
            ("input_norm", layer.input_layernorm),
            ("post_attention_norm", layer.post_attention_layernorm),
        ):
            hooks.append(
                norm.register_forward_hook(
                    lambda m, a, out, key=(kind, number): found.__setitem__(key, out[0])
                )
            )
        for kind, linear in (("heads", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            hooks.append(
                linear.register_forward_pre_hook(
                    lambda m, args, key=(kind, number): found.__setitem__(key, args[0][0])
                )
            )
    with torch.no_grad():
        out = model.model(
            input_ids=torch.tensor(row.tokens[None]), output_hidden_states=True, use_cache=False
        )
    for hook in hooks:
        hook.remove()
    # transformers' last state is that after the last norm; the layer's own is not among them.
    states = [state[0] for state in out.hidden_states[:-1]]
    return found, states


def by_hand(model, rows):
    """The scores of the module's docstring, row by row in float64."""
    found, cosines = {}, []
    for row in rows:
        arrays, states = activations(model, row)
        for key, x in arrays.items():
            found.setdefault(key, []).append(x.double().abs().mean(0))
        cosines.append(
            [
                torch.cosine_similarity(a, b, dim=-1).mean().item()
                for a, b in zip(states, states[1:])
            ]
        )
    layers = len(model.model.layers)
    l2 = {
        key: (torch.stack(means).square().sum(0) / len(rows)).sqrt() for key, means in found.items()
    }
    heads = [l2["heads", n].unflatten(0, (-1, 8)).norm(dim=-1) for n in range(1, layers + 1)]
    width = sum(x for (kind, _), x in l2.items() if kind.endswith("norm"))
    mlp = [l2["mlp", n] for n in range(1, layers + 1)]
    return 1 - np.mean(cosines, axis=0), width.numpy(), torch.stack(heads).numpy(), torch.stack(mlp)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scores_are_those_of_the_definitions(family):
    model = tiny_of_family(family)
    layers, width, heads, mlp = by_hand(model, ROWS)
    found = scores(calibration.sums_over(model, ROWS))
    np.testing.assert_allclose(found.layers[:-1], layers, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.width, width, rtol=1e-4)
    np.testing.assert_allclose(found.heads, heads, rtol=1e-4)
    np.testing.assert_allclose(found.mlp, mlp, rtol=1e-4)


def counted(model, batches, **options):
    found = sums.UnitSums(model)
    for rows in batches:
        lengths = [len(row.tokens) for row in rows]
        ids = torch.zeros(len(rows), max(lengths) + 3, dtype=torch.long)[:, : max(lengths)]
        for b, row in enumerate(rows):
            ids[b, : lengths[b]] = torch.from_numpy(row.tokens)
        with torch.no_grad(), found.of_batch([row.example_id for row in rows], lengths):
            forward_signals(model, ids, **options)
    return found.table()


def test_sums_do_not_depend_on_batches_or_on_captured_maps():
    model = tiny_llama()
    whole = counted(model, [ROWS])
    for other in (
        counted(model, [[row] for row in ROWS]),
        counted(tiny_llama(), [ROWS[:7], ROWS[7:]], map_layers=[2], hidden_layers=[1]),
        sums.added_up([counted(model, [ROWS[:5]]), counted(model, [ROWS[5:]])]),
    ):
        pd.testing.assert_frame_equal(other, whole, rtol=1e-4)
    assert whole.loc[whole["kind"] == "rows", sums.SUMS].sum().sum() == len(ROWS)
    assert set(whole.dtypes[sums.SUMS]) == {np.dtype("float32")}


def test_only_the_pass_over_the_rows_counts_and_only_once():
    model = tiny_llama()
    found = sums.UnitSums(model)
    ids = torch.tensor(np.stack([ROWS[1].tokens, ROWS[4].tokens]))
    with torch.no_grad(), found.of_batch(["a", "b"], [5, 5]):
        model(ids[:1])  # a probe
        model(ids)
        model(ids.flip(1))
    with torch.no_grad():
        model(ids)
    once = sums.UnitSums(model)
    with torch.no_grad(), once.of_batch(["a", "b"], [5, 5]):
        model(ids)
    pd.testing.assert_frame_equal(found.table(), once.table())
    assert not any(module._forward_hooks for module in model.modules())


def test_other_families_have_no_sums():
    assert sums.new_sums(tiny_of_family("gpt_neox", num_attention_heads=4)) is None
    assert sums.new_sums(tiny_llama()) is not None


def test_half_precision_is_added_up_in_float32():
    """The activations are half precision, and so is nothing that is made of them."""
    model = tiny_of_family("llama").bfloat16()
    layers, width, heads, mlp = by_hand(model, ROWS)
    found = scores(counted(model, [[row] for row in ROWS]))
    np.testing.assert_allclose(found.mlp, mlp, rtol=1e-4)
    np.testing.assert_allclose(found.width, width, rtol=1e-4)
    np.testing.assert_allclose(found.heads, heads, rtol=1e-4)


def test_a_layer_that_changes_nothing_has_no_influence():
    model = tiny_llama(layers=3)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    found = scores(calibration.sums_over(model, ROWS)).layers
    assert abs(found[1]) < 1e-6 < min(found[0], found[2])
    lost = calibration.leave_one_out(model, ROWS)
    assert abs(lost[1]) < 1e-6 and abs(lost[0]) > 1e-3


def test_leave_one_out_is_the_loss_of_the_model_without_the_layer():
    from kd_utils.models.cut.layers import keep_layers

    model = tiny_llama(layers=3)
    whole = calibration.answer_loss(model, ROWS)
    found = calibration.leave_one_out(model, ROWS)
    for layer in range(3):
        kept = keep_layers(model, [n for n in range(3) if n != layer])
        assert found[layer] == pytest.approx(calibration.answer_loss(kept, ROWS) - whole, abs=1e-5)


def test_second_moments_are_of_normalised_states_without_padding():
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(3)  # gains do not count
    found = calibration.second_moments(model, ROWS)
    tokens = sum(len(row.tokens) for row in ROWS)
    assert found.trace().item() == pytest.approx(tokens * 2 * 2 * 32, rel=1e-4)
    by_row = sum(calibration.second_moments(model, [row]) for row in ROWS)
    torch.testing.assert_close(found, by_row, rtol=1e-3, atol=1e-2)


CONFIG = tiny_of_family(
    "llama"
).config  # 6 layers, 4 heads over 2 key/value heads, 48 neurons, width 32


def ranked(**changed):
    whole = Scores(*(np.ones(shape) for shape in ((6,), (32,), (6, 4), (6, 48))))
    return whole._replace(**changed)


def test_the_highest_are_kept_in_their_order_and_the_first_of_equals():
    layers = np.array([3.0, 1, 2, 9, 0, 3])
    heads = np.array([[4.0, 3, 1, 2]] * 6)
    kept = choosing.kept_units(CONFIG, Sizes(3, 2, 5, 8), ranked(layers=layers, heads=heads))
    assert kept.layers == [0, 3, 5]
    assert kept.heads == [[0, 3]] * 3  # one of each group, although 0 and 1 have the most
    assert kept.mlp == [[0, 1, 2, 3, 4]] * 3 and kept.width == list(range(8))


def test_controls_keep_others():
    known = scores(calibration.sums_over(tiny_of_family("llama"), ROWS))
    size = Sizes(6, 2, 24, 16)
    best = choosing.kept_units(CONFIG, size, known)
    worst = choosing.kept_units(CONFIG, size, choosing.reversed_scores(known))
    assert not {*best.width} & {*worst.width} and not {*best.mlp[0]} & {*worst.mlp[0]}
    drawn = [
        choosing.kept_units(CONFIG, size, choosing.random_scores(CONFIG, seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len({*units.heads[0]} & {0, 1}) == 1 for units in drawn)


def test_agreement_compares_disjoint_rows_and_says_how_many():
    rows = [row for seed in range(4) for row in example_rows([9, 12] * 20, seed=seed)]
    for number, row in enumerate(rows):
        row.example_id = f"row{number}"
    table = calibration.sums_over(tiny_of_family("llama"), rows)
    found = agreement(table)
    groups = np.bincount([sums.group_of(row.example_id) for row in rows], minlength=8)
    assert sorted(found["rows"].unique()) == np.cumsum(groups)[[0, 1, 3]].tolist()
    assert set(found["kind"]) == {"layers", "width", "heads", "mlp"}
    mlp = found[found["kind"] == "mlp"]["rank_correlation"]
    assert mlp.between(0.5, 1).all()
    shuffled = table.copy()
    mixed = np.random.default_rng(0).permutation(len(table))
    last = sums.SUMS[4:]
    shuffled[last] = table[last].to_numpy()[mixed]
    shuffled.loc[table["kind"] == "rows", last] = table.loc[table["kind"] == "rows", last]
    none = agreement(shuffled).query("kind == 'mlp'")["rank_correlation"]
    assert none.abs().max() < 0.3


def test_a_few_rows_leave_out_what_they_cannot_say():
    rows = example_rows([9, 12, 7])
    table = calibration.sums_over(tiny_llama(layers=1), rows)
    found = agreement(table)
    assert np.isfinite(found["rank_correlation"]).all() and (found["rows"] > 0).all()
    assert "layers" not in set(found["kind"])


def test_rows_in_the_tokens_of_another_model_are_refused():
    rows = calibration.Calibration("", lambda: None, ROWS)
    rows.require_known(tiny_llama(vocab=97).config, "m")
    with pytest.raises(
        ValueError, match="token id 9., and m knows the ids below 50: set tokenizer"
    ):
        rows.require_known(tiny_llama(vocab=50).config, "m")


def test_the_cached_teachers_sums_are_taken_and_anothers_are_counted(tmp_path):
    model = tiny_llama()
    loading.save_model(model, tiny_tokenizer(begin=False), tmp_path / "m")
    name = str(tmp_path / "m")
    known = pd.DataFrame({"known": [1]})

    def of(teacher, sums_):
        return calibration.Calibration(teacher, lambda: sums_, ROWS).sums_of(name)

    fingerprint = loading.model_fingerprint(name)
    assert of(fingerprint, known) is known
    counted_here = calibration.sums_over(model, ROWS)
    for found in (of(fingerprint, None), of("another", known)):
        pd.testing.assert_frame_equal(found, counted_here)


def test_which_few_rows_are_taken_follows_from_their_names():
    rows = [row for n in range(60) for row in example_rows([5] * 12, seed=n)]
    for number, row in enumerate(rows):
        row.example_id = f"row{number}"
    few = calibration.Calibration("", lambda: None, rows).few_rows
    again = calibration.Calibration("", lambda: None, rows[::-1]).few_rows
    names = [row.example_id for row in few]
    assert len(few) == calibration.FEW_ROWS and names == [row.example_id for row in again]
    assert names != [row.example_id for row in rows[: calibration.FEW_ROWS]]
