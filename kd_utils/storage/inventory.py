"""What is in `artifacts/`: each folder that one stage made, with its size and its age."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from kd_utils.store.files import matching

#: Folder of `artifacts/` -> what one entry in it is called.
KINDS = {
    "data": "data",
    "cache": "cache",
    "teachers": "teacher",
    "initial_students": "initial student",
    "students": "students",
    "checkpoints": "checkpoints",
    "analysis": "analysis",
    "embedded": "embedded",
}
BENCH, LEFTOVER, OTHER = "bench", "leftover", "other"

#: What a process was writing: `.NAME.partial-PID`, also with an ending of its own.
PARTIAL = re.compile(r"\..+\.partial-(\d+)(\.\w+|\.old-\d+)?")


@dataclass(frozen=True)
class Item:
    """A folder or file of `artifacts/` that is kept or removed as a whole.

    Attributes:
        path: the folder; `beside` has what belongs to it and lies next to it.
        bytes: of all files in it.
        used: the newest time of a file in it, in seconds: when it was last used or made.
    """

    kind: str
    path: Path
    bytes: int
    used: float
    beside: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """The name by which it can be chosen; of a leftover, its place below `artifacts/`."""
        return self.path.name

    @property
    def day(self) -> str:
        """The day of `used`, as YYYY-MM-DD."""
        return f"{datetime.fromtimestamp(self.used):%Y-%m-%d}"


def inventory(artifacts: Path) -> list[Item]:
    """Everything in `artifacts`, by kind and name. Links are not followed."""
    items = [
        _item(kind, path, *_notes(path))
        for folder, kind in KINDS.items()
        for path in matching(artifacts / folder, "[!.]*")
    ]
    for path in matching(artifacts, "[!.]*"):
        if path.name not in KINDS:
            bench = path.is_dir() and path.name.startswith("bench-")
            items.append(_item(BENCH if bench else OTHER, path))
    return items + [_item(LEFTOVER, path) for path in _leftovers(artifacts)]


def _item(kind: str, path: Path, *beside: Path) -> Item:
    stats = [file.lstat() for place in (path, *beside) for file in _files(place)]
    # A folder's own time tells when something was put in or taken out, not of a use.
    used = max((stat.st_mtime for stat in stats), default=path.lstat().st_mtime)
    return Item(kind, path, sum(stat.st_size for stat in stats), used, beside)


def _files(place: Path) -> list[Path]:
    if place.is_symlink() or not place.is_dir():
        return [place]
    return [path for path in place.rglob("*") if path.is_symlink() or not path.is_dir()]


def _notes(path: Path) -> list[Path]:
    """The notes on shards of a cache that is not finished."""
    notes = path.with_name(f".{path.name}.shards")
    return [notes] if notes.is_dir() else []


def _leftovers(artifacts: Path) -> Iterator[Path]:
    """What processes that are gone were writing, and notes on caches that are gone."""
    for path in sorted([*artifacts.glob("*/.*"), *artifacts.glob("*/*/.*")]):
        if found := PARTIAL.fullmatch(path.name):
            if not psutil.pid_exists(int(found[1])):
                yield path
        elif path.name.endswith(".shards") and not path.with_name(path.name[1:-7]).exists():
            yield path
