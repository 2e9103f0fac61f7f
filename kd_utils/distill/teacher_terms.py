"""The terms of the loss: their base classes, the table of terms, and those of one teacher.

To add a term, define a subclass of `Term` (or of `LayerTerm`, for layers that are compared in
pairs) in a file of `distill/terms/`, decorate it with `register`, and name it in
`config.trial.METHODS`.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch

from kd_utils.cache import manifest, teacher_cache, verification
from kd_utils.config.trial import TrialConfig
from kd_utils.distill.targets import Targets
from kd_utils.models import devices, layer_pairs, output_head, signal_kinds
from kd_utils.models.signals import Signals, attention_modules
from kd_utils.tokens.vocabulary import Vocabulary


class TermSetup(NamedTuple):
    """What a term may ask for when it is built.

    Attributes:
        config: the trial's.
        cache: the teacher's signals.
        student: the configuration of the student's text model; vocabulary: the student's.
        device: where the loss is computed.
        teacher_index: the number of this teacher among several.
    """

    config: TrialConfig
    cache: teacher_cache.TeacherCache
    student: Any
    vocabulary: Vocabulary
    device: torch.device
    teacher_index: int = 0

    @property
    def shape(self) -> dict[str, int]:
        """The teacher's shape, with the names that `transformers` uses."""
        return self.cache.manifest["shape"]

    def pairs(self, kind: str, choice: str) -> list[tuple[int, int]]:
        """(teacher's layer, student's layer) for a choice of layers, all of which are cached.

        Raises:
            ValueError: a side has no such layer, or the cache lacks it.
        """
        total, count = self.shape["num_hidden_layers"], self.config.paired_layers
        pairs = layer_pairs.layer_pairs(
            choice, count, total, self.student.num_hidden_layers, self.config.seed
        )
        self.require({signal_kinds.column(kind, layer, total) for layer, _ in pairs})
        return pairs

    def seed(self, k: int) -> int:
        """The seed of the k-th thing that a term draws at random for this teacher."""
        seed, number = self.config.seed, self.teacher_index
        return devices.mixed_seed(seed, number, k) if number or k else seed

    def require(self, columns: Collection[str]) -> None:
        """Check that the cache holds these columns.

        Raises:
            ValueError: a kind of signal, or a layer of it, is missing.
        """
        header = self.cache.manifest
        for name in sorted(set(columns) - set(header["dtypes"])):
            kind = signal_kinds.kind_of(name).name
            cached = ", ".join(map(str, header["layers"].get(kind, [])))
            if not cached:
                raise ValueError(
                    f"the cache holds {header['signals']!r} without {kind!r}: add {kind} to "
                    "`signals` ('white_box' has hidden states and attention maps) and run 02 "
                    "again, or use distill_type 'black_box'"
                )
            raise ValueError(
                f"the cache holds {kind!r} of the teacher's layers {cached}, not of "
                f"{name.removeprefix(kind)[1:] or self.shape['num_hidden_layers']}: set "
                f"{kind}_layers in the parameter file, which 02 reads too, and run 02 again"
            )


class Term(torch.nn.Module):
    """One term of the loss, for one teacher. Its parameters train with the student.

    A subclass defines

    - `of(setup)`, a class method that builds the term from a `TermSetup`;
    - `forward(signals, head, targets)`: the student's signals and output layer, and the teacher's
      `Targets`, to a scalar: the sum over the batch divided by `self.count(targets.whole)`;
    - where several teachers can be mixed before they are compared with the student, `mixes` and a
      class method `mixed(terms, weights, signals, head, targets)`.

    Attributes:
        name: in `METHODS`, in records and in figures.
        columns: the columns of the teacher's cache that the term reads.
        hidden_layers, map_layers: layers of which the student's forward pass must keep the hidden
            states, or the queries and keys.
    """

    name: ClassVar[str]
    columns: Collection[str] = ()
    hidden_layers: Collection[int] = ()
    map_layers: Collection[int] = ()

    def count(self, whole: Counter[str]) -> int:
        """How many elements the term averages over, from the sizes in `Targets`."""
        return whole["places"]

    def about(self) -> str:
        """What is compared, in a few words, for the record."""
        return self.name

    def numbers(self) -> dict[str, float]:
        """What the term fixed when it was built, for every row of the record."""
        return {}

    @classmethod
    def mixes(cls, terms: Sequence[Self], targets: Sequence[Targets]) -> bool:
        """Whether these teachers are mixed; else the term is the weighted sum over them."""
        return False


class LayerTerm(Term):
    """A term that compares pairs of layers: the mean over the pairs.

    A subclass names the `kind` of signal that it compares and defines `compare(k, signals, layer,
    targets, column)`: the k-th pair, the student's `layer` with the teacher's `column`, to a scalar
    that is divided by `self.count(targets.whole)`.

    Args:
        pairs: (teacher's layer, student's layer), counted from 1.
        teacher_layers: how many layers the teacher has.
    """

    kind: ClassVar[str]

    def __init__(self, pairs: list[tuple[int, int]], teacher_layers: int) -> None:
        super().__init__()
        self.pairs = pairs
        self.columns = [signal_kinds.column(self.kind, layer, teacher_layers) for layer, _ in pairs]
        student_layers = [(signal_kinds.kind_of(self.kind), layer) for _, layer in pairs]
        self.hidden_layers, self.map_layers = signal_kinds.captured_layers(student_layers).values()

    def forward(
        self, signals: Signals, head: output_head.OutputHead, targets: Targets
    ) -> torch.Tensor:
        return sum(
            self.compare(k, signals, layer, targets, column)
            for k, ((_, layer), column) in enumerate(zip(self.pairs, self.columns))
        ) / len(self.pairs)

    def about(self) -> str:
        layers = ", ".join(f"{teacher}:{student}" for teacher, student in self.pairs)
        return f"{self.name} of layers {layers} (teacher:student)"


TERMS: dict[str, type[Term]] = {}


def register(term: type[Term]) -> type[Term]:
    """Add a term to the table, under its name."""
    TERMS[term.name] = term
    return term


class TeacherTerms(torch.nn.ModuleDict):
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
    # It fills the table; at the top it would be a circle, since its files import this module.
    import kd_utils.distill.terms  # noqa: F401

    names = [name for name in setup.config.weights if name != "task"]
    if unknown := [name for name in names if name not in TERMS]:
        raise ValueError(
            f"no term of the loss is called {unknown[0]!r} (known: {', '.join(TERMS)}): register "
            "it with distill.teacher_terms.register"
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
    model: torch.nn.Module,
    vocabulary: Vocabulary,
    config: TrialConfig,
    device: torch.device,
) -> torch.nn.ModuleList:
    """`teacher_terms_of` each of the trial's teachers.

    Args:
        caches: as `open_caches` gives them.
        model, vocabulary: the student's.
        device: where the loss is computed.

    Raises:
        ValueError: as `teacher_terms_of`; or the student has no maps.
    """
    student, weights = model.config.get_text_config(), config.teachers.values()
    teachers = torch.nn.ModuleList(
        teacher_terms_of(TermSetup(config, cache, student, vocabulary, device, index), weight)
        for index, (cache, weight) in enumerate(zip(caches, weights, strict=True))
    )
    if mapped := layers_needed(teachers)["map_layers"]:
        attention_modules(model, mapped)  # told here, and not in the first step
    return teachers
