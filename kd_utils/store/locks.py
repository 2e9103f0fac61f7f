"""Files that are either whole or not there: written aside, synced, renamed into place; and who may
write a folder.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

from kd_utils.store.files import (
    full_disk_named,
)

if TYPE_CHECKING:
    pass


@contextmanager
def locked(folder: Path, what: str, remedy: str = "wait for it or stop it") -> Iterator[None]:
    """Hold `folder` for this process alone: another's attempt fails at once, and the system frees
    it if we are killed.

    The lock is `flock`'s on the file `.lock` inside, which says who holds it and goes away with the
    block.

    Args:
        what: what holds the folder ("a sweep"), for the other's error.
        remedy: what the other may do.

    Raises:
        ValueError: somebody holds it: what, since when, its process and machine.
    """
    path = folder / ".lock"
    while True:
        file = _appended(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise ValueError(f"{folder.name} is in use by {holder}: {remedy}") from None
        except OSError as error:
            with file:
                path.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"{path}: this file system gives no locks ({error.strerror}), which keep two "
                "processes out of one folder: put the folder on one that does",
            ) from None
        # The one before may have removed the file between our opening and locking it: then it
        # guards nothing.
        if _is_at(file, path):
            break
        file.close()
    with file:
        try:
            file.truncate(0)
            file.write(
                f"{what} (process {os.getpid()} on {socket.gethostname()}, since "
                f"{datetime.now():%H:%M:%S})"
            )
            file.flush()
            yield
        finally:
            if _is_at(
                file, path
            ):  # and not another's: the folder may have been removed and made again
                path.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()  # if nothing came into it


def _appended(path: Path) -> IO:
    """`path` opened in a folder that is made, and that the one before may remove at any moment,
    when it is empty.
    """
    for _ in range(100):
        with suppress(FileExistsError, FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "a+", encoding="utf-8")
    return open(path, "a+", encoding="utf-8")  # says what else is the matter


def _is_at(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """`files.locked` for what 02 writes; a disk that has no room for the lock is named too."""
    with ExitStack() as lock:
        with full_disk_named(folder):
            lock.enter_context(locked(folder, what, "wait for it, or stop it and run 02 again"))
        yield
