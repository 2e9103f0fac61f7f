"""The first lines of a verdict: at rest or not, controls, and tasks that the teacher does not know."""

import pandas as pd
import pytest

from kd_utils.analysis import rest
from kd_utils.analysis.words import head


def moves(last_tenth, twice, methods=("black_box", "attention")):
    rows = [
        {"metric": metric, "setting": "", "distill_type": method, "n": 7 * (value is not None)}
        | {"mean": value}
        for metric, values in ((rest.LAST_TENTH, last_tenth), (rest.TWICE, twice))
        for method, value in zip(methods, values)
    ]
    return pd.DataFrame(rows).astype({"mean": float})


def rows(question, *found, metric="macro"):
    """(method, baseline, outcome) each."""
    return pd.DataFrame(
        [
            {"question": question, "metric": metric, "setting": "", "method": method}
            | {"baseline": baseline, "outcome": outcome}
            | {"difference": 0.052, "low": 0.01, "high": 0.09}
            for method, baseline, outcome in found
        ],
        columns="question metric setting method baseline outcome difference low high".split(),
    )


def test_at_rest_names_the_largest_move_and_who_measured_it():
    line = head.rest_line(moves([0.001, -0.004], [0.002, 0.006]), "toy-rest")
    assert line.startswith("At rest: ") and line.endswith(
        "twice the steps were measured in toy-rest)."
    )
    assert "attention -0.4 over the last tenth of the steps" in line
    assert "attention +0.6 with twice the steps" in line


@pytest.mark.parametrize(
    "last_tenth, twice, said",
    [
        ([0.02, 0.0], [0.0, 0.0], "black_box moves +2.0 points over the last tenth of the steps"),
        ([0.0, 0.0], [0.0, -0.03], "attention moves -3.0 points with twice the steps"),
        ([0.0, 0.01], [None, None], "attention moves +1.0 points over the last tenth"),
    ],
)
def test_not_at_rest_compares_speeds_and_names_the_methods(last_tenth, twice, said):
    measured = "toy-rest" * (twice[0] is not None)
    line = head.rest_line(moves(last_tenth, twice), measured)
    assert line.startswith("Not at rest, so speeds are compared, not ends: ") and said in line
    assert ("was not measured" in line) == (not measured)


def test_methods_that_are_at_rest_are_told_from_one_that_is_not():
    line = head.rest_line(moves([0.0, 0.02], [0.0, -0.03]), "toy-rest")
    assert line.count("attention") == 2 and line.endswith("All other methods are at rest.")
    for unsure in (moves([0.0, 0.02], [None, 0.0]), moves([0.02, 0.02], [0.0, 0.0])):
        assert "All other" not in head.rest_line(unsure, "toy-rest")


def test_what_is_not_known_is_said():
    line = head.rest_line(moves([None, None], [None, None]), "")
    assert line == (
        "Whether training was at rest cannot be said: the record has no held-out accuracy at 90 and "
        "100 % of the steps."
    )
    line = head.rest_line(moves([0.0, 0.0], [0.0, None]), "toy-rest")
    assert "what twice the steps would change was not measured of attention over 3 seeds" in line
    assert line.endswith("is not known.")
    assert head.rest_line(rest.last_tenth([]), "") == ""


@pytest.mark.parametrize("move", [0.0, 0.03])
def test_twice_the_steps_of_two_seeds_say_nothing(move):
    found = moves([0.0, 0.0], [0.0, move])
    found.loc[found.index[-1], "n"] = 2
    line = head.rest_line(found, "toy-rest")
    assert "not measured of attention over 3 seeds" in line and line.endswith("is not known.")
    found.loc[found.index[-1], "n"] = 3
    assert head.rest_line(found, "toy-rest").startswith("Not at" if move else "At")


@pytest.mark.parametrize(
    "outcome, said",
    [
        ("better", "seen: +5.2 points [+1.0, +9.0], better."),
        ("undecided", "undecided; nothing here says anything about smaller effects."),
        ("worse", "not seen: "),
    ],
)
def test_the_positive_control(outcome, said):
    line = head.positive_line(rows("teacher", ("black_box", "task_only", outcome)))
    assert said in line and ("not seen" in line) == (outcome != "better")
    assert head.positive_line(rows("teacher")).endswith("not in this run.")
    untested = head.positive_line(rows("teacher", ("black_box", "task_only", "not tested")))
    assert untested.endswith("task_only): not tested.")


def test_the_negative_controls():
    shuffled, smoothing = ("shuffled", "teacher_answers"), ("label_smoothing", "teacher_answers")
    quiet = rows("controls", (*shuffled, "undecided"), (*smoothing, "worse"))
    assert head.negative_line(quiet).endswith("label_smoothing over teacher_answers): quiet.")
    false = head.negative_line(rows("controls", (*shuffled, "better"), (*smoothing, "worse")))
    assert "a FALSE ALARM, +5.2 points" in false
    helps = head.negative_line(rows("controls", (*shuffled, "undecided"), (*smoothing, "better")))
    assert "FALSE" not in helps and "may help as a regulariser" in helps
    assert "not tested" in head.negative_line(rows("controls", (*shuffled, "not tested")))
    assert head.negative_line(rows("controls")) == "Negative controls: not in this run."


def test_tasks_that_the_teacher_does_not_know_are_left_out_and_named():
    pair = ("black_box", "task_only", "better")
    compared = pd.concat(
        [
            rows("teacher", pair, metric=metric).assign(difference=value)
            for metric, value in {"macro": 0.01, "informed": 0.03, "sst2": 0.03, "mmlu": 0}.items()
        ]
    )
    text = head.head_text(moves([0.0, 0.0], [0.0, 0.0]), "toy-rest", compared, ["mmlu"])
    first, *_, last = text.splitlines()
    assert first.startswith("At rest") and "seen: +3.0 points" in text
    assert last.endswith("on the mean of the others (sst2).") or "others (sst2)" in last
    assert max(map(len, text.splitlines())) <= 118
    [line] = head.informed_lines(["sst2"], ["sst2"])
    assert line.endswith("rests on all tasks.")
