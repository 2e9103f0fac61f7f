"""What a student is shown of one teacher: which layers of both are compared, through which
projectors and heads.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from kd_utils.cache.teacher_cache import TOP_K, TeacherCache
from kd_utils.config.trial import TrialConfig
from kd_utils.distill.logit_losses import (
    Shared,
    forward_kl_top_k,
    kd_loss,
    span_kl,
    span_log_probs,
    uld_loss,
)
from kd_utils.distill.losses import attention_mse, hidden_mse
from kd_utils.distill.targets import Targets
from kd_utils.models.devices import mixed_seed
from kd_utils.models.layer_pairs import column, layer_pairs
from kd_utils.models.output_head import OutputHead
from kd_utils.models.signals import Signals
from kd_utils.models.students import make_projector
from kd_utils.tokens.vocabulary import SharedPieces, Vocabulary, same_pieces, shared_pieces


class TeacherTerms(nn.Module):
    """One teacher as the student sees it. Its parameters (projectors, a learned mix of heads) train
    with the student.

    Args:
        head: the teacher's output layer; None of a top-k cache.
        widths: (student's, teacher's) hidden size.
        hidden_pairs, map_pairs: (teacher's layer, student's layer), counted from 1.
        teacher_layers: how many the teacher has.
        shared: pieces of both vocabularies; None where the ids agree.
        mix: (H_student, H_teacher) which of the teacher's heads each of the student's is compared
            with; None: its own.
        learned: `mix` is where training starts; rows stay positive and sum to 1.
        temperatures: those for which a top-k cache holds the rest's mass.
        seed: of the projectors' initial weights; index: of this teacher among several.
        weight: of this teacher among several.
    """

    def __init__(
        self,
        head: OutputHead | None,
        widths: tuple[int, int],
        *,
        hidden_pairs: list[tuple[int, int]],
        map_pairs: list[tuple[int, int]],
        teacher_layers: int,
        shared: Shared | None = None,
        mix: Tensor | None = None,
        learned: bool = False,
        temperatures: Collection[float] = (),
        seed: int = 0,
        index: int = 0,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.head, self.shared, self.weight, self.temperatures = (
            head,
            shared,
            weight,
            list(temperatures),
        )
        self.hidden_pairs, self.map_pairs, self.teacher_layers = (
            hidden_pairs,
            map_pairs,
            teacher_layers,
        )
        seeds = [
            mixed_seed(seed, index, k) if index or k else seed for k in range(len(hidden_pairs))
        ]
        self.projectors = nn.ModuleList(make_projector(*widths, each) for each in seeds)
        self.mixing = nn.Parameter(torch.log(mix + 0.01)) if learned else None
        self.register_buffer("fixed_mix", None if learned else mix, persistent=False)

    def about(self) -> str:
        """What is compared, in a few words, for the record."""
        pieces = (
            "id by id"
            if self.shared is None
            else (
                f"over {len(self.shared.teacher):,} shared pieces, beside "
                f"{len(self.shared.teacher_rest):,} of the teacher "
                f"and {len(self.shared.student_rest):,} of the student"
            )
        )
        mix = (
            "head by head"
            if self.mix is None
            else f"{self.mix.shape[1]} heads mixed to {self.mix.shape[0]}"
        )
        pairs = {"hidden states": self.hidden_pairs, f"maps, {mix},": self.map_pairs}
        layers = [
            f"{what} of layers " + ", ".join(f"{theirs}:{ours}" for theirs, ours in chosen)
            for what, chosen in pairs.items()
            if chosen
        ]
        return "; ".join([f"logits {pieces}", *layers]) + " (teacher:student)" * bool(layers)

    def columns(self, terms: Collection[str]) -> set[str]:
        """The cache's columns that these terms need."""
        if "kd" not in terms:
            return set()
        logits = {"hidden"} if self.head else set(TOP_K)
        return (
            logits
            | {column("hidden", theirs, self.teacher_layers) for theirs, _ in self.hidden_pairs}
            | {column("attention", theirs, self.teacher_layers) for theirs, _ in self.map_pairs}
        )

    @property
    def mix(self) -> Tensor | None:
        """(H_student, H_teacher) rows that sum to 1; None: head by head."""
        return self.fixed_mix if self.mixing is None else self.mixing.softmax(-1)

    def trainable(self, terms: Collection[str]) -> list[nn.Parameter]:
        """What trains where these are the terms of the loss."""
        return [
            *(self.projectors.parameters() if "hidden" in terms else ()),
            *([self.mixing] if "attention" in terms and self.mixing is not None else ()),
        ]

    def terms(
        self,
        signals: Signals,
        head: OutputHead,
        compared: Targets,
        terms: Collection[str],
        temperature: float,
        logit_loss: str = "kl",
    ) -> dict[str, Tensor]:
        """The terms of this teacher, each divided by the whole batch's normaliser; see
        `training.loss_terms`.
        """
        values, whole = {}, compared.normalisers
        if "kd" in terms:
            students = signals.hidden.flatten(0, 1)
            values["kd"] = self._kd(students, head, compared, temperature, logit_loss) / whole["kd"]
        if "hidden" in terms:
            values["hidden"] = sum(
                hidden_mse(
                    projector(signals.state(ours).flatten(0, 1)[compared.places]),
                    compared.signals[column("hidden", theirs, self.teacher_layers)],
                    whole["hidden"],
                )
                for projector, (theirs, ours) in zip(self.projectors, self.hidden_pairs)
            ) / len(self.hidden_pairs)
        if "attention" in terms:
            values["attention"] = sum(
                attention_mse(
                    signals.attentions[ours],
                    compared.maps[column("attention", theirs, self.teacher_layers)],
                    whole["attention"],
                    self.mix,
                )
                for theirs, ours in self.map_pairs
            ) / len(self.map_pairs)
        return values

    def _kd(
        self,
        students: Tensor,
        head: OutputHead,
        compared: Targets,
        temperature: float,
        logit_loss: str,
    ) -> Tensor:
        """The sum over places."""
        signals, places = compared.signals, compared.places
        if (
            self.head is None
        ):  # of a longer group's tokens nobody knows whether they are among the largest
            keep = slice(None) if compared.single is None else compared.single
            mass = signals["log_mass"][keep, self.temperatures.index(temperature)]
            return forward_kl_top_k(
                head.logits(students[places[keep]]),
                signals["top_logits"][keep],
                signals["top_ids"][keep].long(),
                mass,
                temperature,
            ).sum()
        if logit_loss == "uld":
            return uld_loss(students[places], head, signals["hidden"], self.head, temperature, 1)
        theirs = signals["hidden"]
        if compared.single is not None:
            places, theirs = places[compared.single], theirs[compared.single]
        total = kd_loss(
            students[places], head, theirs, self.head, temperature, 1, shared=self.shared
        )
        if (spans := compared.spans) is not None:
            ours = span_log_probs(
                students[spans.student],
                head,
                spans.student_targets,
                spans.student_span,
                spans.count,
                temperature,
            )
            with torch.no_grad():
                theirs = span_log_probs(
                    spans.teacher,
                    self.head,
                    spans.teacher_targets,
                    spans.teacher_span,
                    spans.count,
                    temperature,
                )
            total = total + span_kl(ours, theirs, temperature).sum()
        return total


def mixed_kd(
    views: list[TeacherTerms],
    signals: Signals,
    head: OutputHead,
    compared: list[Targets],
    temperature: float,
) -> Tensor:
    """L_KD against several teachers' mixed probabilities, sum_m w_m p_m; for teachers with the
    student's own tokens.
    """
    students = signals.hidden.flatten(0, 1)[compared[0].places]
    return kd_loss(
        students,
        head,
        [each.signals["hidden"] for each in compared],
        [view.head for view in views],
        temperature,
        compared[0].normalisers["kd"],
        mixture=[view.weight for view in views],
    )


def view_of(
    cache: TeacherCache,
    model: nn.Module,
    vocabulary: Vocabulary,
    config: TrialConfig,
    device: torch.device,
    *,
    index: int = 0,
    weight: float = 1.0,
) -> TeacherTerms:
    """How this student sees the teacher of this cache, of which from now on only that is read.

    Args:
        cache: verified.
        model: the student.
        vocabulary: the student's.
        config: the trial's.
        device: where the loss is computed.
        index, weight: of this teacher among several.

    Raises:
        ValueError: what the two cannot be compared in, or what the cache lacks, and the remedy.
    """
    manifest, terms, own = cache.manifest, config.weights, model.config.get_text_config()
    shape = manifest["shape"]
    pairs = {
        term: layer_pairs(
            choice,
            config.paired_layers,
            shape["num_hidden_layers"],
            own.num_hidden_layers,
            config.seed,
        )
        if term in terms
        else []
        for term, choice in (
            ("hidden", config.hidden_layers),
            ("attention", config.attention_layers),
        )
    }
    require_signals(manifest, pairs, terms, config.temperature)
    if config.logit_loss == "uld" and manifest["signals"] == "top_k" and "kd" in terms:
        raise ValueError(
            "the cache holds top-k logits, and logit_loss 'uld' sorts the whole distribution: set "
            "signals "
            "to 'white_box' and run 02 again, or logit_loss to 'kl'"
        )
    theirs = cache.vocabulary()
    sizes, top_k = (shape["vocab_size"], own.vocab_size), manifest["signals"] == "top_k"
    # Of one tokenizer, models may have more output rows than it has ids: each has its own number of
    # unused ones.
    same = same_pieces(theirs, vocabulary) and (
        sizes[0] == sizes[1] or top_k and sizes[0] < sizes[1]
    )
    if not same and top_k and "kd" in terms:
        other = (
            "has another tokenizer than the student"
            if not same_pieces(theirs, vocabulary)
            else f"has {sizes[0]:,} output rows (the student {sizes[1]:,})"
        )
        raise ValueError(
            f"the teacher {other} and its cache holds top-k logits: set signals to 'white_box' and "
            f"run 02 "
            "again"
        )
    shared = None
    if not same and "kd" in terms:
        pieces = within(shared_pieces(theirs, vocabulary), *sizes)
        shared = Shared.of(
            torch.from_numpy(pieces.teacher), torch.from_numpy(pieces.student), *sizes, device
        )
    weight_of_head = cache.lm_head()
    head = (
        None
        if weight_of_head is None
        else OutputHead(weight_of_head.float().to(device), **manifest["head"])
    )
    mix = None
    if "attention" in terms:
        mix = head_mix(config.head_mapping, own.num_attention_heads, shape["num_attention_heads"])
    view = TeacherTerms(
        head,
        (own.hidden_size, manifest.get("hidden_size", 1)),
        shared=shared,
        hidden_pairs=pairs["hidden"],
        map_pairs=pairs["attention"],
        teacher_layers=shape["num_hidden_layers"],
        mix=mix,
        learned=config.head_mapping == "learned" and mix is not None,
        temperatures=manifest["temperatures"],
        seed=config.seed,
        index=index,
        weight=weight,
    )
    cache.read_only(view.columns(terms))
    return view.to(device)


def require_signals(
    manifest: dict[str, Any],
    pairs: dict[str, list[tuple[int, int]]],
    terms: Collection[str],
    temperature: float,
) -> None:
    """Check that a cache holds what the terms compare.

    Raises:
        ValueError: it lacks a signal, a layer or the temperature.
    """
    missing = {"hidden", "attention"} & set(terms)
    if manifest["signals"] == "top_k" and missing:
        raise ValueError(
            f"the cache holds top-k logits and no {' or '.join(sorted(missing))}: set signals to "
            "'white_box' and run 02 again, or distill_type to 'black_box'"
        )
    if (
        manifest["signals"] == "top_k"
        and "kd" in terms
        and temperature not in manifest["temperatures"]
    ):
        raise ValueError(
            f"the top-k cache is exact at temperature {manifest['temperatures']} only, not "
            f"{temperature}: "
            "run 02 again with this temperature"
        )
    for term, chosen in pairs.items():
        if lacking := sorted({theirs for theirs, _ in chosen} - set(manifest["layers"][term])):
            raise ValueError(
                f"the cache holds the teacher's {term} of layers "
                f"{_words(manifest['layers'][term])}, not "
                f"of {_words(lacking)}: set {term}_layers in the parameter file, which 02 reads "
                f"too, and "
                "run 02 again"
            )


def _words(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def within(pieces: SharedPieces, teacher_size: int, student_size: int) -> SharedPieces:
    """Those that both models have an output row for."""
    kept = (pieces.teacher < teacher_size) & (pieces.student < student_size)
    return SharedPieces(pieces.teacher[kept], pieces.student[kept])


def head_mix(mapping: str, student_heads: int, teacher_heads: int) -> Tensor | None:
    """(H_student, H_teacher) rows that sum to 1: with which of the teacher's heads each of the
    student's is compared.

    "mean_groups": neighbouring heads of the teacher are averaged in as many groups as the student
    has heads; where that does not divide, groups overlap by a head, and where the student has more
    heads, several see the same one (as adaptive average pooling does). "learned" starts from there.
    None: head by head.

    Raises:
        ValueError: the head counts differ and no mapping was chosen.
    """
    if mapping == "none":
        if student_heads != teacher_heads:
            raise ValueError(
                f"teacher has {teacher_heads} heads, student {student_heads}, and maps are "
                f"compared head "
                "by head: set head_mapping to 'mean_groups' (the teacher's heads averaged in "
                "groups) or "
                "'learned' (a trained mix of them)"
            )
        return None
    return torch.nn.functional.adaptive_avg_pool1d(
        torch.eye(teacher_heads), student_heads
    ).T.contiguous()
