"""What of `artifacts/` is shown, what can be removed, and its removal."""

import difflib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

from kd_utils.config.project_paths import project_path, short_path
from kd_utils.storage.inventory import BENCH, KINDS, LEFTOVER, OTHER, Item, inventory
from kd_utils.storage.needs import Use, runs_in, uses
from kd_utils.store.locks import locked

UNITS = ("B", "kB", "MB", "GB", "TB")

#: How a line of `clean` begins that says what could not be removed.
FAILED = "not removed: "

ALL_KINDS = (*KINDS.values(), BENCH, LEFTOVER, OTHER)


class Entry(NamedTuple):
    """An item of `artifacts/` and who needs it."""

    item: Item
    use: Use

    @property
    def needed_by(self) -> str:
        """Who needs it, in one short line; "" for nobody."""
        by = [self.use.now] * bool(self.use.now) + self.use.by
        return ", ".join(by[:2]) + f" and {len(by) - 2} more" * (len(by) > 2)


def entries(artifacts: Path, runs: Path, what: Iterable[str] = ()) -> list[Entry]:
    """What is in `artifacts`, with who needs it, all or what is chosen.

    Args:
        artifacts, runs: the folder, and that of all run folders, seen from the project's root.
        what: kinds or names; none for everything.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: nothing has a kind or name of `what`.
    """
    artifacts, runs = project_path(artifacts), project_path(runs)
    if not artifacts.is_dir():
        raise FileNotFoundError(f"no folder {short_path(artifacts)}: nothing was made yet")
    items = inventory(artifacts)
    used = uses(items, runs_in(runs), artifacts)
    known = {*ALL_KINDS, *KINDS, *(item.name for item in items)}
    for name in (chosen := set(what)) - known:
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(ALL_KINDS)}"
        raise ValueError(f"{short_path(artifacts)} has nothing of kind or name {name!r}; {hint}")
    return [
        Entry(item, used[item.path])
        for item in items
        if not chosen or chosen & {item.kind, item.path.parent.name, item.name}
    ]


def table(found: list[Entry]) -> Iterator[str]:
    """Lines of a table: kind, name, size, the day of the last use, who needs it; and the sum."""
    width = max((len(entry.item.name) for entry in found), default=4)
    yield f"{'kind':<16} {'name':<{width}} {'size':>9}  {'last used':<10}  needed by"
    for entry in found:
        item, by = entry.item, entry.needed_by or "-"
        yield f"{item.kind:<16} {item.name:<{width}} {size(item.bytes):>9}  {item.day:<10}  {by}"
    total = sum(entry.item.bytes for entry in found)
    free = sum(entry.item.bytes for entry in found if removable(entry, force=False))
    yield f"{size(total)} in {len(found)} folders, of which {size(free)} nobody needs"


def removable(entry: Entry, *, force: bool) -> bool:
    """Whether `clean` removes it; what a running sweep uses, or others made, it never does."""
    if entry.use.now or entry.item.kind == OTHER or entry.item.path.is_symlink():
        return False
    return force or not entry.use.by


def clean(found: list[Entry], *, yes: bool, force: bool, all_kept: bool) -> Iterator[str]:
    """Remove what can go, or only say so; a line for each folder as it goes, and the sum.

    Args:
        yes: remove; otherwise nothing is changed.
        force: remove what is needed too, but not what is in use.
        all_kept: say of each other folder why it is kept.
    """
    freed, does, did = 0, *(("removed", "freed") if yes else ("would remove", "would free"))
    for entry in found:
        label = f"{entry.item.kind} {entry.item.name}"
        if not removable(entry, force=force):
            if all_kept or force:
                yield f"kept: {label}: {entry.needed_by or 'it is a link: remove it by hand'}"
            continue
        label += f" ({size(entry.item.bytes)})" + f", needed by {entry.needed_by}" * bool(
            entry.use.by
        )
        try:
            if yes:
                remove(entry.item)
        except (ValueError, OSError) as error:
            yield f"{FAILED}{label}: {error}"
            continue
        freed += entry.item.bytes
        yield f"{does}: {label}"
    yield f"{did}: {size(freed)}"


def remove(item: Item) -> None:
    """Remove a folder, so that it is never seen half: it is renamed first.

    Raises:
        ValueError: another process is writing it.
        OSError: it cannot be removed.
    """
    with _held(item):
        for place in (*item.beside, item.path):
            aside = place.with_name(f".{place.name.lstrip('.')}.partial-{os.getpid()}")
            place.rename(aside)
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def _held(item: Item) -> AbstractContextManager[None]:
    """The lock under which this kind is written; other kinds are written under a sweep's."""
    if item.kind == "cache":
        return locked(item.path, "python -m kd_utils clean")
    if item.kind in ("teacher", "initial student"):
        return locked(item.path.with_name(f".{item.name}.lock"), "python -m kd_utils clean")
    return nullcontext()


def size(count: int) -> str:
    """A number of bytes as people read it: "12.3 MB"."""
    power = min((len(str(count)) - 1) // 3, len(UNITS) - 1)
    return f"{count / 1000**power:.{min(power, 1)}f} {UNITS[power]}"
