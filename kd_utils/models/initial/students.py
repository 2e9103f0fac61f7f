"""Students: the folder of their initial weights.

Every initial student is a plain `transformers` folder, from which all trials of all machines read
the same bytes. With student_init "pretrained" it is the source's own folder. In any other way of
`initial.ways` it is made once and kept in `artifacts/initial_students/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pandas as pd

from kd_utils.config.project_paths import short_path
from kd_utils.data import hub
from kd_utils.models import loading
from kd_utils.models.importance.calibration import Calibration
from kd_utils.models.initial.ways import WAYS
from kd_utils.records.provenance import Ingredients, code_of, environment
from kd_utils.store.files import sha256_json
from kd_utils.store.locks import locked
from kd_utils.store.sealed import SealedFolder
from kd_utils.tokens.encoding import Example, tokenizer_fingerprint

if TYPE_CHECKING:
    from kd_utils.config.trial import TrialConfig


class Cache(Protocol):
    """What is read of a teacher cache (`cache.teacher_cache.TeacherCache`)."""

    manifest: dict[str, Any]

    def unit_sums(self) -> pd.DataFrame | None: ...


class StudentSource(NamedTuple):
    """Where a student comes from.

    Attributes:
        name, revision: the model that the parameter `student` names.
        fingerprint: of that model's content.
        folder, folder_revision: where the initial weights are: a folder, or the hub's model.
        initial: fingerprint of the initial student's content.
    """

    name: str
    revision: str
    fingerprint: str
    folder: str
    folder_revision: str
    initial: str


def student_source(
    config: TrialConfig, cache: Cache, tokenizer: Any, training_rows: list[Example]
) -> StudentSource:
    """The model that the parameter `student` names, and the initial student that is made of it.

    An initial student that does not exist yet is made; other trials that need it wait meanwhile.

    Args:
        cache: the trial's teacher cache, whose teacher is what "teacher" names.
        tokenizer: the student's, which is written beside the weights.
        training_rows: in the student's tokens; a cut may depend on them.

    Raises:
        ValueError: the teacher's weights changed after they were cached, the student cannot be made
            in this way, or a file of an initial student changed after it was written.
    """
    name, revision, manifest = config.student, "", cache.manifest
    if config.student == "teacher":
        name, revision = manifest["teacher"], manifest["teacher_revision"]
    fingerprint = loading.model_fingerprint(name, revision)
    if config.student == "teacher" and fingerprint != manifest["key"]["teacher"]:
        raise ValueError(
            f"the weights of {name} are not those that were cached: run 02_cache_teacher again"
        )
    if config.student_init == "pretrained":
        return StudentSource(name, revision, fingerprint, name, revision, fingerprint)
    way, settings = WAYS[config.student_init], config.initial_settings
    made_from = Ingredients(
        source={"fingerprint": fingerprint},
        config={"student_init": config.student_init, **settings},
        tokenizer={"fingerprint": tokenizer_fingerprint(tokenizer)},
        code=_code(),
    )
    if way.reads_rows({*settings.values()}):
        # Rows without a label have the teacher's answers, and sums are those of the cache's pass.
        made_from["rows"] = {"cache": sha256_json(manifest["key"])}
    parts = [
        f"{key.partition('keep_')[2]}{value}" for key, value in settings.items() if value != "all"
    ]
    label = (Path(name).name[:80], config.student_init, *parts, made_from.digest)
    place = config.artifacts / "initial_students" / "-".join(map(str, label))
    folder = SealedFolder(
        place,
        "initial_student.json",
        label=f"{place.parent.name}/{place.name}",
        remedy="remove this folder, then the next trial makes it again",
    )
    if not place.exists():
        rows = Calibration(manifest["key"]["teacher"], cache.unit_sums, training_rows)
        build = partial(way.build, name, revision, rows, **settings)
        document = {"made_from": made_from, "source": name, "versions": environment()["versions"]}
        _make(folder, document, tokenizer, build)
    initial = hub.fingerprint_of(folder.check("config.json")["checksums"])
    return StudentSource(name, revision, fingerprint, short_path(place), "", initial)


def require_possible(trials: Sequence[TrialConfig], teacher: str, revision: str = "") -> None:
    """Refuse initial students that no trial could make, by the configs of their sources alone.

    Args:
        teacher, revision: what the trials' `student` "teacher" is, or is tuned from.

    Raises:
        ValueError: sizes that are not possible, with the trial's name.
    """
    for trial in trials:
        of_earlier_round = trial.cuts > 1 and trial.round > 1  # its source is not there yet
        if trial.student_init in ("pretrained", "layers") or of_earlier_round:
            continue
        name = (teacher, revision) if trial.student == "teacher" else (trial.student, "")
        try:
            source = loading.load_pretrained("AutoConfig", name[0], ("*.json",), name[1])
        except (OSError, ValueError):
            continue  # perhaps not on this machine; the trial says what is missing
        try:
            WAYS[trial.student_init].config(source, **trial.initial_settings)
        except ValueError as error:
            raise ValueError(f"{trial.trial_name}: {error}") from None


def _make(
    folder: SealedFolder, document: dict[str, Any], tokenizer: Any, build: Callable[[], Any]
) -> None:
    """Write an initial student, unless another process does so first: then wait until it is done.

    The lock is beside the folder, which appears as a whole.
    """
    lock = folder.path.with_name(f".{folder.path.name}.lock")
    with locked(lock, "a trial that makes this student", wait=True):
        if not folder.path.exists():
            with folder.replaced(document) as aside:
                loading.write_model(build(), tokenizer, aside)


def _code() -> dict[str, str]:
    """Digests of the code that makes initial students."""
    stem = "03_train_student"
    code = code_of(stem, {"models.initial.ways"})
    del code[f"notebooks/{stem}.ipynb"]  # which only reads them
    return code
