"""The parameters of one trial, and the table of methods: the terms of each method's loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from kd_utils.config import fields, project_paths
from kd_utils.config.base import Config


class Method(NamedTuple):
    """A row of the table of methods.

    Attributes:
        terms: term of the loss -> the parameter that weighs the term.
        kind: a "reference" learns from answers alone; a "control" has a distillation's form without
            what the teacher knows of the row; a "distillation" has a teacher's signals of the row.
        answers: of training rows that L_task counts: "gold" (rows with a label alone), "teacher"
            (the teacher's answer where there is no label), or "chosen" (the parameter `answers`).
        signals: which row's signals of the teacher a batch has: each row's "own", those of an
            "other" row (`data.other_rows`), or "none".
    """

    terms: dict[str, str]
    kind: Literal["reference", "control", "distillation"] = "distillation"
    answers: Literal["gold", "teacher", "chosen"] = "chosen"
    signals: Literal["own", "other", "none"] = "own"


_TASK = {"task": "alpha"}
_LOGITS = {**_TASK, "kd": "beta"}
_HIDDEN, _MAPS = {"hidden": "gamma_hidden"}, {"attention": "gamma_attention"}

#: `untrained` is the student as it is: it has a loss to report, and no training.
METHODS: dict[str, Method] = {
    "untrained": Method(_TASK, "reference", answers="gold", signals="none"),
    "task_only": Method(_TASK, "reference", answers="gold", signals="none"),
    "teacher_answers": Method(_TASK, "reference", answers="teacher", signals="none"),
    "label_smoothing": Method({**_TASK, "smoothing": "beta"}, "control", signals="none"),
    "shuffled": Method({**_LOGITS, **_HIDDEN, **_MAPS}, "control", signals="other"),
    "black_box": Method(_LOGITS),
    "hidden_state": Method({**_LOGITS, **_HIDDEN}),
    "attention": Method({**_LOGITS, **_MAPS}),
    "combined": Method({**_LOGITS, **_HIDDEN, **_MAPS}),
}

_KEPT = ("keep_layers", "keep_heads", "keep_mlp", "keep_width")

#: The ways in which an initial student is made -> the parameters that each of them reads.
INITIAL: dict[str, tuple[str, ...]] = {
    "pretrained": (),
    "layers": ("student_layers",),
    "random": (*_KEPT, "student_seed"),
    "svd": ("student_width", "student_basis", "student_output", "student_seed"),
    "pruned": (*_KEPT, "importance", "student_seed", "rounds", "round"),
}


def initial_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that decide how a trial's initial student is made of its source.

    Args:
        config: a trial's parameters; one that an older record lacks is left out.
    """
    way = config.get("student_init", "pretrained")
    settings = {key: config[key] for key in INITIAL[way] if key in config}
    if "random" not in {way, *settings.values()}:
        settings.pop("student_seed", None)  # nothing is drawn
    if settings.get("rounds") == 1:
        del settings["rounds"], settings["round"]
    return settings


DISTILLATIONS = tuple(name for name, method in METHODS.items() if method.kind == "distillation")

#: Further users of a parameter, beside the terms: any term that reads a teacher; the training; a
#: method whose answers are chosen; any term that may have a share of the gradient, and the terms of
#: a trial whose weights are set by shares.
TEACHER, TRAINING, CHOICE = "any teacher", "any training", "chosen answers"
ANY_SHARE, SHARES = "any share", "weights by shares"


class UsedBy(NamedTuple):
    """Marks a parameter that has no effect unless the method has this term, or the trial this user.

    A parameter with several marks needs them all.
    """

    user: str


def _known_method(name: str) -> str:
    if name not in METHODS:
        *others, last = map(repr, METHODS)
        raise ValueError(f"Input should be {', '.join(others)} or {last}")
    return name


def trial_name(distill_type: str, seed: int, **other_swept: Any) -> str:
    """`METHOD_seedN`, with every other swept key appended: `attention_seed3_temperature=4.0`."""
    others = "".join(f"_{key}={value}" for key, value in sorted(other_swept.items()))
    # A swept value may be a path ("teachers/a"), and the name must stay one file name.
    name = f"{distill_type}_seed{seed}{others}"
    return "".join(c if c.isalnum() or c in "._=-+" else "-" for c in name)


class TrialConfig(Config):
    """Parameters of `03_train_student`: one trial, one method and one seed."""

    notebook = "03_train_student"

    distill_type: Annotated[str, AfterValidator(_known_method)] = "black_box"
    seed: Annotated[fields.Seed, UsedBy(TRAINING)] = 0
    student: fields.Place = "artifacts/embedded/toy/student"
    student_init: Literal["pretrained", "layers", "random", "svd", "pruned"] = "pretrained"
    student_layers: fields.PositiveInt = 2
    student_width: fields.PositiveInt = 48
    student_basis: Literal["weights", "activations", "channels", "random"] = "weights"
    student_output: Literal["own", "tied"] = "own"
    keep_layers: fields.Kept = "all"
    keep_heads: fields.Kept = "all"
    keep_mlp: fields.Kept = "all"
    keep_width: fields.Kept = "all"
    importance: Literal["minitron", "block_influence", "leave_one_out", "random", "lowest"] = (
        "minitron"
    )
    student_seed: fields.Seed = 0
    rounds: fields.PositiveInt = 1
    round: fields.PositiveInt = 1
    answers: Annotated[Literal["gold", "teacher"], UsedBy(CHOICE)] = "teacher"
    teacher: fields.Place = "artifacts/embedded/toy/teacher"
    more_teachers: Annotated[fields.MoreTeachers, UsedBy(TEACHER)] = ""
    tokenizer: fields.Place = "artifacts/embedded/toy/tokenizer"
    alpha: Annotated[fields.Weight, UsedBy(TRAINING)] = 1.0
    beta: fields.Weight = 0.5
    gamma_hidden: fields.Weight = 0.1
    gamma_attention: fields.Weight = 0.1
    weighting: Annotated[Literal["fixed", "share"], UsedBy(ANY_SHARE)] = "fixed"
    hidden_share: Annotated[fields.Share, UsedBy("hidden"), UsedBy(SHARES)] = 0.1
    attention_share: Annotated[fields.Share, UsedBy("attention"), UsedBy(SHARES)] = 0.1
    temperature: Annotated[fields.PositiveFloat, UsedBy("kd")] = 2.0
    logit_loss: Annotated[Literal["kl", "uld"], UsedBy("kd")] = "kl"
    distill_tokens: Annotated[Literal["all", "answer"], UsedBy(TEACHER)] = "all"
    attention_normaliser: Annotated[Literal["entries", "queries"], UsedBy("attention")] = "entries"
    head_mapping: Annotated[Literal["none", "mean_groups", "learned"], UsedBy("attention")] = "none"
    hidden_layers: Annotated[fields.Layers, UsedBy("hidden")] = "last"
    attention_layers: Annotated[fields.Layers, UsedBy("attention")] = "last"
    paired_layers: fields.PositiveInt = 2
    trained: Annotated[Literal["all", "layers"], UsedBy(TRAINING)] = "all"
    epochs: Annotated[fields.PositiveInt, UsedBy(TRAINING)] = 8
    batch_size: fields.PositiveInt = 16
    micro_batch_size: Annotated[fields.PositiveInt, UsedBy(TRAINING)] = 16
    learning_rate: Annotated[fields.PositiveFloat, UsedBy(TRAINING)] = 2e-3
    lr_schedule: Annotated[fields.Schedule, UsedBy(TRAINING)] = "linear"
    warmup_ratio: Annotated[fields.Share, UsedBy(TRAINING)] = 0.05
    average_last: Annotated[fields.Share, UsedBy(TRAINING)] = 0.0
    evaluations: Annotated[fields.PositiveInt, UsedBy(TRAINING)] = 3
    weight_decay: Annotated[fields.Weight, UsedBy(TRAINING)] = 0.01
    max_grad_norm: Annotated[fields.PositiveFloat, UsedBy(TRAINING)] = 1.0
    eval_batch_size: fields.PositiveInt = 64
    max_new_tokens: fields.PositiveInt = 24
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: fields.Device = "auto"
    save_student: bool = True
    checkpoint_seconds: fields.Count = 0
    run_dir: fields.Place = "runs/explore"
    trial: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._=+-]*)?$", max_length=200)] = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError("every weight of the loss is 0: set alpha, beta or a gamma above 0")
        if sum(self.shares.values()) >= 1 or not any(
            weight for term, weight in self.weights.items() if term not in self.shares
        ):
            named = ", ".join(f"{term}_share = {share:g}" for term, share in self.shares.items())
            raise ValueError(
                f"weighting 'share' with {named} leaves nothing to the terms of a fixed weight: "
                "keep the sum of the shares below 1, and alpha or beta above 0"
            )
        if self.cuts > 1:
            self._require_possible_rounds()
        if self.name in fields.teacher_weights(self.more_teachers):
            raise ValueError(
                f"more_teachers names {self.name}, the trial's own experiment, whose teacher has "
                "the rest of the weight: name other experiments"
            )
        return self

    def _require_possible_rounds(self) -> None:
        """Raise a ValueError for rounds of cuts that no sweep could run."""
        shares = [key for key in _KEPT if "." in str(getattr(self, key))]
        why = ""
        if shares:
            why = f"{shares[0]} = {getattr(self, shares[0])}, a share: give how many are kept"
        elif self.trains and self.epochs % self.rounds:
            why = f"epochs = {self.epochs}, which they share: set it to a multiple"
        elif self.round < self.rounds and not self.save_student:
            why = "save_student = False, and each starts from the student before: set it to True"
        if self.round > self.rounds:
            why = f"round = {self.round}: a sweep sets it"
        if why:
            raise ValueError(f"rounds = {self.rounds} with {why}")

    @property
    def cuts(self) -> int:
        """In how many rounds the student is cut, each with a trial of its own; 1 if it is not."""
        return self.rounds if self.student_init == "pruned" else 1

    @property
    def own_epochs(self) -> int:
        """How many epochs this trial trains for: `epochs` are shared by all rounds of cuts."""
        return self.epochs // self.cuts

    @property
    def method(self) -> Method:
        return METHODS[self.distill_type]

    @property
    def weights(self) -> dict[str, float]:
        """The method's terms and their weights; with `weighting` "share" until they are set."""
        return {term: getattr(self, parameter) for term, parameter in self.method.terms.items()}

    @property
    def shares(self) -> dict[str, float]:
        """Term -> the share of the gradient that its weight is set to give it; none where `fixed`.

        A term has a share if there is a parameter `TERM_share`.
        """
        return self._possible_shares if self.weighting == "share" else {}

    @property
    def _possible_shares(self) -> dict[str, float]:
        named = {term: f"{term}_share" for term in self.method.terms}
        return {term: getattr(self, key) for term, key in named.items() if hasattr(self, key)}

    @property
    def distils(self) -> bool:
        """Whether the method has a term that needs a teacher's cache."""
        return self.method.terms.keys() != {"task"}

    @property
    def task_answers(self) -> str:
        """What the task loss sees: the "gold" labels alone, or for rows without a label the answer
        of the "teacher".
        """
        named = self.method.answers
        return self.answers if named == "chosen" else named

    @property
    def teachers(self) -> dict[str, float]:
        """Experiments whose caches the student learns from -> weights, which sum to 1.

        The trial's own experiment comes first.
        """
        others = fields.teacher_weights(self.more_teachers) if self.distils else {}
        return {self.name: 1.0 - sum(others.values()), **others}

    @property
    def trial_name(self) -> str:
        return self.trial or trial_name(self.distill_type, self.seed)

    @property
    def record_folder(self) -> Path:
        return project_paths.project_path(self.run_dir) / "trials" / self.trial_name

    @property
    def student_folder(self) -> Path:
        return self.artifacts / "students" / project_paths.run_label(self.run_dir) / self.trial_name

    @property
    def checkpoint_file(self) -> Path:
        return (
            self.artifacts
            / "checkpoints"
            / project_paths.run_label(self.run_dir)
            / f"{self.trial_name}.json"
        )

    @property
    def initial_settings(self) -> dict[str, Any]:
        """The parameters that decide how the initial student is made (`initial_settings`)."""
        return initial_settings(self.model_dump())

    @property
    def trains(self) -> bool:
        """Whether the method takes any step: the untrained student is only measured."""
        return self.distill_type != "untrained"

    @property
    def without_effect(self) -> set[str]:
        """Parameters that this method does not use; trials that differ in them alone are equal."""
        terms = self.method.terms
        users = {
            *terms,
            *([TEACHER] if self.distils else []),
            *([TRAINING] if self.trains else []),
            *([CHOICE] if self.method.answers == "chosen" else []),
            *([ANY_SHARE] if self._possible_shares else []),
            *([SHARES] if self.shares else []),
        }
        marks = {key: field.metadata for key, field in type(self).model_fields.items()}
        unused = {parameter for method in METHODS.values() for parameter in method.terms.values()}
        unused -= set(terms.values())
        unused |= {
            key
            for key, found in marks.items()
            if any(isinstance(mark, UsedBy) and mark.user not in users for mark in found)
        }
        layers = {
            getattr(self, key)
            for key, found in marks.items()
            if AfterValidator(fields.check_layers) in found and key not in unused
        }
        if not layers & {"uniform", "reversed", "random"}:
            unused.add("paired_layers")
        unused |= {key for settings in INITIAL.values() for key in settings}
        unused -= self.initial_settings.keys()
        if self.student_init == "pruned":
            unused.discard("rounds")  # one cut is compared with several
        return unused
