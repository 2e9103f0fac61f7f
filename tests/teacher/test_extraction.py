"""The teacher: fingerprints by content, fine-tuned once, signals the same in any batch."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tiny import example_rows, late_copy, tiny_llama, tiny_model, tiny_tokenizer
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from kd_utils.config.parameter_files import notebook_config
from kd_utils.models.loading import model_fingerprint, save_model
from kd_utils.models.signal_kinds import columns_of
from kd_utils.teacher import extraction, preparation
from kd_utils.teacher.extraction import cached_layers, signal_function
from kd_utils.teacher.preparation import prepare_teacher
from kd_utils.tokens.encoding import encode_table

TABLE = pd.DataFrame(
    {
        "example_id": ["a", "b"],
        "prompt": ["Tom has 12 apples.\nAnswer:", "buys 30\nAnswer:"],
        "answer": [" 42", " positive"],
    }
)


ROWS = encode_table(tiny_tokenizer(begin=False), TABLE)


@pytest.fixture
def base(tmp_path):
    tokenizer = tiny_tokenizer(begin=False)
    save_model(tiny_model(tokenizer), tokenizer, tmp_path / "base")
    return tmp_path / "base"


def config_for(base, **changes):
    values = {
        "name": "t",
        "artifacts_dir": str(base.parent / "artifacts"),
        "teacher": str(base),
        "teacher_epochs": 2,
        "teacher_batch_size": 2,
        **changes,
    }
    return notebook_config("02_cache_teacher", values)


def test_rows_end_with_the_end_token_and_know_where_the_answer_starts():
    tokenizer = tiny_tokenizer(begin=True)
    first, second = encode_table(tokenizer, TABLE)
    assert first.tokens[-1] == tokenizer.eos_token_id and first.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(first.tokens[first.answer_start : -1]) == " 42"
    assert tokenizer.decode(second.tokens[second.answer_start : -1]) == " positive"


@pytest.mark.parametrize("signals", ["white_box", "top_k"])
def test_rows_wait_for_their_copies_in_whatever_order_they_are_read(signals, monkeypatch):
    run = signal_function(tiny_llama(), signals=signals, top_k=5, temperatures=[1.0, 2.0])
    batches = [example_rows([4 + k, 9], seed=k) for k in range(5)]
    expected = [list(run(batch)) for batch in batches]
    monkeypatch.setattr("kd_utils.models.devices.HostCopy", late_copy())
    started = [run(batch) for batch in batches]  # all copies are under way
    for k in (3, 0, 4, 1, 2):
        for row, wanted in zip(started[k], expected[k], strict=True):
            for column, array in row.signals.items():
                np.testing.assert_array_equal(array, wanted.signals[column])


@pytest.mark.parametrize("signals", ["white_box", "top_k"])
def test_signals_do_not_depend_on_the_batch(signals):
    run = signal_function(tiny_llama(), signals=signals, top_k=5, temperatures=[1.0, 2.0])
    rows = example_rows([4, 9, 6])
    for together, row in zip(run(rows), rows):
        [alone] = run([row])
        for field in dataclasses.fields(row):
            one, other = getattr(together, field.name), getattr(alone, field.name)
            if isinstance(one, np.ndarray) and field.name != "top_ids":
                np.testing.assert_allclose(one, other, atol=2e-3)


def test_fingerprint_follows_the_weights_and_the_config(base, tmp_path):
    before = model_fingerprint(str(base))
    assert model_fingerprint(str(base)) == before
    save_model(tiny_model(tiny_tokenizer(begin=False), seed=1), tiny_tokenizer(begin=False), base)
    assert model_fingerprint(str(base)) != before
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no .*safetensors"):
        model_fingerprint(str(tmp_path / "none"))


def test_a_teacher_is_fine_tuned_once_and_again_when_something_changes(base, monkeypatch):
    name, history = prepare_teacher(config_for(base), ROWS, "data")
    assert history["epoch"].tolist() == [1, 2] and history["train_loss"].is_monotonic_decreasing
    tuned = model_fingerprint(name)
    assert tuned != model_fingerprint(str(base))

    def never(steps):
        raise AssertionError("trained again")

    again, same = prepare_teacher(config_for(base), ROWS, "data", progress=never)
    assert again == name and same["train_loss"].tolist() == pytest.approx(
        history["train_loss"].tolist()
    )
    for changed in ({"teacher_seed": 1}, {"teacher_prompt_weight": 0.3}):
        assert prepare_teacher(config_for(base, **changed), ROWS, "data")[0] != name
    assert prepare_teacher(config_for(base), ROWS, "other data")[0] != name
    monkeypatch.setattr(
        preparation.manifest, "cache_code", lambda: {"kd_utils/training.py": "other"}
    )
    assert prepare_teacher(config_for(base), ROWS, "data")[0] != name


def test_a_tuned_teacher_is_used_again_only_if_no_byte_of_it_changed(base):
    name, _ = prepare_teacher(config_for(base), ROWS, "data")
    folder = base.parent / "artifacts" / "teachers" / name.rsplit("/", 1)[-1]
    before, damaged = model_fingerprint(name), []
    for path in sorted(folder.iterdir()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        prepare_teacher(
            config_for(base),
            ROWS,
            "data",
            progress=lambda steps: damaged.append(path.name) or steps,
        )
        assert model_fingerprint(name) == before
    assert (
        damaged == sorted(path.name for path in folder.iterdir()) and "model.safetensors" in damaged
    )
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_two_processes_do_not_fine_tune_one_teacher(base):
    def second(steps):
        with pytest.raises(
            ValueError,
            match=r"in use by a fine-tuning run \(process \d+ on .*: wait for it, or stop it",
        ):
            prepare_teacher(config_for(base), ROWS, "data")
        return steps

    prepare_teacher(config_for(base), ROWS, "data", progress=second)
    assert len(list((base.parent / "artifacts" / "teachers").iterdir())) == 1


def test_a_row_that_cannot_be_encoded_is_named():
    table = TABLE.assign(prompt=["Tom has", "  "])
    with pytest.raises(ValueError, match="^train.parquet, row b: the prompt before .* is empty"):
        encode_table(tiny_tokenizer(begin=False), table, "train.parquet")


def test_without_epochs_the_teacher_is_taken_as_it_comes(base):
    name, history = prepare_teacher(config_for(base, teacher_epochs=0), ROWS, "data")
    assert name == str(base) and history.empty


@pytest.mark.parametrize(
    "changes, layers",
    [
        ({}, {"hidden": [8], "attention": [8]}),
        (
            {"hidden_layers": "random", "paired_layers": 4},
            {"hidden": [2, 4, 6, 8], "attention": [8]},
        ),
        (
            {"hidden_layers": "3:1", "attention_layers": "2:1 5:9"},
            {"hidden": [3, 8], "attention": [2, 5]},
        ),
        ({"signals": "top_k", "hidden_layers": "uniform"}, {"hidden": [], "attention": []}),
    ],
)
def test_a_cache_holds_the_layers_that_are_compared_and_the_last_hidden_state(changes, layers):
    config = notebook_config("02_cache_teacher", changes)
    found = cached_layers(config, tiny_llama(layers=8))
    assert found == layers
    columns = columns_of(config.signals, found, 8, "uint8")
    columns = {column: dtype for column, (_, _, dtype) in columns.items()}
    if changes.get("signals") == "top_k":
        assert list(columns) == ["top_logits", "top_ids", "log_mass"]
    else:
        assert columns["hidden"] == "float16" and columns.get("attention", "uint8") == "uint8"
        assert len(columns) == len(layers["hidden"]) + len(layers["attention"])


def test_a_generation_config_counts_as_it_changes_answers(base):
    before = model_fingerprint(base)
    path = base / "generation_config.json"
    path.write_text('{"repetition_penalty": 1.8}')
    assert model_fingerprint(base) != before
    path.unlink(missing_ok=True)


def test_the_teachers_accuracy_is_of_the_caches_own_setting(base):
    """Of another longest answer it is another accuracy, so the cache is another one too."""
    tokenizer = tiny_tokenizer(begin=False)
    held_out = pd.DataFrame({"task": ["sst2", "mmlu", "sst2"]})
    prepared = SimpleNamespace(
        data_hash="d", tokenizer_fingerprint="s", max_length=64, held_out=held_out
    )
    model = tiny_model(tokenizer)
    headers = [
        extraction.cache_header(
            config_for(base, max_new_tokens=longest),
            prepared,
            str(base),
            "b",
            "t",
            model,
            tokenizer,
            {"held_out_accuracy/sst2": 0.5},
        )
        for longest in (2, 24, 24)
    ]
    assert headers[0]["teacher_accuracy"] == {
        "held_out_accuracy/sst2": 0.5,
        "held_out_rows/sst2": 2,
        "held_out_rows/mmlu": 1,
    }
    assert headers[0]["key"] != headers[1]["key"] == headers[2]["key"]
    assert headers[0]["base_fingerprint"] == "b" and headers[0]["key"]["teacher"] == "t"


def test_more_top_logits_than_there_are_is_one_line():
    with pytest.raises(
        ValueError,
        match="top_k = 128, but the teacher's vocabulary has 97 tokens: set top_k to 97 or",
    ):
        signal_function(tiny_llama(), signals="top_k", top_k=128, temperatures=[1.0])


def test_a_model_that_sees_pictures_too_gives_its_texts_signals():
    text = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96
        )
    ).eval()
    layers = cached_layers(notebook_config("02_cache_teacher", {"name": "t"}), model)
    assert layers == {"hidden": [2], "attention": [2]}
    [row] = signal_function(model, signals="white_box", layers=layers)(example_rows([5]))
    assert row.signals["hidden"].shape == (5, 32) and row.signals["attention"].shape == (4, 15)
