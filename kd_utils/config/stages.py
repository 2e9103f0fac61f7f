"""Typed parameters: one frozen config per notebook, checked before anything is loaded.

The classes here say which keys exist, of what type, in which range, and with which default. A
notebook's cell tagged `parameters` assigns the same defaults (a test keeps them equal), and a file
in `papermill_params/` holds what differs from them.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kd_utils.config import fields
from kd_utils.config.base import Config
from kd_utils.config.trial import TrialConfig

TOY = re.compile(r"toy(?:-([0-9]{1,6}))?")


def _embedded(name: str) -> str:
    if name not in ("toy-large", "smol", "smol-cross", "none") and not TOY.fullmatch(name):
        raise ValueError(
            "Input should be 'toy', 'toy-large', 'smol', 'smol-cross', 'none', or another world of "
            "the toy, such as 'toy-2'"
        )
    return name


class DataConfig(Config):
    """Parameters of `01_prepare_data`. Which tasks there are is known to `data/tasks`."""

    notebook = "01_prepare_data"

    build: Annotated[str, AfterValidator(_embedded)] = "toy"
    data_dir: fields.PlaceOrBlank = "artifacts/embedded/toy/data"
    tokenizer: fields.Place = "artifacts/embedded/toy/tokenizer"
    max_length: fields.PositiveInt = 64
    data_seed: fields.Seed = 0
    train_rows: fields.TaskRows = "sst2:400 mmlu:400 gsm8k:400"
    labelled: fields.Labelled = "sst2:50 mmlu:100 gsm8k:100"
    held_out_rows: fields.PositiveInt = 300
    validation_rows: fields.TaskRows = "sst2:1000 mmlu:1200 gsm8k:1000"

    def rows(self, split: str) -> dict[str, int]:
        """How many rows of each task go into `split` ("train", "held_out" or "validation")."""
        if split == "held_out":
            return dict.fromkeys(self.rows("train"), self.held_out_rows)
        return fields.rows_by_task(getattr(self, f"{split}_rows"))

    @model_validator(mode="after")
    def _another_toy_is_read(self) -> Self:
        another = self.toy_name not in ("", "toy")
        if another and f"/{self.build}/" not in f"/{self.data_dir}/":
            raise ValueError(
                f"build = {self.build!r} makes artifacts/embedded/{self.build}, but data_dir = "
                f"{self.data_dir!r} is elsewhere: set data_dir to its data/, and tokenizer, "
                "teacher and student to its other folders"
            )
        return self

    @property
    def toy_name(self) -> str:
        """The folder of the toy that is built under `artifacts/embedded/`; "" for other data."""
        name = "toy" if self.build == "toy-large" else self.build  # which has the toy's rows
        return name if TOY.fullmatch(name) else ""

    @property
    def toy_seed(self) -> int | None:
        """Which world of the toy is built: `toy` is the first; None for other data."""
        toy = TOY.fullmatch(self.toy_name)
        return int(toy[1] or 1) if toy else None

    @property
    def labels(self) -> dict[str, int]:
        """How many training rows of each task have a label."""
        return fields.label_counts(self.labelled, self.rows("train"))

    @property
    def labelled_tasks(self) -> set[str]:
        """The tasks that `labelled` names; not all of them need training rows."""
        return set(fields.named_labels(self.labelled))

    @property
    def tasks(self) -> set[str]:
        """Names of all tasks that rows are asked of."""
        return {*self.rows("train"), *self.rows("validation")}


class CacheConfig(Config):
    """Parameters of `02_cache_teacher`."""

    notebook = "02_cache_teacher"

    teacher: fields.Place = "artifacts/embedded/toy/teacher"
    teacher_revision: str = ""
    tokenizer: fields.Place = "artifacts/embedded/toy/tokenizer"
    teacher_epochs: fields.Count = 8
    teacher_labels: Literal["all", "labelled"] = "all"
    teacher_learning_rate: fields.PositiveFloat = 1e-3
    teacher_lr_schedule: fields.Schedule = "linear"
    teacher_warmup_ratio: fields.Share = 0.05
    teacher_batch_size: fields.PositiveInt = 16
    teacher_prompt_weight: fields.Weight = 1.0
    teacher_seed: fields.Seed = 0
    signals: Annotated[str, Field(pattern=r"^(white_box|top_k)( [a-z]+(_[a-z]+)*)*$")] = "white_box"
    hidden_layers: fields.Layers = "last"
    attention_layers: fields.Layers = "last"
    paired_layers: fields.PositiveInt = 2
    attention_dtype: Literal["float16", "uint8"] = "float16"
    top_k: fields.PositiveInt = 64
    temperature: fields.PositiveFloat = 2.0
    shard_examples: fields.PositiveInt = 256
    batch_tokens: fields.PositiveInt = 8192
    eval_batch_size: fields.PositiveInt = 64
    max_new_tokens: fields.PositiveInt = 24
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: fields.Device = "auto"
    workers: fields.Count = 0


class AnalysisConfig(Config):
    """Parameters of `04_analyse_results`."""

    notebook = "04_analyse_results"

    run_dir: fields.PlaceOrBlank = ""
    margin_points: fields.PositiveFloat = 1.0


class WorldsConfig(Config):
    """Parameters of `12_compare_worlds`."""

    notebook = "12_compare_worlds"

    run_dir: fields.PlaceOrBlank = ""
    margin_points: fields.PositiveFloat = 1.0


class SpeedConfig(Config):
    """Parameters of `05_measure_speed`."""

    notebook = "05_measure_speed"

    shapes: Literal["tiny", "small", "llama2"] = "small"
    bench_rows: Annotated[int, Field(ge=8, lt=2**31)] = 48
    size_rows: fields.Count = 14
    growth_rows: fields.PositiveInt = 400
    naive_length: Annotated[int, Field(ge=496, lt=2**31)] = 512
    repeats: fields.PositiveInt = 4
    sweep_trials: fields.Count = 16
    trial_rows: fields.Count = 0
    trial_epochs: fields.PositiveInt = 3
    generate_prompts: fields.Count = 0
    max_new_tokens: fields.PositiveInt = 24
    budget_tokens: fields.Count = 0
    compile_backend: Literal["", "eager", "inductor"] = ""
    seconds: fields.Count = 0
    bench_batch_size: fields.PositiveInt = 8
    batch_tokens: fields.PositiveInt = 8192
    temperature: fields.PositiveFloat = 2.0
    seed: fields.Seed = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: fields.Device = "auto"
    run_dir: fields.Place = "runs/bench"


class AlignmentConfig(Config):
    """Parameters of `06_any_teacher`."""

    notebook = "06_any_teacher"

    student_tokenizer: fields.Place = "artifacts/embedded/toy/teacher-subwords"
    teacher_tokenizers: fields.NamedPlaces = ""
    example: Annotated[str, Field(pattern=r"^[0-9a-f]*$", max_length=64)] = ""
    map_head: fields.Count = 0
    mass_rows: fields.PositiveInt = 40
    temperature: fields.PositiveFloat = 2.0

    @property
    def other_teachers(self) -> dict[str, str]:
        """Folders of other teachers' tokenizers, by the names that tables show."""
        return dict(part.split("=", 1) for part in self.teacher_tokenizers.split())


class PublishedConfig(Config):
    """Parameters of `07_published_claim`: those that every notebook has."""

    notebook = "07_published_claim"


class CutConfig(Config):
    """Parameters of `09_prune`."""

    notebook = "09_prune"

    teacher: fields.Place = "artifacts/embedded/toy/teacher"
    tokenizer: fields.Place = "artifacts/embedded/toy/tokenizer"
    kept_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    random_draws: fields.PositiveInt = 5
    seed: fields.Seed = 0
    epochs: fields.PositiveInt = 8
    learning_rate: fields.PositiveFloat = 2e-3
    device: fields.Device = "auto"
    run_dir: fields.PlaceOrBlank = ""
    chain_run: fields.PlaceOrBlank = ""

    @property
    def of_trial(self) -> dict[str, Any]:
        """The parameters that `03_train_student` has too."""
        own = self.model_dump(exclude={"run_dir", "chain_run"})
        return {key: value for key, value in own.items() if key in TrialConfig.model_fields}


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
        WorldsConfig,
        CutConfig,
    )
}

PREPARE, CACHE, TRAIN, ANALYSE, SPEED, ALIGN, _, JOIN, _ = NOTEBOOKS


def parameter_names() -> set[str]:
    """The parameters of all notebooks."""
    return {key for config in NOTEBOOKS.values() for key in config.model_fields}


#: The notebooks that a sweep executes.
SWEPT = (PREPARE, CACHE, TRAIN, ANALYSE)
