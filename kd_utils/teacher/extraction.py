"""The teacher run over examples for its signals, and what the cache's manifest says about it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from kd_utils.cache.manifest import cache_code
from kd_utils.config import project_paths, stages
from kd_utils.data.prepared_data import PreparedData
from kd_utils.models import devices, layer_pairs, output_head, signal_kinds
from kd_utils.models.importance.sums import UnitSums, new_sums
from kd_utils.models.signals import attention_modules, layer_count, size_of
from kd_utils.records import provenance
from kd_utils.store.files import sha256_json
from kd_utils.tokens import encoding

#: What the manifest says of the teacher's shape, by the names that `transformers` uses.
SHAPE = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()


def cached_layers(config: stages.CacheConfig, model: torch.nn.Module) -> dict[str, list[int]]:
    """The layers, counted from 1, that the cache holds of each kind that is stored per layer.

    Args:
        model: the teacher, or one of its kind on the `meta` device.

    Raises:
        ValueError: it has no maps, or no such layers.
    """
    total = layer_count(model)
    wanted, layers = signal_kinds.kinds_of(config.signals), {}
    for name, kind in signal_kinds.SIGNAL_KINDS.items():
        if kind.captures:
            choice, count = getattr(config, f"{name}_layers", "last"), config.paired_layers
            chosen = layer_pairs.teacher_layers(choice, count, total) if name in wanted else []
            # The last hidden state gives the logits.
            layers[name] = sorted({*chosen, total}) if chosen and name == "hidden" else chosen
            if chosen and kind.captures == "map":
                attention_modules(model, chosen)
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
        teacher: the name that `prepare_teacher` gave.
        base, tuned: `model_fingerprint` of `config.teacher` and of `teacher`, taken before they
            were loaded.
        model, tokenizer: the teacher, loaded.
        accuracy: of the teacher on validation and held-out rows (`scoring.accuracies`); beside it
            the manifest says of how many rows: `held_out_rows/TASK`.
    """
    kinds = signal_kinds.kinds_of(config.signals)
    sizes = {name: size_of(model.config, name) for name in SHAPE}
    shape = {name: size for name, size in sizes.items() if size is not None}
    temperatures = sorted({1.0, config.temperature}) if "log_mass" in kinds else []
    code, layers = cache_code(), cached_layers(config, model)
    provenance.require_loaded(code)
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
        # What the teacher answers depends on these: its accuracy, and rows without a label.
        "max_new_tokens": config.max_new_tokens,
        "eval_batch_size": None if model.dtype == torch.float32 else config.eval_batch_size,
        "student_tokenizer": prepared.tokenizer_fingerprint,
        "max_length": prepared.max_length,
    }
    columns = signal_kinds.columns_of(
        config.signals, layers, shape["num_hidden_layers"], config.attention_dtype
    )
    specific: dict[str, Any] = {"top_k": config.top_k} if "top_logits" in kinds else {}
    if "hidden" in kinds:
        head = output_head.output_head(model)
        specific |= {
            "hidden_size": shape["hidden_size"],
            "head": {"scale": head.scale, "cap": head.cap}
            | ({} if head.bias is None else {"bias": True}),
        }
    if "attention" in kinds:
        specific["heads"] = shape["num_attention_heads"]
    folder = project_paths.project_path(config.teacher)
    counted = prepared.held_out["task"].value_counts(sort=False)
    held_out_rows = {f"held_out_rows/{task}": int(count) for task, count in counted.items()}
    return {
        "name": config.name,
        "key": key,
        "code": code,
        "base_teacher": config.teacher,
        "base_fingerprint": base,
        "teacher": teacher,
        "teacher_revision": config.teacher_revision,
        "tokenizer_files": encoding.tokenizer_files(folder) if folder.is_dir() else {},
        "teacher_accuracy": accuracy | held_out_rows,
        "data_hash": prepared.data_hash,
        "signals": config.signals,
        "shape": shape,
        "layers": layers,
        "tokenizer_fingerprint": fingerprint,
        "temperatures": temperatures,
        "dtypes": {column: dtype for column, (_, _, dtype) in columns.items()},
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


@dataclass(frozen=True)
class TeacherSignals:
    """The teacher as a function from a batch of examples to the same examples with signals.

    It returns as soon as the device has its work; the rows that it returns wait for the device.
    """

    model: torch.nn.Module
    run: Callable[[list[encoding.Example], UnitSums | None], Iterator[encoding.Example]]

    def __call__(
        self, batch: list[encoding.Example], sums: UnitSums | None = None
    ) -> Iterator[encoding.Example]:
        return self.run(batch, sums)

    def new_sums(self) -> UnitSums | None:
        """Sums over rows of the teacher's units, to be filled by calls; None: they are unknown."""
        return new_sums(self.model)


def signal_function(
    model: torch.nn.Module,
    *,
    signals: str,
    top_k: int = 64,
    temperatures: Sequence[float] = (),
    attention_dtype: str = "float16",
    layers: dict[str, list[int]] | None = None,
) -> TeacherSignals:
    """The function that runs the teacher over a batch of examples and adds the signals to cache.

    Args:
        model: the teacher, in eval mode, on its device.
        signals, top_k, attention_dtype: as 02's parameters.
        temperatures: each T for which "top_k" keeps log sum_v exp(z_v / T): the mass of the rest is
            exact for these only.
        layers: as `cached_layers` gives them; None: the last.

    Raises:
        ValueError: an unknown kind of signal, or a k above the size of the vocabulary.
    """
    device, text = next(model.parameters()).device, model.config.get_text_config()
    columns = signal_kinds.columns_of(signals, layers or {}, layer_count(model), attention_dtype)
    if "top_logits" in columns and top_k > text.vocab_size:
        raise ValueError(
            f"top_k = {top_k}, but the teacher's vocabulary has {text.vocab_size} tokens: set "
            f"top_k to {text.vocab_size} or less"
        )
    captured = signal_kinds.captured_layers([(kind, layer) for kind, layer, _ in columns.values()])

    @torch.inference_mode()
    def run(batch: list[encoding.Example], sums: UnitSums | None) -> Iterator[encoding.Example]:
        padded, lengths = encoding.right_padded(batch)
        input_ids = devices.to_device(padded, device)
        teacher = signal_kinds.TeacherPass(
            model, input_ids, captured, top_k, temperatures, attention_dtype
        )
        ids = [row.example_id for row in batch]
        with nullcontext() if sums is None else sums.of_batch(ids, lengths):
            taken = [
                {
                    column: kind.take(teacher, b, n, layer).to(getattr(torch, dtype))
                    for column, (kind, layer, dtype) in columns.items()
                }
                for b, n in enumerate(lengths)
            ]
        # One copy per column is under way when this returns.
        flat = {column: torch.cat([row[column].flatten() for row in taken]) for column in columns}
        copies = devices.HostCopy(flat)
        shapes = [{column: array.shape for column, array in row.items()} for row in taken]
        return _rows(batch, copies, shapes)

    return TeacherSignals(model, run)


def _rows(
    batch: list[encoding.Example],
    copies: devices.HostCopy,
    shapes: list[dict[str, torch.Size]],
) -> Iterator[encoding.Example]:
    """The examples with their parts of the flat columns, as soon as these are on the host."""
    flat = copies.result()
    parts = {
        column: values.split([shape[column].numel() for shape in shapes])
        for column, values in flat.items()
    }
    for b, (row, shape) in enumerate(zip(batch, shapes)):
        arrays = {column: parts[column][b].view(shape[column]).numpy() for column in flat}
        yield replace(row, signals=arrays)


def stored_lm_head(model: torch.nn.Module) -> torch.Tensor:
    """(V, d) the output layer's weight on the CPU, as the model holds it."""
    return output_head.output_head(model).weight.detach().cpu().contiguous()


def stored_head_bias(model: torch.nn.Module) -> torch.Tensor | None:
    """(V,) the output layer's bias on the CPU, if it has one."""
    bias = output_head.output_head(model).bias
    return None if bias is None else bias.detach().cpu().contiguous()
