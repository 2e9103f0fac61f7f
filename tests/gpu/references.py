"""Random batches of a teacher and a student, cut into tokens alike or not, and each term of the
loss computed from them in float64 on the CPU with plain torch.

The student's side is leaves of the graph: hidden states, head, queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_utils.models.attention_maps import Attention, decode_map, encode_map
from kd_utils.models.output_head import OutputHead
from kd_utils.models.signals import Signals
from kd_utils.tokens.encoding import Example

#: The largest error by precision of the matrix products: rounding of float32; of bfloat16, whose
#: steps are 2^-8 of a value, in scores and logits of a few units.
NEAR = {"float32": 2e-5, "bfloat16": 5e-2}

#: Tokens of the teacher and the student in a group of six bytes, and after which bytes they end: no
#: two end together before the group does.
CUTS = {
    (1, 1): ([6], [6]),
    (2, 1): ([2, 6], [6]),
    (1, 2): ([6], [3, 6]),
    (2, 3): ([2, 6], [1, 3, 6]),
}
WIDTHS = {"teacher": 48, "student": 32}
PIECES = {"teacher": 131, "student": 97}  # rows of the output layers


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64 on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


@dataclass
class Pair:
    """Rows of a batch with both sides' tokens.

    Attributes:
        teacher_rows, student_rows: the examples; the teacher's have signals.
        groups: of each row, (teacher's tokens, student's tokens) of each group.
        answers: of each row, the group that the answer begins with.
    """

    teacher_rows: list[Example]
    student_rows: list[Example]
    groups: list[list[tuple[int, int]]]
    answers: list[int]

    def lasts(self, side: int) -> list[np.ndarray]:
        """Of each row, the last token of each group on a side (0: teacher, 1: student)."""
        return [np.cumsum([group[side] for group in row]) - 1 for row in self.groups]

    def wanted(self, distill_tokens: str) -> list[range]:
        """Of each row, the groups whose last token is compared."""
        return [
            range(len(row)) if distill_tokens == "all" else range(answer - 1, len(row) - 1)
            for row, answer in zip(self.groups, self.answers)
        ]


def random_pair(lengths: list[int], *, other_tokens: bool, heads: int, seed: int) -> Pair:
    """Rows of so many groups; with `other_tokens` most groups are cut differently.

    The signals are those of a white-box cache: float16 hidden states and maps of random scores.
    """
    rng, random = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    pair = Pair([], [], [], [])
    for number, length in enumerate(lengths):
        cuts = [(1, 1)] * length
        if other_tokens:
            cuts = [list(CUTS)[k] for k in rng.integers(0, len(CUTS), length - 1)] + [(1, 1)]
        answer = length - length // 3
        rows = []
        for side, (name, pieces) in enumerate(PIECES.items()):
            ends = [6 * g + end for g, cut in enumerate(cuts) for end in CUTS[cut][side]]
            tokens = rng.integers(3, pieces, len(ends)).astype(np.int32)
            start = sum(cut[side] for cut in cuts[:answer])
            rows.append(Example(f"row{number}", tokens, start, np.array(ends, np.int32)))
        teacher, student = rows
        if not other_tokens:
            teacher = Example(student.example_id, student.tokens, student.answer_start)
        n = len(teacher.tokens)
        scores = 2 * torch.randn(heads, n, n, generator=random)
        scores.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        teacher.signals = {
            "hidden": torch.randn(n, WIDTHS["teacher"], generator=random).half().numpy(),
            "attention": encode_map(scores.softmax(-1), torch.float16).numpy(),
        }
        pair.teacher_rows.append(teacher)
        pair.student_rows.append(student)
        pair.groups.append(cuts)
        pair.answers.append(answer)
    return pair


class Leaves:
    """The student's side of a batch, random: what its forward pass would give."""

    def __init__(self, pair: Pair, seed: int, *, heads: int = 4, kv_heads: int = 2) -> None:
        random = torch.Generator().manual_seed(seed)
        shape = len(pair.student_rows), max(len(row.tokens) for row in pair.student_rows)

        def leaf(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=random)

        self.values = {
            "hidden": leaf(*shape, WIDTHS["student"]),
            "head": leaf(PIECES["student"], WIDTHS["student"]) / 3,
            "query": leaf(shape[0], heads, shape[1], 16),
            "key": leaf(shape[0], kv_heads, shape[1], 16),
        }

    def on(self, device: torch.device | str, dtype: torch.dtype, attention: torch.dtype) -> dict:
        """New leaves; queries and keys of another type, as a teacher or autocast may have them."""
        return {
            name: value.to(attention if name in ("query", "key") else dtype)
            .to(device, torch.float64 if dtype == torch.float64 else None)
            .requires_grad_()
            for name, value in self.values.items()
        }


def signals_of(leaves: dict[str, Tensor]) -> tuple[Signals, OutputHead]:
    """Leaves as a student's forward pass with one layer of attention, and its output layer."""
    attention = Attention(leaves["query"], leaves["key"], None, 0.25)
    hidden = leaves["hidden"]
    return Signals(hidden, {2: hidden}, {2: attention}), OutputHead(leaves["head"])


def gathered(states: list[Tensor], places: list[np.ndarray]) -> Tensor:
    return torch.cat([state[torch.from_numpy(at)] for state, at in zip(states, places)])


def teacher_hidden(pair: Pair) -> list[Tensor]:
    return [torch.from_numpy(row.signals["hidden"]).double() for row in pair.teacher_rows]


def task_loss(pair: Pair, leaves: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the answers."""
    losses = []
    for row, hidden in zip(pair.student_rows, leaves["hidden"]):
        places = torch.arange(row.answer_start - 1, len(row.tokens) - 1)
        labels = torch.from_numpy(row.tokens).long()[places + 1]
        losses.append(F.cross_entropy(hidden[places] @ leaves["head"].T, labels, reduction="none"))
    return torch.cat(losses).mean()


def kd_loss(
    pair: Pair,
    leaves: dict[str, Tensor],
    head: Tensor,
    temperature: float,
    wanted: list[range],
    shared: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """T^2 KL at places that one token follows on each side, and of two outcomes at the others."""
    sides = (teacher_hidden(pair), head.double()), (list(leaves["hidden"]), leaves["head"])
    singles, outcomes = [], []
    for side, (states, weight) in enumerate(sides):
        rows = (pair.teacher_rows, pair.student_rows)[side]
        single, chains = [], []
        for b, (state, row, last) in enumerate(zip(states, rows, pair.lasts(side))):
            log = (state @ weight.T / temperature).log_softmax(-1)
            following = [*pair.groups[b][1:], (1, 1)]
            single += [log[last[g]] for g in wanted[b] if following[g] == (1, 1)]
            for g in wanted[b]:
                if following[g] != (1, 1):
                    at = torch.arange(last[g], last[g + 1])
                    chains.append(log[at, torch.from_numpy(row.tokens).long()[at + 1]].sum())
        log = torch.stack(single)
        singles.append(log if shared is None else bucketed(log, shared[side]))
        outcomes.append(torch.stack(chains) if chains else log.new_zeros(0))
    total = F.kl_div(singles[1], singles[0], log_target=True, reduction="sum")
    p, q = outcomes
    total = total + (p.exp() * (p - q)).sum()
    total = total + ((1 - p.exp()) * (torch.log1p(-p.exp()) - torch.log1p(-q.exp()))).sum()
    return temperature**2 * total / sum(map(len, wanted))


def bucketed(log_probs: Tensor, ids: Tensor) -> Tensor:
    """(N, K + 1): the pieces `ids`, then the log of the mass of all others."""
    rest = torch.ones(log_probs.shape[-1], dtype=torch.bool)
    rest[ids] = False
    others = log_probs[:, rest].logsumexp(-1, keepdim=True)
    return torch.cat([log_probs[:, ids], others], dim=-1)


def uld_loss(
    pair: Pair, leaves: dict[str, Tensor], head: Tensor, temperature: float, wanted: list[range]
) -> Tensor:
    """The distance of sorted probabilities, at all places."""
    places = [[last[list(part)] for last, part in zip(pair.lasts(side), wanted)] for side in (0, 1)]
    teacher = gathered(teacher_hidden(pair), places[0]) @ head.double().T
    student = gathered(list(leaves["hidden"]), places[1]) @ leaves["head"].T
    p, q = (
        (side / temperature).softmax(-1).sort(-1, descending=True)[0] for side in (teacher, student)
    )
    q = F.pad(q, (0, p.shape[-1] - q.shape[-1]))
    return (p - q).abs().sum(-1).mean()


def hidden_loss(
    pair: Pair, leaves: dict[str, Tensor], projector: Tensor, wanted: list[range]
) -> Tensor:
    """Mean squared error of the projected states."""
    places = [[last[list(part)] for last, part in zip(pair.lasts(side), wanted)] for side in (0, 1)]
    teacher = gathered(teacher_hidden(pair), places[0])
    return F.mse_loss(gathered(list(leaves["hidden"]), places[1]) @ projector.T, teacher)


def attention_loss(
    pair: Pair,
    leaves: dict[str, Tensor],
    mix: Tensor | None,
    normaliser: str,
    wanted: list[range],
) -> Tensor:
    """Squared error of the maps over groups: rows of last tokens, columns summed."""
    total, entries, queries = torch.zeros((), dtype=torch.float64), 0, 0
    for b, groups in enumerate(wanted):
        merged = []
        for side, whole in enumerate((teacher_map(pair, b), student_map(pair, leaves, b))):
            columns = np.repeat(np.arange(len(pair.groups[b])), [g[side] for g in pair.groups[b]])
            one_hot = F.one_hot(torch.from_numpy(columns)).double()
            merged.append((whole @ one_hot)[:, torch.from_numpy(pair.lasts(side)[b][list(groups)])])
        target, found = merged
        if mix is not None:
            target = torch.einsum("st,tqk->sqk", mix, target)
        total = total + (target - found).square().sum(dim=(1, 2)).mean()  # a head's
        entries, queries = entries + sum(g + 1 for g in groups), queries + len(groups)
    return total / (entries if normaliser == "entries" else queries)


def teacher_map(pair: Pair, b: int) -> Tensor:
    row = pair.teacher_rows[b]
    return decode_map(torch.from_numpy(row.signals["attention"]), 0, len(row.tokens)).double()


def student_map(pair: Pair, leaves: dict[str, Tensor], b: int) -> Tensor:
    n, groups = len(pair.student_rows[b].tokens), leaves["query"].shape[1] // leaves["key"].shape[1]
    query, key = leaves["query"][b, :, :n], leaves["key"][b, :, :n].repeat_interleave(groups, dim=0)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    return (0.25 * query @ key.transpose(-1, -2)).masked_fill(hidden, -torch.inf).softmax(-1)
