"""L_KD: the student's next-token distributions against the teacher's."""

from collections.abc import Sequence
from typing import Self

import torch

from kd_utils.cache import teacher_cache
from kd_utils.distill import logit_losses
from kd_utils.distill.targets import Spans, Targets
from kd_utils.distill.teacher_terms import Term, TermSetup, register
from kd_utils.models.output_head import OutputHead
from kd_utils.models.signals import Signals
from kd_utils.tokens.vocabulary import same_pieces

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
        shared: logit_losses.Shared | None = None,
        logit_loss: str = "kl",
        temperatures: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.head, self.shared, self.logit_loss = head, shared, logit_loss
        self.temperature, self.temperatures = temperature, temperatures
        self.columns = ("hidden",) if head else TOP_K

    @classmethod
    def of(cls, setup: TermSetup) -> Self:
        manifest, config = setup.cache.manifest, setup.config
        head = teacher_cache.output_head(setup.cache, setup.device)
        if head is None:
            _require_top_k(setup)
            return cls(None, config.temperature, temperatures=manifest["temperatures"])
        teacher, shared = setup.cache.vocabulary(), None
        sizes = setup.shape["vocab_size"], setup.student.vocab_size
        # Models of one tokenizer may have output rows that no id uses, and not equally many.
        if sizes[0] != sizes[1] or not same_pieces(teacher, setup.vocabulary):
            pieces = logit_losses.shared_output_rows(teacher, setup.vocabulary, *sizes)
            shared = logit_losses.Shared.of(pieces.teacher, pieces.student, *sizes, setup.device)
        return cls(head, config.temperature, shared=shared, logit_loss=config.logit_loss)

    def about(self) -> str:
        if self.shared is None:
            return "logits id by id"
        return (
            f"logits over {len(self.shared.teacher):,} shared pieces (not shared: "
            f"{len(self.shared.teacher_rest):,} of the teacher, "
            f"{len(self.shared.student_rest):,} of the student)"
        )

    def forward(self, signals: Signals, head: OutputHead, targets: Targets) -> torch.Tensor:
        student, teacher = signals.hidden.flatten(0, 1), targets.signals
        count = self.count(targets.whole)
        if self.logit_loss == "uld":
            sides = student[targets.places], head, teacher["hidden"], self.head
            return logit_losses.uld_loss(*sides, self.temperature, count)
        keep = slice(None) if targets.single is None else targets.single
        places = targets.places[keep]
        if self.head is None:
            # Whether a longer group's tokens are among the largest logits is not known.
            losses = logit_losses.forward_kl_top_k(
                head.logits(student[places]),
                teacher["top_logits"][keep],
                teacher["top_ids"][keep].long(),
                teacher["log_mass"][keep, self.temperatures.index(self.temperature)],
                self.temperature,
            )
            return losses.sum() / count
        sides = student[places], head, teacher["hidden"][keep], self.head
        total = logit_losses.kd_loss(*sides, self.temperature, 1, shared=self.shared)
        if targets.spans:
            total = total + self._span_kl(student, head, targets.spans)
        return total / count

    def _span_kl(self, student: torch.Tensor, head: OutputHead, spans: Spans) -> torch.Tensor:
        places, tokens, group = spans.student
        student_log = logit_losses.span_log_probs(
            student[places], head, tokens, group, spans.count, self.temperature
        )
        with torch.no_grad():
            hidden, tokens, group = spans.teacher
            teacher_log = logit_losses.span_log_probs(
                hidden, self.head, tokens, group, spans.count, self.temperature
            )
        sides = student_log[:, None], teacher_log[:, None]
        return logit_losses.outcome_kl(*sides, self.temperature).sum()

    @classmethod
    def mixes(cls, terms: Sequence[Self], targets: Sequence[Targets]) -> bool:
        """Probabilities are mixed where all teachers have the student's tokens and vocabulary.

        Elsewhere the KLs are added. The gradient is the same, the values differ by a constant.
        """
        # Places are unequal in the whole batch where another micro-batch has other tokens.
        return len({target.whole["places"] for target in targets}) == 1 and all(
            term.head and term.shared is None and term.logit_loss == "kl" and target.direct
            for term, target in zip(terms, targets)
        )

    @classmethod
    def mixed(
        cls,
        terms: Sequence[Self],
        weights: Sequence[float],
        signals: Signals,
        head: OutputHead,
        targets: Sequence[Targets],
    ) -> torch.Tensor:
        """L_KD against sum_m w_m p_m, the teachers' mixed probabilities."""
        return logit_losses.kd_loss(
            signals.hidden.flatten(0, 1)[targets[0].places],
            head,
            [target.signals["hidden"] for target in targets],
            [term.head for term in terms],
            terms[0].temperature,
            terms[0].count(targets[0].whole),
            mixture=list(weights),
        )


def _require_top_k(setup: TermSetup) -> None:
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
    other = f"{teacher:,} output rows (the student {student:,})" if teacher > student else ""
    if not same_pieces(setup.cache.vocabulary(), setup.vocabulary):
        other = "another tokenizer than the student"
    if other:
        raise ValueError(
            f"the teacher has {other} and its cache holds top-k logits: set signals to 'white_box' "
            "(or 'top_k hidden' for a teacher without maps) and run 02 again"
        )
