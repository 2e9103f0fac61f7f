"""The derangement whose rows lend the control `shuffled` their signals."""

from collections import Counter

import pytest

from kd_utils.data.other_rows import other_rows

#: Three tasks with an even, an odd and the smallest number of rows; many rows have one length.
TASKS = {f"{task}{k}": task for task, rows in (("a", 40), ("b", 25), ("c", 3)) for k in range(rows)}
LENGTHS = {row: 10 + int(row[1:]) // 5 for row in TASKS}


def test_each_row_has_another_of_its_task_and_each_is_taken_once():
    others = other_rows(TASKS, LENGTHS, seed=3)
    assert others.keys() == TASKS.keys() and sorted(others.values()) == sorted(TASKS)
    assert all(row != other and TASKS[row] == TASKS[other] for row, other in others.items())


def test_the_other_row_is_a_neighbour_by_length():
    lengths = {row: 3 * k for k, row in enumerate(sorted(TASKS))}  # all different
    others = other_rows(TASKS, lengths, seed=0)
    for task in "abc":
        rows = sorted((row for row in TASKS if TASKS[row] == task), key=lengths.get)
        steps = [rows.index(others[row]) - k for k, row in enumerate(rows)]
        pairs = len(rows) - 3 * (len(rows) % 2)
        assert steps == [1, -1] * (pairs // 2) + [1, 1, -2] * (len(rows) % 2)


def test_a_seed_decides_which_rows_of_one_length_meet():
    drawn = [other_rows(TASKS, LENGTHS, seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and drawn[1] != drawn[2] != drawn[3]
    assert drawn[0] == other_rows(dict(reversed(TASKS.items())), LENGTHS, 0), "the order of rows"
    far = Counter(abs(LENGTHS[row] - LENGTHS[other]) for row, other in drawn[0].items())
    assert max(far) == 1 and far[0] > 0.8 * len(TASKS)


def test_a_task_of_one_row_is_named():
    with pytest.raises(ValueError, match="task 'b' has a single training row, and.*'shuffled'"):
        other_rows({"x": "a", "y": "a", "z": "b"}, dict.fromkeys("xyz", 4), 0)
