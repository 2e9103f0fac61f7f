"""Typed parameters: one frozen config per notebook, checked before anything is loaded.

The defaults are in the notebooks' cells tagged `parameters` and nowhere else; the classes here
say which keys exist, of what type and in which range. A file in `papermill_params/` holds what
differs from the defaults.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kd_utils.config import fields
from kd_utils.config.base import Config
from kd_utils.config.trial import TrialConfig


def rows_by_task(text: str) -> dict[str, int]:
    """`"sst2:600 mmlu:730"` -> {"sst2": 600, "mmlu": 730}.

    Raises:
        ValueError: not of this form, a task without rows, or a task that is named twice.
    """
    parts = [part.partition(":")[::2] for part in text.split()]
    rows = {task: int(count) for task, count in parts if re.fullmatch(r"[1-9][0-9]{0,8}", count)}
    if not rows or len(rows) < len(parts) or "" in rows:
        raise ValueError(
            "Input should be TASK:ROWS, several with spaces between, such as 'sst2:600 mmlu:730': "
            "each task once and with at least 1 row (leave out a task that should have none)"
        )
    return rows


TaskRows = Annotated[str, AfterValidator(lambda text: rows_by_task(text) and text)]


class DataConfig(Config):
    """Parameters of `01_prepare_data`. Which tasks there are is known to `data/tasks`."""

    notebook = "01_prepare_data"

    build: Literal["toy", "smol", "smol-cross", "none"]
    data_dir: fields.PlaceOrBlank
    tokenizer: fields.Place
    max_length: fields.PositiveInt
    data_seed: fields.Seed
    train_rows: TaskRows
    validation_rows: TaskRows

    def rows(self, split: str) -> dict[str, int]:
        """How many rows of each task go into `split` ("train" or "validation")."""
        return rows_by_task(getattr(self, f"{split}_rows"))

    @property
    def tasks(self) -> set[str]:
        """Names of all tasks that rows are asked of."""
        return {*self.rows("train"), *self.rows("validation")}


class CacheConfig(Config):
    """Parameters of `02_cache_teacher`."""

    notebook = "02_cache_teacher"

    teacher: fields.Place
    teacher_revision: str
    tokenizer: fields.Place
    teacher_epochs: fields.Count
    teacher_learning_rate: fields.PositiveFloat
    teacher_batch_size: fields.PositiveInt
    teacher_prompt_weight: fields.Weight
    teacher_seed: fields.Seed
    signals: Annotated[str, Field(pattern=r"^(white_box|top_k)( [a-z]+(_[a-z]+)*)*$")]
    hidden_layers: fields.Layers
    attention_layers: fields.Layers
    paired_layers: fields.PositiveInt
    attention_dtype: Literal["float16", "uint8"]
    top_k: fields.PositiveInt
    temperature: fields.PositiveFloat
    shard_examples: fields.PositiveInt
    batch_tokens: fields.PositiveInt
    eval_batch_size: fields.PositiveInt
    max_new_tokens: fields.PositiveInt
    precision: Literal["auto", "float32", "bfloat16"]
    device: fields.Device
    workers: fields.Count


class AnalysisConfig(Config):
    """Parameters of `04_analyse_results`."""

    notebook = "04_analyse_results"

    run_dir: fields.PlaceOrBlank
    margin_points: fields.PositiveFloat


class SpeedConfig(Config):
    """Parameters of `05_measure_speed`."""

    notebook = "05_measure_speed"

    shapes: Literal["tiny", "small", "llama2"]
    bench_rows: Annotated[int, Field(ge=8, lt=2**31)]
    size_rows: fields.Count
    growth_rows: fields.PositiveInt
    naive_length: Annotated[int, Field(ge=496, lt=2**31)]
    repeats: fields.PositiveInt
    sweep_trials: fields.Count
    trial_rows: fields.Count
    trial_epochs: fields.PositiveInt
    generate_prompts: fields.Count
    max_new_tokens: fields.PositiveInt
    budget_tokens: fields.Count
    compile_backend: Literal["", "eager", "inductor"]
    seconds: fields.Count
    batch_size: fields.PositiveInt
    batch_tokens: fields.PositiveInt
    temperature: fields.PositiveFloat
    seed: fields.Seed
    precision: Literal["auto", "float32", "bfloat16"]
    device: fields.Device
    run_dir: fields.Place


class AlignmentConfig(Config):
    """Parameters of `06_any_teacher`."""

    notebook = "06_any_teacher"

    student_tokenizer: fields.Place
    teacher_tokenizers: fields.NamedPlaces
    example: Annotated[str, Field(pattern=r"^[0-9a-f]*$", max_length=64)]
    map_head: fields.Count
    mass_rows: fields.PositiveInt
    temperature: fields.PositiveFloat

    @property
    def other_teachers(self) -> dict[str, str]:
        """Folders of other teachers' tokenizers, by the names that tables show."""
        return dict(part.split("=", 1) for part in self.teacher_tokenizers.split())


class PublishedConfig(Config):
    """Parameters of `07_published_claim`: those that every notebook has."""

    notebook = "07_published_claim"


NOTEBOOKS: dict[str, type[Config]] = {
    config.notebook: config
    for config in (
        DataConfig,
        CacheConfig,
        TrialConfig,
        AnalysisConfig,
        SpeedConfig,
        AlignmentConfig,
        PublishedConfig,
    )
}

PREPARE, CACHE, TRAIN, ANALYSE, SPEED, ALIGN, *_ = NOTEBOOKS
