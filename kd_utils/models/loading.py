"""Tokenizers and causal LMs: loaded from a folder or the hub, saved, and told apart by content."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_utils.config.project_paths import project_path
from kd_utils.data.hub import MODEL_FILES, TOKENIZER_FILES, hub_folder, one_line
from kd_utils.store.files import sha256_file, sha256_json, written_folder


def model_source(name: str) -> str:
    """The folder that `name` means, seen from the project's root; else `name`, a model of the hub.

    Raises:
        FileNotFoundError: `name` looks like a folder and there is none.
    """
    if project_path(name).is_dir():
        return str(project_path(name))
    if name.count("/") > 1 or name.startswith((".", "/", "~", "artifacts")):
        raise FileNotFoundError(
            f"no model folder {name}: run notebook 01_prepare_data first (it builds the embedded "
            "models), or name a folder that exists or a model of the hub"
        )
    return name


def load_tokenizer(name: str, revision: str = "") -> Any:
    """`AutoTokenizer` from a folder or the hub, without remote code."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name, revision, TOKENIZER_FILES)


def load_causal_lm(name: str, revision: str = "", dtype: torch.dtype = torch.float32) -> nn.Module:
    """`AutoModelForCausalLM` from a folder or the hub, safetensors only, without remote code."""
    from transformers import AutoModelForCausalLM

    model, report = _load(
        AutoModelForCausalLM,
        name,
        revision,
        MODEL_FILES,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    if lacking := sorted(report["missing_keys"]):  # transformers would leave them random
        raise ValueError(
            f"cannot load {name}: its weights lack {lacking[0]} and {len(lacking) - 1} more: give "
            "what `save_pretrained` writes"
        )
    return model


def _load(auto_class: Any, name: str, revision: str, files: tuple[str, ...], **kwargs: Any) -> Any:
    _no_weight_bars()
    source = Path(model_source(name))
    folder = source if source.is_dir() else hub_folder(name, files, revision=revision)
    try:
        if "*.safetensors" in files and not _holds_safetensors(folder):
            raise ValueError(
                "weights are not in *.safetensors alone; other files are not read, as a pickle can "
                "run code"
            )
        return auto_class.from_pretrained(folder, trust_remote_code=False, **kwargs)
    except Exception as error:  # a folder that somebody else made may be wrong in every way
        raise ValueError(
            f"cannot load {name}: {one_line(error)}: give what `save_pretrained` writes"
        ) from None


def _holds_safetensors(folder: Path) -> bool:
    """Whether all weights are safetensors: transformers opens every file that the index names."""
    index = folder / "model.safetensors.index.json"
    named = folder.glob("*.safetensors")
    if index.exists():
        named = json.loads(index.read_bytes())["weight_map"].values()
    return {Path(shard).suffix for shard in named} == {".safetensors"}


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a plain `transformers` folder (safetensors), which loads without this project."""
    _no_weight_bars()
    with written_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)


def _no_weight_bars() -> None:
    """Turn off transformers' bars over the tensors of a file; bars of downloads stay."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def model_fingerprint(name: str, revision: str = "") -> str:
    """What a model is, by content: a digest of a folder's weights and configs, or the hub's commit.

    Take it before the model is loaded, since the folder may be replaced meanwhile.

    Raises:
        FileNotFoundError: a folder without safetensors.
    """
    source = model_source(name)
    if not Path(source).is_dir():
        # .../snapshots/COMMIT
        return f"{name}@{hub_folder(name, ['config.json'], revision=revision).name}"
    files = sorted([*Path(source).glob("*.safetensors"), Path(source) / "config.json"])
    if len(files) < 2:
        raise FileNotFoundError(
            f"{name} holds no *.safetensors: save the model with `save_pretrained`"
        )
    # A repetition penalty in this file changes generated answers.
    files += Path(source).glob("generation_config.json")
    return sha256_json({path.name: sha256_file(path) for path in files})
