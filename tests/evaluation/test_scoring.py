import shutil
import warnings

import pandas as pd
import pyarrow.parquet
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer, write_task_files

from kd_utils.data.task_rows import load_task
from kd_utils.evaluation import readiness
from kd_utils.evaluation.replies import choice_loglikelihoods
from kd_utils.evaluation.scoring import (
    accuracies,
    evaluate,
    evaluate_folder,
)
from kd_utils.tokens.encoding import encode_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_task_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def table(folder):
    parts = [
        load_task("gsm8k", "train", data_dir=folder),
        load_task("mmlu", "test", data_dir=folder, num_fewshot=1),
        load_task("sst2", "train", data_dir=folder),
        load_task("mmlu", "test", data_dir=folder),
    ]
    return pd.concat(parts, ignore_index=True).sample(
        frac=1, random_state=0
    )  # tasks mixed, index not in order


@pytest.fixture(scope="module", params=[True, False], ids=["begin", "no-begin"])
def pair(request):
    tokenizer = tiny_tokenizer(begin=request.param)
    return tiny_model(tokenizer), tokenizer


def one_by_one(model, tokenizer, prompt, choice):
    """The definition: sum over the choice's tokens of ln p(token | all before it), without batch or
    shared pass.
    """
    prompt_ids, choice_ids = encode_pair(tokenizer, prompt, choice)
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt_ids + choice_ids])).logits[0].log_softmax(-1)
    return sum(
        float(log_probs[len(prompt_ids) - 1 + place, token])
        for place, token in enumerate(choice_ids)
    )


@pytest.mark.parametrize("batch_size, side", [(1, "left"), (3, "right"), (64, "left")])
def test_loglikelihoods_equal_the_definition_at_any_batch_size(pair, table, batch_size, side):
    model, tokenizer = pair
    tokenizer.padding_side = side
    predictions = evaluate(model, tokenizer, table, batch_size=batch_size, max_new_tokens=4)
    lengths = set()
    for row, predicted in zip(table.itertuples(), predictions.itertuples(), strict=True):
        assert (predicted.example_id, predicted.task, predicted.prompt) == (
            row.example_id,
            row.task,
            row.prompt,
        )
        if row.task != "gsm8k":
            expected = [one_by_one(model, tokenizer, row.prompt, choice) for choice in row.choices]
            assert predicted.loglikelihoods == pytest.approx(expected, abs=1e-4)
            assert predicted.prediction == str(expected.index(max(expected)))
            assert predicted.correct == (predicted.prediction == row.gold)
            lengths |= {
                len(encode_pair(tokenizer, row.prompt, choice)[1]) for choice in row.choices
            }
    assert len(lengths) > 1, "with choices of one length only, a wrong slice would not be seen"
    assert tokenizer.padding_side == side


def test_columns_and_what_does_not_apply(pair, table):
    predictions = evaluate(*pair, table, batch_size=4, max_new_tokens=4)
    said = "prediction correct loglikelihoods generated correct_flexible"
    assert " ".join(predictions.columns) == f"example_id task prompt gold {said}"
    assert predictions["correct"].dtype == bool
    for row in predictions.itertuples():
        if row.task == "gsm8k":
            assert row.loglikelihoods is None and isinstance(row.generated, str)
            assert row.correct_flexible in (True, False)
        else:
            assert row.generated is None and row.correct_flexible is None
            assert all(type(value) is float and value < 0 for value in row.loglikelihoods)


def test_one_letter_choices_share_one_pass(pair, folder):
    model, tokenizer = pair
    mmlu = load_task("mmlu", "test", data_dir=folder)
    rows = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    evaluate(model, tokenizer, mmlu, batch_size=2)
    hook.remove()
    assert rows == [2, 2, 1]  # five questions of four choices


def test_continuations_that_end_one_text_share_one_pass_each_with_its_own_tokens(pair, folder):
    model, tokenizer = pair
    table = load_task("sst2", "train", data_dir=folder).iloc[:2]
    table = table.assign(
        prompt=["Answer:", "Answer: positive"], choices=[[" positive negative"], [" negative"]]
    )
    both, last = choice_loglikelihoods(model, tokenizer, table, batch_size=4)
    assert both == pytest.approx(
        [one_by_one(model, tokenizer, "Answer:", " positive negative")], abs=1e-4
    )
    assert last == pytest.approx(
        [one_by_one(model, tokenizer, "Answer: positive", " negative")], abs=1e-4
    )


def test_no_length_normalisation_and_the_first_wins_a_tie(folder):
    tokenizer = tiny_tokenizer(begin=False)
    model = tiny_model(tokenizer)
    model.lm_head.weight.data.zero_()  # every token equally likely: ln p = -ln V each
    example = load_task("sst2", "train", data_dir=folder).iloc[:1]
    example = example.assign(choices=[[" positive positive", " negative", " positive"]], gold="1")
    [row] = evaluate(model, tokenizer, example, batch_size=4).itertuples()
    lengths = [
        len(encode_pair(tokenizer, row.prompt, choice)[1]) for choice in example["choices"].iloc[0]
    ]
    uniform = torch.log(torch.tensor(float(len(tokenizer)))).item()
    assert row.loglikelihoods == pytest.approx([-uniform * length for length in lengths], rel=1e-5)
    assert row.prediction == str(lengths.index(min(lengths)))
    mmlu = load_task("mmlu", "test", data_dir=folder)
    assert evaluate(model, tokenizer, mmlu, batch_size=4)["prediction"].tolist() == ["0"] * 5


def test_too_long_a_prompt_is_cut_on_the_left_with_a_warning(folder):
    tokenizer = tiny_tokenizer(begin=True)
    model = tiny_model(tokenizer, context=24)
    table = load_task("sst2", "train", data_dir=folder).iloc[:1]
    with pytest.warns(UserWarning, match="2 sequences have more than the model's 24 tokens"):
        [scores] = choice_loglikelihoods(model, tokenizer, table, batch_size=4)
    for choice, score in zip(table["choices"].iloc[0], scores):
        prompt_ids, choice_ids = encode_pair(tokenizer, table["prompt"].iloc[0], choice)
        ids = (prompt_ids + choice_ids)[-25:]  # 24 are read, the last is only predicted
        with torch.no_grad():
            log_probs = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        expected = sum(
            float(log_probs[len(ids) - 1 - len(choice_ids) + place, token])
            for place, token in enumerate(choice_ids)
        )
        assert score == pytest.approx(expected, abs=1e-4)


def test_the_models_mode_comes_back_and_dropout_is_off(folder):
    tokenizer = tiny_tokenizer(begin=True)
    model = tiny_model(tokenizer)
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
    table = load_task("sst2", "train", data_dir=folder)
    expected = evaluate(model, tokenizer, table, batch_size=2)["loglikelihoods"].tolist()
    model.train()
    assert evaluate(model, tokenizer, table, batch_size=2)["loglikelihoods"].tolist() == expected
    assert model.training
    model(
        input_ids=torch.tensor([tokenizer.encode("a")])
    ).logits.sum().backward()  # still trains afterwards


def test_bad_calls(pair, table):
    with pytest.raises(ValueError, match="batch_size = 0"):
        evaluate(*pair, table, batch_size=0)
    model = tiny_model(pair[1])
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="log-likelihood is not a number"):
        evaluate(model, pair[1], table, batch_size=4, max_new_tokens=2)


def test_accuracies():
    predictions = pd.DataFrame(
        {
            "task": ["sst2"] * 3 + ["gsm8k"] * 2,
            "correct": [True, True, False, False, False],
            "correct_flexible": [None, None, None, True, False],
        }
    )
    assert accuracies(predictions) == {
        "validation_accuracy": 0.4,
        "validation_accuracy/macro": pytest.approx(1 / 3),
        "validation_accuracy/sst2": pytest.approx(2 / 3),
        "validation_accuracy/gsm8k": 0.0,
        "validation_accuracy/gsm8k_flexible": 0.5,
    }
    with pytest.raises(ValueError, match="no predictions"):
        accuracies(predictions.iloc[:0])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer(begin=True)
    tiny_model(tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_evaluate_folder_writes_a_row_per_example(model_dir, folder, tmp_path):
    out = tmp_path / "mmlu.parquet"
    evaluate_folder(model_dir, "mmlu", "test", out, data_dir=folder, limit=1, num_fewshot=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mmlu.parquet"]
    schema = pyarrow.parquet.read_schema(out)
    assert schema.names == ["row", "prompt", "gold", "prediction", "correct", "loglikelihoods"]
    assert str(schema.field("loglikelihoods").type) == "list<element: double>"
    written = pd.read_parquet(out)
    assert written["row"].tolist() == [0, 2] and written["gold"].tolist() == [1, 0]
    assert written["correct"].tolist() == (written["gold"] == written["prediction"]).tolist()
    out = tmp_path / "gsm8k.parquet"
    evaluate_folder(model_dir, "gsm8k", "train", out, data_dir=folder, max_new_tokens=4)
    written = pd.read_parquet(out)
    assert written.columns.tolist() == [
        "row",
        "prompt",
        "gold",
        "prediction",
        "correct",
        "generated",
        "correct_flexible",
    ]
    assert written["gold"].tolist() == ["5", "1,200", "9"]


def test_evaluate_folder_refuses_before_it_loads_the_model(model_dir, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model in .*config.json is missing"):
        evaluate_folder(tmp_path, "sst2", "train", tmp_path / "o.parquet", data_dir=folder)
    with pytest.raises(FileNotFoundError, match="cannot write .*a file in a folder that exists"):
        evaluate_folder(model_dir, "sst2", "train", tmp_path / "no" / "o.parquet", data_dir=folder)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no file .*test.parquet"):
        evaluate_folder(tmp_path, "sst2", "test", tmp_path / "o.parquet", data_dir=folder)
    with pytest.raises(ValueError, match="no causal model with its tokenizer"):
        evaluate_folder(tmp_path, "sst2", "train", tmp_path / "o.parquet", data_dir=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def with_forward(forward):
    """A model of a family whose forward is this one around Llama's."""
    tokenizer = tiny_tokenizer(begin=True)
    model, plain = tiny_model(tokenizer), tiny_model(tokenizer)
    kind = type("OtherForCausalLM", (type(model),), {"forward": forward})
    model.__class__ = kind
    model.llama = [plain]  # in a list: no part of the model
    return model, plain, tokenizer


def all_logits(self, input_ids, use_cache=None):
    return self.llama[0](input_ids)


def ignores_what_to_keep(self, input_ids, logits_to_keep=0, **kwargs):
    return self.llama[0](input_ids, **kwargs)


def last_ones(self, input_ids, logits_to_keep=0, **kwargs):
    count = len(logits_to_keep) if torch.is_tensor(logits_to_keep) else logits_to_keep
    return self.llama[0](input_ids, logits_to_keep=count, **kwargs)


def too_few(self, input_ids, **kwargs):
    output = self.llama[0](input_ids)
    output.logits = output.logits[:, 1:]
    return output


def too_narrow(self, input_ids, **kwargs):
    output = self.llama[0](input_ids)
    output.logits = output.logits[:, :, :-1]
    return output


@pytest.mark.parametrize("forward", [all_logits, ignores_what_to_keep])
def test_a_model_that_cannot_leave_out_positions_is_read_at_the_right_ones(folder, forward):
    """Their first rows were read: 32 of 60 predictions were wrong, with status 0."""
    model, plain, tokenizer = with_forward(forward)
    table = load_task("sst2", "train", data_dir=folder)
    scores = choice_loglikelihoods(model, tokenizer, table, batch_size=3)
    for row, values in zip(table.itertuples(), scores, strict=True):
        expected = [one_by_one(plain, tokenizer, row.prompt, choice) for choice in row.choices]
        assert values == pytest.approx(expected, abs=1e-4)
    readiness.require_causal(model, tokenizer, tokenizer.encode("Tom has 12 apples"))


@pytest.mark.parametrize("forward", [too_few, too_narrow])
def test_logits_of_another_shape_are_refused(folder, forward):
    model, _, tokenizer = with_forward(forward)
    table = load_task("sst2", "train", data_dir=folder)
    with pytest.raises(ValueError, match="OtherForCausalLM's logits are .* were expected"):
        choice_loglikelihoods(model, tokenizer, table, batch_size=3)


def sees_what_follows(self, input_ids, **kwargs):
    return self.llama[0](input_ids.flip(1), **kwargs)


@pytest.mark.parametrize(
    "forward, told",
    [
        (last_ones, "gives scores of other positions than it is asked for"),
        (sees_what_follows, "sees tokens that come later"),
    ],
)
def test_scores_of_other_positions_are_refused_although_their_shape_is_right(forward, told):
    model, _, tokenizer = with_forward(forward)
    for text in ("Tom has 12 apples", "a", "aa"):
        with pytest.raises(ValueError, match=f"OtherForCausalLM {told}.*: choose another"):
            readiness.require_causal(model, tokenizer, tokenizer.encode(text))


@pytest.mark.parametrize("decoder", [True, False])
def test_a_bert_is_causal_only_as_a_decoder(decoder):
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(begin=True)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config = BertConfig(
        vocab_size=len(tokenizer), is_decoder=decoder, initializer_range=0.3, **sizes
    )
    model, ids = BertLMHeadModel(config).eval(), tokenizer.encode("Tom has 12 apples")
    if decoder:
        readiness.require_causal(model, tokenizer, ids)
    else:
        with pytest.raises(ValueError, match="BertLMHeadModel sees tokens that come later"):
            readiness.require_causal(model, tokenizer, ids)


def test_tokens_beyond_the_models_are_refused_before_the_first_pass(pair, table):
    tokenizer = pair[1]
    model = tiny_model(tokenizer)
    model.resize_token_embeddings(270)  # the pieces of several bytes have higher ids
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    for task in ("sst2", "gsm8k"):
        with pytest.raises(ValueError, match=r"gives .* the id \d+, and Llama.* the ids below 270"):
            evaluate(model, tokenizer, table[table["task"] == task], batch_size=4)


def test_a_context_length_is_where_the_model_has_it(pair):
    from transformers import Gemma3Config, MambaConfig, MptConfig

    from kd_utils.evaluation.generation import context_length

    tokenizer = pair[1]
    for config, expected in (
        (pair[0].config, 512),
        (Gemma3Config(text_config={"max_position_embeddings": 300}), 300),
        (MptConfig(max_seq_len=70), 70),
        (MambaConfig(), 2048),
    ):
        model = type("Model", (), {"config": config})
        assert context_length(model, tokenizer) == expected
    tokenizer.model_max_length, known = 90, tokenizer.model_max_length
    assert context_length(model, tokenizer) == 90
    tokenizer.model_max_length = known


def test_a_chat_template_that_is_not_used_is_said(model_dir, folder, tmp_path):
    out, place = tmp_path / "o.parquet", tmp_path / "m"
    shutil.copytree(model_dir, place)
    (place / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.warns(UserWarning, match="has a chat template, which is not used") as said:
        evaluate_folder(place, "sst2", "train", out, data_dir=folder)
    assert [str(one.message) for one in said] == [
        f"{place} has a chat template, which is not used: prompts are plain text"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_folder(model_dir, "sst2", "train", out, data_dir=folder)
