import json

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd_utils.tokens import encode_example, encode_pair, require_same_tokenizer, tokenizer_fingerprint


@pytest.mark.parametrize("begin", [True, False])
def test_encode_pair_splits_the_whole(begin):
    tokenizer = tiny_tokenizer(begin=begin)
    prompt_ids, answer_ids = encode_pair(tokenizer, "Tom has 12 apples.\nAnswer:", " positive")
    assert prompt_ids + answer_ids == tokenizer.encode("Tom has 12 apples.\nAnswer: positive")
    assert (prompt_ids[0] == tokenizer.bos_token_id) is begin
    assert tokenizer.bos_token_id not in answer_ids and tokenizer.decode(answer_ids) == " positive"


def test_encode_pair_follows_the_whole_where_pieces_cross_the_border():
    tokenizer = tiny_tokenizer(begin=False)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12+30=<<12")) == ["12", "+", "30", "=<<", "12"]
    prompt_ids, answer_ids = encode_pair(tokenizer, "12+30=", "<<12")
    assert prompt_ids == tokenizer.encode("12+30=") and answer_ids == tokenizer.encode("12")


def test_encode_pair_gives_the_prompts_last_spaces_to_the_answer():
    tokenizer = tiny_tokenizer(begin=True)
    assert encode_pair(tokenizer, "Answer: ", "positive") == encode_pair(tokenizer, "Answer:", " positive")


def test_encode_pair_refuses_what_cannot_be_scored():
    tokenizer = tiny_tokenizer(begin=False)
    with pytest.raises(ValueError, match="is empty"):
        encode_pair(tokenizer, " ", "positive")
    with pytest.raises(ValueError, match="no token of its own"):
        encode_pair(tokenizer, "Answer:", "")


def test_encode_example_ends_with_the_end_token():
    tokenizer = tiny_tokenizer(begin=True)
    prompt_ids, answer_ids = encode_pair(tokenizer, "Answer:", " 42")
    assert encode_example(tokenizer, "Answer:", " 42") == (prompt_ids, answer_ids + [tokenizer.eos_token_id])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
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
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
    assert tokenizer_fingerprint(tokenizer) != before


def test_fingerprint_sees_other_merges_of_the_same_pieces():
    tokenizer = tiny_tokenizer(begin=False)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = []
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<e>")
    assert other.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_other_special_tokens_are_still_the_same_tokenizer():
    teacher, student = tiny_tokenizer(begin=True), tiny_tokenizer(begin=False)
    student.add_special_tokens({"pad_token": "<pad>"})
    require_same_tokenizer(teacher, student)
    require_same_tokenizer(student, teacher)


def test_one_other_piece_is_another_tokenizer():
    student = tiny_tokenizer(begin=False)
    state = json.loads(student.backend_tokenizer.to_str())
    state["model"]["vocab"]["zz"] = state["model"]["vocab"].pop("~")
    teacher = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<e>")
    with pytest.raises(ValueError, match=f"{len(student) - 1} of {len(student)} ids"):
        require_same_tokenizer(teacher, student)


@pytest.mark.parametrize("begin", [True, False])
def test_a_word_after_the_prompt_is_one_piece_in_llama2(shared, begin):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2", add_bos_token=begin)
    prompt_ids, answer_ids = encode_pair(tokenizer, "D. 4\nAnswer:", " B")
    assert tokenizer.convert_ids_to_tokens(answer_ids) == ["▁B"]
    assert (prompt_ids[0] == tokenizer.bos_token_id) is begin
    # Encoded alone, an answer without its space would get one.
    _, answer_ids = encode_pair(tokenizer, "Answer: (", "positive")
    assert tokenizer.convert_ids_to_tokens(answer_ids) == ["pos", "itive"]


def test_real_tokenizers(shared):
    names = ("llama2", "mistral", "llama3")
    llama2, mistral, llama3 = (AutoTokenizer.from_pretrained(shared / "tokenizers" / name) for name in names)
    require_same_tokenizer(llama2, AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2"))
    with pytest.raises(ValueError, match="270 of 32,000 ids stand for the same piece; .* not supported yet"):
        require_same_tokenizer(mistral, llama2)
    with pytest.raises(ValueError, match="of 128,002 ids .* not supported yet"):
        require_same_tokenizer(llama3, llama2)
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in (llama2, mistral, llama3)}) == 3
    # Llama-2's chat models and TinyLlama add tokens of their own behind the same 32,000 pieces.
    chat = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2")
    chat.add_special_tokens({"pad_token": "[PAD]"})
    require_same_tokenizer(llama2, chat)
