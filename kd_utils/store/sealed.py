"""Files that prove to be unchanged: JSON with a digest of its own content, and folders of files.

Notebooks are JSON too. A sealed file is whole as long as it says what was written: any tool may
write it anew, and any change of what it says is found when it is read.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd_utils.store.content import content_digest, dict_at
from kd_utils.store.files import matching, sha256_file, written_aside, written_folder


class RecordError(ValueError):
    """A sealed file that is missing, damaged or not the expected one; the message names it."""


def seal(document: dict[str, Any], holder: str) -> str:
    """The text of a JSON document with the digest of its content in it (`content_digest`).

    Args:
        holder: where the digest goes, as `sha256`: the dotted place of a dict in the document
            ("metadata.kd_utils"), which is created if it is missing.

    Raises:
        ValueError: a number is not finite.
    """
    inside = dict_at(document, holder)
    inside["sha256"] = content_digest(_dump(document), holder)
    return _dump(document)


def read_sealed(path: Path, holder: str) -> dict[str, Any]:
    """Read a document that `write_sealed` wrote; any tool may have written it anew since.

    Raises:
        RecordError: the file is missing, is not JSON, or what it says changed.
    """
    try:
        data = path.read_bytes()
        document = json.loads(data)
        unchanged = (
            content_digest(data, holder) == dict_at(document, holder).get("sha256")
            or _older_seal(document, holder) == data
        )
    except OSError as error:
        raise RecordError(f"{path.name} {_unreadable(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RecordError(f"{path.name} is damaged: it is not a sealed JSON file") from None
    if not unchanged:
        raise RecordError(
            f"{path.name} was changed after it was written, or another version of the code wrote it"
        )
    return document


def _older_seal(document: dict[str, Any], holder: str) -> bytes:
    """The file as older versions wrote it: with the digest of the rest of its very text."""
    inside = dict_at(document, holder)
    given = inside.pop("sha256", None)
    text = _dump(document)
    inside["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    sealed = _dump(document).encode()
    inside["sha256"] = given
    return sealed


def write_sealed(path: Path, document: dict[str, Any], holder: str) -> None:
    """Seal a document and write it, completely or not at all."""
    with written_aside(path) as aside:
        aside.write_text(seal(document, holder), encoding="utf-8", newline="")


class SealedFolder:
    """A folder in which one sealed JSON document has the checksums of the other files.

    The document is written last, so a folder without it is not finished.

    Args:
        path: the folder.
        document: the name of the JSON document, such as "manifest.json".
        label: what messages call the folder; its name by default.
        remedy: what to do about a missing or damaged file; it ends every message.
        error: the exception for such a file.
    """

    def __init__(
        self,
        path: Path,
        document: str,
        *,
        label: str = "",
        remedy: str = "",
        error: type[ValueError] = RecordError,
    ) -> None:
        self.path, self.document, self.error = path, document, error
        self._message = f"{label or path.name}/{{}}" + (f": {remedy}" if remedy else "")

    @contextmanager
    def replaced(self, document: dict[str, Any]) -> Iterator[Path]:
        """Yield an empty folder to write files to; then seal it and let it replace this one."""
        with written_folder(self.path) as aside:
            yield aside
            files = [path for path in matching(aside, "**/*") if path.is_file()]
            checksums = {str(path.relative_to(aside)): sha256_file(path) for path in files}
            SealedFolder(aside, self.document).seal(document, checksums)

    def seal(self, document: dict[str, Any], checksums: dict[str, str]) -> None:
        """Write the document, with the checksums of the files that are in the folder already."""
        document = {**plain(document), "checksums": dict(checksums)}
        write_sealed(self.path / self.document, document, "checksums")

    def read(self) -> dict[str, Any]:
        """The document; no other file is read.

        Raises:
            ValueError: (of type `error`) it is missing or damaged.
        """
        try:
            return read_sealed(self.path / self.document, "checksums")
        except RecordError as error:
            raise self.problem(str(error)) from None

    def check(self, *required: str) -> dict[str, Any]:
        """The document, after all files that it lists, and the required ones, were compared.

        Raises:
            ValueError: (of type `error`) the first file that is missing or damaged.
        """
        document = self.read()
        for name in sorted({*required, *document["checksums"]} - {"sha256"}):
            self.file(name, document)
        return document

    def file(self, name: str, document: dict[str, Any]) -> Path:
        """The path of one file whose bytes have the checksum in the document."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise self.problem(f"{self.document} names a file outside of its folder")
        try:
            checksum = sha256_file(self.path / name)
        except (OSError, ValueError) as error:
            raise self.problem(f"{name} {_unreadable(error)}") from None
        if checksum != document["checksums"].get(name):
            raise self.problem(
                f"{name} is damaged or from another folder: {self.document} has another checksum"
            )
        return self.path / name

    def problem(self, text: str) -> ValueError:
        """An error about a file of this folder, with the folder before it and the remedy after."""
        return self.error(self._message.format(text))


def plain(value: Any, at: str = "") -> Any:
    """Plain JSON values; scalars of numpy and torch become numbers.

    Raises:
        RecordError: a number is not finite, which JSON cannot hold; the message names its place.
    """
    if isinstance(value, dict):
        return {
            str(key): plain(item, f"{at}: {key}" if at else str(key)) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{at}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{at} is {value}, expected a finite number")
    return value


def _unreadable(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def _dump(document: Any) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
