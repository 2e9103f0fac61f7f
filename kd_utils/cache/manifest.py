"""What a teacher cache is: a folder `NAME-DATE-KEY`, its manifest, and how a cache is found.

The manifest (a `SealedFolder`'s document) is written last: without it the cache is not finished.
"""

import re
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from kd_utils.records.provenance import code_of
from kd_utils.store.files import sha256_json
from kd_utils.store.sealed import SealedFolder

FORMAT_VERSION = 5

#: A cache's table of sums over the training rows (`models.importance.sums`), from which the
#: importance of the teacher's units follows.
UNIT_SUMS = "importance.parquet"

#: A cache's table of which validation rows the teacher answers right: `example_id`, `correct`.
PREDICTIONS = "validation_predictions.parquet"

FOLDER = re.compile(r"(?P<name>.+)-\d{4}-\d\d-\d\d-(?P<key>[0-9a-f]{8})")


class CacheError(ValueError):
    """A cache that is missing, damaged, unverified, or made for something else."""


@lru_cache(maxsize=1)  # what this process imported, and not what is edited while it runs
def cache_code() -> dict[str, str]:
    """Digests of the code that decides what a cache holds (see `provenance.code_of`)."""
    start = ["teacher.preparation", "teacher.answers", "teacher.extraction", "cache.writer"]
    return code_of("02_cache_teacher", start)


def key_digest(key: dict[str, Any]) -> str:
    """The end of a cache folder's name: eight hex digits of everything that decides the content."""
    return sha256_json({"format": FORMAT_VERSION, **key})[:8]


def cache_folder(artifacts: Path, name: str, key: dict[str, Any]) -> Path:
    """The folder for experiment `name`'s cache with this key: an earlier one, or one dated today.

    The key has all that decides the content, as JSON: data, teacher, tokenizer, signals and so on.
    """
    caches, digest = artifacts / "cache", key_digest(key)
    earlier = caches.glob(f"{name}-????-??-??-{digest}")
    return max(earlier, default=caches / f"{name}-{date.today():%Y-%m-%d}-{digest}")


def finished_caches(artifacts: Path, name: str) -> list[Path]:
    """Finished caches of experiment `name`; the last is the one that 02 most recently used."""
    manifests = [
        path
        for path in (artifacts / "cache").glob("*/manifest.json")
        if (parts := FOLDER.fullmatch(path.parent.name)) and parts["name"] == name
    ]
    return [path.parent for path in sorted(manifests, key=lambda path: path.stat().st_mtime_ns)]


def find_cache(artifacts: Path, name: str) -> Path:
    """The finished cache of experiment `name` that 02 was last asked for.

    Raises:
        CacheError: there is none, or it is not what its folder's name says.
    """
    folders = finished_caches(artifacts, name)
    if not folders:
        raise CacheError(
            f"no finished teacher cache of experiment {name!r}: run notebook 02_cache_teacher first"
        )
    read_manifest(folders[-1])
    return folders[-1]


def sealed_cache(folder: Path, document: str = "manifest.json") -> SealedFolder:
    """The folder of a cache, whose files are listed in its manifest."""
    return SealedFolder(
        folder, document, remedy="run 02 again (whole files are kept)", error=CacheError
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with `content_hash`, which is the checksum of the manifest itself.

    Raises:
        CacheError: it is missing, damaged, of another format, or another cache's.
    """
    sealed = sealed_cache(folder)
    manifest = sealed.read()
    if manifest.get("format") != FORMAT_VERSION:
        raise sealed.problem(
            f"manifest.json has format {manifest.get('format')}, expected {FORMAT_VERSION}"
        )
    if "key" in manifest and (parts := FOLDER.fullmatch(folder.name)):
        name, key = manifest["name"], key_digest(manifest["key"])
        if (parts["name"], parts["key"]) != (name, key):
            raise sealed.problem(
                f"manifest.json belongs to the cache {name}-DATE-{key} (copied here, or the folder "
                "was renamed)"
            )
    return {**manifest, "content_hash": manifest["checksums"]["sha256"]}


def check_files(folder: Path, *, every_byte: bool = True) -> dict[str, Any]:
    """The manifest, after every file that it lists was compared with its checksum.

    Args:
        every_byte: False reads no file; each must be there, and a shard have its number of bytes.

    Raises:
        CacheError: the first file that is missing or damaged.
    """
    manifest, sealed = read_manifest(folder), sealed_cache(folder)
    sizes = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    if every_byte:
        sealed.check(*sizes)
        return manifest
    for name in sorted({*sizes, *manifest["checksums"]} - {"sha256"}):
        if not (folder / name).is_file():
            raise sealed.problem(f"{name} is missing")
        if (size := (folder / name).stat().st_size) != sizes.get(name, size):
            raise sealed.problem(f"{name} has {size:,} bytes, expected {sizes[name]:,}")
    return manifest
