"""JSON documents (notebooks too) that carry a checksum of their own text, so that any later change
is found.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from kd_utils.store.files import written_aside


class RecordError(ValueError):
    """A sealed file that is missing, changed or not of this execution; the message names it and
    what is wrong.
    """


def seal(document: dict[str, Any], holder: str) -> str:
    """Text of a JSON document that holds the SHA-256 of the rest of itself, as the `sha256` of
    `holder`.

    Args:
        holder: dotted place of a dict in the document ("metadata.kd_utils"), made where it is not
            there.
    """
    inside = document
    for key in holder.split("."):
        inside = inside.setdefault(key, {})
    inside.pop("sha256", None)
    inside["sha256"] = hashlib.sha256(_dump(document).encode()).hexdigest()
    return _dump(document)


def read_sealed(path: Path, holder: str) -> dict[str, Any]:
    """A document that `seal` wrote.

    Raises:
        RecordError: no such file, no JSON, no seal, or any byte of it changed.
    """
    data = read_bytes(path)
    try:
        text = data.decode()
        document = json.loads(text)
        sealed = seal(document, holder)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RecordError(
            f"{label(path)} is no JSON with a checksum of itself, or was damaged since"
        ) from None
    # Sealing it again must give the very bytes: the text is compared because a changed blank parses
    # the same.
    if sealed != text:
        raise RecordError(f"{label(path)} was changed after it was written")
    return document


def write_sealed(path: Path, document: dict[str, Any], holder: str) -> None:
    """Seal a document and write it, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(seal(document, holder), encoding="utf-8", newline="")


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"{label(path)}: {error.strerror}") from None


def label(path: str | Path) -> str:
    """The last part of a path that says which file of a run it is, with nothing of the machine in
    it.
    """
    path = Path(path)
    return (
        "/".join(path.parts[-2:])
        if path.name in ("metrics.json", "predictions.parquet")
        else path.name
    )


def plain(value: Any, *, finite: bool, at: str = "") -> Any:
    """Plain JSON values; numpy's and torch's scalars become numbers.

    Args:
        finite: refuse a number that is not finite (JSON has none); otherwise it becomes null.

    Raises:
        RecordError: names the place of the number.
    """
    if isinstance(value, dict):
        return {
            str(k): plain(v, finite=finite, at=f"{at}: {k}" if at else str(k))
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            plain(item, finite=finite, at=f"{at}[{number}]") for number, item in enumerate(value)
        ]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        if finite:
            raise RecordError(
                f"{at} is {value}: a record holds finite numbers only, this trial has failed"
            )
        return None
    return value


def _dump(document: Any) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
