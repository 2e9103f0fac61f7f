"""What is wrong with a model's folder, told in one line before anything is computed with it."""

import json
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kd_utils.data import hub

#: The names that `save_pretrained` gives to a model's weights.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
#: Parts of a checkpoint that also sees or hears, which its language model has no place for.
OTHER_SENSES = re.compile(r"(^|\.)(vision|visual|image|audio|multi_modal|vq)")
#: Masks and tables that older checkpoints keep among their weights; models make their own.
MADE_ANEW = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.inv_freq$|(^|\.)position_ids$")


class FolderError(ValueError):
    """A folder that is not what its user means; names it and the remedy."""


def refuse_adapter(name: str, folder: Path) -> None:
    """Refuse a folder with an adapter, alone or beside its model: it would not be read.

    Args:
        name: what the folder is called in the error.
    """
    for file in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / file).exists():
            raise FolderError(
                f"{name} holds an adapter ({file}), which is not read: merge it into its base "
                "model (peft: merge_and_unload) and save that in a folder of its own, or move the "
                "adapter out of the folder"
            )


def require_one_model(name: str, folder: Path) -> None:
    """Refuse weights of several models in one folder, of which transformers would choose one.

    Args:
        name: what the folder is called in the error.

    Raises:
        FolderError: an adapter, weights beside those that are read, or a generation_config.json
            that cannot be used (transformers would pass over a damaged one).
        ValueError: weights in other files than safetensors, or none.
    """
    refuse_adapter(name, folder)
    _require_generation_config(name, folder)
    index, files = folder / "model.safetensors.index.json", {p.name for p in folder.iterdir()}
    named, by = {"model.safetensors"}, "no model.safetensors.index.json names"
    if index.exists():
        named = {Path(file).name for file in json.loads(index.read_bytes())["weight_map"].values()}
        by = f"{index.name} does not name"
    if {Path(file).suffix for file in named} != {".safetensors"} or not any(
        file.endswith(".safetensors") for file in files
    ):
        raise ValueError(
            "the weights are not all in *.safetensors; other files are not read, because a "
            "pickle can run code"
        )
    if others := sorted(file for file in files - named if WEIGHTS.fullmatch(file)):
        raise FolderError(
            f"{name} holds {others[0]}, which {by}: remove the weights that are not meant, or save "
            "the model again with save_pretrained"
        )


def _require_generation_config(name: str, folder: Path) -> None:
    """Refuse a generation_config.json that is damaged, or whose values transformers refuses."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:  # of a file that somebody else made
            raise FolderError(
                f"cannot load {name}: transformers refuses its generation_config.json "
                f"({hub.one_line(error)}): correct the file, or remove it"
            ) from None


def require_all_weights(name: str, model: torch.nn.Module, report: dict[str, Any]) -> None:
    """Refuse a config that asks for other weights than the folder has.

    Args:
        name: what the folder is called in the error.
        report: of `from_pretrained(output_loading_info=True, ignore_mismatched_sizes=True)`.
    """
    if lacking := sorted(report["missing_keys"]):  # transformers would leave them random
        raise FolderError(
            f"cannot load {name}: its weights lack {_first(lacking)}: give a folder that "
            "save_pretrained wrote"
        )
    if unlike := sorted(report["mismatched_keys"]):  # these too
        key, found, wanted = unlike[0]
        raise FolderError(
            f"cannot load {name}: its {key} is {tuple(found)}, and its config asks for "
            f"{tuple(wanted)}: give the config.json that belongs to the weights"
        )
    own = {key for key, _ in model.named_buffers()}
    unplaced = sorted(
        key
        for key in report["unexpected_keys"]
        if key not in own and not MADE_ANEW.search(key) and not OTHER_SENSES.search(key)
    )
    if unplaced:
        raise FolderError(
            f"cannot load {name}: its config has no place for {_first(unplaced)} of its weights: "
            "give the config.json that belongs to the weights"
        )


def _first(names: list[str]) -> str:
    return names[0] + f" and {len(names) - 1} more" * (len(names) > 1)


def require_package(name: str, folder: Path) -> None:
    """Name the packages that a folder's only tokenizer, a SentencePiece model, needs.

    transformers asks for tiktoken instead, which cannot read it.
    """
    files = sorted(folder.glob("*.model"))
    if not files or any(folder.glob("tokenizer.json")) or any(folder.glob("vocab.*")):
        return
    with files[0].open("rb") as file:
        is_tiktoken = re.match(rb"\S+ \d+\n", file.read(200))  # text, as Llama 3's
    lacking = [package for package in ("sentencepiece", "google.protobuf") if not _has(package)]
    if lacking and not is_tiktoken:
        raise FolderError(
            f"cannot load {name}: its tokenizer is a SentencePiece model ({files[0].name}): "
            "`pip install sentencepiece protobuf`, or add the tokenizer.json of the same model"
        )


def _has(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package's parent
        return False


def known_ids(model: torch.nn.Module) -> int:
    """How many token ids, from 0, the model has both an embedding and a logit for."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(len(layer.weight) for layer in layers if hasattr(layer, "weight"))


def require_known_ids(model: torch.nn.Module, tokenizer: Any, used: Iterable[int]) -> None:
    """Refuse token ids that the model does not know: a GPU would only abort.

    Args:
        used: the ids that are read or predicted.
    """
    largest, known = max(used, default=-1), known_ids(model)
    if largest >= known:
        token = tokenizer.convert_ids_to_tokens(int(largest))
        raise FolderError(
            f"the tokenizer gives {token!r} the id {largest}, and {type(model).__name__} knows "
            f"the ids below {known}: choose the tokenizer that belongs to the model"
        )
