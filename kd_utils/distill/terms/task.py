"""L_task: cross-entropy on the answers, the one term that needs no teacher."""

from collections import Counter

from torch import Tensor, nn

from kd_utils.distill.batches import Batch
from kd_utils.distill.teacher_terms import Term, register
from kd_utils.models.output_head import OutputHead
from kd_utils.models.signals import Signals


@register
class Task(Term):
    """L_task = - sum_t log q(target_t) / number of answer tokens in the whole batch, in nats.

    The labels in a batch take the place of a teacher's targets. It is 0 for a batch in which no
    example has an answer.
    """

    name = "task"

    def count(self, whole: Counter[str]) -> int:
        return whole["answers"]

    def forward(self, signals: Signals, head: OutputHead, batch: Batch) -> Tensor:
        logits = head.logits(signals.hidden.flatten(0, 1)[batch.predicting])
        total = nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
        return total / max(self.count(batch.whole), 1)
