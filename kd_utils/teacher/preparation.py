"""The teacher's weights: as they are in their folder or on the hub, or fine-tuned first."""

from collections.abc import Callable, Iterable

import pandas as pd
import torch

from kd_utils.cache.manifest import cache_code
from kd_utils.config.project_paths import project_path
from kd_utils.config.stages import CacheConfig
from kd_utils.models.devices import autocast, choose_device
from kd_utils.models.loading import load_causal_lm, load_tokenizer, model_fingerprint, save_model
from kd_utils.models.output_head import require_known_head
from kd_utils.records.provenance import Ingredients
from kd_utils.store.files import remove_leftovers
from kd_utils.store.locks import locked
from kd_utils.store.sealed import RecordError, SealedFolder
from kd_utils.teacher.fine_tuning import fine_tune
from kd_utils.tokens.encoding import Example, right_padded

#: Parameters of 02 that decide a fine-tuned teacher.
TUNING = {
    "teacher_epochs",
    "teacher_learning_rate",
    "teacher_batch_size",
    "teacher_prompt_weight",
    "teacher_seed",
    "precision",
}


def prepare_teacher(
    config: CacheConfig,
    train: list[Example],
    data_hash: str,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[str, pd.DataFrame]:
    """Fine-tune the teacher on the training rows if `teacher_epochs` is above 0.

    A fine-tuned teacher is kept in `artifacts/teachers/NAME-DIGEST`. It is used again while nothing
    that it was made from changes, and no byte of it.

    Args:
        config: parameters of 02.
        train: the training rows as tokens, exactly as they will be cached.
        data_hash: of the prepared data.
        progress: wraps the list of steps, e.g. `tqdm`.

    Returns:
        The teacher's name, relative to the project's root if it is a folder, and the table of
        `fine_tune`, a row per epoch.

    Raises:
        ValueError: another process is fine-tuning this teacher.
    """
    if config.teacher_epochs == 0:
        return config.teacher, pd.DataFrame({"epoch": [], "train_loss": []})
    made_from = Ingredients(
        teacher={"weights": model_fingerprint(config.teacher, config.teacher_revision)},
        data={"rows": data_hash},
        config=config.model_dump(include=TUNING),
        code=cache_code(),
    )
    name = f"{config.artifacts_dir}/teachers/{config.name}-{made_from.digest}"
    sealed = SealedFolder(project_path(name), "fine_tuning.json")
    # The lock is beside the folder, which is replaced as a whole.
    with locked(sealed.path.with_name(f".{sealed.path.name}.lock"), "a fine-tuning"):
        remove_leftovers(sealed.path)
        try:
            history = sealed.check()["history"]
        except RecordError:
            history = _fine_tuned(config, train, sealed, progress)
    return name, pd.DataFrame(history)


def _fine_tuned(
    config: CacheConfig, train: list[Example], sealed: SealedFolder, progress: Callable
) -> list[dict[str, float]]:
    device = choose_device(config.device)
    tokenizer = load_tokenizer(config.teacher, config.teacher_revision)
    model = load_causal_lm(config.teacher, config.teacher_revision).to(device)
    require_known_head(model, torch.from_numpy(right_padded(train[:8])[0]).to(device))
    history = fine_tune(
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
    with sealed.replaced({"history": history}) as aside:
        save_model(model, tokenizer, aside)
    return history
