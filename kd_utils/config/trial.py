"""Typed parameters: one frozen config per notebook, checked before anything is loaded.

The defaults stand in the notebooks' cells tagged `parameters` and nowhere else; the classes here
say which keys exist, of what type and in which range. A file in `papermill_params/` holds what
differs from the defaults.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

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
    teacher_weights,
)

#: Reference rows, which are no distillation: the student as it comes, and the student fine-tuned
#: without the teacher.
REFERENCES = ("untrained", "task_only")

DISTILLATIONS = ("black_box", "hidden_state", "attention", "combined")

METHODS = (*REFERENCES, *DISTILLATIONS)


class TrialConfig(Config):
    """Parameters of `03_train_student`: one trial, one method and one seed."""

    distill_type: Literal[
        "untrained", "task_only", "black_box", "hidden_state", "attention", "combined"
    ]
    seed: Seed
    student: Place
    student_init: Literal["pretrained", "layers", "random"]
    student_layers: PositiveInt
    teacher: Place
    more_teachers: MoreTeachers
    tokenizer: Place
    alpha: Weight
    beta: Weight
    gamma_hidden: Weight
    gamma_attention: Weight
    temperature: PositiveFloat
    logit_loss: Literal["kl", "uld"]
    distill_tokens: Literal["all", "answer"]
    attention_normaliser: Literal["entries", "queries"]
    head_mapping: Literal["none", "mean_groups", "learned"]
    hidden_layers: Layers
    attention_layers: Layers
    paired_layers: PositiveInt
    epochs: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt
    learning_rate: PositiveFloat
    weight_decay: Weight
    max_grad_norm: PositiveFloat
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
                f"the rest "
                "of the weight: name others"
            )
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss term that the method has (DESIGN's table: which method has which
        term).
        """
        weights = {"task": self.alpha}
        if self.distill_type in DISTILLATIONS:
            weights["kd"] = self.beta
        if self.distill_type in ("hidden_state", "combined"):
            weights["hidden"] = self.gamma_hidden
        if self.distill_type in ("attention", "combined"):
            weights["attention"] = self.gamma_attention
        return weights

    @property
    def teachers(self) -> dict[str, float]:
        """Experiments whose caches are trained from, with weights that sum to 1; the trial's own
        comes first.
        """
        others = teacher_weights(self.more_teachers) if "kd" in self.weights else {}
        return {self.name: 1.0 - sum(others.values()), **others}

    @property
    def epoch_numbers(self) -> range:
        """Epochs that leave a row: 1 to `epochs`, or 0 alone for the untrained student."""
        return range(1) if self.distill_type == "untrained" else range(1, self.epochs + 1)

    @property
    def without_effect(self) -> set[str]:
        """Parameters that this method does not use: trials that differ in nothing else are one
        trial.
        """
        of_terms = {
            "kd": {"beta", "temperature", "logit_loss", "distill_tokens", "more_teachers"},
            "hidden": {"gamma_hidden", "hidden_layers"},
            "attention": {
                "gamma_attention",
                "attention_normaliser",
                "attention_layers",
                "head_mapping",
            },
        }
        unused = set().union(*(keys for term, keys in of_terms.items() if term not in self.weights))
        named = {
            self.hidden_layers if "hidden" in self.weights else "last",
            self.attention_layers if "attention" in self.weights else "last",
        }
        if not named & {"uniform", "reversed", "random"}:
            unused.add("paired_layers")
        if self.distill_type == "untrained":
            unused |= {
                "seed",
                "alpha",
                "epochs",
                "micro_batch_size",
                "learning_rate",
                "weight_decay",
                "max_grad_norm",
            }
        return unused
