"""What a model's cost depends on: its number of weights and its widths, without its weights."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import huggingface_hub
import torch

from kd_utils.config.project_paths import project_path
from kd_utils.data import hub
from kd_utils.models import students


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder of Llama's kind.

    Attributes:
        weights: all parameters, a tied one once.
        matrices: those in the decoder layers' linear modules, of which autocast makes copies.
        layers, width, inner, heads, vocabulary: the config's `num_hidden_layers`, `hidden_size`,
            `intermediate_size`, `num_attention_heads` and `vocab_size`.
        query_width, key_width: what a token's queries, and its keys, have over all heads.
    """

    #: The sizes that `work.multiply_adds` needs.
    NAMES: ClassVar = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )

    weights: int
    matrices: int
    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    query_width: int
    key_width: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> Self:
        """The shape of a causal LM, which may be on the `meta` device.

        Raises:
            ValueError: its config does not say a size, so that its cost is not known.
        """
        config = model.config.get_text_config()
        try:
            heads = config.num_attention_heads
            head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
            key_heads = getattr(config, "num_key_value_heads", None) or heads
            inner = config.intermediate_size
        except AttributeError as error:
            raise ValueError(f"the config of {type(model).__name__} has no {error.name}") from None
        linear = [
            module.weight.numel()
            for module in model.base_model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        return cls(
            weights=sum(parameter.numel() for parameter in model.parameters()),
            matrices=sum(linear),
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner=inner,
            heads=heads,
            vocabulary=config.vocab_size,
            query_width=heads * head_width,
            key_width=key_heads * head_width,
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by the names that `transformers` uses, for `work.multiply_adds`."""
        key_heads = max(self.heads * self.key_width // self.query_width, 1)
        sizes = (self.width, self.inner, self.layers, self.heads, key_heads, self.vocabulary)
        return dict(zip(self.NAMES, sizes, strict=True))


def meta_model(config: Any, layers: int = 0) -> torch.nn.Module:
    """A causal LM on the `meta` device: it has sizes and no values, and takes no memory.

    Args:
        config: of `transformers`.
        layers: how many layers to keep, as `students.build_student` does; 0: all.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return students.keep_layers(model, list(range(layers))) if layers else model


def local_model(name: str, revision: str = "", layers: int = 0) -> torch.nn.Module:
    """`meta_model` of a folder, or of a model in the hub's local cache; the network is not used.

    Raises:
        ValueError: the model is not on this machine, or it is none that can be sized, in one line.
    """
    folder = project_path(name)
    file: Any = folder / "config.json"
    if not folder.is_dir():
        with suppress(ValueError):  # no name that the hub could have
            file = huggingface_hub.try_to_load_from_cache(
                name, "config.json", revision=revision or "main"
            )
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        raise ValueError(f"{name} is not on this machine")
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(Path(file).parent, trust_remote_code=False)
        return meta_model(config, layers)
    except Exception as error:  # a folder that somebody else made may be wrong in every way
        raise ValueError(f"{name} cannot be sized: {hub.one_line(error)}") from None
