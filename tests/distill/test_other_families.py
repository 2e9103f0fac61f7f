"""A teacher and a student without attention maps, from their folders to the loss and its gradient."""

import pytest
import torch
from safetensors.torch import load_file
from small_project import small_project
from transformers import AutoConfig, AutoModelForCausalLM

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.cache.teacher_cache import output_head as cached_head
from kd_utils.config.parameter_files import notebook_config
from kd_utils.distill.batches import collate
from kd_utils.distill.teacher_terms import all_teacher_terms, layers_needed
from kd_utils.distill.training import loss_terms
from kd_utils.models.loading import load_causal_lm, save_model
from kd_utils.models.output_head import output_head, require_known_head
from kd_utils.models.signals import forward_signals
from kd_utils.teacher.preparation import prepare_teacher
from kd_utils.tokens.vocabulary import Vocabulary

FAMILIES = {
    "gptj": dict(n_embd=32, n_head=4, n_layer=2, n_inner=64, rotary_dim=4, n_positions=512),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=8),
}


def save_family(family, tokenizer, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = dict(bos_token_id=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    if (bias := model.get_output_embeddings().bias) is not None:
        torch.nn.init.normal_(bias)  # beside logits that are small
    save_model(model, tokenizer, folder)


@pytest.mark.parametrize("family, signals", [("gptj", "top_k hidden"), ("mamba", "top_k")])
def test_a_student_that_is_its_teacher_is_at_no_distance(tmp_path, family, signals):
    project = small_project(tmp_path, train_rows="sst2:6", validation_rows="sst2:3")
    save_family(family, project.tokenizer, tmp_path / "teacher")
    folder, checks = project.cache(signals=signals, temperature=2.0)
    assert "rows, train" in checks
    hidden = "hidden" in signals
    own = {**project.parameters, "distill_type": "hidden_state" if hidden else "black_box"}
    config, cache = notebook_config("03_train_student", own), TeacherCache(folder)
    student = load_causal_lm(str(tmp_path / "teacher")).train()
    pieces = Vocabulary.of(project.tokenizer)
    terms = all_teacher_terms([cache], student, pieces, config, torch.device("cpu"))
    batch = collate([cache[i] for i in cache.splits["train"]])
    student_signals = forward_signals(student, batch.input_ids, **layers_needed(terms))
    names, head = tuple(config.weights), output_head(student)
    assert require_known_head(student, batch.input_ids) < 1e-6
    values = loss_terms(student_signals, head, batch=batch, terms=names, teachers=terms)
    assert 0 <= values["kd"].item() + 1e-6 < 1e-4 and values["task"].item() > 1
    sum(values.values()).backward()
    assert all(weight.grad is not None for weight in student.get_output_embeddings().parameters())
    if hidden:
        assert cache.manifest["head"] == {"scale": 1.0, "cap": None, "bias": True}
        stored = load_file(folder / "lm_head.safetensors")
        assert torch.equal(stored["bias"], head.bias) and stored.keys() == {"lm_head", "bias"}
        assert torch.equal(cached_head(cache).bias, head.bias)


def test_advice_that_is_followed_already_is_not_given(tmp_path):
    """A teacher whose head is unknown: what is still to change is named, and nothing else."""
    project = small_project(tmp_path, train_rows="sst2:6", validation_rows="sst2:3")
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(project.tokenizer), hidden_size=32, intermediate_size=64)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=4, is_decoder=True)
    encoder = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes))
    save_model(encoder, project.tokenizer, tmp_path / "teacher")
    cache = TeacherCache(project.cache(signals="top_k")[0])
    train = [cache[i] for i in cache.splits["train"]]
    for signals, remedy in (
        ("top_k", "set teacher_epochs to 0"),
        ("top_k hidden", "set teacher_epochs to 0 and signals to 'top_k'"),
    ):
        asked = {**project.parameters, "teacher_epochs": 1, "signals": signals}
        with pytest.raises(ValueError, match=f"^BertLMHeadModel: the output head .*: {remedy}$"):
            prepare_teacher(notebook_config("02_cache_teacher", asked), train, "data")


def test_a_student_without_maps_is_told_before_it_trains(tmp_path):
    project = small_project(tmp_path, train_rows="sst2:6", validation_rows="sst2:3")
    cache = TeacherCache(project.cache(signals="white_box")[0])
    config = notebook_config("03_train_student", {**project.parameters, "distill_type": "combined"})
    for family, why in (
        ("mamba", r"^the student \(mamba\) has no attention heads, so it has no maps: use dist"),
        ("gptj", "^GPTJForCausalLM does not use transformers' attention interface, so its maps "),
    ):
        save_family(family, project.tokenizer, tmp_path / family)
        student, pieces = load_causal_lm(str(tmp_path / family)), Vocabulary.of(project.tokenizer)
        with pytest.raises(ValueError, match=f"{why}[^\n]*'hidden_state' or 'black_box'[^\n]*$"):
            all_teacher_terms([cache], student, pieces, config, torch.device("cpu"))
