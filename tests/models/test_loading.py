"""Where models come from, which layers a student keeps, and what is refused before training."""

import errno

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from kd_utils.data import hub
from kd_utils.models.cut.layers import evenly_spaced, keep_layers
from kd_utils.models.devices import amp_dtype, autocast, choose_device
from kd_utils.models.initial.ways import random_weights, some_layers
from kd_utils.models.loading import load_causal_lm, load_tokenizer, model_folder, save_model
from kd_utils.models.signals import forward_signals


@pytest.mark.parametrize(
    "total, indices", [(30, [0, 6, 12, 17, 23, 29]), (4, [0, 1, 2, 3]), (9, [0, 8])]
)
def test_layers_are_first_last_and_evenly_spaced(total, indices):
    model = tiny_llama(layers=total)
    assert evenly_spaced(model, len(indices)) == indices
    with pytest.raises(ValueError, match=f"student_layers = {total + 1}: choose 2 to {total}"):
        evenly_spaced(model, total + 1)


def test_a_student_of_chosen_layers_computes_what_those_layers_compute(tmp_path):
    teacher = tiny_llama(layers=4)
    save_model(teacher, tiny_tokenizer(begin=False), tmp_path / "teacher")
    made = some_layers(str(tmp_path / "teacher"), student_layers=2)
    assert made.config.num_hidden_layers == 2 and made.model.layers[1].self_attn.layer_idx == 1
    for kept, original in ((0, 0), (1, 3)):
        torch.testing.assert_close(
            made.model.layers[kept].state_dict(), teacher.model.layers[original].state_dict()
        )
    ids = torch.randint(3, 97, (2, 6))
    assert forward_signals(made, ids, map_layers=[2]).attentions[2].map().shape == (2, 4, 6, 6)
    assert made.generate(ids, max_new_tokens=3, do_sample=False).shape == (
        2,
        9,
    )  # its cache has two layers


def test_saved_student_loads_without_this_code(tmp_path):
    model = keep_layers(tiny_llama(layers=3), [0, 2])
    ids = torch.randint(3, 97, (1, 5))
    logits = model(ids).logits  # before capture: plain attention
    forward_signals(model, ids)
    save_model(model, tiny_tokenizer(begin=True), tmp_path / "s")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    torch.testing.assert_close(loaded(ids).logits, logits, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "s" / "model.safetensors").is_file()
    assert "sdpa_with_map" not in (tmp_path / "s" / "config.json").read_text()
    assert (
        load_tokenizer(str(tmp_path / "s")).encode("Tom")[0] == 0
    )  # the begin token is still added


def test_random_students_are_alike(tmp_path):
    save_model(tiny_llama(seed=9), tiny_tokenizer(begin=False), tmp_path / "m")
    one = random_weights(str(tmp_path / "m"))
    torch.rand(5)
    two = random_weights(str(tmp_path / "m"))
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, tiny_llama(seed=9).lm_head.weight)
    assert not one.training  # nobody asked for dropout yet
    loaded = load_causal_lm(str(tmp_path / "m"))
    assert torch.equal(loaded.lm_head.weight, tiny_llama(seed=9).lm_head.weight)


def test_a_model_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer(begin=True)
    folder = tmp_path / "students" / "m"
    save_model(model, tokenizer, folder)
    (folder / "of_before").write_text("old")
    save_model(tiny_llama(seed=1), tokenizer, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (
        "of_before" not in before
        and {"model.safetensors", "config.json", "tokenizer.json"} <= before.keys()
    )

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)  # the weights are written by then
    for place in (folder, tmp_path / "students" / "new"):
        with pytest.raises(
            OSError, match="no space left on device while writing students/.*make room"
        ):
            save_model(model, tokenizer, place)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def double_scaling(model):
    model.model.layers[0].self_attn.scaling *= 2


def another_epsilon(model):
    model.config.rms_norm_eps = 0.1  # it was built with another


def a_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.ones(97))  # no config says so


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (double_scaling, "it gives other logits"),
        (another_epsilon, "it gives other logits"),
        (a_bias, "its config has no place for lm_head.bias"),
    ],
)
def test_a_model_that_would_be_loaded_as_another_is_not_saved(tmp_path, change, why):
    model, tokenizer, folder = tiny_llama(), tiny_tokenizer(begin=True), tmp_path / "m"
    save_model(model, tokenizer, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    change(model)
    with pytest.raises(ValueError, match=f"m is not saved: .*LlamaForCausalLM in memory .{why}"):
        save_model(model, tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_saved_as_it_is_after_training_and_stays_so(tmp_path, dtype):
    save_model(tiny_llama(attention_dropout=0.5), tiny_tokenizer(begin=True), tmp_path / "m")
    model = load_causal_lm(str(tmp_path / "m"), dtype=dtype).train()
    forward_signals(model, torch.arange(5)[None])  # which changes how attention is computed
    state = torch.get_rng_state()
    save_model(model, tiny_tokenizer(begin=True), tmp_path / "m")
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert load_causal_lm(str(tmp_path / "m"), dtype=dtype).dtype == dtype


def test_a_head_of_its_own_is_saved_whatever_the_config_says(tmp_path):
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    save_model(model, tiny_tokenizer(begin=True), tmp_path / "m")
    loaded = load_causal_lm(str(tmp_path / "m"))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_missing_and_damaged_folders_and_a_hub_out_of_reach_are_one_line(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no model folder artifacts/nothing: run notebook 01"
    ):
        model_folder("artifacts/nothing", ["*.json"])
    with pytest.raises(
        ConnectionError,
        match="cannot get the model meta-llama/Llama-2-7b-hf from the hub: .*OFFLINE.*"
        "unset HF_HUB_OFFLINE, or name a folder that holds the model",
    ) as caught:
        load_causal_lm("meta-llama/Llama-2-7b-hf")
    assert "\n" not in str(caught.value)
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(ValueError, match="cannot load .*not all in .*safetensors"):
        load_causal_lm(str(folder))
    save_model(tiny_llama(), tiny_tokenizer(begin=True), folder)
    for name, load in (
        ("model.safetensors", load_causal_lm),
        ("config.json", load_causal_lm),
        ("tokenizer.json", load_tokenizer),
    ):
        whole = (folder / name).read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"\x00" * len(whole), b"[1]"):
            (folder / name).write_bytes(damaged)
            with pytest.raises(
                ValueError, match="cannot load .*give a folder that save_pretrained wrote"
            ) as caught:
                load(str(folder))
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(whole)
    weights = load_file(folder / "model.safetensors")
    for count, lacking in (
        (1, "model.norm.weight"),
        (2, "model.layers.1.self_attn.v_proj.weight and 1 more"),
    ):
        save_file(
            {name: weights[name] for name in sorted(weights)[:-count]},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(ValueError, match=f"weights lack {lacking}: give"):
            load_causal_lm(str(folder))
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load"):
        load_causal_lm(str(folder))


def test_tied_weights_are_not_missed(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    save_model(model, tiny_tokenizer(begin=True), tmp_path / "m")
    assert torch.equal(load_causal_lm(str(tmp_path / "m")).lm_head.weight, model.lm_head.weight)


def test_a_cache_that_cannot_be_written_is_no_matter_of_the_network(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "_ask_hub", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(
        ConnectionError, match="cache cannot be written .*No space left.*make room, or set HF_HOME"
    ):
        load_causal_lm("owner/model")


def test_devices_and_precision():
    assert (
        amp_dtype(torch.device("cuda"), "auto")
        == amp_dtype(torch.device("cpu"), "bfloat16")
        == torch.bfloat16
    )
    assert (
        amp_dtype(torch.device("cuda"), "float32")
        == amp_dtype(torch.device("cpu"), "auto")
        == torch.float32
    )
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ValueError, match="sees no GPU here"):
            choose_device("cuda")
    with autocast(torch.device("cpu"), "bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "auto"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
