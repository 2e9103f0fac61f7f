"""Shares of tokens, groups and probability by hand."""

import numpy as np
import pytest
import torch

from kd_utils.cache.coverage import shared_mass, token_agreement
from kd_utils.tokens.encoding import Example
from kd_utils.tokens.vocabulary import PIECE, SharedPieces, Vocabulary, shared_output_rows


def example(tokens, ends):
    return Example("x", np.array(tokens, np.int32), 1, np.array(ends, np.int32))


def test_agreement_by_hand():
    vocabularies = (
        Vocabulary([b"ab", b"c", b"x"], [PIECE] * 3),
        Vocabulary([b"c", b"a", b"b"], [PIECE] * 3),
    )
    teacher = [example([0, 1, 1], [2, 3, 4]), example([2, 1], [1, 2])]  # ab c c; x c
    student = [example([1, 2, 0, 0], [1, 2, 3, 4]), example([0, 0], [1, 2])]  # a b c c
    table = token_agreement(teacher, student, vocabularies, ["one", "two"])
    assert table.loc["one"].tolist() == pytest.approx([1, 3, 4, 3, 2 / 3, 2 / 3, 3 / 4])
    assert table.loc["two"].tolist() == pytest.approx([1, 2, 2, 2, 1, 1 / 2, 1])
    both = token_agreement(teacher, student, vocabularies, ["one", "one"])
    assert both.loc["one", "rows"] == 2 and both.loc["one", "teacher tokens"] == 2.5
    assert both.loc["one", "single groups"] == pytest.approx(4 / 5)


class StoredTeacher(dict):
    """Rows by id, and a head whose logits are the hidden states."""

    manifest = {"head": {"scale": 1.0, "cap": None}}

    def lm_head(self):
        return torch.eye(3)


def test_mass_is_that_of_the_whole_softmax():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    signals = {"hidden": np.log(probabilities).astype(np.float16)}
    cache = StoredTeacher(x=Example("x", np.zeros(2, np.int32), 1, signals=signals))

    def mass(ids, temperature):
        pieces = SharedPieces(np.array(ids, np.int64), np.arange(len(ids)))
        [value] = shared_mass(cache, ["x"], pieces, temperature)
        return value

    assert mass([0, 2], 1.0) == pytest.approx((0.75 + 0.9) / 2, abs=1e-3)
    assert mass([0, 1, 2], 3.0) == pytest.approx(1)
    assert mass([], 1.0) == 0


def test_pieces_without_an_output_row_are_not_shared():
    teacher, student = (
        Vocabulary([letter.encode() for letter in letters], [PIECE] * len(letters))
        for letters in ("abc", "cb")
    )
    pieces = shared_output_rows(teacher, student, 2, 2)
    assert pieces.teacher.tolist() == [1] and pieces.student.tolist() == [1]  # "c" has no row
