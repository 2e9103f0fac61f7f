"""One writer per folder: a second process gets an error at once, or waits."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kd_utils.store.files import full_disk_named

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(
    folder: Path,
    what: str,
    remedy: str = "wait for it, or stop it and run the same command again",
    *,
    wait: bool = False,
) -> Iterator[None]:
    """Hold `folder` for this process alone; the system frees it when the process dies.

    The lock is the file `.lock` in the folder. It names the holder and is removed at the end. The
    folder is created where it does not exist, and removed again if it is still empty at the end.

    Args:
        what: what holds the folder ("a sweep"), for the error that another process gets.
        remedy: what the other process can do.
        wait: until the folder is free, instead of an error.

    Raises:
        ValueError: another process holds the folder; the message says which one and since when.
        OSError: the file system has no locks, or the disk is full.
    """
    path = folder / ".lock"
    lock = FileLock(path, blocking=wait, fallback_to_soft=False)
    with full_disk_named(folder):
        _acquire(lock, folder, remedy)
    lock_stat = path.stat()
    try:
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%H:%M:%S}"
        with full_disk_named(folder):
            path.write_text(f"{what} ({holder})", encoding="utf-8")
        yield
    finally:
        with suppress(FileNotFoundError):
            # The folder may have been removed and created again by another process.
            if os.path.samestat(lock_stat, path.stat()):
                path.unlink()
        lock.release()
        with suppress(OSError):
            folder.rmdir()


def _acquire(lock: FileLock, folder: Path, remedy: str) -> None:
    """Lock at the first attempt. An empty folder may vanish meanwhile, when its holder leaves."""
    path = Path(lock.lock_file)
    for attempts_left in reversed(range(100)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            return
        except (FileExistsError, FileNotFoundError):
            if not attempts_left:
                raise
        except Timeout:
            with suppress(FileNotFoundError):
                holder = path.read_text(encoding="utf-8").strip() or "another process"
                raise ValueError(f"{folder.name} is in use by {holder}: {remedy}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"{path}: this file system has no locks ({error.strerror}), and without them two "
                "processes could write to one folder: use a folder on another file system",
            ) from None
    raise ValueError(f"{folder.name} is in use by another process: {remedy}")
