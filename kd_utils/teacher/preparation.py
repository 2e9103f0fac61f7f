"""The teacher: fine-tuned where it knows too little, fingerprinted, and run over examples for its
signals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import torch

from kd_utils.cache.manifest import cache_code
from kd_utils.config.project_paths import project_path
from kd_utils.config.stages import CacheConfig
from kd_utils.data.prepared_data import remove_leftovers
from kd_utils.models.devices import autocast, choose_device
from kd_utils.models.loading import (
    load_causal_lm,
    load_tokenizer,
    model_fingerprint,
    save_model,
)
from kd_utils.models.output_head import require_known_head
from kd_utils.store.files import sha256_file, sha256_json, written_folder
from kd_utils.store.locks import locked
from kd_utils.store.sealed import RecordError, read_sealed, write_sealed
from kd_utils.teacher.fine_tuning import fine_tune
from kd_utils.tokens.encoding import (
    Example,
    right_padded,
)


def prepare_teacher(
    config: CacheConfig,
    train: list[Example],
    data_hash: str,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[str, pd.DataFrame]:
    """The teacher's folder or hub name, fine-tuned on the training rows first if `teacher_epochs`
    is above 0.

    A fine-tuned teacher is kept in `artifacts/teachers/NAME-KEY` and used again while nothing that
    it was made from changes, and no byte of it.

    Args:
        config: parameters of 02.
        train: the training rows as tokens, just as they will be cached.
        data_hash: of the prepared data.
        progress: wraps the list of steps, e.g. `tqdm`.

    Returns:
        Its name, relative to the project's root where it is a folder, and `fine_tune`'s table, a
        row per epoch.

    Raises:
        ValueError: another process is fine-tuning this teacher.
    """
    history = pd.DataFrame({"epoch": [], "train_loss": []})
    if config.teacher_epochs == 0:
        return config.teacher, history
    tuning = (
        "teacher_epochs",
        "teacher_learning_rate",
        "teacher_batch_size",
        "teacher_prompt_weight",
        "teacher_seed",
        "precision",
    )
    key = sha256_json(
        {
            "base": model_fingerprint(config.teacher, config.teacher_revision),
            "data": data_hash,
            "code": sha256_json(cache_code()),
            **{name: getattr(config, name) for name in tuning},
        }
    )[:8]
    name = f"{config.artifacts_dir}/teachers/{config.name}-{key}"
    folder = project_path(name)
    lock = folder.with_name(
        f".{folder.name}.lock"
    )  # not in the folder, which is replaced as a whole
    with locked(lock, "a fine-tuning"):
        remove_leftovers(folder)
        return name, pd.DataFrame(
            _kept_history(folder) or _fine_tuned(config, train, folder, progress)
        )


def _kept_history(folder: Path) -> list[dict[str, float]] | None:
    """The history of a fine-tuned teacher whose files are those that were written; else None."""
    try:
        written = read_sealed(folder / "fine_tuning.json", "checksums")
        files = {
            name: sha256_file(folder / name) for name in written["checksums"] if name != "sha256"
        }
    except (RecordError, OSError):
        return None
    return written["history"] if files.items() <= written["checksums"].items() else None


def _fine_tuned(
    config: CacheConfig, train: list[Example], folder: Path, progress: Callable
) -> list[dict[str, float]]:
    device = choose_device(config.device)
    tokenizer = load_tokenizer(config.teacher, config.teacher_revision)
    model = load_causal_lm(config.teacher, config.teacher_revision).to(device)
    require_known_head(model, torch.from_numpy(right_padded(train[:8])[0]).to(device))
    rows = fine_tune(
        model,
        train,
        epochs=config.teacher_epochs,
        learning_rate=config.teacher_learning_rate,
        batch_size=config.teacher_batch_size,
        prompt_weight=config.teacher_prompt_weight,
        seed=config.teacher_seed,
        autocast=lambda: autocast(device, config.precision),
        device=device,
        progress=progress,
    )
    with written_folder(folder) as aside:
        save_model(model, tokenizer, aside)
        checksums = {
            str(path.relative_to(aside)): sha256_file(path)
            for path in sorted(aside.rglob("*"))
            if path.is_file()
        }
        write_sealed(
            aside / "fine_tuning.json", {"history": rows, "checksums": checksums}, "checksums"
        )
    return rows
