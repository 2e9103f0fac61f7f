"""The control `label_smoothing`: as uncertain as the teacher on average, and nothing it knows."""

import math
from typing import Self

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd_utils.cache.teacher_cache import TeacherCache, output_head
from kd_utils.distill.targets import NextTokens
from kd_utils.distill.teacher_terms import Term, TermSetup, register
from kd_utils.models.output_head import OutputHead
from kd_utils.models.signals import Signals

ROWS = 512  # of the teacher's cache whose entropies are averaged


@register
class Smoothing(Term):
    """L_smoothing = - sum over places of sum_v p(v) log q(v) / number of places, in nats.

    p is (1 - eps) for the token that follows plus eps / V for each of the V pieces (Szegedy et al.
    2016, section 7; Mueller et al. 2019). Its entropy is the teacher's mean entropy. The places are
    those of L_KD but for the last token of a row, which no token follows; distributions are at
    T = 1, and no T^2 is in. The least value is the entropy, not 0.

    Args:
        entropy: the teacher's mean entropy per position, in nats; pieces: V, the student's.
        teacher: what the entropy was taken from, in words.
    """

    name = "smoothing"

    def __init__(self, entropy: float, pieces: int, teacher: str = "the teacher") -> None:
        super().__init__()
        self.entropy, self.teacher = entropy, teacher
        self.epsilon = epsilon_of(entropy, pieces)

    @classmethod
    def of(cls, setup: TermSetup) -> Self:
        entropy, teacher = teacher_entropy(setup)
        return cls(entropy, setup.student.vocab_size, teacher)

    def forward(self, signals: Signals, head: OutputHead, targets: NextTokens) -> Tensor:
        hidden = signals.hidden.flatten(0, 1)[targets.places]
        total = torch.zeros((), device=hidden.device)

        def part(hidden: Tensor, tokens: Tensor) -> Tensor:
            return nn.functional.cross_entropy(
                head.logits(hidden).float(), tokens, reduction="sum", label_smoothing=self.epsilon
            )

        for start in range(0, len(hidden), 512):  # logits are computed again, and not kept
            rows = slice(start, start + 512)
            total = total + checkpoint(
                part, hidden[rows], targets.tokens[rows], use_reentrant=False
            )
        return total / max(self.count(targets.whole), 1)

    def about(self) -> str:
        return (
            f"labels smoothed by eps = {self.epsilon:.4g}, to the mean entropy of {self.teacher}: "
            f"{self.entropy:.4g} nats per position"
        )

    def numbers(self) -> dict[str, float]:
        return {"smoothing/epsilon": self.epsilon, "smoothing/teacher_entropy": self.entropy}


def smoothed_entropy(epsilon: float, pieces: int) -> float:
    """The entropy in nats of (1 - eps) one-hot + eps / V; it grows with eps, from 0 to ln V."""
    others = epsilon / pieces
    first = 1.0 - epsilon + others
    spread = -(pieces - 1) * others * math.log(others) if others else 0.0
    return spread - first * math.log(first)


def epsilon_of(entropy: float, pieces: int) -> float:
    """The eps for which `smoothed_entropy` is `entropy`; 1 where no eps reaches it."""
    if entropy >= math.log(pieces):
        return 1.0
    return brentq(lambda eps: smoothed_entropy(eps, pieces) - entropy, 0.0, 1.0, xtol=1e-15)


@torch.no_grad()
def teacher_entropy(setup: TermSetup) -> tuple[float, str]:
    """The teacher's mean entropy per position at T = 1, in nats, and what it was taken from.

    The mean is over the teacher's positions that a token follows ("answer": that predict a part of
    the answer) of at most `ROWS` training rows: the first by `example_id`, which is a hash, so that
    every seed and method has the same rows.

    Of a top-k cache the entropy of the largest logits is exact. The rest of the probability counts
    as spread evenly over the other pieces, which is the most entropy that it can have.

    Raises:
        ValueError: a top-k cache without the mass of the rest at T = 1.
    """
    cache, device = setup.cache, setup.device
    head = output_head(cache, device)
    columns = ("hidden",) if head else ("top_logits", "log_mass")
    setup.require(columns)
    cache.read_only(columns)
    if not head and 1.0 not in cache.manifest["temperatures"]:
        raise ValueError(
            "the top-k cache has no mass of the rest at temperature 1, so that the teacher's "
            "entropy is not known: run 02 again"
        )
    ids, total, count = sorted(cache.splits["train"])[:ROWS], 0.0, 0
    for row in map(cache.__getitem__, ids):
        first = 0 if setup.config.distill_tokens == "all" else row.answer_start - 1
        places = slice(first, len(row.tokens) - 1)
        count += places.stop - places.start
        read = [torch.as_tensor(row.signals[name][places]).to(device) for name in columns]
        entropies = _entropies(head, read[0]) if head else _top_k_entropies(cache, *read)
        total += float(entropies.sum())
    bound = "" if head else ", an upper bound"
    return total / count, f"{cache.manifest['teacher']} over {len(ids)} training rows{bound}"


def _entropies(head: OutputHead, hidden: Tensor) -> Tensor:
    """(N, d) -> (N,) nats."""
    chunks = hidden.float().split(max(16, 2**25 // len(head.weight)))
    logs = (head.logits(chunk).log_softmax(-1) for chunk in chunks)
    return torch.cat([-(log.exp() * log).sum(-1) for log in logs])


def _top_k_entropies(cache: TeacherCache, logits: Tensor, mass: Tensor) -> Tensor:
    """(N, k) largest logits and the mass at each temperature -> (N,) nats."""
    manifest = cache.manifest
    log = logits - mass[:, [manifest["temperatures"].index(1.0)]]
    rest = (1 - log.exp().sum(-1)).clamp(min=0)
    others = max(manifest["shape"]["vocab_size"] - logits.shape[1], 1)
    return -(log.exp() * log).sum(-1) - torch.xlogy(rest, rest / others)
