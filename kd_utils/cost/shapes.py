"""What a model's cost depends on: its number of weights and its widths, without its weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kd_utils.config.project_paths import project_path
from kd_utils.data import hub
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
    size = shape.get("head_dim") or width // heads
    attention = 2 * size * (heads + shape["num_key_value_heads"])
    layer = width * (attention + 3 * shape["intermediate_size"])
    return {"body": shape["num_hidden_layers"] * layer, "head": width * shape["vocab_size"]}


def local_model(
    name: str, revision: str = "", made: Callable[[Any], Any] = lambda config: config
) -> torch.nn.Module:
    """A causal LM on the `meta` device: it has sizes and no values, and takes no memory.

    Args:
        name: a folder, or a model in the hub's local cache; the network is not used.
        made: the config of the model that is meant, from that of the named one (`Way.config`).

    Raises:
        ValueError: the model is not on this machine, or it is none that can be sized, in one line.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = project_path(name)
    options: Any = {"revision": revision or "main", "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder if folder.is_dir() else name, **options)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(made(config))
    except OSError:
        raise ValueError(f"{name} is not on this machine") from None
    except Exception as error:  # a folder that somebody else made may be wrong in every way
        raise ValueError(f"{name} cannot be sized: {hub.one_line(error)}") from None
