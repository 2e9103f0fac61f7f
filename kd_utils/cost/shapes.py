"""What a model's cost depends on: its number of weights and its widths, without its weights."""

from collections.abc import Mapping
from typing import Any

import torch

from kd_utils.config.project_paths import project_path
from kd_utils.data import hub
from kd_utils.models.initial.layers import kept_config
from kd_utils.models.signals import layer_count, size_of

#: The sizes of a decoder of Llama's kind, by the names that `transformers` uses.
Shape = Mapping[str, int]


def shape_of(model: torch.nn.Module) -> Shape:
    """The sizes of a causal LM, which may be on the `meta` device.

    Returns:
        `hidden_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads`,
        `num_key_value_heads`, `head_dim`, `vocab_size`; and `weights`, all parameters, a tied one
        once.
    """
    config = model.config.get_text_config()

    width, heads = config.hidden_size, size_of(model.config, "num_attention_heads") or 1
    return {
        "hidden_size": width,
        "intermediate_size": size_of(model.config, "intermediate_size") or 4 * width,
        "num_hidden_layers": layer_count(model),
        "num_attention_heads": heads,
        "num_key_value_heads": size_of(model.config, "num_key_value_heads") or heads,
        "head_dim": size_of(model.config, "head_dim") or width // heads,
        "vocab_size": config.vocab_size,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
    }


def matrices(shape: Shape) -> dict[str, int]:
    """How many weights a model's matrices have: "body", all layers together, and "head"."""
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    key_width = width * shape["num_key_value_heads"] // heads
    layer = 2 * width**2 + 2 * width * key_width + 3 * width * shape["intermediate_size"]
    return {"body": shape["num_hidden_layers"] * layer, "head": width * shape["vocab_size"]}


def local_model(name: str, revision: str = "", layers: int = 0) -> torch.nn.Module:
    """A causal LM on the `meta` device: it has sizes and no values, and takes no memory.

    Args:
        name: a folder, or a model in the hub's local cache; the network is not used.
        layers: how many layers to keep, the first ones; 0: all.

    Raises:
        ValueError: the model is not on this machine, or it is none that can be sized, in one line.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = project_path(name)
    options: Any = {"revision": revision or "main", "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder if folder.is_dir() else name, **options)
        config = kept_config(config, list(range(layers))) if layers else config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except OSError:
        raise ValueError(f"{name} is not on this machine") from None
    except Exception as error:  # a folder that somebody else made may be wrong in every way
        raise ValueError(f"{name} cannot be sized: {hub.one_line(error)}") from None
