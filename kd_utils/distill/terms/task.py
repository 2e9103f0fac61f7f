"""L_task: cross-entropy on the answers, the one term that needs no teacher."""

from collections import Counter

import torch.nn.functional as F
from torch import Tensor

from kd_utils.distill.batches import Batch
from kd_utils.distill.term import Term, register
from kd_utils.models.output_head import OutputHead
from kd_utils.models.signals import Signals


@register
class Task(Term):
    """The labels in a batch take the place of a teacher's targets."""

    name = "task"

    def count(self, sizes: Counter[str]) -> int:
        return sizes["answers"]

    def forward(self, signals: Signals, head: OutputHead, batch: Batch) -> Tensor:
        logits = head.logits(signals.hidden.flatten(0, 1)[batch.predicting])
        return task_cross_entropy(logits, batch.targets, self.count(batch.whole))


def task_cross_entropy(
    student_logits: Tensor, targets: Tensor, normaliser: int | None = None
) -> Tensor:
    """L_task = - sum_t log q(target_t) / normaliser.

    Args:
        student_logits: (N, V) at the positions that predict the answer's tokens.
        targets: (N,) the tokens that follow.
        normaliser: number of answer tokens in the whole batch; None: N.

    Returns:
        Scalar, nats per answer token.
    """
    total = F.cross_entropy(student_logits.float(), targets, reduction="sum")
    return total / (normaliser or max(len(targets), 1))
