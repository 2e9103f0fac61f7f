"""L_KD: the student's next-token distributions against the teacher's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_utils.distill.logit_losses import (
    Shared,
    kd_loss,
    log_rest,
    span_kl,
    span_log_probs,
    uld_loss,
    with_output_rows,
)
from kd_utils.distill.targets import Targets
from kd_utils.distill.term import Term, TermSetup, register
from kd_utils.models.output_head import OutputHead
from kd_utils.models.signals import Signals
from kd_utils.tokens.vocabulary import same_pieces, shared_pieces

TOP_K = ("top_logits", "top_ids", "log_mass")


@register
class KD(Term):
    """T^2 KL(teacher || student) over all pieces, those of both vocabularies, or the top k.

    Args:
        head: the teacher's output layer; None of a top-k cache.
        temperature: T.
        shared: pieces of both vocabularies; None where the ids agree.
        logit_loss: "kl", or "uld": distance of the sorted probabilities.
        temperatures: those for which a top-k cache holds the mass of the rest.
    """

    name = "kd"

    def __init__(
        self,
        head: OutputHead | None,
        temperature: float,
        *,
        shared: Shared | None = None,
        logit_loss: str = "kl",
        temperatures: Collection[float] = (),
    ) -> None:
        super().__init__()
        self.head, self.shared, self.logit_loss = head, shared, logit_loss
        self.temperature, self.temperatures = temperature, list(temperatures)
        self.columns = ("hidden",) if head else TOP_K

    @classmethod
    def of(cls, setup: TermSetup) -> Self:
        manifest, config = setup.cache.manifest, setup.config
        weight = setup.cache.lm_head()
        if weight is None:
            _require_top_k(setup)
            return cls(None, config.temperature, temperatures=manifest["temperatures"])
        head = OutputHead(weight.float().to(setup.device), **manifest["head"])
        return cls(head, config.temperature, shared=_shared(setup), logit_loss=config.logit_loss)

    def about(self) -> str:
        if self.shared is None:
            return "logits id by id"
        return (
            f"logits over {len(self.shared.teacher):,} shared pieces, beside "
            f"{len(self.shared.teacher_rest):,} of the teacher and "
            f"{len(self.shared.student_rest):,} of the student"
        )

    def forward(self, signals: Signals, head: OutputHead, targets: Targets) -> Tensor:
        student = signals.hidden.flatten(0, 1)
        if self.head is None:
            total = self._top_k(student, head, targets)
        elif self.logit_loss == "uld":
            teacher = targets.signals["hidden"]
            total = uld_loss(student[targets.places], head, teacher, self.head, self.temperature, 1)
        else:
            total = self._kl(student, head, targets)
        return total / self.count(targets.whole)

    def _top_k(self, student: Tensor, head: OutputHead, targets: Targets) -> Tensor:
        # Whether a longer group's tokens are among the largest logits is not known.
        keep = slice(None) if targets.single is None else targets.single
        signals = targets.signals
        return forward_kl_top_k(
            head.logits(student[targets.places[keep]]),
            signals["top_logits"][keep],
            signals["top_ids"][keep].long(),
            signals["log_mass"][keep, self.temperatures.index(self.temperature)],
            self.temperature,
        ).sum()

    def _kl(self, student: Tensor, head: OutputHead, targets: Targets) -> Tensor:
        places, teacher = targets.places, targets.signals["hidden"]
        if targets.single is not None:
            places, teacher = places[targets.single], teacher[targets.single]
        total = kd_loss(
            student[places], head, teacher, self.head, self.temperature, 1, shared=self.shared
        )
        if (spans := targets.spans) is None:
            return total
        student_log = span_log_probs(
            student[spans.student],
            head,
            spans.student_targets,
            spans.student_span,
            spans.count,
            self.temperature,
        )
        with torch.no_grad():
            teacher_log = span_log_probs(
                spans.teacher,
                self.head,
                spans.teacher_targets,
                spans.teacher_span,
                spans.count,
                self.temperature,
            )
        return total + span_kl(student_log, teacher_log, self.temperature).sum()

    @classmethod
    def mixes(cls, terms: Sequence[KD], targets: Sequence[Targets]) -> bool:
        """Probabilities are mixed where all teachers have the student's tokens and vocabulary.

        Elsewhere the KLs are added. The gradient is the same, the values differ by a constant.
        """
        alike = all(
            term.head and term.shared is None and term.logit_loss == "kl" and target.direct
            for term, target in zip(terms, targets)
        )
        # In the whole batch: unequal where another micro-batch has other tokens.
        return alike and len({target.whole["places"] for target in targets}) == 1

    @classmethod
    def mixed(
        cls,
        terms: Sequence[KD],
        weights: Sequence[float],
        signals: Signals,
        head: OutputHead,
        targets: Sequence[Targets],
    ) -> Tensor:
        """L_KD against sum_m w_m p_m, the teachers' mixed probabilities."""
        return kd_loss(
            signals.hidden.flatten(0, 1)[targets[0].places],
            head,
            [target.signals["hidden"] for target in targets],
            [term.head for term in terms],
            terms[0].temperature,
            terms[0].count(targets[0].whole),
            mixture=list(weights),
        )


def _shared(setup: TermSetup) -> Shared | None:
    """The pieces that both sides have; None where each id means the same to both."""
    teacher = setup.cache.vocabulary()
    sizes = setup.shape["vocab_size"], setup.student.vocab_size
    # Models of one tokenizer may have output rows that no id uses, and not equally many.
    if same_pieces(teacher, setup.vocabulary) and sizes[0] == sizes[1]:
        return None
    pieces = with_output_rows(shared_pieces(teacher, setup.vocabulary), *sizes)
    return Shared.of(
        torch.from_numpy(pieces.teacher), torch.from_numpy(pieces.student), *sizes, setup.device
    )


def _require_top_k(setup: TermSetup) -> None:
    """Check that a cache of top-k logits can be compared with this student.

    Raises:
        ValueError: what is missing, and the remedy.
    """
    setup.require(TOP_K)
    config, temperatures = setup.config, setup.cache.manifest["temperatures"]
    if config.temperature not in temperatures:
        raise ValueError(
            f"the top-k cache is exact at temperature {temperatures} only, not "
            f"{config.temperature}: run 02 again with this temperature"
        )
    if config.logit_loss == "uld":
        raise ValueError(
            "the cache holds top-k logits, and logit_loss 'uld' sorts the whole distribution: set "
            "signals to 'white_box' and run 02 again, or logit_loss to 'kl'"
        )
    teacher, student = setup.shape["vocab_size"], setup.student.vocab_size
    other = ""
    if not same_pieces(setup.cache.vocabulary(), setup.vocabulary):
        other = "has another tokenizer than the student"
    elif teacher > student:
        other = f"has {teacher:,} output rows (the student {student:,})"
    if other:
        raise ValueError(
            f"the teacher {other} and its cache holds top-k logits: set signals to 'white_box' and "
            "run 02 again"
        )


def forward_kl_top_k(
    student_logits: Tensor,
    top_logits: Tensor,
    top_ids: Tensor,
    log_mass: Tensor,
    temperature: float,
) -> Tensor:
    """T^2 KL per token over the teacher's top k tokens and one bucket for the rest.

    The mass of the rest is exact: `log_mass` is the log-sum-exp of all the teacher's logits / T.
    Merging tokens can only lower a KL (data processing inequality), so this is a lower bound of
    `kd_loss`; it is equal where the student is proportional to the teacher within the rest.

    Args:
        student_logits: (N, V).
        top_logits: (N, k) the teacher's largest logits (not divided by T).
        top_ids: (N, k) their token ids, int64.
        log_mass: (N,) log sum_v exp(z_v / T) over the whole vocabulary, for this T.
        temperature: T > 0.

    Returns:
        (N,) nats, times T^2.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1).gather(-1, top_ids)
    teacher = top_logits.float() / temperature - log_mass.float()[:, None]
    student_rest, teacher_rest = log_rest(student), log_rest(teacher)
    inside = (teacher.exp() * (teacher - student)).sum(-1)
    return temperature**2 * (inside + teacher_rest.exp() * (teacher_rest - student_rest))
