"""The teacher's signals for a batch, lined up with the student's tokens."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kd_utils.models.attention_maps import causal_slice
from kd_utils.models.devices import to_device
from kd_utils.models.signal_kinds import kind_of
from kd_utils.tokens import alignment
from kd_utils.tokens.encoding import Example, groups_of


@dataclass
class Merge:
    """How a map over tokens becomes a map over groups of tokens.

    A group's row is that of its last token; its column is the sum over its tokens.

    Attributes:
        rows: (Q,) int64, the groups' last tokens, among the query rows of the map.
        group_of_key: (K,) int64, the group of each key.
        groups: how many groups the keys have.
    """

    rows: torch.Tensor
    group_of_key: torch.Tensor
    groups: int

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., queries, K) -> (..., Q, groups)."""
        chosen = rows.index_select(-2, self.rows)
        merged = torch.zeros(*chosen.shape[:-1], self.groups, device=rows.device)
        return merged.index_add_(-1, self.group_of_key, chosen)

    def spread(self, slope: torch.Tensor, queries: int) -> torch.Tensor:
        """The transpose, for gradients: (..., Q, groups) -> (..., queries, K)."""
        sizes = *slope.shape[:-2], queries, len(self.group_of_key)
        spread = torch.zeros(sizes, device=slope.device)
        return spread.index_copy_(-2, self.rows, slope.index_select(-1, self.group_of_key))


@dataclass
class Maps:
    """One layer's teacher maps of a batch, a list entry per example.

    Attributes:
        packed: (H, P) the teacher's query rows, as `attention_maps.encode_map` stores them.
        teacher_rows, student_rows: first and last + 1 position of the query rows on each side.
        merges: (teacher's, student's) where their tokens differ; None where they are the same.
    """

    packed: list[torch.Tensor]
    teacher_rows: list[tuple[int, int]]
    student_rows: list[tuple[int, int]]
    merges: list[tuple[Merge, Merge] | None]


@dataclass
class NextTokens:
    """A batch's own next tokens, for a term that takes no signal of a teacher from the batch.

    Attributes:
        places: (N,) flat positions b T + t of the student that a token follows, among those that
            `Targets` of the same rows compare: the last token of a row has none after it.
        tokens: (N,) these tokens.
        whole: the number of "places", in the whole batch when this is a part.
    """

    places: torch.Tensor
    tokens: torch.Tensor
    whole: Counter[str]


@dataclass
class Spans:
    """Groups of more than one token, each side as `terms.kd.span_log_probs` takes it.

    Attributes:
        student, teacher: what predicts each token, (P_s,) flat positions of the student or (P_t, d)
            hidden states of the teacher; (P,) the tokens; (P,) the number of each token's group.
        count: how many groups.
    """

    student: tuple[torch.Tensor, ...]
    teacher: tuple[torch.Tensor, ...]
    count: int


@dataclass
class Targets:
    """One teacher's signals for a batch. A place is the last token of a group, on either side.

    Attributes:
        places: (N,) flat positions b T + t of the student whose signals are compared.
        signals: column of the cache -> (N, .) the teacher's values there.
        maps: column of the cache -> the teacher's maps.
        single: (S,) the places that are followed by one token on each side, so that distributions
            over the next token can be compared; None: all are.
        spans: what follows the other places; None if there are none.
        direct: every example has the same tokens on both sides, or is paired with another of its
            length: places are all positions of the student, without merging.
        whole: the number of "places", and of "entries" and "queries" in one head's maps, in the
            whole batch when this is a part.
    """

    places: torch.Tensor
    signals: dict[str, torch.Tensor]
    maps: dict[str, Maps]
    single: torch.Tensor | None
    spans: Spans | None
    direct: bool
    whole: Counter[str]


def targets_of(
    examples: list[Example],
    rows: list[Example],
    width: int,
    distill_tokens: str,
    device: torch.device | str,
    *,
    other_rows: bool = False,
) -> Targets:
    """Line up one teacher's rows with the student's, and take the signals that are compared.

    Args:
        examples: with the student's tokens; rows: the same with the teacher's, and its signals.
        width: T of the batch.
        distill_tokens, device: as in `batches.collate`.
        other_rows: `rows` are not `examples` but others (`data.other_rows`): their last tokens are
            paired, and what is compared are the positions of the student's that have a partner.
    """

    def tensor(arrays: list[np.ndarray]) -> torch.Tensor:
        return to_device(np.concatenate(arrays), device)

    if other_rows:
        lengths = [(len(row.tokens), len(example.tokens)) for row, example in zip(rows, examples)]
        groups = [alignment.from_the_end(*pair) for pair in lengths]
        same = [teacher == student for teacher, student in lengths]
    else:
        groups = [groups_of(row, example) for row, example in zip(rows, examples)]
        same = [np.array_equal(row.tokens, example.tokens) for row, example in zip(rows, examples)]
    wanted = [
        (0, len(lined)) if distill_tokens == "all" else _before_answer(lined, example)
        for lined, example in zip(groups, examples)
    ]
    teacher_places = [lined.teacher[slice(*part)] for lined, part in zip(groups, wanted)]
    student_places = [lined.student[slice(*part)] for lined, part in zip(groups, wanted)]
    map_names = [name for name in rows[0].signals if kind_of(name).aligned == "map"]
    signals = {
        name: tensor([row.signals[name][at] for row, at in zip(rows, teacher_places)])
        for name in rows[0].signals
        if name not in map_names
    }
    teacher_rows, student_rows = (
        [(int(at[0]), int(at[-1]) + 1) for at in side] for side in (teacher_places, student_places)
    )
    merges = [
        None
        if equal or not map_names
        else (_merge(lined.teacher, teacher, device), _merge(lined.student, student, device))
        for lined, teacher, student, equal in zip(groups, teacher_places, student_places, same)
    ]
    maps = {
        name: Maps(_packed(name, rows, teacher_rows, device), teacher_rows, student_rows, merges)
        for name in map_names
    }
    single, spans = (
        (None, None) if all(same) else _followed(rows, examples, groups, wanted, width, tensor)
    )
    places = tensor([at + b * width for b, at in enumerate(student_places)])
    entries = sum(end - start for start, end in (causal_slice(*part) for part in wanted))
    whole = Counter(places=len(places), entries=entries, queries=len(places))
    return Targets(places, signals, maps, single, spans, all(same), whole)


def next_tokens_of(
    examples: list[Example],
    input_ids: np.ndarray,
    distill_tokens: str,
    device: torch.device | str,
) -> NextTokens:
    """Args: the padded `input_ids` (B, T) of `examples`; the others as in `batches.collate`."""
    width = input_ids.shape[1]
    places = np.concatenate(
        [
            np.arange(0 if distill_tokens == "all" else row.answer_start - 1, len(row.tokens) - 1)
            + b * width
            for b, row in enumerate(examples)
        ]
    )
    following = to_device(input_ids.reshape(-1)[places + 1], device)
    return NextTokens(to_device(places, device), following, Counter(places=len(places)))


def _before_answer(groups: alignment.Groups, example: Example) -> tuple[int, int]:
    """First and last + 1 of the groups whose last token predicts a part of the answer."""
    first = int(np.searchsorted(groups.student, example.answer_start - 1))
    return first, max(len(groups) - 1, first + 1)


def _packed(
    name: str, rows: list[Example], queries: list[tuple[int, int]], device: torch.device | str
) -> list[torch.Tensor]:
    """The query rows of each example's map, after one transfer to the device for all examples."""
    parts = [row.signals[name][:, slice(*causal_slice(*at))] for row, at in zip(rows, queries)]
    joined = to_device(np.concatenate([part.reshape(-1) for part in parts]), device)
    pieces = joined.split([part.size for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts)]


def _merge(last: np.ndarray, places: np.ndarray, device: torch.device | str) -> Merge:
    """One side's merge: `last` has each group's last token, `places` those that are compared."""
    keys = np.asarray(np.searchsorted(last, np.arange(places[-1] + 1)))
    return Merge(to_device(places - places[0], device), to_device(keys, device), int(keys[-1]) + 1)


def _followed(
    rows: list[Example],
    examples: list[Example],
    groups: list[alignment.Groups],
    wanted: list[tuple[int, int]],
    width: int,
    tensor: Callable[[list[np.ndarray]], torch.Tensor],
) -> tuple[torch.Tensor | None, Spans | None]:
    """The places that single tokens (or none) follow, and the groups behind the others."""
    alone: list[np.ndarray] = [
        np.append(lined.single, True)[first + 1 : last + 1]
        for lined, (first, last) in zip(groups, wanted)
    ]
    longer: list[tuple[int, int]] = [  # (example, group) of each group before a longer one
        (b, g)
        for b, (short, (first, _)) in enumerate(zip(alone, wanted))
        for g in map(int, np.flatnonzero(~short) + first)
    ]
    if not longer:
        return None, None
    single = tensor([np.flatnonzero(np.concatenate(alone))])
    if "hidden" not in rows[0].signals:
        return single, None

    def side(
        rows: list[Example], last: list[np.ndarray], predicts: Callable
    ) -> tuple[torch.Tensor, ...]:
        places = [(b, np.arange(last[b][g], last[b][g + 1])) for b, g in longer]
        return (
            tensor([predicts(b, at) for b, at in places]),
            tensor([rows[b].tokens[at + 1].astype(np.int64) for b, at in places]),
            tensor([np.full(len(at), k) for k, (_, at) in enumerate(places)]),
        )

    hidden = [row.signals["hidden"] for row in rows]
    student = side(examples, [lined.student for lined in groups], lambda b, at: at + b * width)
    teacher = side(rows, [lined.teacher for lined in groups], lambda b, at: hidden[b][at])
    return single, Spans(student, teacher, len(longer))
