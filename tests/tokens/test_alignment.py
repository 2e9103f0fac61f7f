"""Two tokenizations of one text: groups tile both, each group's bytes agree; and what merging makes
of maps.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_utils.distill.targets import Merge
from kd_utils.tokens.alignment import align, identity, merge_map
from kd_utils.tokens.encoding import Example, groups_of


def groups(teacher, student):
    """As lists of (teacher's tokens, student's tokens)."""
    found = align(np.array(teacher, np.int32), np.array(student, np.int32))
    starts = [np.concatenate([[0], last[:-1] + 1]) for last in (found.teacher, found.student)]
    return [
        (list(range(a, b + 1)), list(range(c, d + 1)))
        for a, b, c, d in zip(starts[0], found.teacher, starts[1], found.student)
    ]


@pytest.mark.parametrize(
    "teacher, student, expected",
    [
        ([], [], []),
        ([1, 3, 6], [1, 3, 6], [([0], [0]), ([1], [1]), ([2], [2])]),
        ([3, 6], [1, 3, 4, 6], [([0], [0, 1]), ([1], [2, 3])]),
        ([2, 5, 6], [3, 4, 6], [([0, 1, 2], [0, 1, 2])]),  # they meet at the end only
        ([0, 3], [3], [([0, 1], [0])]),  # a begin token on one side
        (
            [0, 3, 3],
            [0, 3, 3],
            [([0], [0]), ([1], [1]), ([2], [2])],
        ),  # begin and end tokens on both
        (
            [0, 2, 5],
            [0, 0, 5],
            [([0], [0]), ([1, 2], [1, 2])],
        ),  # and a leading space of its own on one
        ([3, 3], [3], [([0, 1], [0])]),  # an end token on one side
        ([0], [0, 0], [([0], [0, 1])]),  # of an empty text
    ],
)
def test_groups_by_hand(teacher, student, expected):
    assert groups(teacher, student) == expected


@pytest.mark.parametrize("teacher, student", [([3], [4]), ([], [0]), ([0], [])])
def test_tokens_of_two_texts_are_refused(teacher, student):
    with pytest.raises(ValueError, match="not one text"):
        align(np.array(teacher, np.int32), np.array(student, np.int32))


ENDS = st.lists(st.integers(0, 12), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(ENDS, ENDS)
def test_groups_tile_both_sides_and_close_where_both_end(teacher, student):
    total = max(*teacher, *student)
    teacher, student = np.array(sorted([*teacher, total])), np.array(sorted([*student, total]))
    found = align(teacher, student)
    for side, ends in ((found.teacher, teacher), (found.student, student)):
        assert side[-1] == len(ends) - 1 and (np.diff(side) > 0).all()
    assert (teacher[found.teacher] == student[found.student]).all()
    # No group could have been closed earlier: inside it the two sides never end at one byte.
    met = set(teacher[found.teacher])
    assert met >= (set(teacher) & set(student)) - {0}
    assert len(identity(5)) == 5 and identity(5).single.all()


@settings(max_examples=100, deadline=None)
@given(ENDS, ENDS, st.integers(0, 5))
def test_a_merged_map_has_rows_that_sum_to_one_and_look_back_only(teacher, student, seed):
    total = max(*teacher, *student)
    teacher, student = np.array(sorted([*teacher, total])), np.array(sorted([*student, total]))
    found = align(teacher, student)
    n = len(teacher)
    causal = np.tril(np.random.default_rng(seed).uniform(0.1, 1, (2, n, n)))
    merged = merge_map(causal / causal.sum(-1, keepdims=True), found.teacher)
    np.testing.assert_allclose(merged.sum(-1), 1)
    assert merged.shape == (2, len(found), len(found)) and not np.triu(merged, 1).any()


def test_merging_in_batches_is_merging_and_spreading_is_its_transpose():
    last, generator = np.array([0, 3, 4, 7]), torch.Generator().manual_seed(0)
    rows = torch.rand(2, 8, 8, generator=generator).tril()
    merge = Merge(torch.tensor(last), torch.tensor([0, 1, 1, 1, 2, 3, 3, 3]), 4)
    np.testing.assert_allclose(merge.apply(rows), merge_map(rows.numpy(), last), rtol=1e-6)
    slope = torch.rand(2, 4, 4, generator=generator)
    torch.testing.assert_close(
        (merge.apply(rows) * slope).sum(), (rows * merge.spread(slope, 8)).sum()
    )


def test_an_example_whose_tokens_do_not_spell_its_text_is_named():
    rows = [
        Example("abc", np.array(ids, np.int32), 1, np.array(ends, np.int32))
        for ids, ends in (([5, 6], []), ([7, 8, 9], [1, 2, 3]))
    ]
    with pytest.raises(
        ValueError, match="row abc: the teacher's tokens do not spell the row's text"
    ):
        groups_of(*rows)
    assert groups_of(rows[0], rows[0]).single.all()  # the same tokens need no bytes
