import json

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd_utils.tokens.encoding import (
    encode_example,
    encode_pair,
    encode_pairs,
    tokenizer_files,
    tokenizer_fingerprint,
)


@pytest.mark.parametrize("begin", [True, False])
def test_encode_pair_splits_the_whole(begin):
    tokenizer = tiny_tokenizer(begin=begin)
    prompt_ids, answer_ids = encode_pair(tokenizer, "Tom has 12 apples.\nAnswer:", " positive")
    assert prompt_ids + answer_ids == tokenizer.encode("Tom has 12 apples.\nAnswer: positive")
    assert (prompt_ids[0] == tokenizer.bos_token_id) is begin
    assert tokenizer.bos_token_id not in answer_ids and tokenizer.decode(answer_ids) == " positive"


def test_encode_pair_follows_the_whole_where_pieces_cross_the_border():
    tokenizer = tiny_tokenizer(begin=False)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12+30=<<12")) == [
        "12",
        "+",
        "30",
        "=<<",
        "12",
    ]
    prompt_ids, answer_ids = encode_pair(tokenizer, "12+30=", "<<12")
    assert prompt_ids == tokenizer.encode("12+30=") and answer_ids == tokenizer.encode("12")


def test_encode_pair_gives_the_prompts_last_spaces_to_the_answer():
    tokenizer = tiny_tokenizer(begin=True)
    assert encode_pair(tokenizer, "Answer: ", "positive") == encode_pair(
        tokenizer, "Answer:", " positive"
    )


def test_encode_pair_refuses_what_cannot_be_scored():
    tokenizer = tiny_tokenizer(begin=False)
    with pytest.raises(ValueError, match="is empty"):
        encode_pair(tokenizer, " ", "positive")
    with pytest.raises(ValueError, match="no token of its own"):
        encode_pair(tokenizer, "Answer:", "")


@pytest.mark.parametrize("begin", [True, False])
def test_many_pairs_are_encoded_as_each_alone_is(begin):
    """Also those whose texts come again, and those that a call to the tokenizer parts."""
    tokenizer = tiny_tokenizer(begin=begin)
    pairs = [(f"{n % 700}+{n}= ", str(n)) for n in range(1500)]
    for (prompt, answer), (prompt_ids, answer_ids) in zip(
        pairs, encode_pairs(tokenizer, pairs), strict=True
    ):
        assert prompt_ids == tokenizer.encode(prompt.rstrip())
        assert prompt_ids + answer_ids == tokenizer.encode(prompt + answer)


def test_a_pair_that_is_wrong_raises_in_its_turn():
    tokenizer = tiny_tokenizer(begin=False)
    encoded = encode_pairs(tokenizer, [("Answer:", " 42"), ("Answer:", ""), ("12+30=", "42")])
    assert next(encoded) == encode_pair(tokenizer, "Answer:", " 42")
    with pytest.raises(ValueError, match="no token of its own after 'Answer:'"):
        next(encoded)


def test_encode_example_ends_with_the_end_token():
    tokenizer = tiny_tokenizer(begin=True)
    prompt_ids, answer_ids = encode_pair(tokenizer, "Answer:", " 42")
    assert encode_example(tokenizer, "Answer:", " 42") == (
        prompt_ids,
        answer_ids + [tokenizer.eos_token_id],
    )
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token.*choose a tokenizer with an eos_token"):
        encode_example(tokenizer, "Answer:", " 42")


def test_fingerprint_follows_the_ids_and_survives_saving(tmp_path):
    tokenizer = tiny_tokenizer(begin=True)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == before
    tokenizer.padding_side, tokenizer.pad_token = "left", "<e>"
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(tiny_tokenizer(begin=False)) != before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_fingerprint_sees_how_digits_are_split():
    tokenizer = tiny_tokenizer(begin=False)
    before = tokenizer_fingerprint(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), backend.pre_tokenizer]
    )
    assert tokenizer_fingerprint(tokenizer) != before


def test_fingerprint_sees_other_merges_of_the_same_pieces():
    tokenizer = tiny_tokenizer(begin=False)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = []
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<e>"
    )
    assert other.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("begin", [True, False])
def test_a_word_after_the_prompt_is_one_piece_in_llama2(shared, begin):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2", add_bos_token=begin)
    prompt_ids, answer_ids = encode_pair(tokenizer, "D. 4\nAnswer:", " B")
    assert tokenizer.convert_ids_to_tokens(answer_ids) == ["▁B"]
    assert (prompt_ids[0] == tokenizer.bos_token_id) is begin
    # Encoded alone, an answer without its space would get one.
    _, answer_ids = encode_pair(tokenizer, "Answer: (", "positive")
    assert tokenizer.convert_ids_to_tokens(answer_ids) == ["pos", "itive"]


def test_real_tokenizers_have_fingerprints_of_their_own(shared):
    names = ("llama2", "mistral", "llama3")
    tokenizers = [AutoTokenizer.from_pretrained(shared / "tokenizers" / name) for name in names]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) == 3


def test_a_folders_tokenizer_files_and_no_others(tmp_path):
    tiny_tokenizer(begin=False).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = tokenizer_files(tmp_path)
    assert set(before) == {"tokenizer.json", "tokenizer_config.json"}
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert tokenizer_files(tmp_path) == before
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_files(tmp_path) != before


def test_a_tokenizer_that_ends_every_text_is_refused_and_a_text_that_ends_so_is_not(shared):
    ends = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2", add_eos_token=True)
    assert ends.encode("a fine film")[-1] == ends.eos_token_id
    with pytest.raises(ValueError, match="ends every text with '</s>': set add_eos_token to false"):
        encode_example(ends, "a fine film\nAnswer:", " positive, I think")
    plain = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2")
    prompt_ids, answer_ids = encode_pair(plain, "what is </s>", " positive")
    assert prompt_ids[-1] == plain.eos_token_id and plain.decode(answer_ids).strip() == "positive"
