"""What a JSON document says, however a tool writes it: the content that a seal is over.

Editors, JupyterLab and `nbformat` change the order of keys, blanks, line ends and the spelling of
numbers and letters; JavaScript writes 1.0 as 1. None of that changes what a document says.
"""

import hashlib
import json
from contextlib import suppress
from decimal import Decimal
from typing import Any

#: What counts of the metadata of a notebook and of its cells: the keys that a record is written
#: with. JupyterLab and others add and rewrite the rest (kernelspec, collapsed, execution times).
NOTEBOOK_METADATA = ("kd_utils", "papermill")
CELL_METADATA = ("tags", "seconds")


def content_digest(data: str | bytes, holder: str) -> str:
    """SHA-256 of what a JSON document says, apart from the digest in it.

    Two documents have the same digest if they are equal for every JSON reader: objects without an
    order, and numbers as double precision keeps them (digits that it cannot keep count as they
    are). Of a notebook only what its record says counts, see `_notebook`.

    Args:
        data: the document's text, or its bytes in any of JSON's encodings.
        holder: the dotted place of the dict that holds the digest as `sha256`.

    Raises:
        ValueError: it is not JSON, or JSON that readers take differently: a key twice in one
            object, NaN, or a number too large.
        KeyError, TypeError, AttributeError: the holder's place is not a dict.
    """
    document = json.loads(
        data,
        object_pairs_hook=_without_repeats,
        parse_int=_number,
        parse_float=_number,
        parse_constant=_number,
    )
    dict_at(document, holder).pop("sha256", None)
    if "nbformat" in document:
        with suppress(AttributeError, KeyError, TypeError):  # not a notebook: everything counts
            document = _notebook(document)
    said = json.dumps(document, sort_keys=True, allow_nan=False, separators=(",", ":"))
    # No text of a document begins like this, so an older seal, over the text, is never taken for it
    return hashlib.sha256(f"content 1\n{said}".encode()).hexdigest()


def dict_at(document: dict[str, Any], holder: str) -> dict[str, Any]:
    """The dict at a dotted place ("metadata.kd_utils"), which is created if it is missing."""
    for key in holder.split("."):
        document = document.setdefault(key, {})
    return document


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _number(text: str) -> float | int:
    """One value for all spellings of a number that JSON readers and writers make of each other."""
    value = float(text)
    # JavaScript writes 1.5e18 as 1500000000000000000, which Python reads as an int.
    if text.lstrip("-").isdecimal() and Decimal(repr(value)) != Decimal(text):
        return int(text)
    return value + 0.0  # -0.0 is 0 in JavaScript


def _notebook(notebook: dict[str, Any]) -> dict[str, Any]:
    """What a notebook's record says: sources, outputs, execution counts, and our own metadata.

    Text is the same as a string and as a list of lines, and an output stream in one piece or in
    several. The minor version of the format, cell ids and other metadata do not count.
    """
    return {
        "nbformat": notebook["nbformat"],
        "metadata": _picked(notebook["metadata"], NOTEBOOK_METADATA),
        "cells": [_cell(cell) for cell in notebook["cells"]],
    }


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    said = {
        "cell_type": cell["cell_type"],
        "source": _text(cell["source"]),
        "metadata": _picked(cell["metadata"], CELL_METADATA),
    }
    if attached := cell.get("attachments"):
        said["attachments"] = {name: _bundle(data) for name, data in attached.items()}
    if cell["cell_type"] == "code":
        said |= {"execution_count": cell["execution_count"], "outputs": _outputs(cell["outputs"])}
    return said


def _outputs(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs; neighbouring pieces of one stream are one output."""
    said: list[dict[str, Any]] = []
    for output in outputs:
        kind = {key: output.get(key) for key in ("output_type", "name")}
        if kind["output_type"] != "stream":
            more = {"data": _bundle(output.get("data", {})), "metadata": output.get("metadata", {})}
            said.append(output | more)
        elif said and kind == {key: said[-1].get(key) for key in kind}:
            said[-1]["text"] += _text(output["text"])
        else:
            said.append({**kind, "text": _text(output["text"])})
    return said


def _bundle(data: dict[str, Any]) -> dict[str, Any]:
    """One output in several formats (MIME type -> text, or a JSON value where the type says so)."""
    return {
        kind: value if kind.startswith("application/") and kind.endswith("json") else _text(value)
        for kind, value in data.items()
    }


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return "".join(value)
    return value


def _picked(metadata: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: metadata[key] for key in keys if metadata.get(key) not in (None, [], {})}
