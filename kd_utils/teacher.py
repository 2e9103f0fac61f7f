"""The teacher: fine-tuned where it knows too little, fingerprinted, and run over examples for its signals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .batches import right_padded
from .cache import CachedExample, cache_code
from .cache_writer import SignalsOf, held
from .config import CacheConfig, resolve
from .data import PreparedData, remove_leftovers
from .files import sha256_file, sha256_json, written_folder
from .fine_tuning import fine_tune
from .hub import hub_folder
from .layers import column, teacher_layers
from .sealed import RecordError, read_sealed, write_sealed
from .heads import output_head, require_known_head
from .signals import encode_map, forward_signals
from .student import autocast, choose_device, load_causal_lm, load_tokenizer, model_source, save_model
from .tokens import encode_example, tokenizer_files, tokenizer_fingerprint
from .vocabulary import Vocabulary, byte_ends


def encode_table(tokenizer: Any, table: pd.DataFrame, where: str = "the table", *,
                 vocabulary: Vocabulary | None = None) -> list[CachedExample]:
    """Each prepared row as tokens: prompt, answer, end token; its signals still to come.

    Args:
        vocabulary: the tokenizer's: then each row has `ends` too (none where the tokens do not spell the text).

    Raises:
        ValueError: names `where` and the row that this tokenizer cannot encode.
    """
    rows = []
    for example_id, prompt, answer in zip(table["example_id"], table["prompt"], table["answer"]):
        try:
            prompt_ids, answer_ids = encode_example(tokenizer, prompt, answer)
        except ValueError as error:
            raise ValueError(f"{where}, row {example_id}: {error}") from None
        if not prompt_ids:
            raise ValueError(f"{where}, row {example_id}: this tokenizer has no token for its prompt {prompt[:40]!r}: "
                             "leave the row out, or choose another tokenizer")
        ids, ends = prompt_ids + answer_ids, None
        if vocabulary is not None:
            try:
                ends = byte_ends(tokenizer, vocabulary, prompt + answer, ids)
            except ValueError:  # of use to a student with the same tokens only, who needs no ends
                ends = np.zeros(0, np.int32)
        rows.append(CachedExample(example_id, np.asarray(ids, np.int32), len(prompt_ids), ends))
    return rows


def model_fingerprint(name: str, revision: str = "") -> str:
    """What a model is, by content: a digest of a folder's weights and configs, or the hub's commit.

    Take it before the model is loaded: what was made of one that is replaced meanwhile must not bear the new one's.

    Raises:
        FileNotFoundError: a folder without safetensors.
    """
    source = model_source(name)
    if not Path(source).is_dir():
        return f"{name}@{hub_folder(name, ['config.json'], revision=revision).name}"  # .../snapshots/COMMIT
    files = sorted([*Path(source).glob("*.safetensors"), Path(source) / "config.json"])
    if len(files) < 2:
        raise FileNotFoundError(f"{name} holds no *.safetensors: save the model with `save_pretrained`")
    files += Path(source).glob("generation_config.json")  # a repetition penalty in it changes generated answers
    return sha256_json({path.name: sha256_file(path) for path in files})


def prepare_teacher(config: CacheConfig, train: list[CachedExample], data_hash: str,
                    progress: Callable[[Iterable], Iterable] = iter) -> tuple[str, pd.DataFrame]:
    """The teacher's folder or hub name, fine-tuned on the training rows first if `teacher_epochs` is above 0.

    A fine-tuned teacher is kept in `artifacts/teachers/NAME-KEY` and used again while nothing that it was made from
    changes, and no byte of it.

    Args:
        config: parameters of 02.
        train: the training rows as tokens, just as they will be cached.
        data_hash: of the prepared data.
        progress: wraps the list of steps, e.g. `tqdm`.

    Returns:
        Its name, relative to the project's root where it is a folder, and `fine_tune`'s table, a row per epoch.

    Raises:
        ValueError: another process is fine-tuning this teacher.
    """
    history = pd.DataFrame({"epoch": [], "train_loss": []})
    if config.teacher_epochs == 0:
        return config.teacher, history
    tuning = ("teacher_epochs", "teacher_learning_rate", "teacher_batch_size", "teacher_prompt_weight", "teacher_seed",
              "precision")
    key = sha256_json({"base": model_fingerprint(config.teacher, config.teacher_revision), "data": data_hash,
                       "code": sha256_json(cache_code()), **{name: getattr(config, name) for name in tuning}})[:8]
    name = f"{config.artifacts_dir}/teachers/{config.name}-{key}"
    folder = resolve(name)
    lock = folder.with_name(f".{folder.name}.lock")  # not in the folder, which is replaced as a whole
    with held(lock, "a fine-tuning"):
        remove_leftovers(folder)
        return name, pd.DataFrame(_kept_history(folder) or _fine_tuned(config, train, folder, progress))


def _kept_history(folder: Path) -> list[dict[str, float]] | None:
    """The history of a fine-tuned teacher whose files are those that were written; else None."""
    try:
        written = read_sealed(folder / "fine_tuning.json", "checksums")
        files = {name: sha256_file(folder / name) for name in written["checksums"] if name != "sha256"}
    except (RecordError, OSError):
        return None
    return written["history"] if files.items() <= written["checksums"].items() else None


def _fine_tuned(config: CacheConfig, train: list[CachedExample], folder: Path,
                progress: Callable) -> list[dict[str, float]]:
    device = choose_device(config.device)
    tokenizer = load_tokenizer(config.teacher, config.teacher_revision)
    model = load_causal_lm(config.teacher, config.teacher_revision).to(device)
    require_known_head(model, torch.from_numpy(right_padded(train[:8])[0]).to(device))
    rows = fine_tune(model, train, epochs=config.teacher_epochs,
                     learning_rate=config.teacher_learning_rate, batch_size=config.teacher_batch_size,
                     prompt_weight=config.teacher_prompt_weight, seed=config.teacher_seed,
                     autocast=lambda: autocast(device, config.precision), device=device, progress=progress)
    with written_folder(folder) as aside:
        save_model(model, tokenizer, aside)
        checksums = {str(path.relative_to(aside)): sha256_file(path)
                     for path in sorted(aside.rglob("*")) if path.is_file()}
        write_sealed(aside / "fine_tuning.json", {"history": rows, "checksums": checksums}, "checksums")
    return rows


def cached_layers(config: CacheConfig, model: nn.Module) -> dict[str, list[int]]:
    """The layers, counted from 1, whose "hidden" states and "attention" maps the cache is to hold."""
    if config.signals != "white_box":
        return {"hidden": [], "attention": []}
    total = model.config.get_text_config().num_hidden_layers  # of a model that sees pictures too
    chosen = {signal: teacher_layers(choice, config.paired_layers, total) for signal, choice in (
        ("hidden", config.hidden_layers), ("attention", config.attention_layers))}
    return chosen | {"hidden": sorted({*chosen["hidden"], total})}  # the last one's gives the logits


def cache_header(config: CacheConfig, prepared: PreparedData, teacher: str, base: str, tuned: str, model: nn.Module,
                 tokenizer: Any, accuracy: dict[str, float]) -> dict[str, Any]:
    """What a manifest says besides its files: where the signals come from (`key` decides the folder), and shapes.

    Args:
        config: parameters of 02.
        prepared: the data that is cached.
        teacher: the name that `prepare_teacher` gave.
        base, tuned: `model_fingerprint` of the teacher as it came and of `teacher`, from before they were loaded.
        model, tokenizer: the teacher, loaded.
        accuracy: its accuracy on the validation rows.
    """
    white_box = config.signals == "white_box"
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    text = model.config.get_text_config()
    shape = {key: getattr(text, key) for key in wanted if hasattr(text, key)}
    temperatures = [] if white_box else sorted({1.0, config.temperature})
    code, layers, fingerprint = cache_code(), cached_layers(config, model), tokenizer_fingerprint(tokenizer)
    key = {"data": prepared.data_hash, "base_teacher": config.teacher, "teacher": tuned, "tokenizer": fingerprint,
           "signals": config.signals, "layers": layers, "temperatures": temperatures,
           "attention_dtype": config.attention_dtype if white_box else None,
           "top_k": None if white_box else config.top_k, "teacher_dtype": str(model.dtype),
           "shard_examples": config.shard_examples, "code": sha256_json(code),
           "max_new_tokens": config.max_new_tokens}  # with it the teacher's accuracy is measured
    specific = ({"hidden_size": shape["hidden_size"], "heads": shape["num_attention_heads"],
                 "head": {"scale": output_head(model).scale, "cap": output_head(model).cap}} if white_box else
                {"top_k": config.top_k})
    files = tokenizer_files(resolve(config.teacher)) if resolve(config.teacher).is_dir() else {}
    return {"name": config.name, "key": key, "code": code, "base_teacher": config.teacher, "base_fingerprint": base,
            "teacher": teacher, "teacher_revision": config.teacher_revision, "tokenizer_files": files,
            "teacher_accuracy": accuracy, "data_hash": prepared.data_hash, "signals": config.signals, "shape": shape,
            "layers": layers, "tokenizer_fingerprint": fingerprint, "temperatures": temperatures,
            "dtypes": column_dtypes(layers, shape["num_hidden_layers"], config.attention_dtype), **specific}


def column_dtypes(layers: dict[str, list[int]], total: int, attention_dtype: str) -> dict[str, str]:
    """The signals' columns of a cache and their types; no layers: those of top-k logits."""
    if not layers["hidden"]:
        return {"top_logits": "float32", "top_ids": "int32", "log_mass": "float32"}
    return {**{column("hidden", layer, total): "float16" for layer in reversed(layers["hidden"])},
            **{column("attention", layer, total): attention_dtype for layer in reversed(layers["attention"])}}


def signal_function(model: nn.Module, *, signals: str, top_k: int = 64, temperatures: Sequence[float] = (),
                    attention_dtype: str = "float16", layers: dict[str, list[int]] | None = None) -> SignalsOf:
    """A function that runs the teacher over one batch of examples and fills in what the cache holds of each.

    It returns as soon as the device has its work; the rows that it returns wait for the device.

    Args:
        model: the teacher, in eval mode, on its device.
        signals: "white_box" for hidden states and maps, "top_k" for its largest logits and the exact rest.
        top_k: k of "top_k".
        temperatures: each T for which "top_k" keeps log sum_v exp(z_v / T): the rest's mass is exact for these only.
        attention_dtype: of "white_box" maps, "float16" or "uint8" (`signals.encode_map`).
        layers: of "white_box": as `cached_layers` gives them; None: the last.
    """
    device, map_dtype = next(model.parameters()).device, getattr(torch, attention_dtype)
    text = model.config.get_text_config()
    if signals == "top_k" and top_k > text.vocab_size:
        raise ValueError(f"top_k is {top_k}, and the teacher has {text.vocab_size} logits: ask for fewer")
    total = text.num_hidden_layers
    layers = layers or {"hidden": [total], "attention": [total]}

    @torch.inference_mode()
    def run(batch: list[CachedExample]) -> Iterator[CachedExample]:
        padded, lengths = right_padded(batch)
        input_ids = torch.from_numpy(padded).to(device)
        if signals == "top_k":
            logits = model(input_ids=input_ids, use_cache=False).logits
            return _rows(batch, [_top_k(logits[b, :n], top_k, temperatures) for b, n in enumerate(lengths)])
        output = forward_signals(model, input_ids, hidden_layers=layers["hidden"], map_layers=layers["attention"])
        return _rows(batch, [{
            **{column("hidden", layer, total): hidden[b, :n].half() for layer, hidden in output.layers.items()},
            **{column("attention", layer, total): encode_map(attention.example(b, 0, n).map()[0], map_dtype)
               for layer, attention in output.attentions.items()}} for b, n in enumerate(lengths)])

    return run


def _rows(batch: list[CachedExample], signals: list[dict[str, Tensor]]) -> Iterator[CachedExample]:
    """Start copying to the host at once, one copy a column; the rows come when it is done."""
    columns = {name: _on_host(torch.cat([row[name].flatten() for row in signals])) for name in signals[0]}
    sizes = {name: [row[name].shape for row in signals] for name in signals[0]}
    device = signals[0][next(iter(columns))].device
    copied = torch.cuda.Event() if device.type == "cuda" else None
    if copied:
        copied.record(torch.cuda.current_stream(device))

    def rows() -> Iterator[CachedExample]:
        if copied:
            copied.synchronize()
        parts = {name: [part.view(shape).numpy() for part, shape in
                        zip(column.split([shape.numel() for shape in sizes[name]]), sizes[name])]
                 for name, column in columns.items()}
        for b, row in enumerate(batch):
            yield replace(row, signals={name: arrays[b] for name, arrays in parts.items()})

    return rows()


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor, or its copy in page-locked memory, on its way."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _top_k(logits: Tensor, k: int, temperatures: Sequence[float]) -> dict[str, Tensor]:
    logits = logits.float()
    top = logits.topk(k, dim=-1)
    mass = torch.stack([(logits / t).logsumexp(-1) for t in temperatures], dim=-1)
    return {"top_logits": top.values, "top_ids": top.indices.to(torch.int32), "log_mass": mass}


def stored_lm_head(model: nn.Module) -> Tensor:
    """(V, d) the output layer's weight on the CPU, as the model holds it."""
    return output_head(model).weight.detach().cpu().contiguous()
