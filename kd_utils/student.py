"""Models: tokenizers and causal LMs from a folder or the hub, students made from them, the projector, devices."""

from __future__ import annotations

import json
import resource
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .config import resolve
from .files import written_folder
from .hub import MODEL_FILES, TOKENIZER_FILES, hub_folder, one_line
from .signals import decoder_layers


def model_source(name: str) -> str:
    """A model's folder if `name` is one (seen from the project's root), else `name` as the hub's `owner/model`.

    Raises:
        FileNotFoundError: `name` looks like a folder and there is none.
    """
    if resolve(name).is_dir():
        return str(resolve(name))
    if name.count("/") > 1 or name.startswith((".", "/", "~", "artifacts")):
        raise FileNotFoundError(f"no model folder {name}: run notebook 01_prepare_data first (it builds the embedded "
                                "models), or name a folder that exists or a model of the hub")
    return name


def load_tokenizer(name: str, revision: str = "") -> Any:
    """`AutoTokenizer` from a folder or the hub, without remote code."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name, revision, TOKENIZER_FILES)


def load_causal_lm(name: str, revision: str = "", dtype: torch.dtype = torch.float32) -> nn.Module:
    """`AutoModelForCausalLM` from a folder or the hub, safetensors only, without remote code."""
    from transformers import AutoModelForCausalLM

    model, report = _load(AutoModelForCausalLM, name, revision, MODEL_FILES, dtype=dtype, use_safetensors=True,
                          output_loading_info=True)
    if lacking := sorted(report["missing_keys"]):  # transformers would leave them random, and say so
        raise ValueError(f"cannot load {name}: its weights lack {lacking[0]} and {len(lacking) - 1} more: give what "
                         "`save_pretrained` writes")
    return model


def _load(auto_class: Any, name: str, revision: str, files: tuple[str, ...], **kwargs: Any) -> Any:
    _no_weight_bars()
    source = Path(model_source(name))
    folder = source if source.is_dir() else hub_folder(name, files, revision=revision)
    try:
        if "*.safetensors" in files and not _holds_safetensors(folder):
            raise ValueError("weights are not in *.safetensors alone, and others are not read (a pickle can run code)")
        return auto_class.from_pretrained(folder, trust_remote_code=False, **kwargs)
    except Exception as error:  # a folder that somebody else made may be wrong in every way
        raise ValueError(f"cannot load {name}: {one_line(error)}: give what `save_pretrained` writes") from None


def _holds_safetensors(folder: Path) -> bool:
    """Whether that is what its weights are: transformers opens whatever the index of the shards names."""
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_bytes())["weight_map"].values() if index.exists() else folder.glob("*.safetensors")
    return {Path(shard).suffix for shard in named} == {".safetensors"}


def build_student(name: str, init: str, layers: int, revision: str = "") -> nn.Module:
    """The student's initial weights, the same in every trial.

    Args:
        name: a folder or hub name; with `init="layers"` the model whose layers are taken.
        init: "pretrained" takes the weights as they are; "layers" keeps the first, the last and evenly spaced layers
            (DistilBERT's way, Sanh et al. 2019); "random" keeps the architecture only.
        layers: how many layers "layers" keeps.

    Returns:
        A float32 causal LM.
    """
    if init == "random":
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_load(AutoConfig, name, revision, ("*.json",)),
                                                     dtype=torch.float32)
        return model.eval()  # without dropout, as a model with weights is loaded
    model = load_causal_lm(name, revision)
    return model if init == "pretrained" else keep_layers(model, evenly_spaced(model.config.num_hidden_layers, layers))


def evenly_spaced(total: int, keep: int) -> list[int]:
    """`keep` of `total` layer indices, the first and the last among them: evenly_spaced(30, 6) = 0 6 12 17 23 29.

    Raises:
        ValueError: more layers than there are, or fewer than two.
    """
    if not 2 <= keep <= total:
        raise ValueError(f"student_layers = {keep}: choose 2 to {total}, the model has {total} layers")
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)]


def keep_layers(model: nn.Module, indices: list[int]) -> nn.Module:
    """Drop all decoder layers but `indices` (rising, from 0), in place; the rest are renumbered."""
    layers = decoder_layers(model)
    total = len(layers)
    for i in sorted(set(range(total)) - set(indices), reverse=True):
        del layers[i]
    for position, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    model.config.num_hidden_layers = len(layers)
    for name, value in vars(model.config).items():  # one entry a layer: `layer_types`, SmolLM3's `no_rope_layers`
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(model.config, name, [value[i] for i in indices])
    return model


def mixed_seed(*numbers: int) -> int:
    """One seed out of several numbers. Shifting one up would not do: a CPU's generator takes the lower 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def make_projector(student_width: int, teacher_width: int, seed: int) -> nn.Linear:
    """`Linear(d_student, d_teacher, bias=False)`; its initial weights are fixed by the seed, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(student_width, teacher_width, bias=False)


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """A plain `transformers` folder (safetensors) that loads without this code, whole or not there at all."""
    _no_weight_bars()
    with written_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def _no_weight_bars() -> None:
    """A bar over the tensors of a file says nothing in a record; downloads keep theirs."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device = {name!r}: use 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}, but torch sees no GPU here: use 'auto' or 'cpu'")
    return device


def amp_dtype(device: torch.device, precision: str) -> torch.dtype:
    """What matrix products are computed in: `auto` means bfloat16 on a GPU and float32 on a CPU."""
    half = precision == "bfloat16" or (precision == "auto" and device.type != "cpu")
    return torch.bfloat16 if half else torch.float32


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bfloat16 autocast over float32 weights where `amp_dtype` says so, or nothing."""
    dtype = amp_dtype(device, precision)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: the GPU's allocations, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
