"""The parameters of one trial, and the table of methods: which terms each method's loss has."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from kd_utils.config import fields, project_paths
from kd_utils.config.base import Config

#: Method -> {term of its loss: the parameter that weighs the term}. The first three are
#: references without a teacher's signals: the student as it is, trained on the labels alone, and
#: trained on the labels and, for rows without one, on the teacher's answers.
METHODS: dict[str, dict[str, str]] = {
    "untrained": {"task": "alpha"},
    "task_only": {"task": "alpha"},
    "teacher_answers": {"task": "alpha"},
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


class UsedBy(NamedTuple):
    """Marks a parameter that has no effect unless the method has this term."""

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
    student_init: Literal["pretrained", "layers", "random"] = "pretrained"
    student_layers: fields.PositiveInt = 2
    answers: Annotated[Literal["gold", "teacher"], UsedBy(TEACHER)] = "teacher"
    teacher: fields.Place = "artifacts/embedded/toy/teacher"
    more_teachers: Annotated[fields.MoreTeachers, UsedBy(TEACHER)] = ""
    tokenizer: fields.Place = "artifacts/embedded/toy/tokenizer"
    alpha: Annotated[fields.Weight, UsedBy(TRAINING)] = 1.0
    beta: fields.Weight = 0.5
    gamma_hidden: fields.Weight = 0.1
    gamma_attention: fields.Weight = 0.1
    temperature: Annotated[fields.PositiveFloat, UsedBy("kd")] = 2.0
    logit_loss: Annotated[Literal["kl", "uld"], UsedBy("kd")] = "kl"
    distill_tokens: Annotated[Literal["all", "answer"], UsedBy(TEACHER)] = "all"
    attention_normaliser: Annotated[Literal["entries", "queries"], UsedBy("attention")] = "entries"
    head_mapping: Annotated[Literal["none", "mean_groups", "learned"], UsedBy("attention")] = "none"
    hidden_layers: Annotated[fields.Layers, UsedBy("hidden")] = "last"
    attention_layers: Annotated[fields.Layers, UsedBy("attention")] = "last"
    paired_layers: fields.PositiveInt = 2
    epochs: Annotated[fields.PositiveInt, UsedBy(TRAINING)] = 3
    batch_size: fields.PositiveInt = 8
    micro_batch_size: Annotated[fields.PositiveInt, UsedBy(TRAINING)] = 8
    learning_rate: Annotated[fields.PositiveFloat, UsedBy(TRAINING)] = 1e-3
    lr_schedule: Annotated[fields.Schedule, UsedBy(TRAINING)] = "constant"
    warmup_ratio: Annotated[fields.Share, UsedBy(TRAINING)] = 0.0
    average_last: Annotated[fields.Share, UsedBy(TRAINING)] = 0.0
    evaluations: Annotated[fields.PositiveInt, UsedBy(TRAINING)] = 10
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
        if self.name in fields.teacher_weights(self.more_teachers):
            raise ValueError(
                f"more_teachers names {self.name}, the trial's own experiment, whose teacher has "
                "the rest of the weight: name other experiments"
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
    def task_answers(self) -> str:
        """What the task loss sees: the "gold" labels alone, or for rows without a label the answer
        of the "teacher".
        """
        if self.distill_type == "teacher_answers":
            return "teacher"
        return self.answers if self.distils else "gold"

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
    def trains(self) -> bool:
        """Whether the method takes any step: the untrained student is only measured."""
        return self.distill_type != "untrained"

    @property
    def without_effect(self) -> set[str]:
        """Parameters that this method does not use; trials that differ in them alone are equal."""
        terms = METHODS[self.distill_type]
        users = set(terms)
        if self.distils:
            users.add(TEACHER)
        if self.trains:
            users.add(TRAINING)
        marks = {key: field.metadata for key, field in type(self).model_fields.items()}
        unused = {parameter for method in METHODS.values() for parameter in method.values()}
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
        return unused
