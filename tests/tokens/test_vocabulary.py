"""What ids spell: pieces of two vocabularies matched, tokens' ends to the byte, with real
tokenizers and any text.
"""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kd_utils.data.task_rows import load_task
from kd_utils.data.tasks import TASKS
from kd_utils.tokens.alignment import align
from kd_utils.tokens.encoding import encode_example
from kd_utils.tokens.vocabulary import (
    BYTE,
    PIECE,
    SPECIAL,
    Vocabulary,
    byte_ends,
    same_pieces,
    shared_pieces,
)

NAMES = ("llama2", "mistral", "llama3")


@pytest.fixture(scope="module")
def real(shared):
    """name -> (tokenizer, vocabulary)."""
    tokenizers = {
        name: AutoTokenizer.from_pretrained(shared / "tokenizers" / name) for name in NAMES
    }
    return {name: (tokenizer, Vocabulary.of(tokenizer)) for name, tokenizer in tokenizers.items()}


def test_pieces_of_the_three_kinds(real):
    for name, word, newline in (("llama2", "▁film", "<0x0A>"), ("llama3", "Ġfilm", "Ċ")):
        tokenizer, vocabulary = real[name]
        ids = tokenizer.convert_tokens_to_ids([word, newline, tokenizer.eos_token])
        assert [vocabulary.pieces[i] for i in ids] == [b" film", b"\n", b"end"]
        assert [vocabulary.kinds[i] for i in ids] == [
            PIECE,
            BYTE if name == "llama2" else PIECE,
            SPECIAL,
        ]
    assert Vocabulary.from_table(real["mistral"][1].table()) == real["mistral"][1]


def test_vocabularies_of_one_size_share_pieces_under_other_ids(real):
    (_, llama2), (_, mistral), (_, llama3) = real.values()
    assert len(llama2.pieces) == len(mistral.pieces) == 32_000
    both = shared_pieces(mistral, llama2)
    assert len(both.teacher) == 24_184 and (both.teacher == both.student).sum() < 300
    for vocabulary in (mistral, llama3):
        both = shared_pieces(vocabulary, llama2)
        assert (
            len(set(both.teacher.tolist())) == len(set(both.student.tolist())) == len(both.teacher)
        )
        for i, j in zip(both.teacher.tolist(), both.student.tolist()):
            assert vocabulary.pieces[i] == llama2.pieces[j]
        assert [
            (vocabulary.pieces[i], llama2.pieces[j])
            for i, j in zip(both.teacher, both.student)
            if vocabulary.kinds[i] == SPECIAL
        ].count((b"end", b"end")) == 1
        assert not same_pieces(vocabulary, llama2)
    own = shared_pieces(llama3, llama3)
    assert (
        (own.teacher == own.student).all()
        and len(own.teacher) == 128_002
        and same_pieces(llama3, llama3)
    )


def test_special_tokens_may_differ_but_not_the_end():
    pieces, kinds = [b"a", b"b", b"end", b"pad"], [PIECE, PIECE, SPECIAL, SPECIAL]
    whole = Vocabulary(pieces, kinds)
    assert same_pieces(whole, Vocabulary([b"a", b"b", b"end"], kinds[:3]))
    assert same_pieces(whole, Vocabulary([b"a", b"b", b"end", b"begin"], kinds))
    assert not same_pieces(whole, Vocabulary([b"a", b"b", b"pad", b"end"], kinds))
    assert not same_pieces(whole, Vocabulary([b"a", b"c", b"end", b"pad"], kinds))
    assert not same_pieces(whole, Vocabulary([b"a", b"b", b"end", b"pad", b"c"], [*kinds, PIECE]))


def test_a_token_that_both_begins_and_ends_texts_is_the_end():
    """As of GPT-2, GPT-NeoX and OLMo 2: matched with a student's begin token, its mass would never
    reach `</s>`.
    """
    one = tiny_tokenizer(begin=True)
    one.bos_token = one.eos_token
    found = shared_pieces(Vocabulary.of(one), Vocabulary.of(tiny_tokenizer(begin=True)))
    partner = dict(zip(found.teacher.tolist(), found.student.tolist()))
    assert partner[one.eos_token_id] == tiny_tokenizer(begin=True).eos_token_id


def test_tokenizers_that_differ_in_special_tokens_alone_have_the_same_pieces(shared):
    teacher, student = tiny_tokenizer(begin=True), tiny_tokenizer(begin=False)
    student.add_special_tokens({"pad_token": "<pad>"})
    assert same_pieces(Vocabulary.of(teacher), Vocabulary.of(student))
    state = json.loads(student.backend_tokenizer.to_str())
    state["model"]["vocab"]["zz"] = state["model"]["vocab"].pop("~")
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<e>"
    )
    assert not same_pieces(Vocabulary.of(other), Vocabulary.of(student))
    # Llama-2's chat models and TinyLlama add tokens of their own behind the same 32,000 pieces.
    llama2, chat = (
        AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2") for _ in range(2)
    )
    chat.add_special_tokens({"pad_token": "[PAD]"})
    assert same_pieces(Vocabulary.of(llama2), Vocabulary.of(chat))


def ends_of(real, name, text):
    tokenizer, vocabulary = real[name]
    ids = tokenizer.encode(text)
    return ids, byte_ends(tokenizer, vocabulary, text, ids)


def test_ends_by_hand(real):
    text = "Hello  é\n🙂"  # 5 + 2 + 2 + 1 + 4 bytes
    # ▁Hello ▁▁ é <0x0A> <0xF0> <0x9F> <0x99> <0x82>: the leading space is not in the text, the
    # emoji falls apart
    assert ends_of(real, "llama2", text)[1].tolist() == [5, 7, 9, 10, 11, 12, 13, 14]
    # Hello Ġ Ġé Ċ and the emoji in two: a character cut between tokens
    assert ends_of(real, "llama3", text)[1].tolist() == [5, 6, 9, 10, 12, 14]
    # The character that stands for a space, in the text itself: the tokenizer's own offsets
    ids, ends = ends_of(real, "llama2", "a▁b")
    assert ends[-1] == 5 and (np.diff(ends, prepend=0) >= 0).all() and len(ids) == len(ends)
    assert [ends_of(real, name, "")[1].tolist() for name in NAMES] == [[], [], []]


def check(real, text):
    """Ends are in order, whole, and groups of any two sides agree; of one side with itself they are
    single.
    """
    sides = {name: ends_of(real, name, text)[1] for name in NAMES}
    for name, ends in sides.items():
        assert (np.diff(ends, prepend=0) >= 0).all() and (
            not len(ends) or ends[-1] == len(text.encode())
        )
    for a in NAMES:
        for b in NAMES:
            found = align(sides[a], sides[b])
            assert (sides[a][found.teacher] == sides[b][found.student]).all()
            assert a != b or found.single.all()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
@example("<s>a</s><|end_of_text|>")
@example("a▁b ▁")
@example("\u0301e\u200d👩🏽‍🚀\r\n\t  ")
def test_any_text_is_lined_up(real, text):
    check(real, text)


@pytest.fixture(scope="module")
def beginning(shared):
    """As `real`, with a begin token before every text, as the hub's own files have it."""
    tokenizers = {
        name: AutoTokenizer.from_pretrained(shared / "tokenizers" / name, add_bos_token=True)
        for name in NAMES
    }
    return {name: (tokenizer, Vocabulary.of(tokenizer)) for name, tokenizer in tokenizers.items()}


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60))
@example(" a▁b ▁")
def test_any_text_is_lined_up_behind_a_begin_token_on_either_side(real, beginning, text):
    check(beginning, text)
    for name in NAMES:
        (ids, without), (begun, behind) = (ends_of(side, name, text) for side in (real, beginning))
        assert begun == [beginning[name][0].bos_token_id, *ids] and behind.tolist() == [0, *without]
        if without[0] > 0:  # else it is paired with the dummy space, which has no bytes either
            found = align(behind, without)  # the begin token joins the first group
            assert found.teacher.tolist() == (found.student + 1).tolist() and found.teacher[
                -1
            ] == len(ids)


@pytest.mark.parametrize("task", TASKS)
def test_every_tenth_real_row_is_lined_up(shared, real, task):
    _rows_are_lined_up(shared, real, task, step=10)


@pytest.mark.parametrize("task", TASKS)
def test_every_real_row_is_lined_up(shared, real, task):
    _rows_are_lined_up(shared, real, task, step=1)


def _rows_are_lined_up(shared, real, task, step):
    """Prompt and answer as trained on, with the end token behind."""
    folder = shared / "data"
    for path in sorted((folder / task).glob("*.parquet")):
        table = load_task(task, path.stem.split("-")[0], data_dir=folder)
        for prompt, answer in zip(table["prompt"][::step], table["answer"][::step]):
            sides = []
            for tokenizer, vocabulary in real.values():
                prompt_ids, answer_ids = encode_example(tokenizer, prompt, answer)
                ends = byte_ends(tokenizer, vocabulary, prompt + answer, prompt_ids + answer_ids)
                assert ends[len(prompt_ids) - 1] == len(
                    prompt.rstrip().encode()
                )  # there a group ends, too
                sides.append(ends)
            for ends in sides[1:]:
                found = align(ends, sides[0])
                assert (ends[found.teacher] == sides[0][found.student]).all()
                assert (found.teacher[-1], found.student[-1]) == (len(ends) - 1, len(sides[0]) - 1)


def test_a_begin_token_has_no_bytes_and_joined_tokens_are_refused():
    tokenizer = tiny_tokenizer(begin=True)
    vocabulary = Vocabulary.of(tokenizer)
    ids = tokenizer.encode("Answer: positive")
    ends = byte_ends(tokenizer, vocabulary, "Answer: positive", ids)
    assert ends[0] == 0 and ends[-1] == 16
    with pytest.raises(ValueError, match="joined into one token"):
        byte_ends(tokenizer, vocabulary, "Answer: positive", ids[:-1])


def test_runs_of_spaces_that_were_added_spell_spaces_where_pieces_do(real):
    """Gemma adds its runs of spaces as tokens, in the spelling of its pieces."""
    backend = Tokenizer.from_str(real["llama2"][0].backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("\u2581" * 20, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert (
        Vocabulary.of(tokenizer).pieces[32_000]
        == b" " * 20
        == tokenizer.decode([450, 32_000])[-20:].encode()
    )


def test_a_large_number_of_added_tokens_is_looked_at_once(real, monkeypatch):
    tokenizer, looks = real["llama3"][0], []
    added = type(tokenizer).added_tokens_decoder.fget
    monkeypatch.setattr(
        type(tokenizer),
        "added_tokens_decoder",
        property(lambda self: looks.append(1) or added(self)),
    )
    Vocabulary.of(tokenizer)
    assert len(looks) < 10


class Offsets:
    """A tokenizer that says of a text what it was told to: (id, first character, last character) of
    each token.
    """

    all_special_ids: list[int] = []

    def __init__(self, *tokens):
        self.tokens = tokens

    def __call__(self, text, return_offsets_mapping):
        return {
            "input_ids": [token for token, _, _ in self.tokens],
            "offset_mapping": [(first, last) for _, first, last in self.tokens],
        }


@pytest.mark.parametrize(
    ("text", "tokens", "ends"),
    [
        # A space and a part of a character, then the rest of the character: both cut tokens end
        # where nothing ended yet.
        (
            "open \U0001fae0 now",
            [(0, 0, 4), (1, 4, 6), (2, 5, 6), (3, 5, 6), (4, 6, 10)],
            [4, 4, 4, 9, 13],
        ),
        # Composed by a normaliser: the offset of its character stops before the mark that was
        # composed with it.
        ("cafe\u0301 x", [(0, 0, 2), (1, 2, 4), (2, 5, 7)], [2, 6, 8]),
        # Not composed: the mark is a token of its own.
        ("cafe\u0301 x", [(0, 0, 2), (1, 2, 4), (2, 4, 5), (3, 5, 7)], [2, 4, 6, 8]),
    ],
)
def test_ends_by_offsets_close_no_group_inside_a_character(text, tokens, ends):
    nothing = Vocabulary([b"?"] * 5, [PIECE] * 5)
    assert (
        byte_ends(Offsets(*tokens), nothing, text, [token for token, _, _ in tokens]).tolist()
        == ends
    )
