"""Some decoder layers of a causal LM as a model of their own."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kd_utils.data import hub
from kd_utils.models import loading
from kd_utils.models.cut.renumbering import renumbered
from kd_utils.models.signals import decoder_layers


def evenly_spaced(model: nn.Module, count: int) -> list[int]:
    """`count` numbers of decoder layers from 0, the first and the last among them.

    Raises:
        ValueError: more layers than there are, or fewer than two.
    """
    total = _total(model)
    if not 2 <= count <= total:
        raise ValueError(
            f"student_layers = {count}: choose 2 to {total}, the model has {total} layers"
        )
    # Of 30 layers, 6 are 0 6 12 17 23 29.
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def keep_layers(model: nn.Module, kept: list[int]) -> nn.Module:
    """The model of the decoder layers `kept` (rising, from 0), renumbered, with the same tensors.

    It is built from its own config, as it will be when it is loaded, and compared with `model`
    whose other layers are passed over. Whatever depends on a layer's number is found this way, in
    families that nobody thought of too.

    Raises:
        ValueError: no config of this family describes these layers, in one line.
    """
    total = _total(model)
    try:
        name, layers = _layer_list(model)
        with torch.random.fork_rng(devices=[]):
            made = type(model)(kept_config(model.config, kept)).eval()
        made.load_state_dict(_kept_weights(model.state_dict(), name, kept), assign=True)
        if _has_ties(model):
            made.tie_weights()  # undone by `assign`
        made.to(model.device).set_attn_implementation(model.config._attn_implementation)
        made.generation_config = model.generation_config
        with passed_over(layer for number, layer in enumerate(layers) if number not in kept):
            wanted = loading.probe_logits(model)
        why = _changed_settings([layers[number] for number in kept], _layer_list(made)[1])
        if not why and not loading.same(wanted, loading.probe_logits(made)):
            why = "other logits"
    except Exception as error:  # every family has its own
        why = hub.one_line(error)[:150]
    if why:
        raise ValueError(
            f"{len(kept)} of {total} layers of {type(model).__name__} are no model of their "
            f"own, since its layers depend on their numbers ({why}): set student_init to "
            "'pretrained' or 'random', or keep all layers"
        )
    return made


def kept_config(config: Any, kept: list[int]) -> Any:
    """The config of a model of the layers `kept`, in a new object."""
    inner = config.get_text_config(decoder=True)
    settings = renumbered(inner.to_dict(), kept, inner.num_hidden_layers)
    count = inner.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    settings |= {count: len(kept)} if count in settings else {}  # else a list's length says it
    if inner is config:
        return type(config).from_dict(settings)
    part = next(name for name in config.sub_configs if getattr(config, name) is inner)
    return type(config).from_dict(config.to_dict() | {part: settings})


def _total(model: nn.Module) -> int:
    return model.config.get_text_config(decoder=True).num_hidden_layers


def _layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers), layers


def _kept_weights(weights: dict[str, torch.Tensor], name: str, kept: list[int]) -> dict[str, Any]:
    """The weights without the other layers', by their new names."""
    found = {}
    for key, tensor in weights.items():
        inside = re.fullmatch(rf"{re.escape(name)}\.(\d+)\.(.+)", key)
        if not inside:
            found[key] = tensor
        elif int(inside[1]) in kept:
            found[f"{name}.{kept.index(int(inside[1]))}.{inside[2]}"] = tensor
    return found


def _has_ties(model: nn.Module) -> bool:
    """Whether a weight has two names; a config may say so of a head that the file has."""
    every = [id(weight) for _, weight in model.named_parameters(remove_duplicate=False)]
    return len(every) > len({*every})


@contextmanager
def passed_over(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile these layers give back the hidden state that they are given."""

    def give_back(_layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden

    hooks = [layer.register_forward_hook(give_back, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _changed_settings(before: list[nn.Module], after: nn.ModuleList) -> str:
    """What is another in a layer's modules beside its number, such as a window; "" if nothing is.

    The few tokens of a probe do not reach out of a window, so their logits do not show it.
    """
    for old, new in zip(before, after, strict=True):
        settings = _settings(new)
        for name, value in _settings(old).items():
            if value != settings.get(name):
                return f"{name} was {value!r}, is {settings.get(name)!r}"
    return ""


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if not re.search(r"(^|_)(layer|block)_?(idx|id|index|number)$|^_|^training$", key)
        and isinstance(value, (int, float, str))
    }
