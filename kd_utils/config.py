"""Typed parameters: one frozen config per notebook, checked before anything is loaded.

The defaults stand in the notebooks' cells tagged `parameters` and nowhere else; the classes here say which keys
exist, of what type and in which range. A file in `papermill_params/` holds what differs from the defaults.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .fields import (Count, Device, Layers, MoreTeachers, Name, NamedPlaces, Place, PlaceOrBlank, PositiveFloat,
                     PositiveInt, Seed, Weight, in_one_line, teacher_weights)
from .files import sha256_json

#: Every relative path of a config starts here. On a cluster the code travels by itself, so KD_ROOT names the shared
#: folder that holds `artifacts/` and `runs/`: a node's own KD_ROOT, or else the place where the sweep was started.
ROOT = Path(os.environ.get("KD_ROOT") or os.environ.get("KD_SWEEP_ROOT") or Path(__file__).parents[1])
ROOT = ROOT.expanduser().resolve()

#: Reference rows, which are no distillation: the student as it comes, and the student fine-tuned without the teacher.
REFERENCES = ("untrained", "task_only")
DISTILLATIONS = ("black_box", "hidden_state", "attention", "combined")
METHODS = (*REFERENCES, *DISTILLATIONS)
TASK_NAMES = ("sst2", "mmlu", "gsm8k")
#: Names, places and devices: parameters that no fingerprint holds.
NEVER_IN_A_RESULT = frozenset({"name", "artifacts_dir", "run_dir", "trial", "device", "save_student",
                               "checkpoint_seconds"})


def resolve(path: str | Path) -> Path:
    """A path as the project means it: absolute as given, relative to the project's root otherwise."""
    return ROOT / Path(path).expanduser()


def short_path(path: str | Path) -> str:
    """The path relative to the project's root where it lies inside it, for text that goes into records."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def run_label(run_dir: str | Path) -> str:
    """A name for a run's checkpoints and students that no other run has: NAME of `runs/NAME`, else with a digest."""
    place = short_path(resolve(run_dir))
    name = Path(place).name
    return name if Path(place) == Path("runs", name) else f"{name}-{sha256_json(place)[:8]}"


class Config(BaseModel):
    """What all notebooks share: names, places, and how a bad value is reported."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    name: Name
    artifacts_dir: Place

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(in_one_line(error, type(self))) from None

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_stands(cls, value: Any, info: Any) -> Any:
        """Refuse what pydantic would take for something else, and text that files and libraries do not take."""
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float):
            raise ValueError("Input should be a number, not true or false")
        if isinstance(value, bytes) or isinstance(value, str) and re.search(r"[\0\ud800-\udfff]", value):
            raise ValueError("Input should be plain text: no bytes, no NUL, no lone surrogates")
        return value

    @classmethod
    def from_notebook(cls, namespace: dict[str, Any]) -> Self:
        """The config from a notebook's `globals()`, after its `parameters` cell and what papermill injected.

        Raises:
            ValueError: one line: key, value and what is allowed; also for an injected key that no notebook declares.
        """
        from .parameters import injected_names, unknown_keys_are_errors

        unknown_keys_are_errors(injected_names(namespace.get("In", [])), "injected parameters")
        if missing := [key for key in cls.model_fields if key not in namespace]:
            raise ValueError(f"the parameters cell does not define {', '.join(missing)}: restore it")
        return cls(**{key: namespace[key] for key in cls.model_fields})

    def __str__(self) -> str:
        width = max(map(len, type(self).model_fields))
        return "\n".join(f"{key:<{width}}  {value!r}" for key, value in self.model_dump().items())

    @property
    def artifacts(self) -> Path:
        return resolve(self.artifacts_dir)

    @property
    def data_path(self) -> Path:
        """Folder of the prepared data, `artifacts/data/NAME`."""
        return self.artifacts / "data" / self.name

    @property
    def without_effect(self) -> set[str]:
        """Parameters that cannot change a result because of what others say."""
        return set()

    def fingerprint(self) -> str:
        """Sixteen hex digits over all values but those that cannot change a result."""
        values = self.model_dump(exclude=NEVER_IN_A_RESULT | self.without_effect)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class DataConfig(Config):
    """Parameters of `01_prepare_data`."""

    build: Literal["toy", "smol", "smol-cross", "none"]
    data_dir: PlaceOrBlank
    tokenizer: Place
    max_length: PositiveInt
    data_seed: Seed
    sst2_train: Count
    sst2_validation: Count
    mmlu_train: Count
    mmlu_validation: Count
    gsm8k_train: Count
    gsm8k_validation: Count

    @model_validator(mode="after")
    def _some_rows(self) -> Self:
        for split in ("train", "validation"):
            if not any(self.rows(task, split) for task in TASK_NAMES):
                raise ValueError(f"no task has {split} rows: set sst2_{split}, mmlu_{split} or gsm8k_{split} above 0")
        return self

    def rows(self, task: str, split: str) -> int:
        """How many rows of `task` go into `split` ("train" or "validation")."""
        return getattr(self, f"{task}_{split}")


class CacheConfig(Config):
    """Parameters of `02_cache_teacher`."""

    teacher: Place
    teacher_revision: str
    tokenizer: Place
    teacher_epochs: Count
    teacher_learning_rate: PositiveFloat
    teacher_batch_size: PositiveInt
    teacher_prompt_weight: Weight
    teacher_seed: Seed
    signals: Literal["white_box", "top_k"]
    hidden_layers: Layers
    attention_layers: Layers
    paired_layers: PositiveInt
    attention_dtype: Literal["float16", "uint8"]
    top_k: PositiveInt
    temperature: PositiveFloat
    shard_examples: PositiveInt
    batch_tokens: PositiveInt
    eval_batch_size: PositiveInt
    max_new_tokens: PositiveInt
    precision: Literal["auto", "float32", "bfloat16"]
    device: Device
    workers: Count


class TrialConfig(Config):
    """Parameters of `03_train_student`: one trial, one method and one seed."""

    distill_type: Literal["untrained", "task_only", "black_box", "hidden_state", "attention", "combined"]
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
            raise ValueError(f"more_teachers names {self.name}, the trial's own experiment, whose teacher has the rest "
                             "of the weight: name others")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each loss term that the method has (DESIGN's table: which method has which term)."""
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
        """Experiments whose caches are trained from, with weights that sum to 1; the trial's own comes first."""
        others = teacher_weights(self.more_teachers) if "kd" in self.weights else {}
        return {self.name: 1.0 - sum(others.values()), **others}

    @property
    def epoch_numbers(self) -> range:
        """Epochs that leave a row: 1 to `epochs`, or 0 alone for the untrained student."""
        return range(1) if self.distill_type == "untrained" else range(1, self.epochs + 1)

    @property
    def without_effect(self) -> set[str]:
        """Parameters that this method does not use: trials that differ in nothing else are one trial."""
        of_terms = {"kd": {"beta", "temperature", "logit_loss", "distill_tokens", "more_teachers"},
                    "hidden": {"gamma_hidden", "hidden_layers"},
                    "attention": {"gamma_attention", "attention_normaliser", "attention_layers", "head_mapping"}}
        unused = set().union(*(keys for term, keys in of_terms.items() if term not in self.weights))
        named = {self.hidden_layers if "hidden" in self.weights else "last",
                 self.attention_layers if "attention" in self.weights else "last"}
        if not named & {"uniform", "reversed", "random"}:
            unused.add("paired_layers")
        if self.distill_type == "untrained":
            unused |= {"seed", "alpha", "epochs", "micro_batch_size", "learning_rate", "weight_decay", "max_grad_norm"}
        return unused


class AnalysisConfig(Config):
    """Parameters of `04_analyse_results`."""

    run_dir: PlaceOrBlank
    margin_points: PositiveFloat


class SpeedConfig(Config):
    """Parameters of `05_measure_speed`."""

    shapes: Literal["tiny", "small", "llama2"]
    bench_rows: Annotated[int, Field(ge=8, lt=2**31)]
    size_rows: Count
    growth_rows: PositiveInt
    naive_length: Annotated[int, Field(ge=496, lt=2**31)]
    repeats: PositiveInt
    sweep_trials: Count
    batch_size: PositiveInt
    batch_tokens: PositiveInt
    temperature: PositiveFloat
    seed: Seed
    precision: Literal["auto", "float32", "bfloat16"]
    device: Device
    run_dir: Place


class AlignmentConfig(Config):
    """Parameters of `06_any_teacher`."""

    student_tokenizer: Place
    teacher_tokenizers: NamedPlaces
    example: Annotated[str, Field(pattern=r"^[0-9a-f]*$", max_length=64)]
    map_head: Count
    mass_rows: PositiveInt
    temperature: PositiveFloat

    @property
    def others(self) -> dict[str, str]:
        """Tokenizers of other teachers, by the names that tables have for them."""
        return dict(part.split("=", 1) for part in self.teacher_tokenizers.split())


NOTEBOOKS: dict[str, type[Config]] = {
    "01_prepare_data": DataConfig,
    "02_cache_teacher": CacheConfig,
    "03_train_student": TrialConfig,
    "04_analyse_results": AnalysisConfig,
    "05_measure_speed": SpeedConfig,
    "06_any_teacher": AlignmentConfig,
}
