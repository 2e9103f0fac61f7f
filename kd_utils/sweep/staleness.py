"""What of a sweep is done, and why the rest has to be run (again): data, teacher cache, code,
students, parameters.

The records of 01 and 02 name what they were made of (`stage_key`), a trial's `metrics.json` does,
and the plan, `sweep.json`, names what all trials of one table have to be made of (`made_of`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from kd_utils.cache.manifest import CacheError, find_cache, read_manifest
from kd_utils.config import notebook_files, parameter_files, project_paths
from kd_utils.config.fields import teacher_weights
from kd_utils.config.stages import CACHE, PREPARE, TRAIN
from kd_utils.records import run_folder
from kd_utils.records.source_code import changed_files, code_of
from kd_utils.store.files import sha256_file, sha256_json
from kd_utils.store.sealed import RecordError
from kd_utils.sweep.planning import Trial


def status(
    trials: list[Trial], run_dir: Path, parameters: dict[str, Any]
) -> dict[str, run_folder.Status]:
    """Of each trial, whether it is done with this config, code and student, and with the cache that
    there is now.
    """
    made = made_of(trials, run_dir, parameters)
    return {
        t.trial: run_folder.trial_status(run_dir, t.trial, t.config_hash, made, t.parameters)
        for t in trials
    }


def made_of(trials: list[Trial], run_dir: Path, parameters: dict[str, Any]) -> run_folder.Made:
    """What these trials have to be made of as things are now.

    Where there is no cache, that is the earlier plan's, if there is a plan: trials of two caches
    are never done beside each other.
    """
    now = artifact_of(CACHE, parameters)
    if now is None:
        earlier = earlier_plan(run_dir)
        named = {
            key: earlier[key] for key in ("more_caches", "tokenizer", "students") if key in earlier
        }
        return run_folder.Made(
            cache=(earlier.get("cache") or {}).get("content_hash", ""), code=code_of(TRAIN), **named
        )
    names = {
        trial.parameters.get("student", notebook_files.notebook_defaults(TRAIN)["student"])
        for trial in trials
    }
    return run_folder.Made(
        cache=now["cache"]["content_hash"],
        code=code_of(TRAIN),
        students={name: _student(name, now["cache"]) for name in sorted(names)},
        more_caches={
            name: read_manifest(folder)["content_hash"]
            for name, folder in more_caches(trials, parameters).items()
        },
        tokenizer=_tokenizer(parameters),
    )


def earlier_plan(run_dir: Path) -> dict[str, Any]:
    """The run folder's `sweep.json`; {} where there is none, or none that can be read."""
    with suppress(RecordError):
        return run_folder.read_plan(run_dir) or {}
    return {}


def _tokenizer(parameters: dict[str, Any]) -> str:
    """Fingerprint of the tokenizer that the data was prepared with, the student's; "" where no data
    is.
    """
    from kd_utils.data import prepared_data

    try:
        return prepared_data.read_manifest(
            parameter_files.notebook_config(PREPARE, parameters).data_path
        )["tokenizer_fingerprint"]
    except (ValueError, FileNotFoundError):
        return ""


def more_caches(trials: list[Trial], parameters: dict[str, Any]) -> dict[str, Path]:
    """Other experiments whose teachers these trials have, and their caches' folders, of those that
    there are.
    """
    settings, folders = parameter_files.notebook_config(CACHE, parameters), {}
    names = {
        name
        for trial in trials
        for name in teacher_weights(
            trial.parameters.get("more_teachers", parameters.get("more_teachers", ""))
        )
    }
    for name in sorted(names):
        with suppress(CacheError):  # 03 says that there is none
            folders[name] = find_cache(settings.artifacts, name)
    return folders


def _student(name: str, cache: dict[str, Any]) -> str:
    """Fingerprint of the initial weights that trials of this `student` start from; "" where there
    is none yet.
    """
    from kd_utils.models.loading import model_fingerprint

    name, revision = (
        (cache["teacher"], cache["teacher_revision"]) if name == "teacher" else (name, "")
    )
    try:
        return model_fingerprint(name, revision)
    except (FileNotFoundError, ValueError, OSError):
        return ""  # 03 says what is wrong with it


def why_to_run(stem: str, run_dir: Path, parameters: dict[str, Any]) -> str:
    """Why 01 or 02 has to be executed (again), in one line; "" if it has not."""
    path = run_dir / f"{stem}.ipynb"
    if not path.exists():
        return "not run yet"
    try:
        about = run_folder.read_notebook(path)["metadata"]["kd_utils"]
    except RecordError as error:
        return str(error)
    key = stage_key(stem, parameters)
    if key is None:
        return "what it made is not there any more, or damaged"
    if files := changed_files(about.get("code", {}), key["code"]):
        return f"code changed: {files}"
    other = [name for name, value in key.items() if about.get(name) != value]
    return f"changed since: {', '.join(other)}" if other else _why_stale(stem, parameters)


def _why_stale(stem: str, parameters: dict[str, Any]) -> str:
    """Why data or cache are not what their sources would make now; "" if they are."""
    from kd_utils.cache import manifest, verification
    from kd_utils.data import prepared_data

    settings = parameter_files.notebook_config(stem, parameters)
    if stem == PREPARE:
        made = project_paths.project_path(settings.artifacts_dir) / "embedded"
        for name in (
            parameter_files.notebook_config(TRAIN, parameters).student,
            parameter_files.notebook_config(CACHE, parameters).teacher,
        ):
            if (
                settings.build != "none"
                and project_paths.project_path(name).is_relative_to(made)
                and not list(project_paths.project_path(name).glob("*.safetensors"))
            ):
                return f"{name} is not there any more"
        return prepared_data.why_stale(settings.data_path, settings)
    prepared = prepared_data.read_manifest(settings.data_path)
    manifest = manifest.read_manifest(manifest.find_cache(settings.artifacts, settings.name))
    why = verification.why_stale(
        manifest, data_hash=prepared["data_hash"], teacher=settings.teacher
    )
    return f"the cache {why}" if why else ""


def stage_key(stem: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """What a record of 01 or 02 has to name in order to stand; None where what the stage makes is
    not there.
    """
    artifact = artifact_of(stem, parameters)
    if artifact is None:
        return None
    settings = parameter_files.notebook_config(stem, parameters).model_dump()
    return {"code": code_of(stem), "parameters": sha256_json(settings), "artifact": artifact}


def artifact_of(stem: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """What identifies the data and, for 02, the teacher cache that are there now; None when they
    are not there.
    """
    settings = parameter_files.notebook_config(stem, parameters)
    manifest = settings.data_path / "manifest.json"
    if not manifest.is_file():
        return None
    artifact: dict[str, Any] = {"data": sha256_file(manifest)}
    if stem == CACHE:
        try:
            folder = find_cache(settings.artifacts, settings.name)
            cache = read_manifest(folder)
        except CacheError:
            return None
        artifact["cache"] = {
            "name": folder.name,
            **{
                key: cache.get(key, "")
                for key in ("content_hash", "teacher", "teacher_revision", "data_hash")
            },
        }
    return artifact
