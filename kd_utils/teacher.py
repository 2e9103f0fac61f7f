"""The teacher: fine-tuned where it knows too little, fingerprinted, and run over examples for its signals."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .cache import CachedExample
from .config import CacheConfig, resolve
from .data import PreparedData
from .files import sha256_file, sha256_json, write_json
from .signals import forward_signals, lm_head_weight, pack_causal, require_linear_head
from .student import autocast, choose_device, load_causal_lm, load_tokenizer, model_source, save_model
from .tokens import encode_example
from .training import fine_tune, right_padded


def encode_table(tokenizer: Any, table: pd.DataFrame) -> list[CachedExample]:
    """Each prepared row as tokens: prompt, answer, end token; its signals still to come."""
    pairs = [encode_example(tokenizer, prompt, answer) for prompt, answer in zip(table["prompt"], table["answer"])]
    return [CachedExample(example_id, np.asarray(prompt + answer, np.int32), len(prompt))
            for example_id, (prompt, answer) in zip(table["example_id"], pairs)]


def model_fingerprint(name: str, revision: str = "") -> str:
    """What a model is, by content: a digest of a folder's weights and config, or the hub's commit.

    Raises:
        FileNotFoundError: a folder without safetensors.
    """
    source = model_source(name)
    if source == name and not Path(source).is_dir():
        from transformers.utils import cached_file

        # The hub's local copy is .../snapshots/COMMIT/config.json
        return f"{name}@{Path(cached_file(name, 'config.json', revision=revision or 'main')).parent.name}"
    files = sorted([*Path(source).glob("*.safetensors"), Path(source) / "config.json"])
    if len(files) < 2:
        raise FileNotFoundError(f"{name} holds no *.safetensors: save the model with `save_pretrained`")
    return sha256_json({path.name: sha256_file(path) for path in files})


def prepare_teacher(config: CacheConfig, train: list[CachedExample], data_hash: str,
                    progress: Callable[[Iterable], Iterable] = iter) -> tuple[str, pd.DataFrame]:
    """The teacher's folder or hub name, fine-tuned on the training rows first if `teacher_epochs` is above 0.

    A fine-tuned teacher is kept in `artifacts/teachers/NAME-KEY` and used again while nothing that it was made from
    changes.

    Args:
        config: parameters of 02.
        train: the training rows as tokens, just as they will be cached.
        data_hash: of the prepared data.
        progress: wraps the list of steps, e.g. `tqdm`.

    Returns:
        Its name, relative to the project's root where it is a folder, and `fine_tune`'s table, a row per epoch.
    """
    history = pd.DataFrame({"epoch": [], "train_loss": []})
    if config.teacher_epochs == 0:
        return config.teacher, history
    tuning = ("teacher_epochs", "teacher_learning_rate", "teacher_batch_size", "teacher_prompt_weight", "teacher_seed",
              "precision")
    key = sha256_json({"base": model_fingerprint(config.teacher, config.teacher_revision), "data": data_hash,
                       **{name: getattr(config, name) for name in tuning}})[:8]
    name = f"{config.artifacts_dir}/teachers/{config.name}-{key}"
    if not (resolve(name) / "fine_tuning.json").is_file():
        rows = _fine_tuned(config, train, resolve(name), progress)
    else:
        rows = pd.read_json(resolve(name) / "fine_tuning.json").to_dict("records")
    return name, pd.DataFrame(rows)


def _fine_tuned(config: CacheConfig, train: list[CachedExample], folder: Path,
                progress: Callable) -> list[dict[str, float]]:
    device = choose_device(config.device)
    tokenizer = load_tokenizer(config.teacher, config.teacher_revision)
    model = load_causal_lm(config.teacher, config.teacher_revision).to(device)
    require_linear_head(model, torch.from_numpy(right_padded(train[:8])[0]).to(device))
    rows = fine_tune(model, train, epochs=config.teacher_epochs,
                     learning_rate=config.teacher_learning_rate, batch_size=config.teacher_batch_size,
                     prompt_weight=config.teacher_prompt_weight, seed=config.teacher_seed,
                     autocast=lambda: autocast(device, config.precision), device=device, progress=progress)
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    save_model(model, tokenizer, aside)
    write_json(aside / "fine_tuning.json", rows)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return rows


def cache_header(config: CacheConfig, prepared: PreparedData, teacher: str, model: nn.Module,
                 accuracy: dict[str, float]) -> dict[str, Any]:
    """What a manifest says besides its files: where the signals come from (`key` decides the folder), and shapes.

    Args:
        config: parameters of 02.
        prepared: the data that is cached.
        teacher: the name that `prepare_teacher` gave.
        model: the teacher, loaded.
        accuracy: its accuracy on the validation rows.
    """
    white_box = config.signals == "white_box"
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    shape = {key: getattr(model.config, key) for key in wanted if hasattr(model.config, key)}
    temperatures = [] if white_box else sorted({1.0, config.temperature})
    key = {"data": prepared.data_hash, "base_teacher": config.teacher,
           "teacher": model_fingerprint(teacher, config.teacher_revision),
           "tokenizer": prepared.tokenizer_fingerprint, "signals": config.signals, "temperatures": temperatures,
           "top_k": None if white_box else config.top_k, "teacher_dtype": str(model.dtype),
           "shard_examples": config.shard_examples}
    specific = ({"hidden_size": shape["hidden_size"], "heads": shape["num_attention_heads"], "dtype": "float16"}
                if white_box else {"top_k": config.top_k, "dtype": "float32"})
    return {"name": config.name, "key": key, "base_teacher": config.teacher,
            "teacher": teacher, "teacher_revision": config.teacher_revision,
            "teacher_accuracy": accuracy, "data_hash": prepared.data_hash, "signals": config.signals, "shape": shape,
            "tokenizer_fingerprint": prepared.tokenizer_fingerprint, "temperatures": temperatures, **specific}


def signal_function(model: nn.Module, *, signals: str, top_k: int,
                    temperatures: list[float]) -> Callable[[list[CachedExample]], list[CachedExample]]:
    """A function that runs the teacher over one batch of examples and fills in what the cache holds of each.

    Args:
        model: the teacher, in eval mode, on its device.
        signals: "white_box" for hidden states and maps, "top_k" for its largest logits and the exact rest.
        top_k: k of "top_k".
        temperatures: each T for which "top_k" keeps log sum_v exp(z_v / T): the rest's mass is exact for these only.
    """
    device = next(model.parameters()).device

    @torch.inference_mode()
    def run(batch: list[CachedExample]) -> list[CachedExample]:
        padded, lengths = right_padded(batch)
        input_ids = torch.from_numpy(padded).to(device)
        if signals == "top_k":
            logits = model(input_ids=input_ids, use_cache=False).logits
            return [replace(row, **_top_k(logits[b, :lengths[b]], top_k, temperatures)) for b, row in enumerate(batch)]
        output = forward_signals(model, input_ids)
        return [replace(row, hidden=_half(output.hidden[b, :n]), attention=_packed(output.attention_map[b], n))
                for b, (row, n) in enumerate(zip(batch, lengths))]

    return run


def _half(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float16).cpu().numpy()


def _packed(maps: Tensor, length: int) -> np.ndarray:
    return _half(pack_causal(maps, length))


def _top_k(logits: Tensor, k: int, temperatures: list[float]) -> dict[str, np.ndarray]:
    logits = logits.float()
    top = logits.topk(k, dim=-1)
    mass = torch.stack([(logits / t).logsumexp(-1) for t in temperatures], dim=-1)
    return {"top_logits": top.values.cpu().numpy(), "top_ids": top.indices.to(torch.int32).cpu().numpy(),
            "log_mass": mass.cpu().numpy()}


def stored_lm_head(model: nn.Module) -> Tensor:
    """(V, d) the output layer's weight on the CPU, as the model holds it."""
    return lm_head_weight(model).detach().cpu().contiguous()
