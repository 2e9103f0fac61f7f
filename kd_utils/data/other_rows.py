"""For each training row another row of its task, whose signals the control `shuffled` is given."""

from collections.abc import Mapping

import numpy as np


def other_rows(tasks: Mapping[str, str], lengths: Mapping[str, int], seed: int) -> dict[str, str]:
    """A derangement within each task that pairs rows of nearest length.

    The rows of a task are sorted by length, rows of one length in an order that the seed draws.
    Neighbours then take each other's place; of an odd number the last three go round in a circle.

    Args:
        tasks: `example_id` -> task, of the rows of one split.
        lengths: `example_id` -> tokens.

    Returns:
        `example_id` -> that of the other row; each row is the other row of exactly one.

    Raises:
        ValueError: a task has a single row.
    """
    generator = np.random.default_rng(seed)
    others: dict[str, str] = {}
    for task in sorted(set(tasks.values())):
        ids = sorted(row for row in tasks if tasks[row] == task)
        if len(ids) == 1:
            raise ValueError(
                f"task {task!r} has a single training row, and the method 'shuffled' needs another "
                f"row of the same task: raise {task} in train_rows and run 01 and 02 again"
            )
        drawn = [ids[k] for k in generator.permutation(len(ids))]
        ordered = sorted(drawn, key=lambda row: lengths[row])
        in_pairs = len(ids) - 3 * (len(ids) % 2)
        circles = [ordered[k : k + 2] for k in range(0, in_pairs, 2)] + [ordered[in_pairs:]]
        for circle in circles:
            others |= dict(zip(circle, circle[1:] + circle[:1]))
    return others
