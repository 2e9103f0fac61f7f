"""What a sweep's results must be made from, and why 01 and 02 have to be run (again).

The records of 01 and 02 name what they were made from (`stage_key`), and so does each trial's
`metrics.json`. The plan, `sweep.json`, names what all trials of one table must be made from.
"""

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from kd_utils.cache import manifest
from kd_utils.config import fields, notebook_files, project_paths, stages
from kd_utils.config.parameter_files import notebook_config
from kd_utils.data import prepared_data
from kd_utils.records import provenance, run_folder
from kd_utils.records.trial_status import Status
from kd_utils.store.files import matching, sha256_file
from kd_utils.store.sealed import RecordError, SealedFolder
from kd_utils.sweep.planning import Trial


def made_of(trials: list[Trial], run_dir: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """What these trials must be made from now, as the plan says it (`run_folder.Plan`).

    Without a teacher cache this is what the earlier plan says, if there is one: trials of two
    caches are never done beside each other.
    """
    now = artifact_of(stages.CACHE, parameters)
    if now is None:
        unknown: dict[str, Any] = {
            "cache": None,
            "more_caches": {},
            "tokenizer": "",
            "students": {},
        }
        earlier = earlier_plan(run_dir)
        return {key: earlier.get(key, unknown[key]) for key in unknown} | {
            "code": provenance.code_of(stages.TRAIN)
        }
    default = notebook_files.notebook_defaults(stages.TRAIN)["student"]
    names = sorted({trial.parameters.get("student", default) for trial in trials})
    others, tokenizer = more_caches(trials, parameters), ""
    with suppress(RecordError):  # data that is damaged
        prepared = notebook_config(stages.PREPARE, parameters).data_path
        tokenizer = prepared_data.read_manifest(prepared)["tokenizer_fingerprint"]
    return {
        "cache": {key: now["cache"][key] for key in ("name", "content_hash")},
        "more_caches": {
            name: manifest.read_manifest(folder)["content_hash"] for name, folder in others.items()
        },
        "tokenizer": tokenizer,
        "students": {name: _initial_weights(name, now["cache"]) for name in names},
        "code": provenance.code_of(stages.TRAIN),
    }


def with_lineage(trials: list[Trial], states: dict[str, Status]) -> dict[str, Status]:
    """The states of trials, some of which start from students of others, in the plan's order.

    One that starts from a trial that is to run is stale. One that is done is to run again if its
    student is gone and another trial needs it.
    """
    found, names = dict(states), {trial.trial: trial for trial in trials}
    for trial in trials:
        start = found.get(trial.after, Status("done"))
        if start.state != "done" and found[trial.trial].state == "done":
            why = f"it starts from {trial.after}, which is to run"
            found[trial.trial] = Status("stale", why)
    for trial in reversed(trials):
        before = names.get(trial.after)
        if before and found[trial.trial].state != "done" == found[before.trial].state:
            if not notebook_config(stages.TRAIN, before.parameters).student_folder.is_dir():
                why = f"its student is missing, from which {trial.trial} starts"
                found[before.trial] = Status("broken", why)
    return found


def earlier_plan(run_dir: Path) -> dict[str, Any]:
    """The run folder's `sweep.json`; {} if there is none that can be read."""
    with suppress(RecordError):
        return run_folder.read_plan(run_dir) or {}
    return {}


def require_experiment(run_dir: Path, name: str, *, several_worlds: bool = False) -> None:
    """Raise a ValueError if a run folder holds another experiment, or worlds where this sweep has
    none or the other way round: a sweep would replace its plan.
    """
    plan = earlier_plan(run_dir)
    worlds = bool(plan.get("worlds")) if plan else several_worlds
    held = f"experiment {plan.get('name', name)!r}", worlds
    asked = f"experiment {name!r}", several_worlds
    if held != asked:
        words = [f"{what}{' in several worlds' * several}" for what, several in (held, asked)]
        raise ValueError(
            f"{project_paths.short_path(run_dir)} holds {words[0]}, but this sweep is of "
            f"{words[1].removeprefix('experiment ')}: give another --run-dir, or remove that folder"
        )


def more_caches(trials: list[Trial], parameters: dict[str, Any]) -> dict[str, Path]:
    """Other experiments whose teachers these trials have -> folders of those caches that exist."""
    settings, folders = notebook_config(stages.CACHE, parameters), {}
    default = parameters.get("more_teachers", "")
    for trial in trials:
        for name in fields.teacher_weights(trial.parameters.get("more_teachers", default)):
            with suppress(manifest.CacheError):  # notebook 03 reports a missing cache
                folders[name] = manifest.find_cache(settings.artifacts, name)
    return dict(sorted(folders.items()))


def _initial_weights(student: str, cache: dict[str, Any]) -> str:
    """Fingerprint of a student's initial weights; "" if they do not exist yet."""
    from kd_utils.models.loading import model_fingerprint

    teacher = (cache["teacher"], cache["teacher_revision"])
    with suppress(ValueError, OSError):  # notebook 03 reports what is wrong with a student
        return model_fingerprint(*(teacher if student == "teacher" else (student, "")))
    return ""


def why_to_run(
    stem: str,
    run_dir: Path,
    parameters: dict[str, Any],
    trials: Collection[Trial] = (),
    *,
    every_byte: bool = False,
) -> str:
    """Why 01 or 02 has to be executed (again), in one line; "" if it does not have to be.

    A stage is done if its record names what is there, and a trial can use what is there.

    Args:
        trials: what needs the stage.
        every_byte: read the whole cache too, and not only its small files.
    """
    path = run_dir / f"{stem}.ipynb"
    if not path.exists():
        return "not run yet"
    try:
        about = provenance.Ingredients(run_folder.read_notebook(path)["metadata"]["kd_utils"])
        if why := about.why_stale(stage_key(stem, parameters)):
            return why
        if stem == stages.PREPARE:
            return _why_data_stale(parameters)
        return _why_cache_stale(parameters, trials, every_byte)
    except RecordError as error:
        return str(error)


def _why_data_stale(parameters: dict[str, Any]) -> str:
    """Why the prepared data and the embedded models are not what 01 would make; "" if they are."""
    settings = notebook_config(stages.PREPARE, parameters)
    if settings.build != "none":
        student = notebook_config(stages.TRAIN, parameters).student
        for name in (student, notebook_config(stages.CACHE, parameters).teacher):
            if why := _why_rebuilt(name, settings.artifacts / "embedded"):
                return why
    return prepared_data.why_stale(settings.data_path, settings)


def _why_rebuilt(name: str, embedded: Path) -> str:
    """What is wrong with a model, if it is one that 01 builds; "" if nothing is."""
    place = project_paths.project_path(name)
    if not place.is_relative_to(embedded):
        return ""
    if not matching(place, "*.safetensors"):
        return f"{name} is missing"
    built = embedded / place.relative_to(embedded).parts[0]
    home = SealedFolder(built, f"{built.name}.json", label=project_paths.short_path(built))
    try:
        if (built / home.document).is_file():  # older versions sealed the toy only
            home.check()
    except RecordError as error:
        return str(error)
    return ""


def _why_cache_stale(
    parameters: dict[str, Any], trials: Collection[Trial], every_byte: bool
) -> str:
    """Why the cache is not one from which these trials can be trained now; "" if it is."""
    from kd_utils.cache import verification  # brings torch, which a wrong input never needs
    from kd_utils.models import loading

    settings = notebook_config(stages.CACHE, parameters)
    data_hash = prepared_data.read_manifest(settings.data_path)["data_hash"]
    folder = manifest.find_cache(settings.artifacts, settings.name)
    cache = manifest.read_manifest(folder)
    why = verification.why_stale(cache, data_hash=data_hash, teacher=settings.teacher)
    why = why or verification.why_not_verified(folder, every_byte=every_byte)
    tuned = cache["teacher"] != settings.teacher  # 02 made it, and can make it again
    if not why and tuned and any(t.parameters.get("student") == "teacher" for t in trials):
        try:
            found = loading.model_fingerprint(cache["teacher"], cache["teacher_revision"])
        except (ValueError, OSError) as error:
            return str(error)
        if found != cache["key"]["teacher"]:
            return f"the weights of {cache['teacher']} are not those that were cached"
    return why


def asked_of(stem: str, parameters: dict[str, Any]) -> provenance.Ingredients:
    """What 01 or 02 is executed with: the code, and all parameters."""
    return provenance.Ingredients(
        code=provenance.code_of(stem), parameters=notebook_config(stem, parameters).model_dump()
    )


def stage_key(
    stem: str, parameters: dict[str, Any], asked: provenance.Ingredients | None = None
) -> provenance.Ingredients:
    """What the record of 01 or 02 must name.

    Args:
        asked: `asked_of` as it was before the stage was executed: code and notebook may have been
            edited meanwhile. None: as it is now.

    Raises:
        RecordError: what the stage makes is missing.
    """
    artifact, settings = artifact_of(stem, parameters), notebook_config(stem, parameters)
    if artifact is None:
        raise RecordError(f"what {stem} writes to {settings.artifacts_dir} is missing or damaged")
    return provenance.Ingredients(asked or asked_of(stem, parameters), artifact=artifact)


def artifact_of(stem: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Identifies the prepared data and, for 02, the teacher cache; None if they are missing."""
    settings = notebook_config(stem, parameters)
    data = settings.data_path / "manifest.json"
    if not data.is_file():
        return None
    found = {"data": sha256_file(data)}
    if stem == stages.PREPARE:
        return found
    with suppress(manifest.CacheError):
        folder = manifest.find_cache(settings.artifacts, settings.name)
        cache = manifest.read_manifest(folder)
        keys = ("content_hash", "teacher", "teacher_revision", "data_hash")
        return found | {"cache": {"name": folder.name} | {key: cache.get(key, "") for key in keys}}
    return None
