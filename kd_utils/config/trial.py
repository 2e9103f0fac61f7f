"""The parameters of one trial, and the table of methods: which terms each method's loss has."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kd_utils.config.base import Config
from kd_utils.config.fields import (
    Count,
    Device,
    Layers,
    MoreTeachers,
    Place,
    PositiveFloat,
    PositiveInt,
    Seed,
    Weight,
    check_layers,
    teacher_weights,
)
from kd_utils.config.project_paths import project_path, run_label

#: Method -> {term of its loss: the parameter that weighs the term}. The first two are references
#: without a teacher: the student as it is, and the student trained on the labels alone.
METHODS: dict[str, dict[str, str]] = {
    "untrained": {"task": "alpha"},
    "task_only": {"task": "alpha"},
    "black_box": {"task": "alpha", "kd": "beta"},
    "hidden_state": {"task": "alpha", "kd": "beta", "hidden": "gamma_hidden"},
    "attention": {"task": "alpha", "kd": "beta", "attention": "gamma_attention"},
    "combined": {
        "task": "alpha",
        "kd": "beta",
        "hidden": "gamma_hidden",
        "attention": "gamma_attention",
    },
}

DISTILLATIONS = tuple(method for method, terms in METHODS.items() if len(terms) > 1)

#: Further users of a parameter, beside the terms: any term that reads a teacher; the training.
TEACHER, TRAINING = "any teacher", "any training"


class UsedBy:
    """Marks a parameter that has no effect unless the method has one of these terms."""

    def __init__(self, *users: str) -> None:
        self.users = frozenset(users)


def _known_method(name: str) -> str:
    if name not in METHODS:
        *others, last = map(repr, METHODS)
        raise ValueError(f"Input should be {', '.join(others)} or {last}")
    return name


def trial_name(distill_type: str, seed: int, **other_swept: Any) -> str:
    """`METHOD_seedN`, with every other swept key appended: `attention_seed3_temperature=4.0`."""
    others = (f"{key}={value}" for key, value in sorted(other_swept.items()))
    name = "_".join([distill_type, f"seed{seed}", *others])
    # A swept value may be a path ("teachers/a"), and the name must stay one file name.
    return "".join(c if c.isalnum() or c in "._=-+" else "-" for c in name)


class TrialConfig(Config):
    """Parameters of `03_train_student`: one trial, one method and one seed."""

    distill_type: Annotated[str, AfterValidator(_known_method)]
    seed: Annotated[Seed, UsedBy(TRAINING)]
    student: Place
    student_init: Literal["pretrained", "layers", "random"]
    student_layers: PositiveInt
    teacher: Place
    more_teachers: Annotated[MoreTeachers, UsedBy(TEACHER)]
    tokenizer: Place
    alpha: Annotated[Weight, UsedBy(TRAINING)]
    beta: Weight
    gamma_hidden: Weight
    gamma_attention: Weight
    temperature: Annotated[PositiveFloat, UsedBy("kd")]
    logit_loss: Annotated[Literal["kl", "uld"], UsedBy("kd")]
    distill_tokens: Annotated[Literal["all", "answer"], UsedBy(TEACHER)]
    attention_normaliser: Annotated[Literal["entries", "queries"], UsedBy("attention")]
    head_mapping: Annotated[Literal["none", "mean_groups", "learned"], UsedBy("attention")]
    hidden_layers: Annotated[Layers, UsedBy("hidden")]
    attention_layers: Annotated[Layers, UsedBy("attention")]
    paired_layers: PositiveInt
    epochs: Annotated[PositiveInt, UsedBy(TRAINING)]
    batch_size: PositiveInt
    micro_batch_size: Annotated[PositiveInt, UsedBy(TRAINING)]
    learning_rate: Annotated[PositiveFloat, UsedBy(TRAINING)]
    weight_decay: Annotated[Weight, UsedBy(TRAINING)]
    max_grad_norm: Annotated[PositiveFloat, UsedBy(TRAINING)]
    eval_batch_size: PositiveInt
    max_new_tokens: PositiveInt
    precision: Literal["auto", "float32", "bfloat16"]
    device: Device
    save_student: bool
    checkpoint_seconds: Count
    run_dir: Place
    trial: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9._=+-]*)?$", max_length=200)]

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError("every weight of the loss is 0: set alpha, beta or a gamma above 0")
        return self

    @model_validator(mode="after")
    def _other_teachers(self) -> Self:
        if self.name in teacher_weights(self.more_teachers):
            raise ValueError(
                f"more_teachers names {self.name}, the trial's own experiment, whose teacher has "
                "the rest of the weight: name others"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The method's terms and their weights."""
        return {
            term: getattr(self, parameter) for term, parameter in METHODS[self.distill_type].items()
        }

    @property
    def distils(self) -> bool:
        """Whether the method has a term that reads a teacher."""
        return len(METHODS[self.distill_type]) > 1

    @property
    def teachers(self) -> dict[str, float]:
        """Experiments whose caches the student learns from -> weights, which sum to 1.

        The trial's own experiment comes first.
        """
        others = teacher_weights(self.more_teachers) if self.distils else {}
        return {self.name: 1.0 - sum(others.values()), **others}

    @property
    def trial_name(self) -> str:
        """The parameter `trial`, or METHOD_seedN."""
        return self.trial or trial_name(self.distill_type, self.seed)

    @property
    def record_folder(self) -> Path:
        """Where the record goes: RUN_DIR/trials/TRIAL."""
        return project_path(self.run_dir) / "trials" / self.trial_name

    @property
    def student_folder(self) -> Path:
        """Where the trained student goes."""
        return self.artifacts / "students" / run_label(self.run_dir) / self.trial_name

    @property
    def checkpoint_file(self) -> Path:
        """Where the state after an epoch goes."""
        return self.artifacts / "checkpoints" / run_label(self.run_dir) / f"{self.trial_name}.json"

    @property
    def epoch_numbers(self) -> range:
        """Epochs that leave a row: 1 to `epochs`, or 0 alone for the untrained student."""
        return range(1) if self.distill_type == "untrained" else range(1, self.epochs + 1)

    @property
    def without_effect(self) -> set[str]:
        """Parameters that this method does not use; trials that differ in them alone are equal."""
        terms, fields = METHODS[self.distill_type], type(self).model_fields.items()
        users = set(terms)
        if self.distils:
            users.add(TEACHER)
        if self.distill_type != "untrained":
            users.add(TRAINING)
        weights = {parameter for method in METHODS.values() for parameter in method.values()}
        unused = weights - set(terms.values())
        for key, field in fields:
            marks = [mark for mark in field.metadata if isinstance(mark, UsedBy)]
            if marks and not any(mark.users & users for mark in marks):
                unused.add(key)
        layers = {
            getattr(self, key)
            for key, field in fields
            if AfterValidator(check_layers) in field.metadata and key not in unused
        }
        if not layers & {"uniform", "reversed", "random"}:
            unused.add("paired_layers")
        return unused
