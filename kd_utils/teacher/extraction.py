"""The teacher: fine-tuned where it knows too little, fingerprinted, and run over examples for its
signals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_utils.cache.manifest import cache_code
from kd_utils.cache.shards import SignalsOf
from kd_utils.config.project_paths import project_path
from kd_utils.config.stages import CacheConfig
from kd_utils.data.prepared_data import PreparedData
from kd_utils.models.attention_maps import encode_map
from kd_utils.models.layer_pairs import column, teacher_layers
from kd_utils.models.output_head import output_head
from kd_utils.models.signals import forward_signals
from kd_utils.store.files import sha256_json
from kd_utils.tokens.encoding import (
    Example,
    right_padded,
    tokenizer_files,
    tokenizer_fingerprint,
)


def cached_layers(config: CacheConfig, model: nn.Module) -> dict[str, list[int]]:
    """The layers, counted from 1, whose "hidden" states and "attention" maps the cache is to
    hold.
    """
    if config.signals != "white_box":
        return {"hidden": [], "attention": []}
    total = model.config.get_text_config().num_hidden_layers  # of a model that sees pictures too
    chosen = {
        signal: teacher_layers(choice, config.paired_layers, total)
        for signal, choice in (
            ("hidden", config.hidden_layers),
            ("attention", config.attention_layers),
        )
    }
    return chosen | {
        "hidden": sorted({*chosen["hidden"], total})
    }  # the last one's gives the logits


def cache_header(
    config: CacheConfig,
    prepared: PreparedData,
    teacher: str,
    base: str,
    tuned: str,
    model: nn.Module,
    tokenizer: Any,
    accuracy: dict[str, float],
) -> dict[str, Any]:
    """What a manifest says besides its files: where the signals come from (`key` decides the
    folder), and shapes.

    Args:
        config: parameters of 02.
        prepared: the data that is cached.
        teacher: the name that `prepare_teacher` gave.
        base, tuned: `model_fingerprint` of the teacher as it came and of `teacher`, from before
            they were loaded.
        model, tokenizer: the teacher, loaded.
        accuracy: its accuracy on the validation rows.
    """
    white_box = config.signals == "white_box"
    wanted = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    text = model.config.get_text_config()
    shape = {key: getattr(text, key) for key in wanted if hasattr(text, key)}
    temperatures = [] if white_box else sorted({1.0, config.temperature})
    code, layers, fingerprint = (
        cache_code(),
        cached_layers(config, model),
        tokenizer_fingerprint(tokenizer),
    )
    key = {
        "data": prepared.data_hash,
        "base_teacher": config.teacher,
        "teacher": tuned,
        "tokenizer": fingerprint,
        "signals": config.signals,
        "layers": layers,
        "temperatures": temperatures,
        "attention_dtype": config.attention_dtype if white_box else None,
        "top_k": None if white_box else config.top_k,
        "teacher_dtype": str(model.dtype),
        "shard_examples": config.shard_examples,
        "code": sha256_json(code),
        "max_new_tokens": config.max_new_tokens,
    }  # with it the teacher's accuracy is measured
    specific = (
        {
            "hidden_size": shape["hidden_size"],
            "heads": shape["num_attention_heads"],
            "head": {"scale": output_head(model).scale, "cap": output_head(model).cap},
        }
        if white_box
        else {"top_k": config.top_k}
    )
    files = (
        tokenizer_files(project_path(config.teacher))
        if project_path(config.teacher).is_dir()
        else {}
    )
    return {
        "name": config.name,
        "key": key,
        "code": code,
        "base_teacher": config.teacher,
        "base_fingerprint": base,
        "teacher": teacher,
        "teacher_revision": config.teacher_revision,
        "tokenizer_files": files,
        "teacher_accuracy": accuracy,
        "data_hash": prepared.data_hash,
        "signals": config.signals,
        "shape": shape,
        "layers": layers,
        "tokenizer_fingerprint": fingerprint,
        "temperatures": temperatures,
        "dtypes": column_dtypes(layers, shape["num_hidden_layers"], config.attention_dtype),
        **specific,
    }


def column_dtypes(layers: dict[str, list[int]], total: int, attention_dtype: str) -> dict[str, str]:
    """The signals' columns of a cache and their types; no layers: those of top-k logits."""
    if not layers["hidden"]:
        return {"top_logits": "float32", "top_ids": "int32", "log_mass": "float32"}
    return {
        **{column("hidden", layer, total): "float16" for layer in reversed(layers["hidden"])},
        **{
            column("attention", layer, total): attention_dtype
            for layer in reversed(layers["attention"])
        },
    }


def signal_function(
    model: nn.Module,
    *,
    signals: str,
    top_k: int = 64,
    temperatures: Sequence[float] = (),
    attention_dtype: str = "float16",
    layers: dict[str, list[int]] | None = None,
) -> SignalsOf:
    """A function that runs the teacher over one batch of examples and fills in what the cache holds
    of each.

    It returns as soon as the device has its work; the rows that it returns wait for the device.

    Args:
        model: the teacher, in eval mode, on its device.
        signals: "white_box" for hidden states and maps, "top_k" for its largest logits and the
            exact rest.
        top_k: k of "top_k".
        temperatures: each T for which "top_k" keeps log sum_v exp(z_v / T): the rest's mass is
            exact for these only.
        attention_dtype: of "white_box" maps, "float16" or "uint8" (`signals.encode_map`).
        layers: of "white_box": as `cached_layers` gives them; None: the last.
    """
    device, map_dtype = next(model.parameters()).device, getattr(torch, attention_dtype)
    text = model.config.get_text_config()
    if signals == "top_k" and top_k > text.vocab_size:
        raise ValueError(
            f"top_k is {top_k}, and the teacher has {text.vocab_size} logits: ask for fewer"
        )
    total = text.num_hidden_layers
    layers = layers or {"hidden": [total], "attention": [total]}

    @torch.inference_mode()
    def run(batch: list[Example]) -> Iterator[Example]:
        padded, lengths = right_padded(batch)
        input_ids = torch.from_numpy(padded).to(device)
        if signals == "top_k":
            logits = model(input_ids=input_ids, use_cache=False).logits
            return _rows(
                batch, [_top_k(logits[b, :n], top_k, temperatures) for b, n in enumerate(lengths)]
            )
        output = forward_signals(
            model, input_ids, hidden_layers=layers["hidden"], map_layers=layers["attention"]
        )
        return _rows(
            batch,
            [
                {
                    **{
                        column("hidden", layer, total): hidden[b, :n].half()
                        for layer, hidden in output.layers.items()
                    },
                    **{
                        column("attention", layer, total): encode_map(
                            attention.example(b, 0, n).map()[0], map_dtype
                        )
                        for layer, attention in output.attentions.items()
                    },
                }
                for b, n in enumerate(lengths)
            ],
        )

    return run


def _rows(batch: list[Example], signals: list[dict[str, Tensor]]) -> Iterator[Example]:
    """Start copying to the host at once, one copy a column; the rows come when it is done."""
    columns = {
        name: _on_host(torch.cat([row[name].flatten() for row in signals])) for name in signals[0]
    }
    sizes = {name: [row[name].shape for row in signals] for name in signals[0]}
    device = signals[0][next(iter(columns))].device
    copied = torch.cuda.Event() if device.type == "cuda" else None
    if copied:
        copied.record(torch.cuda.current_stream(device))

    def rows() -> Iterator[Example]:
        if copied:
            copied.synchronize()
        parts = {
            name: [
                part.view(shape).numpy()
                for part, shape in zip(
                    column.split([shape.numel() for shape in sizes[name]]), sizes[name]
                )
            ]
            for name, column in columns.items()
        }
        for b, row in enumerate(batch):
            yield replace(row, signals={name: arrays[b] for name, arrays in parts.items()})

    return rows()


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor, or its copy in page-locked memory, on its way."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
        tensor, non_blocking=True
    )


def _top_k(logits: Tensor, k: int, temperatures: Sequence[float]) -> dict[str, Tensor]:
    logits = logits.float()
    top = logits.topk(k, dim=-1)
    mass = torch.stack([(logits / t).logsumexp(-1) for t in temperatures], dim=-1)
    return {"top_logits": top.values, "top_ids": top.indices.to(torch.int32), "log_mass": mass}


def stored_lm_head(model: nn.Module) -> Tensor:
    """(V, d) the output layer's weight on the CPU, as the model holds it."""
    return output_head(model).weight.detach().cpu().contiguous()
