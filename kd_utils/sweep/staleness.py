"""What of a sweep is done, and why the rest has to be run (again).

The records of 01 and 02 name what they were made from (`stage_key`), and so does each trial's
`metrics.json`. The plan, `sweep.json`, names what all trials of one table must be made from.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from kd_utils.cache import manifest
from kd_utils.config import notebook_files, parameter_files, project_paths
from kd_utils.config.fields import teacher_weights
from kd_utils.config.stages import CACHE, PREPARE, TRAIN
from kd_utils.data import prepared_data
from kd_utils.records import run_folder
from kd_utils.records.provenance import Ingredients, code_of
from kd_utils.store.files import sha256_file
from kd_utils.store.sealed import RecordError
from kd_utils.sweep.planning import Trial


def status(
    trials: list[Trial], run_dir: Path, parameters: dict[str, Any]
) -> dict[str, run_folder.Status]:
    """Whether each trial is done with its config and with today's code, student and cache."""
    made = made_of(trials, run_dir, parameters)
    return {
        t.trial: run_folder.trial_status(run_dir, t.trial, t.config_hash, made, t.parameters)
        for t in trials
    }


def made_of(trials: list[Trial], run_dir: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """What these trials must be made from now, as the plan says it (`run_folder.Plan`).

    Without a teacher cache this is what the earlier plan says, if there is one: trials of two
    caches are never done beside each other.
    """
    now = artifact_of(CACHE, parameters)
    if now is None:
        unknown = {"cache": None, "more_caches": {}, "tokenizer": "", "students": {}}
        earlier = earlier_plan(run_dir)
        return {key: earlier.get(key, unknown[key]) for key in unknown} | {"code": code_of(TRAIN)}
    default = notebook_files.notebook_defaults(TRAIN)["student"]
    names = sorted({trial.parameters.get("student", default) for trial in trials})
    others = more_caches(trials, parameters)
    return {
        "cache": {key: now["cache"][key] for key in ("name", "content_hash")},
        "more_caches": {
            name: manifest.read_manifest(folder)["content_hash"] for name, folder in others.items()
        },
        "tokenizer": _tokenizer(parameters),
        "students": {name: _initial_weights(name, now["cache"]) for name in names},
        "code": code_of(TRAIN),
    }


def earlier_plan(run_dir: Path) -> dict[str, Any]:
    """The run folder's `sweep.json`; {} if there is none that can be read."""
    with suppress(RecordError):
        return run_folder.read_plan(run_dir) or {}
    return {}


def _tokenizer(parameters: dict[str, Any]) -> str:
    """Fingerprint of the student's tokenizer, with which data was prepared; "" without data."""
    settings = parameter_files.notebook_config(PREPARE, parameters)
    with suppress(RecordError):
        return prepared_data.read_manifest(settings.data_path)["tokenizer_fingerprint"]
    return ""


def more_caches(trials: list[Trial], parameters: dict[str, Any]) -> dict[str, Path]:
    """Other experiments whose teachers these trials have -> folders of those caches that exist."""
    settings, folders = parameter_files.notebook_config(CACHE, parameters), {}
    default = parameters.get("more_teachers", "")
    for trial in trials:
        for name in teacher_weights(trial.parameters.get("more_teachers", default)):
            with suppress(manifest.CacheError):  # notebook 03 reports a missing cache
                folders[name] = manifest.find_cache(settings.artifacts, name)
    return dict(sorted(folders.items()))


def _initial_weights(student: str, cache: dict[str, Any]) -> str:
    """Fingerprint of a student's initial weights; "" if they do not exist yet."""
    from kd_utils.models.loading import model_fingerprint

    is_teacher = student == "teacher"
    source = (cache["teacher"], cache["teacher_revision"]) if is_teacher else (student, "")
    # Notebook 03 reports what is wrong with a student.
    with suppress(ValueError, OSError):
        return model_fingerprint(*source)
    return ""


def why_to_run(stem: str, run_dir: Path, parameters: dict[str, Any]) -> str:
    """Why 01 or 02 has to be executed (again), in one line; "" if it does not have to be."""
    path = run_dir / f"{stem}.ipynb"
    if not path.exists():
        return "not run yet"
    try:
        about = run_folder.read_notebook(path)["metadata"]["kd_utils"]
    except RecordError as error:
        return str(error)
    key = stage_key(stem, parameters)
    if key is None:
        return "its result is missing or damaged"
    return Ingredients(about).why_stale(key) or _why_stale(stem, parameters)


def _why_stale(stem: str, parameters: dict[str, Any]) -> str:
    """Why data or cache are not what would be made now from their sources; "" if they are."""
    settings = parameter_files.notebook_config(stem, parameters)
    if stem == PREPARE:
        for name in _embedded_models(parameters) if settings.build != "none" else ():
            if not list(project_paths.project_path(name).glob("*.safetensors")):
                return f"{name} is missing"
        return prepared_data.why_stale(settings.data_path, settings)
    from kd_utils.cache import verification  # brings torch along, which a wrong input never needs

    data_hash = prepared_data.read_manifest(settings.data_path)["data_hash"]
    cache = manifest.read_manifest(manifest.find_cache(settings.artifacts, settings.name))
    return verification.why_stale(cache, data_hash=data_hash, teacher=settings.teacher)


def _embedded_models(parameters: dict[str, Any]) -> list[str]:
    """The student and the teacher, of those that 01 builds."""
    train, cache = (parameter_files.notebook_config(stem, parameters) for stem in (TRAIN, CACHE))
    folder = project_paths.project_path(train.artifacts_dir) / "embedded"
    return [
        name
        for name in (train.student, cache.teacher)
        if project_paths.project_path(name).is_relative_to(folder)
    ]


def stage_key(stem: str, parameters: dict[str, Any]) -> Ingredients | None:
    """What the record of 01 or 02 must name; None if what the stage makes is missing."""
    artifact = artifact_of(stem, parameters)
    if artifact is None:
        return None
    settings = parameter_files.notebook_config(stem, parameters).model_dump()
    return Ingredients(code=code_of(stem), parameters=settings, artifact=artifact)


def artifact_of(stem: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Identifies the prepared data and, for 02, the teacher cache; None if they are missing."""
    settings = parameter_files.notebook_config(stem, parameters)
    data = settings.data_path / "manifest.json"
    if not data.is_file():
        return None
    if stem == PREPARE:
        return {"data": sha256_file(data)}
    try:
        folder = manifest.find_cache(settings.artifacts, settings.name)
        cache = manifest.read_manifest(folder)
    except manifest.CacheError:
        return None
    keys = ("content_hash", "teacher", "teacher_revision", "data_hash")
    about = {"name": folder.name, **{key: cache.get(key, "") for key in keys}}
    return {"data": sha256_file(data), "cache": about}
