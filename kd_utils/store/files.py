"""Files that are either whole or missing: written beside their place, then renamed into it."""

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil

#: What file browsers, network drives, editors and JupyterLab leave in any folder, in lower case.
STRAY = (
    ".ds_store",
    "._*",  # macOS, beside each file on a drive of another system
    ".nfs*",
    ".fuse_hidden*",
    ".smbdelete*",
    ".directory",
    ".ipynb_checkpoints",
    "thumbs.db",
    "desktop.ini",
    "*~",
    "~$*",
    "#*#",
    ".#*",
    ".~lock.*#",
    ".*.sw[a-z]",
)

FULL_DISK = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file too large",
}


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it is renamed to `path` if the block succeeds.

    Raises:
        OSError: one line that names the file if the disk is full.
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
    """Yield an empty folder beside `folder`; it takes its place if the block succeeds.

    A folder cannot be renamed over another one, so for a moment there is no folder. What killed
    processes left beside `folder` is removed first.
    """
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    old = aside.with_name(f"{aside.name}.old-{os.getpid()}")
    remove_leftovers(folder)
    try:
        with full_disk_named(folder):
            aside.mkdir(parents=True)
            yield aside
            with suppress(FileNotFoundError):
                # Renamed, not removed in place: on NFS, open files cannot be removed.
                folder.rename(old)
            aside.rename(folder)
    finally:
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left beside `folder` while they wrote it."""
    for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        if not another_writes(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def another_writes(path: Path) -> bool:
    """Whether another process is writing this: the number of one that lives ends its name."""
    number = path.name.rpartition("-")[2]
    try:
        return int(number) != os.getpid() and psutil.pid_exists(int(number))
    except (ValueError, OverflowError):
        return False


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into one OSError with the file and a remedy."""
    try:
        yield
    except Exception as error:
        for number, words in FULL_DISK.items():
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                raise OSError(
                    number,
                    f"{words} while writing {path.parent.name}/{path.name}: make room and run the "
                    "same command again, finished files are kept",
                ) from None
        raise


def is_stray(name: str) -> bool:
    """Whether a file or folder of this name means nothing, wherever it is: see `STRAY`."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in STRAY)


def matching(folder: Path, pattern: str) -> list[Path]:
    """What `folder.glob` finds, sorted; without strays: "*.json" matches ".#a.json" too."""
    return [
        path
        for path in sorted(folder.glob(pattern))
        if not any(map(is_stray, path.relative_to(folder).parts))
    ]


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON that any reader accepts (no NaN), completely or not at all."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
