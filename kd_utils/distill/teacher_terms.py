"""The terms of the loss for one teacher, built from its cache."""

from collections.abc import Iterable

import torch
from torch import nn

from kd_utils.cache import manifest, teacher_cache, verification
from kd_utils.config.trial import TrialConfig
from kd_utils.distill.term import Term, TermSetup
from kd_utils.distill.terms import TERMS
from kd_utils.tokens.vocabulary import Vocabulary


class TeacherTerms(nn.ModuleDict):
    """The terms of one teacher by name, and the teacher's weight among several.

    Its parameters, such as projectors and a learned mix of heads, train with the student.
    """

    def __init__(self, terms: Iterable[Term], weight: float = 1.0) -> None:
        super().__init__({term.name: term for term in terms})
        self.weight = weight

    def about(self) -> str:
        """What is compared, in a few words, for the record."""
        return "; ".join(term.about() for term in self.values()) or "no term reads this teacher"


def teacher_terms_of(setup: TermSetup, weight: float = 1.0) -> TeacherTerms:
    """The terms of the trial's method for one teacher, whose weight among several is `weight`.

    From now on the teacher's cache gives only the signals that these terms read.

    Raises:
        ValueError: what the two cannot be compared in, or what the cache lacks, and the remedy.
    """
    names = [name for name in setup.config.weights if name != "task"]
    if unknown := [name for name in names if name not in TERMS]:
        raise ValueError(
            f"no term of the loss is called {unknown[0]!r} (known: {', '.join(TERMS)}): register "
            "it with distill.term.register"
        )
    terms = TeacherTerms((TERMS[name].of(setup) for name in names), weight)
    columns = {column for term in terms.values() for column in term.columns}
    setup.require(columns)
    setup.cache.read_only(columns)
    return terms.to(setup.device)


def layers_needed(teachers: Iterable[TeacherTerms]) -> dict[str, set[int]]:
    """The layers that `forward_signals` must capture of the student, as its keyword arguments."""
    terms = [term for teacher in teachers for term in teacher.values()]
    return {
        name: {layer for term in terms for layer in getattr(term, name)}
        for name in ("hidden_layers", "map_layers")
    }


def open_caches(config: TrialConfig, data_hash: str) -> list[teacher_cache.TeacherCache]:
    """The verified caches of the trial's teachers, the trial's own experiment first.

    Args:
        config: the trial's.
        data_hash: of the prepared data.

    Raises:
        CacheError: a cache is missing, not verified, or made from something else; and the remedy.
    """
    return [
        verification.open_verified(
            manifest.find_cache(config.artifacts, name),
            data_hash=data_hash,
            teacher=config.teacher if name == config.name else None,
        )
        for name in config.teachers
    ]


def all_teacher_terms(
    caches: list[teacher_cache.TeacherCache],
    model: nn.Module,
    vocabulary: Vocabulary,
    config: TrialConfig,
    device: torch.device,
) -> nn.ModuleList:
    """`teacher_terms_of` each of the trial's teachers.

    Args:
        caches: verified, as `open_caches` gives them.
        model: the student.
        vocabulary: the student's.
        config: the trial's.
        device: where the loss is computed.
    """
    student, weights = model.config.get_text_config(), config.teachers.values()
    return nn.ModuleList(
        teacher_terms_of(TermSetup(config, cache, student, vocabulary, device, index), weight)
        for index, (cache, weight) in enumerate(zip(caches, weights, strict=True))
    )
