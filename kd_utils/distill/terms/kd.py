"""L_KD: the student's next-token distributions against the teacher's."""

from collections.abc import Sequence
from typing import Self

import torch
from torch.utils.checkpoint import checkpoint

from kd_utils.cache import teacher_cache
from kd_utils.distill import logit_losses
from kd_utils.distill.targets import Spans, Targets
from kd_utils.distill.teacher_terms import Term, TermSetup, register
from kd_utils.models.output_head import OutputHead, as_head
from kd_utils.models.signals import Signals
from kd_utils.tokens import vocabulary

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
        if sizes[0] != sizes[1] or not vocabulary.same_pieces(teacher, setup.vocabulary):
            pieces = vocabulary.shared_output_rows(teacher, setup.vocabulary, *sizes)
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
            losses = forward_kl_top_k(
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
        student_log = span_log_probs(
            student[places], head, tokens, group, spans.count, self.temperature
        )
        with torch.no_grad():
            hidden, tokens, group = spans.teacher
            teacher_log = span_log_probs(
                hidden, self.head, tokens, group, spans.count, self.temperature
            )
        sides = student_log[:, None], teacher_log[:, None]
        return outcome_kl(*sides, self.temperature).sum()

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


def outcome_kl(
    student_log: torch.Tensor, teacher_log: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T^2 KL per row over k outcomes and one bucket for all others, whose mass is the rest.

    For a group of several tokens only the probability of its text can be compared, and k is 1.

    Args:
        student_log, teacher_log: (N, k) log-probability of each outcome.

    Returns:
        (N,) nats, times T^2; 0 where the two agree.
    """
    # log(1 - sum of the outcomes), kept finite where float32 leaves the rest no mass.
    student_rest, teacher_rest = (
        torch.log1p(-side.exp().sum(-1).clamp(max=1 - 1e-6)) for side in (student_log, teacher_log)
    )
    inside = (teacher_log.exp() * (teacher_log - student_log)).sum(-1)
    return temperature**2 * (inside + teacher_rest.exp() * (teacher_rest - student_rest))


def forward_kl_top_k(
    student_logits: torch.Tensor,
    top_logits: torch.Tensor,
    top_ids: torch.Tensor,
    log_mass: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """T^2 KL per token over the teacher's top k tokens and one bucket for the rest.

    Merging tokens can only lower a KL (data processing inequality), so this is a lower bound of
    `logit_losses.kd_loss`; it is equal where the student is proportional to the teacher within the
    rest.

    Args:
        student_logits: (N, V).
        top_logits: (N, k) the teacher's largest logits z; top_ids: (N, k) their ids, int64.
        log_mass: (N,) log sum_v exp(z_v / T) over the whole vocabulary, for this T.

    Returns:
        (N,) nats, times T^2.
    """
    student_log = (student_logits.float() / temperature).log_softmax(-1).gather(-1, top_ids)
    teacher_log = top_logits.float() / temperature - log_mass.float()[:, None]
    return outcome_kl(student_log, teacher_log, temperature)


def span_log_probs(
    hidden: torch.Tensor,
    head: OutputHead | torch.Tensor,
    targets: torch.Tensor,
    span: torch.Tensor,
    spans: int,
    temperature: float,
) -> torch.Tensor:
    """Log-probability of each group of tokens: the sum over its tokens of log softmax(z / T).

    Args:
        hidden: (P, d) at the positions that predict a token; targets: (P,) those tokens.
        span: (P,) the number of the group that each token belongs to, below `spans`.

    Returns:
        (spans,) nats.
    """
    head, total = as_head(head), torch.zeros(spans, device=hidden.device)

    def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head.logits(hidden.to(head.weight.dtype)).float() / temperature
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    for start in range(0, len(hidden), 512):  # recomputed in the backward pass, and not kept
        rows = slice(start, start + 512)
        log_probs = checkpoint(part, hidden[rows], targets[rows], use_reentrant=False)
        total = total.index_add(0, span[rows], log_probs)
    return total


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
    if not vocabulary.same_pieces(setup.cache.vocabulary(), setup.vocabulary):
        other = "another tokenizer than the student"
    if other:
        raise ValueError(
            f"the teacher has {other} and its cache holds top-k logits: set signals to 'white_box' "
            "(or 'top_k hidden' for a teacher without maps) and run 02 again"
        )
