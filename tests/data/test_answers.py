"""The teacher's answers in place of labels: who gets one, who is left out, and how it is shown."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from kd_utils.data.answers import answered, answered_tables, left_out, report

SST2 = [" negative", " positive"]
TRAIN = pd.DataFrame(
    [
        ("a", "sst2", SST2, " positive", "1", True),
        ("b", "sst2", SST2, " positive", "1", False),
        ("c", "sst2", SST2, " negative", "0", False),
        ("d", "gsm8k", [], " 2+2\n#### 4", "4", False),
        ("e", "gsm8k", [], "#### 7", "7", False),
        ("f", "gsm8k", [], "#### 8", "8", False),
        ("g", "gsm8k", [], "#### 9", "9", True),
    ],
    columns=["example_id", "task", "choices", "answer", "gold", "labelled"],
)
ANSWERS = pd.DataFrame(
    [
        ("g", " cut off", False, True),  # of a row that has a label
        ("a", " negative", True, True),
        ("b", " positive", True, True),
        ("c", " positive", True, True),
        ("d", " So.\n#### 4", True, False),
        ("e", " Seven, se", False, False),
        ("f", " ", True, True),
    ],
    columns=["example_id", "answer", "whole", "fits"],
)


def test_rows_without_a_label_have_the_teachers_answer_and_no_gold():
    rows = answered(TRAIN, ANSWERS)
    assert rows["example_id"].tolist() == ["a", "b", "c", "g"] and rows.index.tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert rows["answer"].tolist() == [" positive", " positive", " positive", "#### 9"]
    assert rows["gold"].tolist() == ["1", "", "", "9"]
    assert rows["labelled"].tolist() == [True, False, False, True]
    all_labelled = TRAIN.assign(labelled=True)
    pd.testing.assert_frame_equal(answered(all_labelled, ANSWERS), all_labelled)
    assert TRAIN["gold"][1] == "1"  # the prepared rows are as they were


def test_why_a_row_is_left_out():
    why = dict(zip(ANSWERS["example_id"], left_out(ANSWERS)))
    assert why == {"a": "", "b": "", "c": "", "d": "too long", "e": "cut", "f": "empty", "g": "cut"}


def test_answers_are_counted_and_compared_by_hand():
    found = report(TRAIN, ANSWERS).set_index("task")
    counts = ["labelled", "answered", "empty", "cut", "too long"]
    assert found.loc["sst2", counts].tolist() == [1, 2, 0, 0, 0]
    assert found.loc["gsm8k", counts].tolist() == [1, 0, 1, 1, 1]
    assert found["right, labelled"].tolist() == [0, 0]
    assert found["right, unlabelled"].tolist() == [0.5, pytest.approx(1 / 3)]
    alone = report(TRAIN[TRAIN["labelled"]], ANSWERS)
    assert np.isnan(alone["right, unlabelled"]).all()


def test_a_table_that_lacks_rows_or_leaves_none_is_one_line():
    with pytest.raises(ValueError, match="answers lack 2 of 7 training rows: run 02 again$"):
        answered(TRAIN, ANSWERS[2:])
    with pytest.raises(ValueError, match="^no training row is left: none has a label, .*max_new_"):
        answered(TRAIN.assign(labelled=False), ANSWERS.assign(whole=False))


def test_teachers_must_agree_on_rows_without_a_label():
    others = {"held_out": TRAIN[:1], "validation": TRAIN[:2]}
    prepared = SimpleNamespace(train=TRAIN, tables={"train": TRAIN, **others})
    # It answers in another order, and differs where there is a label.
    agreeing = ANSWERS[::-1].replace(" cut off", " something else")
    tables = answered_tables(prepared, ANSWERS, agreeing)
    assert len(tables["train"]) == 4 and tables["validation"] is others["validation"]
    with pytest.raises(
        ValueError,
        match="^the teachers differ in their answers to 1 of 5 rows without a label, .*: use one "
        r"teacher \(more_teachers ''\), or label all rows \(labelled '1' in 01\)$",
    ):
        answered_tables(prepared, ANSWERS, ANSWERS.replace(" So.\n#### 4", " So.\n#### 5"))
