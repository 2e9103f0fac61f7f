"""How much of a teacher reaches a student with another tokenizer: shares of tokens, groups and
probability.
"""

from collections.abc import Iterable

import pandas as pd
import torch

from kd_utils.cache.teacher_cache import TeacherCache, output_head
from kd_utils.tokens import encoding, vocabulary


def token_agreement(
    teacher: list[encoding.Example],
    student: list[encoding.Example],
    vocabularies: tuple[vocabulary.Vocabulary, vocabulary.Vocabulary],
    tasks: Iterable[str],
) -> pd.DataFrame:
    """Compare two tokenizations of the same rows, task by task.

    Args:
        teacher, student: the rows with the tokens of either side and their `ends`, in one order.
        vocabularies: the teacher's, the student's.
        tasks: of each row.

    Returns:
        A row per task: `rows`; `teacher tokens`, `student tokens` and `groups` per row; `single
        groups`, the share of groups with one token on each side; `shared pieces`, the share of the
        teacher's tokens that are pieces of both vocabularies; `hidden states`, the share of the
        student's tokens that end a group, where a hidden state is compared.
    """
    shared = set(vocabulary.shared_pieces(*vocabularies).teacher.tolist())
    counts = []
    for teacher_row, student_row, task in zip(teacher, student, tasks, strict=True):
        groups, tokens = encoding.groups_of(teacher_row, student_row), teacher_row.tokens.tolist()
        sizes = len(tokens), len(student_row.tokens), len(groups)
        counts.append((task, 1, *sizes, groups.single.sum(), sum(t in shared for t in tokens)))
    columns = ["task", "rows", "teacher tokens", "student tokens", "groups", "single", "shared"]
    total = pd.DataFrame(counts, columns=columns).groupby("task", sort=False).sum()
    lengths = total[["teacher tokens", "student tokens", "groups"]].div(total["rows"], axis=0)
    return total[["rows"]].assign(
        **lengths,
        **{
            "single groups": total["single"] / total["groups"],
            "shared pieces": total["shared"] / total["teacher tokens"],
            "hidden states": total["groups"] / total["student tokens"],
        },
    )


@torch.no_grad()
def shared_mass(
    cache: TeacherCache,
    example_ids: Iterable[str],
    pieces: vocabulary.SharedPieces,
    temperature: float,
) -> list[float]:
    """The teacher's probability of shared pieces, for each example the mean over its positions.

    The other pieces go to the rest bucket of `logit_losses.kd_loss`: the student learns how
    probable they are together, and not one by one.

    Args:
        cache: with the teacher's final hidden states and its head.
        temperature: T of softmax(z / T).
    """
    head = output_head(cache)
    assert head, "a top-k cache has no output layer"
    states = (torch.from_numpy(cache[i].signals["hidden"].astype("float32")) for i in example_ids)
    return [
        float((head.logits(hidden) / temperature).softmax(-1)[:, pieces.teacher].sum(-1).mean())
        for hidden in states
    ]
