"""How much of a teacher a student of another tokenizer can use."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor

from kd_utils.distill.targets import groups_of
from kd_utils.models.output_head import OutputHead
from kd_utils.tokens.encoding import Example
from kd_utils.tokens.vocabulary import Vocabulary, shared_pieces


def token_agreement(
    teacher: list[Example],
    student: list[Example],
    vocabularies: tuple[Vocabulary, Vocabulary],
    tasks: Iterable[str],
) -> pd.DataFrame:
    """How two tokenizations of the same rows line up, by task.

    Args:
        teacher, student: the rows as each side's tokens, with `ends`, in the same order.
        vocabularies: the teacher's, the student's.
        tasks: of each row.

    Returns:
        A row per task: `rows`; per row, `teacher tokens`, `student tokens` and `groups`; the shares
        `single groups` (one token on each side), `shared pieces` (teacher's tokens that are pieces
        of both vocabularies) and `hidden states` (student's tokens that end a group, so that their
        hidden states are compared).
    """
    shared = set(shared_pieces(*vocabularies).teacher.tolist())
    counts = []
    for teacher_row, student_row, task in zip(teacher, student, tasks, strict=True):
        groups = groups_of(teacher_row, student_row)
        counts.append(
            {
                "task": task,
                "rows": 1,
                "teacher tokens": len(teacher_row.tokens),
                "student tokens": len(student_row.tokens),
                "groups": len(groups),
                "single": int(groups.single.sum()),
                "shared": sum(token in shared for token in teacher_row.tokens.tolist()),
            }
        )
    total = pd.DataFrame(counts).groupby("task", sort=False).sum()
    shares = pd.DataFrame(
        {
            "single groups": total["single"] / total["groups"],
            "shared pieces": total["shared"] / total["teacher tokens"],
            "hidden states": total["groups"] / total["student tokens"],
        }
    )
    lengths = total[["teacher tokens", "student tokens", "groups"]].div(total["rows"], axis=0)
    return pd.concat([total["rows"], lengths, shares], axis=1)


@torch.no_grad()
def shared_mass(row: Example, head: OutputHead, pieces: Tensor, temperature: float) -> float:
    """The probability that the teacher gives to these of its pieces, averaged over positions.

    The rest goes to one bucket of `logit_losses.kd_loss`: the student learns only how much it is.

    Args:
        row: with the teacher's final hidden states.
        head: the teacher's.
        pieces: (K,) ids.
        temperature: T of softmax(z / T).
    """
    hidden = torch.from_numpy(row.signals["hidden"].astype("float32"))
    return float((head.logits(hidden) / temperature).softmax(-1)[:, pieces].sum(-1).mean())
