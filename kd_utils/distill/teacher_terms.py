"""The terms of the loss for one teacher, built from its cache."""

from collections.abc import Iterable

import torch
from torch import nn

from kd_utils.cache.manifest import find_cache
from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.cache.verification import open_verified
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


def teacher_terms_of(
    cache: TeacherCache,
    model: nn.Module,
    vocabulary: Vocabulary,
    config: TrialConfig,
    device: torch.device,
    *,
    index: int = 0,
    weight: float = 1.0,
) -> TeacherTerms:
    """The terms of the trial's method for the teacher of this cache.

    From now on the cache gives only the signals that these terms read.

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
    setup = TermSetup(config, cache, model.config.get_text_config(), vocabulary, device, index)
    names = [name for name in config.weights if name != "task"]
    if unknown := [name for name in names if name not in TERMS]:
        raise ValueError(
            f"no term of the loss is called {unknown[0]!r} (known: {', '.join(TERMS)}): register "
            "it with distill.term.register"
        )
    terms = TeacherTerms((TERMS[name].of(setup) for name in names), weight)
    columns = {column for term in terms.values() for column in term.columns}
    setup.require(columns)
    cache.read_only(columns)
    return terms.to(device)


def layers_needed(teachers: Iterable[TeacherTerms]) -> dict[str, set[int]]:
    """The layers that `forward_signals` must capture of the student, as its keyword arguments."""
    terms = [term for teacher in teachers for term in teacher.values()]
    return {
        name: {layer for term in terms for layer in getattr(term, name)}
        for name in ("hidden_layers", "map_layers")
    }


def open_caches(config: TrialConfig, data_hash: str) -> list[TeacherCache]:
    """The verified caches of the trial's teachers, the trial's own experiment first.

    Args:
        config: the trial's.
        data_hash: of the prepared data.

    Raises:
        CacheError: a cache is missing, not verified, or made from something else; and the remedy.
    """
    return [
        open_verified(
            find_cache(config.artifacts, name),
            data_hash=data_hash,
            teacher=config.teacher if name == config.name else None,
        )
        for name in config.teachers
    ]


def all_teacher_terms(
    caches: list[TeacherCache],
    model: nn.Module,
    vocabulary: Vocabulary,
    config: TrialConfig,
    device: torch.device,
) -> nn.ModuleList:
    """`teacher_terms_of` each of the trial's teachers."""
    return nn.ModuleList(
        teacher_terms_of(cache, model, vocabulary, config, device, index=index, weight=weight)
        for index, (cache, weight) in enumerate(zip(caches, config.teachers.values(), strict=True))
    )
