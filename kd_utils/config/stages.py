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
    NamedPlaces,
    Place,
    PlaceOrBlank,
    PositiveFloat,
    PositiveInt,
    Seed,
    Weight,
)
from kd_utils.config.trial import TrialConfig

TASK_NAMES = ("sst2", "mmlu", "gsm8k")


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
                raise ValueError(
                    f"no task has {split} rows: set sst2_{split}, mmlu_{split} or gsm8k_{split} "
                    f"above 0"
                )
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
        """Folders of other teachers' tokenizers, by the names that tables show."""
        return dict(part.split("=", 1) for part in self.teacher_tokenizers.split())


NOTEBOOKS: dict[str, type[Config]] = {
    "01_prepare_data": DataConfig,
    "02_cache_teacher": CacheConfig,
    "03_train_student": TrialConfig,
    "04_analyse_results": AnalysisConfig,
    "05_measure_speed": SpeedConfig,
    "06_any_teacher": AlignmentConfig,
}
