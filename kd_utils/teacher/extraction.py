"""The teacher run over examples for its signals, and what the cache's manifest says about it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from kd_utils.cache.manifest import cache_code
from kd_utils.cache.writer import SignalsOf
from kd_utils.config import project_paths, stages
from kd_utils.data.prepared_data import PreparedData
from kd_utils.models import layer_pairs, output_head, signal_kinds
from kd_utils.store.files import sha256_json
from kd_utils.tokens import encoding


def cached_layers(config: stages.CacheConfig, model: torch.nn.Module) -> dict[str, list[int]]:
    """The layers, counted from 1, that the cache holds of each kind that is stored per layer."""
    total = model.config.get_text_config().num_hidden_layers  # of a model that sees pictures too
    wanted, layers = signal_kinds.kinds_of(config.signals), {}
    for name, kind in signal_kinds.SIGNAL_KINDS.items():
        if kind.captures:
            choice, count = getattr(config, f"{name}_layers", "last"), config.paired_layers
            chosen = layer_pairs.teacher_layers(choice, count, total) if name in wanted else []
            # The last hidden state gives the logits.
            layers[name] = sorted({*chosen, total}) if chosen and name == "hidden" else chosen
    return layers


def cache_header(
    config: stages.CacheConfig,
    prepared: PreparedData,
    teacher: str,
    base: str,
    tuned: str,
    model: torch.nn.Module,
    tokenizer: Any,
    accuracy: dict[str, float],
) -> dict[str, Any]:
    """What the manifest says beside its files: the ingredients (`key` decides the folder), shapes.

    Args:
        config: parameters of 02.
        prepared: the data that is cached.
        teacher: the name that `prepare_teacher` gave.
        base, tuned: `model_fingerprint` of `config.teacher` and of `teacher`, taken before they
            were loaded.
        model, tokenizer: the teacher, loaded.
        accuracy: its accuracy on the validation rows.
    """
    kinds, text = signal_kinds.kinds_of(config.signals), model.config.get_text_config()
    wanted = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    shape = {key: getattr(text, key) for key in wanted if hasattr(text, key)}
    temperatures = sorted({1.0, config.temperature}) if "log_mass" in kinds else []
    code, layers = cache_code(), cached_layers(config, model)
    fingerprint = encoding.tokenizer_fingerprint(tokenizer)
    key = {
        "data": prepared.data_hash,
        "base_teacher": config.teacher,
        "teacher": tuned,
        "tokenizer": fingerprint,
        "signals": config.signals,
        "layers": layers,
        "temperatures": temperatures,
        "attention_dtype": config.attention_dtype if "attention" in kinds else None,
        "top_k": config.top_k if "top_logits" in kinds else None,
        "teacher_dtype": str(model.dtype),
        "shard_examples": config.shard_examples,
        "code": sha256_json(code),
        "max_new_tokens": config.max_new_tokens,  # the teacher's accuracy depends on it
    }
    specific: dict[str, Any] = {"top_k": config.top_k} if "top_logits" in kinds else {}
    if "hidden" in kinds:
        head = output_head.output_head(model)
        specific |= {
            "hidden_size": shape["hidden_size"],
            "heads": shape["num_attention_heads"],
            "head": {"scale": head.scale, "cap": head.cap},
        }
    folder = project_paths.project_path(config.teacher)
    return {
        "name": config.name,
        "key": key,
        "code": code,
        "base_teacher": config.teacher,
        "base_fingerprint": base,
        "teacher": teacher,
        "teacher_revision": config.teacher_revision,
        "tokenizer_files": encoding.tokenizer_files(folder) if folder.is_dir() else {},
        "teacher_accuracy": accuracy,
        "data_hash": prepared.data_hash,
        "signals": config.signals,
        "shape": shape,
        "layers": layers,
        "tokenizer_fingerprint": fingerprint,
        "temperatures": temperatures,
        "dtypes": column_dtypes(
            config.signals, layers, shape["num_hidden_layers"], config.attention_dtype
        ),
        **specific,
    }


def signal_options(config: stages.CacheConfig, header: dict[str, Any]) -> dict[str, Any]:
    """What `signal_function` is told besides the model, from `cache_header`'s result."""
    return {
        "signals": config.signals,
        "top_k": config.top_k,
        "temperatures": header["temperatures"],
        "attention_dtype": config.attention_dtype,
        "layers": header["layers"],
    }


def column_dtypes(
    signals: str, layers: dict[str, list[int]], total: int, attention_dtype: str
) -> dict[str, str]:
    """The columns of a cache with these signals, and the types in which they are stored."""
    return {
        column: attention_dtype if kind.name == "attention" else kind.dtypes[0]
        for column, (kind, _) in signal_kinds.columns_of(signals, layers, total).items()
    }


def signal_function(
    model: torch.nn.Module,
    *,
    signals: str,
    top_k: int = 64,
    temperatures: Sequence[float] = (),
    attention_dtype: str = "float16",
    layers: dict[str, list[int]] | None = None,
) -> SignalsOf:
    """A function that runs the teacher over a batch of examples and adds the signals to cache.

    It returns as soon as the device has its work; the rows that it returns wait for the device.

    Args:
        model: the teacher, in eval mode, on its device.
        signals: what to take, as 02's parameter: "white_box" (hidden states and maps) or "top_k"
            (the largest logits and the exact mass of the rest), then names of further kinds.
        top_k: k of "top_k".
        temperatures: each T for which "top_k" keeps log sum_v exp(z_v / T): the mass of the rest is
            exact for these only.
        attention_dtype: of maps, "float16" or "uint8" (`attention_maps.encode_map`).
        layers: as `cached_layers` gives them; None: the last.

    Raises:
        ValueError: an unknown kind of signal, or a k above the size of the vocabulary.
    """
    device, text = next(model.parameters()).device, model.config.get_text_config()
    total, layers = text.num_hidden_layers, layers or {}
    columns = signal_kinds.columns_of(signals, layers, total)
    dtypes = column_dtypes(signals, layers, total, attention_dtype)
    if "top_logits" in columns and top_k > text.vocab_size:
        raise ValueError(
            f"top_k is {top_k}, and the teacher has {text.vocab_size} logits: ask for fewer"
        )
    captured = signal_kinds.captured_layers(columns.values())

    @torch.inference_mode()
    def run(batch: list[encoding.Example]) -> Iterator[encoding.Example]:
        padded, lengths = encoding.right_padded(batch)
        input_ids = torch.from_numpy(padded).to(device)
        teacher = signal_kinds.TeacherPass(
            model, input_ids, *captured, top_k, temperatures, attention_dtype
        )
        taken = [
            {
                column: kind.take(teacher, b, n, layer).to(getattr(torch, dtypes[column]))
                for column, (kind, layer) in columns.items()
            }
            for b, n in enumerate(lengths)
        ]
        # One copy per column, under way when this returns.
        flat = {c: _on_host(torch.cat([row[c].flatten() for row in taken])) for c in columns}
        copied = None if device.type != "cuda" else torch.cuda.current_stream(device).record_event()
        return _rows(batch, flat, [{c: row[c].shape for c in columns} for row in taken], copied)

    return run


def _rows(
    batch: list[encoding.Example],
    flat: dict[str, torch.Tensor],
    shapes: list[dict[str, torch.Size]],
    copied: torch.cuda.Event | None,
) -> Iterator[encoding.Example]:
    """The examples with their parts of the flat columns, as soon as these are on the host."""
    if copied:
        copied.synchronize()
    parts = {c: flat[c].split([shape[c].numel() for shape in shapes]) for c in flat}
    for b, (row, shape) in enumerate(zip(batch, shapes)):
        yield replace(row, signals={c: parts[c][b].view(shape[c]).numpy() for c in flat})


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy in page-locked memory that is under way."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def stored_lm_head(model: torch.nn.Module) -> torch.Tensor:
    """(V, d) the output layer's weight on the CPU, as the model holds it."""
    return output_head.output_head(model).weight.detach().cpu().contiguous()
