"""Two tokenizations of one text, lined up: the groups of tokens between places where both end.

Tokens of two different texts can only be paired from their ends (`from_the_end`).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Groups:
    """Neighbouring tokens of both sides that spell the same bytes; in order, they tile both.

    Attributes:
        teacher, student: (G,) int64, index of each group's last token.
        before: how many tokens of (teacher, student) come before the first group, in none.
    """

    teacher: np.ndarray
    student: np.ndarray
    before: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.teacher)

    @property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(G,), (G,): how many tokens of the teacher, and of the student, each group has."""
        teacher, student = (count - 1 for count in self.before)
        return np.diff(self.teacher, prepend=teacher), np.diff(self.student, prepend=student)

    @property
    def single(self) -> np.ndarray:
        """(G,) bool: one token on each side."""
        teacher, student = self.sizes
        return (teacher == 1) & (student == 1)


def align(teacher_ends: np.ndarray, student_ends: np.ndarray) -> Groups:
    """Two pointers over byte ends: the side that is behind advances; equal ends close a group.

    Tokens without bytes (begin tokens, a leading space that is not in the text) pair with each
    other where both sides have one. Else they belong to the group that follows, and at the end of
    the text to the last group.

    Args:
        teacher_ends: (n_t,) after how many bytes each of the teacher's tokens ends
            (`vocabulary.byte_ends`).
        student_ends: (n_s,) the same for the student's tokens.

    Raises:
        ValueError: the two do not end together, so they are not from one text.
    """
    teacher, student = teacher_ends.tolist(), student_ends.tolist()
    if teacher[-1:] != student[-1:]:
        raise ValueError(
            f"the teacher's {len(teacher)} tokens spell {max(teacher, default=0)} bytes and "
            f"the student's {len(student)} spell {max(student, default=0)}: not one text"
        )
    places, i, j = [], 0, 0
    while i < len(teacher) and j < len(student):
        ahead = teacher[i] - student[j]
        if ahead == 0:
            places.append((i, j))
        i, j = i + (ahead <= 0), j + (ahead >= 0)
    if places:
        places[-1] = (len(teacher) - 1, len(student) - 1)
    last = np.array(places, np.int64).reshape(-1, 2)
    return Groups(last[:, 0].copy(), last[:, 1].copy())


def identity(length: int) -> Groups:
    """The groups of a sequence with itself."""
    return Groups(np.arange(length), np.arange(length))


def from_the_end(teacher_length: int, student_length: int) -> Groups:
    """The last tokens of two sequences of different texts in pairs, as many as the shorter has.

    Each pair is a group of one token on each side, whatever the tokens spell. The longer side's
    other tokens come `before` the first group. A map's keys must keep their sum, so whoever merges
    maps counts them to the first group, as `merge_map` does.
    """
    before = (
        max(teacher_length - student_length, 0),
        max(student_length - teacher_length, 0),
    )
    return Groups(
        np.arange(before[0], teacher_length), np.arange(before[1], student_length), before
    )


def merge_map(rows: np.ndarray, last: np.ndarray) -> np.ndarray:
    """An attention map over groups: a group's keys are summed, its last query represents it.

    Each row still sums to one. This is the plain form, for figures and tests; `distill` does the
    same in batches.

    Args:
        rows: (..., n, n) probabilities.
        last: (G,) index of each group's last token.

    Returns:
        (..., G, G).
    """
    return np.add.reduceat(rows[..., last, :], np.concatenate([[0], last[:-1] + 1]), axis=-1)
