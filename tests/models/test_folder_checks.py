"""Folders that are not what their user means: a right model, or one line before anything runs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from kd_utils.models import folder_checks
from kd_utils.models.initial.ways import random_weights
from kd_utils.models.loading import load_causal_lm, load_tokenizer, model_fingerprint, save_model

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def folder(tmp_path):
    save_model(tiny_llama(), tiny_tokenizer(begin=True), tmp_path / "m")
    return tmp_path / "m"


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def weights(folder, change=lambda tensors: tensors, file="model.safetensors"):
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / file)


def refused(folder, match):
    with pytest.raises(folder_checks.FolderError, match=match) as caught:
        load_causal_lm(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_an_adapter_is_not_passed_over(folder, file):
    (folder / file).write_text("{}")
    refused(folder, f"holds an adapter .{file}., which is not read: merge it")
    (folder / "config.json").unlink()  # alone, as peft saves it
    (folder / "model.safetensors").unlink()
    refused(folder, "holds an adapter")
    with pytest.raises(ValueError, match="holds an adapter"):
        model_fingerprint(str(folder))
    load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "values, key",
    [
        (dict(num_hidden_layers=1), "model.layers.1.input_layernorm.weight and 8 more"),
        (dict(model_type="olmo", rms_norm_eps=None), "model.layers.0.input_layernorm.weight"),
    ],
    ids=["fewer layers", "another family"],
)
def test_weights_that_the_config_has_no_place_for(folder, values, key):
    """A config of 1 layer over 2 layers of weights gave a model of one layer."""
    edit(folder, **values)
    refused(folder, f"no place for {key}.* of its weights: give the config.json")


@pytest.mark.parametrize(
    "added",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "score.weight",
        "model.mtp.0.weight",
    ],
)
def test_single_weights_without_a_place(folder, added):
    weights(folder, lambda tensors: tensors | {added: torch.ones(32)})
    refused(folder, f"no place for {added} of its weights")


@pytest.mark.parametrize(
    "made",
    [
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.bias",
        "transformer.h.0.attn.attention.bias",
        "transformer.h.0.attn.masked_bias",
        "model.vision_tower.embeddings.weight",
        "multi_modal_projector.linear.weight",
    ],
)
def test_what_a_model_makes_itself_or_does_not_read_text_with_may_be_there(folder, made):
    expected = load_causal_lm(str(folder))(IDS).logits
    weights(folder, lambda tensors: tensors | {made: torch.ones(4)})
    assert torch.equal(load_causal_lm(str(folder))(IDS).logits, expected)


@pytest.mark.parametrize(
    "family, buffer",
    [
        ("gpt_neo", "transformer.h.0.attn.attention.bias"),
        ("gptj", "transformer.h.0.attn.masked_bias"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
    ],
)
def test_old_checkpoints_with_their_masks_load(tmp_path, family, buffer):
    sizes = dict(vocab_size=97, hidden_size=32, num_attention_heads=4, rotary_dim=4)
    layers = {"gpt_neo": dict(num_layers=2, attention_types=[[["global"], 2]], num_heads=4)}
    config = AutoConfig.for_model(
        family, **sizes, **layers.get(family, dict(num_hidden_layers=2, intermediate_size=64))
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    save_model(model, tiny_tokenizer(begin=True), tmp_path / "m")
    weights(tmp_path / "m", lambda tensors: tensors | {buffer: torch.ones(1, 1, 8, 8)})
    torch.testing.assert_close(load_causal_lm(str(tmp_path / "m"))(IDS).logits, model(IDS).logits)


def test_sizes_that_differ_are_named(folder):
    edit(folder, vocab_size=105)
    refused(folder, r"its lm_head.weight is \(97, 32\), and its config asks for \(105, 32\)")


def shards(folder):
    """Two shards with their index, beside the file that was there."""
    names = sorted(load_file(folder / "model.safetensors"))
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = {file: names[half::2] for half, file in enumerate(files)}
    for file, part in parts.items():
        weights(folder, lambda tensors: {name: tensors[name] for name in part}, file)
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def test_weights_of_two_saves_in_one_folder(folder):
    """transformers read the older single file and passed over the newer shards."""
    expected = load_causal_lm(str(folder))(IDS).logits
    shards(folder)
    refused(folder, "holds model.safetensors, which model.safetensors.index.json does not name")
    single = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    assert torch.equal(load_causal_lm(str(folder))(IDS).logits, expected)
    (folder / "model-00003-of-00003.safetensors").write_bytes(single)
    refused(folder, "holds model-00003-of-00003.safetensors, which .* does not name: remove")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "holds model-00001-of-00002.safetensors, which no .*index.json names")
    (folder / "model.safetensors").write_bytes(single)
    refused(folder, "holds model-00001-of-00002.safetensors, which no .*index.json names")


def test_other_files_with_weights_do_no_harm(folder):
    single = (folder / "model.safetensors").read_bytes()
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(single)
    load_causal_lm(str(folder))


@pytest.mark.parametrize("build", [load_causal_lm, random_weights])
def test_what_a_config_wants_returned_changes_nothing(folder, build, tmp_path):
    expected = build(str(folder))(IDS).logits
    edit(folder, return_dict=False, output_attentions=True, output_hidden_states=True)
    model = build(str(folder))
    output = model(IDS)
    assert torch.equal(output.logits, expected)
    assert output.attentions is None and output.hidden_states is None
    save_model(model, tiny_tokenizer(begin=True), tmp_path / "saved")  # transformers refused to


@pytest.mark.parametrize(
    "content, match",
    [
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "pip install sentencepiece protobuf"),
        (b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
    ids=["sentencepiece", "tiktoken"],
)
def test_a_tokenizer_names_the_package_that_it_needs(tmp_path, monkeypatch, content, match):
    monkeypatch.setattr(folder_checks, "find_spec", lambda package: None)
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match=match) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_file_beside_its_model_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_checks, "find_spec", lambda package: None)
    tiny_tokenizer(begin=True).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    load_tokenizer(str(tmp_path))


def test_ids_are_known_by_the_smaller_of_embedding_and_head():
    model = tiny_llama()
    assert folder_checks.known_ids(model) == 97
    model.lm_head = torch.nn.Linear(32, 90, bias=False)
    tokenizer = tiny_tokenizer(begin=True)
    folder_checks.require_known_ids(model, tokenizer, {3, 89})
    folder_checks.require_known_ids(model, tokenizer, set())
    piece = tokenizer.convert_ids_to_tokens(90)
    with pytest.raises(ValueError) as caught:
        folder_checks.require_known_ids(model, tokenizer, {3, 90})
    assert f"gives {piece!r} the id 90, and LlamaForCausalLM knows the ids below 90: choose" in str(
        caught.value
    )
