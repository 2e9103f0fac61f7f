"""The teacher cache: its signals for every example, ragged, keyed by `example_id`, checksummed,
resumable.

A cache is a folder `NAME-DATE-KEY`: Parquet shards of one row group per example (so that one row is
one read), `vocabulary.parquet` (what each id spells), `lm_head.safetensors`, and `manifest.json`,
which is written last: without it there is no cache. Tokens are the teacher's own; where the
student's differ, the two are lined up when it trains.

| column | per example of n tokens |
|---|---|
| `example_id`, `tokens`, `answer_start` | key, int32 (n,), index of the answer's first token |
| `ends` | int32 (n,) behind which byte of the text each token ends; empty if the tokens do not spell the text |
| `hidden` | float16 (n, d) final hidden state, after the last norm: times `lm_head` it is the logits |
| `attention` | float16 or uint8 (H, n (n + 1) / 2) last layer's map as `signals.encode_map` gives it |
| `hidden_7`, `attention_7`, ... | the same of other layers that were asked for; the hidden state before any norm |
| `top_logits`, `top_ids`, `log_mass` | instead of these: float32 (n, k), int32 (n, k), float32 (n, temperatures) |

A signal is stored as byte planes: column `hidden.0` has the first byte of every value, `hidden.1`
the second. Exponents then stand beside exponents and compress, mantissas beside mantissas
(Parquet's BYTE_STREAM_SPLIT does the same, but the lists that it needs are read and written at half
the speed). `manifest.json` has the dtypes.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_utils.records.source_code import code_of
from kd_utils.store.files import sha256_file, sha256_json

if TYPE_CHECKING:
    pass

FORMAT_VERSION = 3

FOLDER = re.compile(r"(?P<name>.+)-\d{4}-\d\d-\d\d-(?P<key>[0-9a-f]{8})")


class CacheError(ValueError):
    """A cache that is missing, damaged, unverified, or made for something else."""


@lru_cache(maxsize=1)  # what this process imported, and not what is edited while it runs
def cache_code() -> dict[str, str]:
    """Digests of the code that decides what a cache holds (see `source_code.code_of`)."""
    return code_of(
        "02_cache_teacher", ("teacher.preparation", "teacher.extraction", "cache.writer")
    )


def key_digest(key: dict[str, Any]) -> str:
    """The end of a cache folder's name: everything that decides the content, in eight hex
    digits.
    """
    return sha256_json({"format": FORMAT_VERSION, **key})[:8]


def finished_caches(artifacts: Path, name: str) -> list[Path]:
    """Folders of experiment `name`'s finished caches, in the order in which 02 wrote, or was asked
    for, them last.
    """
    folders = [
        path.parent
        for path in (artifacts / "cache").glob("*/manifest.json")
        if (parts := FOLDER.fullmatch(path.parent.name)) and parts["name"] == name
    ]
    return sorted(folders, key=lambda folder: (folder / "manifest.json").stat().st_mtime_ns)


def find_cache(artifacts: Path, name: str) -> Path:
    """The finished cache of experiment `name` that 02 wrote, or was asked for, last.

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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if it is one of this format, this folder's own, and unchanged since it was
    written.
    """
    where = f"{folder.name}/manifest.json"
    try:
        text = (folder / "manifest.json").read_bytes().decode()
        manifest = json.loads(text)
        # The text is compared too, since other digits, or an E for an e, can read as the same
        # number.
        unchanged = text == json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        stated = manifest.pop("content_hash")
        unchanged &= sha256_json(manifest) == stated
    except FileNotFoundError:
        raise CacheError(
            f"{where} is missing: caching did not finish; run 02 again, it resumes"
        ) from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CacheError(f"{where} is damaged or cannot be read: run 02 again") from None
    if not unchanged:
        raise CacheError(f"{where} was changed after it was written: run 02 again")
    if manifest.get("format") != FORMAT_VERSION:
        raise CacheError(
            f"{where} has format {manifest.get('format')}, this code reads {FORMAT_VERSION}: run "
            f"02 again"
        )
    parts = FOLDER.fullmatch(folder.name)
    if (
        parts
        and "key" in manifest
        and (parts["name"], parts["key"]) != (manifest["name"], key_digest(manifest["key"]))
    ):
        raise CacheError(
            f"{where} is that of {manifest['name']}-DATE-{key_digest(manifest['key'])}: another "
            f"cache was "
            "copied here, or the folder renamed: run 02 again"
        )
    return {**manifest, "content_hash": stated}


def check_files(folder: Path) -> dict[str, Any]:
    """Every file that the manifest names is there, byte for byte. Returns the manifest.

    Raises:
        CacheError: the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    for entry in [
        *manifest["shards"],
        *(manifest[name] for name in ("vocabulary", "lm_head") if name in manifest),
    ]:
        _check_file(folder, entry)
    return manifest


def _check_file(folder: Path, entry: dict[str, Any]) -> Path:
    path = folder / entry["file"]
    if not path.is_file():
        raise CacheError(
            f"{folder.name}/{path.name} is missing: run 02 again, it writes what is missing"
        )
    if sha256_file(path) != entry["sha256"]:
        raise CacheError(
            f"{folder.name}/{path.name} is damaged, or another cache's (checksum differs): run 02 "
            f"again"
        )
    return path
