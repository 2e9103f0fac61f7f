"""The record of a trial: how it is written, completely or not at all, and read back.

A trial is whole if the folder `trials/TRIAL/` (metrics.json, predictions.parquet) and the executed
notebook `trials/TRIAL.ipynb` are unchanged since they were written, in the same execution. The ids
of the validation rows, which would be half of every record, are beside the trials that share them:
`trials/examples-DIGEST.parquet`, in the order of the predictions.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kd_utils.records import provenance
from kd_utils.records.arithmetic import arithmetic
from kd_utils.store.files import sha256_file, written_aside
from kd_utils.store.sealed import RecordError, SealedFolder

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
PREDICTIONS = "predictions.parquet"
DIGITS = 16  # of the digest that names a file of ids

#: How predictions are packed: 3,200 of them, with two to four log-likelihoods each, take 29 kB.
PACKED: dict[str, Any] = {
    "index": False,
    "compression": "zstd",
    "compression_level": 19,
    "store_schema": False,  # pandas' own notes on the types are enough to read them back
    "write_statistics": False,
}


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
    #: Names the file of ids; "" where they are in `predictions.parquet`, as in older records.
    examples: Annotated[str, Field(pattern="^([0-9a-f]{16})?$")] = ""
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
    sizes: dict[str, dict[str, float]] = {}
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
        predictions: one row per validation example, as `scoring.evaluate` returns them. Their log-
            likelihoods are kept in single precision.

    Raises:
        RecordError: a key is missing, a number is not finite, or there are no predictions; nothing
            is written then.
    """
    folder, fields = Path(folder), Metrics.model_fields
    missing = [name for name in fields if fields[name].is_required() and name not in metrics]
    missing += [] if len(predictions) else ["predictions"]
    if missing:
        raise RecordError(f"the record of {folder.name} has no {', '.join(missing)}")
    ids = predictions[["example_id"]].to_parquet(**PACKED)
    examples = hashlib.sha256(ids).hexdigest()[:DIGITS]
    document = {"format": FORMAT, **metrics, "examples": examples}
    with SealedFolder(folder, "metrics.json").replaced(document) as aside:
        # The prompts are in the prepared data, the same for every trial; `example_id` finds them.
        table = predictions.drop(columns=["prompt", "example_id"], errors="ignore")
        options, scores = dict(PACKED), table["loglikelihoods"]
        if scores.notna().any():
            table["loglikelihoods"] = scores.map(np.float32, na_action="ignore")
            options["use_byte_stream_split"] = ["loglikelihoods.list.element"]
            options["use_dictionary"] = table.columns.drop("loglikelihoods").tolist()
        table.to_parquet(aside / PREDICTIONS, **options)
        if not _whole(path := examples_file(folder, examples)):
            with written_aside(path) as ids_aside:
                ids_aside.write_bytes(ids)


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
    examples = metrics.get("examples")
    if examples and not _whole(path := examples_file(folder, examples)):
        raise RecordError(
            f"trials/{path.name}, the ids of the predictions, is lost or damaged: restore it, or "
            "run the sweep again, which repeats the trials"
        )
    return metrics


def examples_file(folder: str | Path, digest: str) -> Path:
    """Where the ids of a trial's validation rows are; trials of the same rows share the file."""
    return Path(folder).parent / f"examples-{digest}.parquet"


def _whole(examples: Path) -> bool:
    """Whether a file of ids is the one that its name says."""
    with suppress(OSError):
        return examples.stem == f"examples-{sha256_file(examples)[:DIGITS]}"
    return False


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
    config: Any,
    made: dict[str, Any],
    caches: list[Any],
    tokenizer: str,
    meter: Any,
    memory: float,
    sizes: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """What `metrics.json` says of a trial that is done.

    Args:
        made: what `made_from` gave for the same `config` and `caches`.
        tokenizer: fingerprint of the student's tokenizer.
        meter: the trial's (`distill.meter.Meter`).
        memory: the largest memory in use, MB.
        sizes: of "teacher" and "student" (`evaluation.footprint`).
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
        "sizes": sizes,
        **provenance.environment(),
        "started": meter.started.isoformat(timespec="seconds"),
        "seconds": meter.seconds,
        "peak_memory_mb": memory,
        "resumed_after": meter.resumed_after,
        "epochs": meter.rows,
        "final": meter.rows[-1],
    }
