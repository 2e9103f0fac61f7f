"""The record of a trial: how it is written, completely or not at all, and read back.

A trial is whole if the folder `trials/TRIAL/` (metrics.json, predictions.parquet) and the executed
notebook `trials/TRIAL.ipynb` are unchanged since they were written, in the same execution.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kd_utils.records import provenance
from kd_utils.records.arithmetic import arithmetic
from kd_utils.store.sealed import RecordError, SealedFolder

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
PREDICTIONS = "predictions.parquet"


class Shape(BaseModel):
    """What a JSON document must have; it may have more."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)


class Metrics(Shape):
    """What every `metrics.json` has; keys with a default are missing in older records."""

    class Config(Shape):
        __pydantic_extra__: dict[str, str | int | float | bool]
        distill_type: str
        seed: int

    class Cache(Shape):
        name: str
        content_hash: str

    class Seconds(Shape):
        total: float

    config: Config
    config_hash: str
    cache: Cache
    git_commit: str
    versions: dict[str, str]
    device: dict[str, Any]
    started: str
    seconds: Seconds
    peak_memory_mb: float
    epochs: list[dict[str, float]] = Field(min_length=1)
    final: dict[str, float]
    student: dict[str, str] = {}
    initial: str = ""
    tokenizer: str = ""
    more_caches: dict[str, str] = {}
    code: dict[str, str] = {}
    arithmetic: dict[str, Any] = {}


def report_row(row: dict[str, Any]) -> None:
    """Append a row of metrics as a JSON line to the file that KD_PROGRESS names, if any."""
    if path := os.environ.get("KD_PROGRESS"):
        with open(path, "a", encoding="utf-8") as file:
            # JSON has no NaN.
            finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
            file.write(json.dumps(finite, default=float) + "\n")


def write_record(folder: str | Path, metrics: dict[str, Any], predictions: pd.DataFrame) -> None:
    """Write a trial's `metrics.json` and `predictions.parquet`, in place of an older record.

    Args:
        folder: `RUN_DIR/trials/TRIAL`.
        metrics: the keys of `Metrics` and any others; `format` and `checksums` are added here.
        predictions: one row per validation example, as `scoring.evaluate` returns them.

    Raises:
        RecordError: a key is missing, a number is not finite, or there are no predictions; nothing
            is written then.
    """
    folder, fields = Path(folder), Metrics.model_fields
    missing = [name for name in fields if fields[name].is_required() and name not in metrics]
    missing += [] if len(predictions) else ["predictions"]
    if missing:
        raise RecordError(f"the record of {folder.name} has no {', '.join(missing)}")
    document = {"format": FORMAT, **metrics}
    with SealedFolder(folder, "metrics.json").replaced(document) as aside:
        # The prompts are in the prepared data, the same for every trial; `example_id` finds them.
        predictions.drop(columns="prompt", errors="ignore").to_parquet(
            aside / PREDICTIONS,
            index=False,
            compression="zstd",
            compression_level=19,
            store_schema=False,  # pandas' own notes on the types are enough to read them back
            write_statistics=False,
        )


def read_record(folder: str | Path) -> dict[str, Any]:
    """A trial's metrics, after the checksums of both files were compared.

    Raises:
        RecordError: names the file, and what is wrong with it.
    """
    sealed = SealedFolder(Path(folder), "metrics.json")
    metrics = sealed.check(PREDICTIONS)
    if metrics.get("format") != FORMAT:
        raise sealed.problem(f"metrics.json is not a record of format {FORMAT}")
    require_shape(Metrics, metrics, f"{Path(folder).name}/metrics.json")
    if metrics["final"] != metrics["epochs"][-1]:
        raise sealed.problem("metrics.json: its final metrics are not those of its last row")
    return metrics


def require_shape(model: type[Shape], document: dict[str, Any], name: str) -> Any:
    """The document as a `model`.

    Raises:
        RecordError: names the first key that is missing or of another type.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecordError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def made_from(config: Any, caches: list[Any], student: Any, precision: str, device: str) -> dict:
    """Everything that decides a trial's numbers, as JSON values: the key of its checkpoints.

    Args:
        config, caches: the trial's `TrialConfig`, and the `TeacherCache` of each of its teachers.
        student: the model that the student was made of, and its initial weights
            (`models.initial.students.StudentSource`).
        precision: of matrix products.
        device: "cuda" or "cpu", whose arithmetic rounds the sums.

    Raises:
        ValueError: a module was changed after this process loaded it, or the notebook after the
            config was made.
    """
    config.require_as_saved()
    code = provenance.code_of("03_train_student")
    provenance.require_loaded(code)
    return {
        "config": config.fingerprint(),
        "cache": [cache.manifest["content_hash"] for cache in caches],
        "student": {"name": student.name, "fingerprint": student.fingerprint},
        "initial": student.initial,
        "precision": precision,
        "code": code,
        "versions": provenance.environment()["versions"],
        "arithmetic": arithmetic(device),
    }


def metrics_document(
    config: Any, made: dict[str, Any], caches: list[Any], tokenizer: str, meter: Any, memory: float
) -> dict[str, Any]:
    """What `metrics.json` says of a trial that is done.

    Args:
        made: what `made_from` gave for the same `config` and `caches`.
        tokenizer: fingerprint of the student's tokenizer.
        meter: the trial's (`distill.meter.Meter`).
        memory: the largest memory in use, MB.
    """
    contents = {
        name: {"name": cache.folder.name, "content_hash": cache.manifest["content_hash"]}
        for name, cache in zip(config.teachers, caches, strict=True)
    }
    manifest = caches[0].manifest
    return {
        "config": config.model_dump(),
        "config_hash": made["config"],
        "cache": contents.pop(config.name),
        "more_caches": {name: cache["content_hash"] for name, cache in contents.items()},
        "student": made["student"],
        "initial": made["initial"],
        "tokenizer": tokenizer,
        "code": made["code"],
        "precision": made["precision"],
        "arithmetic": made["arithmetic"],
        "teacher": {"name": manifest["teacher"], "accuracy": manifest["teacher_accuracy"]},
        **provenance.environment(),
        "started": meter.started.isoformat(timespec="seconds"),
        "seconds": meter.seconds,
        "peak_memory_mb": memory,
        "resumed_after": meter.resumed_after,
        "epochs": meter.rows,
        "final": meter.rows[-1],
    }
