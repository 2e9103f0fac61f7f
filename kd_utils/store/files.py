"""Files that are either whole or not there: written aside, synced, renamed into place; and who may
write a folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it is renamed to `path` when the block ends without
    an error.

    Raises:
        OSError: one line that names the file, where the disk is full.
    """
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with full_disk_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """As `written_aside`, for a folder: yields an empty one beside it, which takes its place, an
    older one's too.

    A folder cannot be renamed over another, so for a moment there is none: what reads it must be
    able to make it again.
    """
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    old = aside.with_name(f"{aside.name}.old-{os.getpid()}")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with full_disk_named(folder):
            aside.mkdir(parents=True)
            yield aside
            with suppress(FileNotFoundError):
                folder.rename(
                    old
                )  # at once and whole: what somebody has open on NFS cannot be removed
            aside.rename(folder)
    finally:
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Whatever a library raises when the disk is full becomes one OSError that names the file and
    the remedy.
    """
    try:
        yield
    except Exception as error:
        full = {
            errno.ENOSPC: "no space left on device",
            errno.EDQUOT: "disk quota exceeded",
            errno.EFBIG: "file too large",
        }
        for number, words in full.items():
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                raise OSError(
                    number,
                    f"{words} while writing {path.parent.name}/{path.name}: make room and run the "
                    "same command again, what is whole is kept",
                ) from None
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON that any reader accepts (no NaN), whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(
            json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8"
        )


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
