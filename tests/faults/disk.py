"""A disk that is really full: a small tmpfs mounted over a folder, for one command alone.

A namespace of one's own (`unshare -rm`) needs no root rights, where the system allows it.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from kill_points import contents, forked

# exit status of what comes before the command: the tmpfs could not be set up, or is too small to
# start
NO_DISK = 90

# The folder stays visible at $2, so that its content can be copied there and back; the command sees
# the tmpfs.
SCRIPT = f"""
mount --bind "$1" "$2" && mount -t tmpfs -o "size=$3" tmpfs "$1" &&
    cp -a "$2/." "$1/" || exit {NO_DISK}
folder=$1 kept=$2; shift 3
"$@"; status=$?
find "$kept" -mindepth 1 -delete && cp -a "$folder/." "$kept/" || exit {NO_DISK}
exit $status
"""


@lru_cache(maxsize=1)
def _why_not() -> str:
    try:
        done = subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "no `unshare` here"
    return " ".join(done.stderr.split()) if done.returncode else ""


def run_on_small_disk(
    command: list[str], folder: Path, size: int, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command for which `folder` is a disk of `size` bytes; what it leaves there is in
    `folder` afterwards.

    Args:
        command: the program and its arguments.
        folder: made where it is not there; what is in it is on the small disk when the command
            starts.
        size: in bytes; the tmpfs rounds up to whole pages of 4 KiB, and each file and folder takes
            whole pages of it.
        env: variables beside this process's.

    Returns:
        With the command's status and its output.
    """
    if why := _why_not():
        pytest.skip(f"no disk can be filled here: {why}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as kept:
        done = subprocess.run(
            [
                "unshare",
                "-rm",
                "sh",
                "-c",
                SCRIPT,
                "sh",
                folder.resolve(),
                kept,
                str(size),
                *map(str, command),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, **(env or {})},
        )
    assert done.returncode != NO_DISK, (
        f"the disk of {size:,} bytes could not be set up: {done.stderr}"
    )
    return done


def run_with_file_limit(
    command: list[str], size: int, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that can write no file larger than `size` bytes (RLIMIT_FSIZE), which needs no
    rights at all.
    """
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def full_at_every_size(
    work: Path,
    begin: Callable[[], None],
    action: Callable[[], None],
    look: Callable[[], None],
    *,
    most: int,
) -> list[str]:
    """In `run_on_small_disk`'s command: an action on disks with 0, 1, 2, ... free pages, until one
    is large enough.

    After each, no file is half written, `look` passes, and with room the action ends with the very
    files that it leaves on a disk that has it.

    Args:
        work: a folder on the small disk, which is its parent.
        begin: makes what is there before the action.
        most: of about so many sizes.

    Returns:
        The error of each size that was too small, in one line.
    """
    disk, page = work.parent, os.sysconf("SC_PAGESIZE")

    def resize(pages: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={pages * page}", "tmpfs", disk], check=True)

    def used() -> int:
        space = os.statvfs(disk)
        return (space.f_blocks - space.f_bfree) * space.f_frsize // page

    def anew() -> None:
        resize(2**14)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        begin()

    def attempt() -> str:
        """The error of the action, or ""."""
        with tempfile.TemporaryFile("w+") as answer:

            def tell() -> None:
                try:
                    action()
                except Exception as error:
                    answer.write(f"{type(error).__name__}: {error}")
                    answer.flush()

            assert forked(tell)
            answer.seek(0)
            return answer.read()

    anew()
    before = contents(work)
    assert not attempt()
    expected, errors, free = contents(work), [], 0
    pages = sum(math.ceil(path.stat().st_size / page) for path in work.rglob("*") if path.is_file())
    step = max(pages // most, 1)
    while True:
        anew()
        resize(max(used() + free, 1))
        if not (error := attempt()):
            assert contents(work) == expected
            return errors
        errors.append(error)
        left = contents(work)
        assert not [name for name in left if ".partial-" in name], left
        assert all(
            digest in (before.get(name), expected.get(name))
            for name, digest in left.items()
            if not any(part.startswith(".") for part in Path(name).parts)
        ), left
        look()
        resize(2**14)
        assert not attempt() and contents(work) == expected, f"{free} pages free: {error}"
        free += step
