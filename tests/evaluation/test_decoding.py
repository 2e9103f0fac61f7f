"""Greedy decoding is ours, whatever a model's own generation_config.json asks for: compared with a
plain loop over one row, without padding, cache or `generate`.
"""

import json

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers.generation import logits_process

from kd_utils.evaluation import readiness
from kd_utils.evaluation.generation import generate_answers
from kd_utils.models.loading import load_causal_lm, model_fingerprint, save_model
from kd_utils.tokens.encoding import encode_table

PROMPTS = [
    "Question: Tom has 12 apples.\nAnswer:",
    "Answer:",
    "Question: How many apples has Tom if he buys 30?\n",
]
STEPS = 12

# Values that must change nothing: they are about length, time, sampling, beams, caches and what is
# returned. A model that was made for chat has several of them.
OVERRIDDEN = {
    "sampling": dict(do_sample=True, temperature=5.0, top_p=0.1, top_k=3, min_p=0.2, typical_p=0.3),
    "max_new_tokens": dict(max_new_tokens=5),
    "more tokens": dict(max_new_tokens=300, max_length=400),
    "max_length": dict(max_length=3),
    "least lengths": dict(min_length=900, min_new_tokens=STEPS + 5),
    "max_time": dict(max_time=0.0),
    "stop_strings": dict(stop_strings=["a", "e", " "]),
    "beams": dict(num_beams=3, num_return_sequences=2, early_stopping=True, length_penalty=3.0),
    "beam groups": dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0),
    "contrastive": dict(penalty_alpha=0.6, top_k=4),
    "dola": dict(dola_layers="high"),
    "guidance": dict(guidance_scale=3.0),
    "watermark": dict(watermarking_config={"bias": 20.0}),
    "returned": dict(return_dict_in_generate=True, output_scores=True, output_logits=True),
    "states": dict(return_dict_in_generate=True, output_hidden_states=True, output_attentions=True),
    "no cache": dict(use_cache=False),
    "static cache": dict(cache_implementation="static", max_cache_len=700),
    "quantized cache": dict(cache_implementation="quantized"),
    "prefill": dict(prefill_chunk_size=3),
    "lookup": dict(prompt_lookup_num_tokens=4, num_assistant_tokens=2),
    "early exit": dict(assistant_early_exit=1),
    "healing": dict(token_healing=True),
    "forced": dict(forced_bos_token_id=7, forced_eos_token_id=7, decoder_start_token_id=5),
    "other tokens": dict(pad_token_id=9, bos_token_id=11),
    "numbers": dict(renormalize_logits=True, remove_invalid_values=True),
    "constraints": dict(force_words_ids=[[5]], constraints=["x"]),
    "unknown": dict(chat_format="chatml", max_window_size=3),
    "neutral": dict(repetition_penalty=1, no_repeat_ngram_size=0, bad_words_ids=[]),
}

# Values that count, with the processors of a row of these ids.
HONOURED = {
    "repetition_penalty": (
        dict(repetition_penalty=3),
        lambda ids: [logits_process.RepetitionPenaltyLogitsProcessor(3.0)],
    ),
    "no_repeat_ngram_size": (
        dict(no_repeat_ngram_size=1),
        lambda ids: [logits_process.NoRepeatNGramLogitsProcessor(1)],
    ),
    "suppress_tokens": (
        dict(suppress_tokens=list(range(0, 340, 2))),
        lambda ids: [logits_process.SuppressTokensLogitsProcessor(list(range(0, 340, 2)))],
    ),
    "begin_suppress_tokens": (
        dict(begin_suppress_tokens=list(range(1, 340))),
        lambda ids: [
            logits_process.SuppressTokensAtBeginLogitsProcessor(list(range(1, 340)), len(ids))
        ],
    ),
    "bad_words_ids": (
        dict(bad_words_ids=[[token] for token in range(100, 340)]),
        lambda ids: [
            logits_process.NoBadWordsLogitsProcessor([[token] for token in range(100, 340)])
        ],
    ),
    "sequence_bias": (
        dict(sequence_bias=[[[70], 90.0], [[70, 80], 95.0]]),
        lambda ids: [logits_process.SequenceBiasLogitsProcessor([[[70], 90.0], [[70, 80], 95.0]])],
    ),
}
HONOURED["all, and what is overridden"] = (
    dict(repetition_penalty=1.5, no_repeat_ngram_size=2, suppress_tokens=[4], num_beams=2),
    lambda ids: [
        logits_process.RepetitionPenaltyLogitsProcessor(1.5),
        logits_process.NoRepeatNGramLogitsProcessor(2),
        logits_process.SuppressTokensLogitsProcessor([4]),
    ],
)


@pytest.fixture(scope="module")
def pair():
    tokenizer = tiny_tokenizer(begin=False)
    return tiny_model(tokenizer), tokenizer


def by_hand(model, tokenizer, prompt, processors=lambda ids: [], ends=()):
    ids = tokenizer.encode(prompt)
    start, rules = len(ids), processors(ids)
    for _ in range(STEPS):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[:, -1]
        for rule in rules:
            scores = rule(torch.tensor([ids]), scores)
        ids = [*ids, int(scores.argmax())]
        if ids[-1] in (tokenizer.eos_token_id, *ends):
            break
    text = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text.split("Question:")[0]


@pytest.fixture(scope="module")
def plain(pair):
    return [by_hand(*pair, prompt) for prompt in PROMPTS]


def generated(model, tokenizer, own, batch_size=3):
    """With these values in the model's own generation_config, without any validation."""
    before = dict(vars(model.generation_config))
    vars(model.generation_config).update(own)
    try:
        return generate_answers(
            model,
            tokenizer,
            PROMPTS,
            stop_strings=("Question:",),
            batch_size=batch_size,
            max_new_tokens=STEPS,
        )
    finally:
        vars(model.generation_config).clear()
        vars(model.generation_config).update(before)


@pytest.mark.parametrize("own", OVERRIDDEN.values(), ids=OVERRIDDEN.keys())
def test_whatever_else_the_file_asks_for_answers_are_plain_greedy(pair, plain, own):
    assert generated(*pair, own) == plain and len(set(plain)) == 3


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("key", HONOURED)
def test_penalties_count_for_each_row_without_its_padding(pair, plain, key, batch_size):
    own, processors = HONOURED[key]
    expected = [by_hand(*pair, prompt, processors) for prompt in PROMPTS]
    assert generated(*pair, own, batch_size) == expected
    assert expected != plain


def test_padding_is_no_text_that_was_said(pair):
    """Id 0 pads: to a rule that counted padding, a padded row would have said "0 0" already."""
    own = dict(no_repeat_ngram_size=2, sequence_bias=[[[0], 60.0]])
    expected = [
        by_hand(
            *pair,
            prompt,
            lambda ids: [
                logits_process.SequenceBiasLogitsProcessor(own["sequence_bias"]),
                logits_process.NoRepeatNGramLogitsProcessor(2),
            ],
        )
        for prompt in PROMPTS
    ]
    assert generated(*pair, own) == expected


def test_the_models_own_end_tokens_end_an_answer(pair, plain):
    model, tokenizer = pair
    ids = tokenizer.encode(PROMPTS[0])
    for _ in range(3):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    expected = [by_hand(*pair, prompt, ends=ids[-1:]) for prompt in PROMPTS]
    for own in (ids[-1], ids[-1:], [10**6, ids[-1]]):
        assert generated(*pair, dict(eos_token_id=own)) == expected
    assert expected[0] == tokenizer.decode(ids[-3:]) != plain[0]


@pytest.mark.parametrize(
    "own",
    [
        dict(repetition_penalty=0.0),
        dict(repetition_penalty="strong"),
        dict(no_repeat_ngram_size=1.5),
        dict(bad_words_ids=[5]),
        dict(bad_words_ids=[[10**6]]),
        dict(sequence_bias={"5": 1.0}),
        dict(sequence_bias=[[[5], 1]]),
        dict(suppress_tokens=["a"]),
        dict(begin_suppress_tokens=[[1, 2], [3]]),
        dict(eos_token_id="</s>"),
        dict(eos_token_id=[[2]]),
        dict(encoder_repetition_penalty=1.2),
        dict(encoder_no_repeat_ngram_size=3),
        dict(exponential_decay_length_penalty=[3, 1.2]),
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_followed_is_refused_by_its_key(pair, own):
    model, tokenizer = pair
    before = dict(vars(model.generation_config))
    vars(model.generation_config).update(own)
    try:
        with pytest.raises(
            ValueError, match=f"generation_config.json has {next(iter(own))} = .*correct it there"
        ) as caught:
            readiness.require_ready(model, tokenizer, {})
        assert "\n" not in str(caught.value)
    finally:
        vars(model.generation_config).clear()
        vars(model.generation_config).update(before)


def test_rows_with_a_token_that_the_model_lacks_are_refused(pair, small_table):
    model, tokenizer = pair
    rows = encode_table(tokenizer, small_table)
    readiness.require_ready(model, tokenizer, {"train": rows})
    rows[-1].tokens[1] = 340
    with pytest.raises(
        ValueError, match="the id 340, and LlamaForCausalLM knows the ids below 340"
    ):
        readiness.require_ready(model, tokenizer, {"train": rows[:1], "validation": rows})


@pytest.fixture
def small_table():
    import pandas as pd

    texts = [("1", "Tom has", " 12 apples"), ("2", "Answer:", " positive")]
    return pd.DataFrame(texts, columns=["example_id", "prompt", "answer"])


def test_the_file_and_old_keys_of_the_config_are_read_so_and_are_part_of_the_fingerprint(tmp_path):
    """`max_new_tokens: 5` took GSM8K from 71.7 to 0.0 % in a record."""
    tokenizer, folder = tiny_tokenizer(begin=False), tmp_path / "m"
    model = tiny_model(tokenizer)
    save_model(model, tokenizer, folder)
    expected = [by_hand(model, tokenizer, prompt) for prompt in PROMPTS]
    seen = {model_fingerprint(str(folder))}
    ours, config = folder / "generation_config.json", folder / "config.json"
    for change in (
        dict(max_new_tokens=5),
        dict(max_time=0.001, num_beams=2),
        dict(do_sample=False, temperature=0.6, num_return_sequences=1),
    ):
        ours.write_text(json.dumps(change))
        assert generated(load_causal_lm(str(folder)), tokenizer, {}) == expected
        seen.add(model_fingerprint(str(folder)))
    ours.unlink()
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(max_length=20, num_beams=2)))
    assert generated(load_causal_lm(str(folder)), tokenizer, {}) == expected
    assert len(seen) == 4
    for damaged in ("{", "[1]", '{"num_return_sequences": 2}', '{"max_new_tokens": 0}'):
        ours.write_text(damaged)
        with pytest.raises(ValueError, match="refuses its generation_config.json .*: correct") as e:
            load_causal_lm(str(folder))
        assert "\n" not in str(e.value)
