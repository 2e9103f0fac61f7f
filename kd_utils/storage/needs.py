"""Who needs what is in `artifacts/`: run folders, their records, and what is itself needed.

A folder is needed if its name, or the digest of its content, occurs in the text of a plan, of a
record, or of the manifest of something that is needed. What cannot be known is taken for needed.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kd_utils.cache import manifest
from kd_utils.config.project_paths import run_label, short_path
from kd_utils.data import hub
from kd_utils.records import run_folder
from kd_utils.storage.inventory import BENCH, OTHER, Item
from kd_utils.store import locks
from kd_utils.store.files import another_writes, matching
from kd_utils.store.sealed import RecordError, SealedFolder

#: Kinds in the order in which one needs another, the needing one first.
CHAIN = ("cache", "data", "teacher", "initial student", "embedded")

#: What such a folder has that names what it was made from.
DOCUMENTS = ("manifest.json", "fine_tuning.json", "initial_student.json")

#: What a run folder has that names what its trials were made from, or will be.
RECORDS = ("*.json", "01*.ipynb", "02*.ipynb", "trials/*/*.json")

#: A run folder that is not in `runs/` has a label with a digest (`run_label`).
ELSEWHERE = re.compile(r".+-[0-9a-f]{8}")


class Use(NamedTuple):
    """Who needs a folder, in words; and who may be using it at this moment, or ""."""

    by: list[str]
    now: str = ""


class Run(NamedTuple):
    """A run folder: the texts that name what it needs, who holds its lock ("" for nobody), and
    since when, in seconds.
    """

    folder: Path
    text: str
    held: str = ""
    since: float = 0.0


def runs_in(folder: Path) -> list[Run]:
    """Every run folder in `folder` (`runs/`), at any depth."""
    found = {path for path in matching(folder, "[!.]*") if path.is_dir()}
    found |= {path.parent for name in ("sweep.json", "trials") for path in folder.rglob(name)}
    return [
        Run(path, _text(file for name in RECORDS for file in path.glob(name)), *_holder(path))
        for path in sorted(found)
    ]


def uses(items: list[Item], runs: list[Run], artifacts: Path) -> dict[Path, Use]:
    """Who needs each item, and who uses it now: item's path -> `Use`."""
    sources = [(short_path(run.folder), run.text) for run in runs]
    needed: dict[Path, list[str]] = {}
    for kind in CHAIN:
        of_kind = [item for item in items if item.kind == kind]
        newest = _newest(of_kind, artifacts) if kind == "cache" else {}
        for item in of_kind:
            needed[item.path] = newest.get(item.path, []) + _named(item, sources)
        sources += [
            (f"{kind} {item.name}", _text(item.path / name for name in DOCUMENTS))
            for item in of_kind
            if needed[item.path]
        ]
    for item in items:
        if item.kind in ("students", "checkpoints", "analysis"):
            needed[item.path] = _of_run(item, runs)
            if item.kind == "students":  # of another run the teacher, or the initial student
                needed[item.path] = needed[item.path] or _named(item, sources)
        elif item.kind == OTHER:
            needed[item.path] = ["not made by this project"]
    return {
        item.path: Use(by, _user(item, by, runs))
        for item in items
        for by in [needed.get(item.path, [])]
    }


def _user(item: Item, by: list[str], runs: list[Run]) -> str:
    """What runs and uses this, or may have written it: a sweep's plan does not say all yet."""
    if item.kind == BENCH and another_writes(item.path):
        return "a measurement"
    for run in runs:
        if run.held and (short_path(run.folder) in by or item.used >= run.since - 1):
            return run.held
    return ""


def _named(item: Item, sources: list[tuple[str, str]]) -> list[str]:
    """Whose texts name an item of `CHAIN`."""
    name = re.escape(item.name)
    patterns = [rf"(?<![\w.-]){name}(?![\w.-])"]
    if item.kind == "data":
        patterns = [rf'"name":\s*"{name}"']
    elif item.kind in ("teacher", "embedded", "students"):
        patterns = [rf"\b{item.path.parent.name}/{name}(?![\w.-])"]
    try:
        if item.kind == "cache":
            patterns.append(manifest.read_manifest(item.path)["content_hash"])
        elif item.kind == "initial student":
            sealed = SealedFolder(item.path, "initial_student.json")
            patterns.append(hub.fingerprint_of(sealed.read()["checksums"]))
    except ValueError:
        if item.kind == "initial student":
            return ["it does not say what it is"]
    mark = re.compile("|".join(patterns))
    return [who for who, text in sources if mark.search(text)]


def _of_run(item: Item, runs: list[Run]) -> list[str]:
    """Who needs a folder that has the label of a run."""
    owners = [run for run in runs if run_label(run.folder) == item.name]
    todo = {path.stem for path in matching(item.path, "*.json")}
    if not owners and item.kind == "checkpoints" and todo:
        return ["a trial that was not done"]  # a first trial by hand has no run folder yet
    if not owners:
        return ["perhaps a run folder elsewhere"] if ELSEWHERE.fullmatch(item.name) else []
    if item.kind == "checkpoints":
        with suppress(RecordError):  # a plan that cannot be read: all of them are kept
            states = run_folder.trials_with_status(owners[0].folder)
            todo -= {planned["trial"] for planned, state in states if state.state == "done"}
        if not todo:
            return []
    return [short_path(owners[0].folder)]


def _newest(caches: list[Item], artifacts: Path) -> dict[Path, list[str]]:
    """Each experiment's newest cache, and one that is begun and newer: path -> for whom."""
    kept: dict[Path, list[str]] = {}
    for item in caches:
        parts = manifest.FOLDER.fullmatch(item.name)
        if parts is None:
            kept[item.path] = ["it is not named as a cache"]
            continue
        finished = manifest.finished_caches(artifacts, parts["name"])
        if item.path in finished[-1:]:
            kept[item.path] = [f"newest of {parts['name']}"]
        elif item.path not in finished and all(_time(cache) < item.used for cache in finished):
            kept[item.path] = [f"begun for {parts['name']}"]
    return kept


def _time(cache: Path) -> float:
    return (cache / "manifest.json").stat().st_mtime


def _text(paths: Iterable[Path]) -> str:
    texts = []
    for path in paths:
        with suppress(OSError):
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(texts)


def _holder(run_dir: Path) -> tuple[str, float]:
    """Who holds a run folder now, in words, and since when; ("", 0.0) for nobody."""
    try:
        since = (run_dir / ".lock").stat().st_mtime
        with locks.locked(run_dir, "a look at what is in use"):
            return "", 0.0
    except FileNotFoundError:
        return "", 0.0
    except (ValueError, OSError) as error:
        return str(error).partition(": ")[0], since
