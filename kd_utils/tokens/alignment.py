"""Two tokenizations of one text, lined up: the groups of tokens between places where both end."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Groups:
    """Neighbouring tokens of both sides that spell the same bytes; in order, they tile both.

    Attributes:
        teacher, student: (G,) int64, index of each group's last token.
    """

    teacher: np.ndarray
    student: np.ndarray

    def __len__(self) -> int:
        return len(self.teacher)

    @property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """(G,), (G,): how many tokens of the teacher, and of the student, each group has."""
        return np.diff(self.teacher, prepend=-1), np.diff(self.student, prepend=-1)

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
