"""Which axis of which weight belongs to which units: the table of slots, and the stored weights.

A decoder of Llama's kind has four kinds of units that can be cut: channels of the residual stream
("width", d of them), query heads ("heads", H of P rows each), neurons of the MLP ("mlp", n a layer)
and whole layers. Key/value heads ("kv", K of P rows each) are shared by groups of query heads and
are all kept.
"""

import re
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from kd_utils.data import hub
from kd_utils.models import loading

#: The model types whose weights have the names and axes below, and no others.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_HEADS, _KEYS, _NEURONS = ("heads", "width"), ("kv", "width"), ("mlp", "width")

#: Weight, without the layer's number -> the units along each of its axes; None: no units.
SLOTS: dict[str, tuple[str | None, ...]] = {
    "model.embed_tokens.weight": (None, "width"),
    "input_layernorm.weight": ("width",),
    "self_attn.q_proj.weight": _HEADS,
    "self_attn.q_proj.bias": ("heads",),
    "self_attn.q_norm.weight": (None,),  # Qwen3's, over one head's P entries
    "self_attn.k_proj.weight": _KEYS,
    "self_attn.k_proj.bias": ("kv",),
    "self_attn.k_norm.weight": (None,),
    "self_attn.v_proj.weight": _KEYS,
    "self_attn.v_proj.bias": ("kv",),
    "self_attn.o_proj.weight": ("width", "heads"),
    "self_attn.o_proj.bias": ("width",),
    "post_attention_layernorm.weight": ("width",),
    "mlp.gate_proj.weight": _NEURONS,
    "mlp.gate_proj.bias": ("mlp",),
    "mlp.up_proj.weight": _NEURONS,
    "mlp.up_proj.bias": ("mlp",),
    "mlp.down_proj.weight": ("width", "mlp"),
    "mlp.down_proj.bias": ("width",),
    "model.norm.weight": ("width",),
    "lm_head.weight": (None, "width"),
}

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class Slot(NamedTuple):
    """A weight's place: its decoder layer from 0 (None: outside of them) and the row of `SLOTS`."""

    layer: int | None
    name: str

    @property
    def axes(self) -> tuple[str | None, ...]:
        return SLOTS[self.name]


def slot_of(key: str) -> Slot:
    """The slot of a weight by its name in a state dict, which `StoredModel` checked."""
    inside = LAYER.fullmatch(key)
    return Slot(int(inside[1]), inside[2]) if inside else Slot(None, key)


def require_family(config: Any) -> None:
    """Refuse a model whose weights the table does not describe, by name."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"a {config.model_type} model cannot be cut: the table of slots has "
            f"{', '.join(FAMILIES)}; set student_init to 'layers', which drops whole layers of any "
            "family, or to 'pretrained'"
        )


class StoredModel:
    """A causal LM of the table's families in its folder: its config, and one weight at a time.

    Args:
        name, revision: a folder, or a model of the hub.

    Raises:
        ValueError: another family, or weights that are not those of the config, in one line.
    """

    def __init__(self, name: str, revision: str = "") -> None:
        self.name = name
        self.config = loading.load_pretrained("AutoConfig", name, hub.MODEL_FILES, revision)
        require_family(self.config)
        shapes = _shapes(self.config)
        self._files: dict[str, Any] = {}
        for path in sorted(loading.model_folder(name, hub.MODEL_FILES, revision).iterdir()):
            if path.suffix == ".safetensors":
                file = safe_open(path, framework="pt")
                self._files |= dict.fromkeys(file.keys(), file)
        wanted = {key: shape for key, shape in shapes.items() if key in self._files}
        tied = {HEAD} if self.config.tie_word_embeddings else set()
        if lacking := sorted(shapes.keys() - wanted - tied):
            raise ValueError(
                f"cannot cut {name}: its weights lack {lacking[0]}: give a folder that "
                "save_pretrained wrote"
            )
        for key, shape in wanted.items():
            if slot_of(key).name not in SLOTS:
                raise ValueError(f"cannot cut {name}: the table of slots has no {key}")
            if (found := tuple(self._files[key].get_slice(key).get_shape())) != shape:
                raise ValueError(
                    f"cannot cut {name}: its {key} is {found}, and its config asks for {shape}: "
                    "give the config.json that belongs to the weights"
                )
        if tied & wanted.keys() and not torch.equal(self.read(HEAD), self.read(_EMBEDDING)):
            # transformers does not tie them then, whatever the config says.
            self.config.tie_word_embeddings = False
        #: Every weight by its name, the output layer too where it is the embedding.
        self.keys = tuple(shapes)

    def read(self, key: str) -> Tensor:
        """One weight, as it is stored; a tied output layer is the embedding."""
        key = key if key in self._files else _EMBEDDING
        return self._files[key].get_tensor(key)


HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a config asks for."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {key: tuple(weight.shape) for key, weight in model.state_dict().items()}


def empty_model(config: Any) -> torch.nn.Module:
    """A float32 model of this config, whose weights are to be overwritten."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
