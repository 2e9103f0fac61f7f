"""The ways in which an initial student is made of its source: one function each, in one table."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from kd_utils.models import loading
from kd_utils.models.initial import layers


class Way(NamedTuple):
    """A function `build(name, revision, **settings)`: the same float32 model in every call.

    Attributes:
        settings: the parameters of a trial that decide the model, beside its source.
    """

    build: Callable[..., torch.nn.Module]
    settings: tuple[str, ...] = ()


def some_layers(name: str, revision: str = "", *, student_layers: int) -> torch.nn.Module:
    """That many evenly spaced layers of a folder's or the hub's model, the first and the last too.

    DistilBERT was initialised with every second layer (Sanh et al. 2019).

    Raises:
        ValueError: more layers than there are, or fewer than two; or they are no model of their
            own.
    """
    model = loading.load_causal_lm(name, revision)
    return layers.keep_layers(model, layers.evenly_spaced(model, student_layers))


def random_weights(name: str, revision: str = "") -> torch.nn.Module:
    """The architecture only, with random weights from one seed."""
    from transformers import AutoModelForCausalLM

    config = loading.load_pretrained("AutoConfig", name, ("*.json",), revision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return loading.with_soft_capping(model).eval()  # no dropout, as a model that was loaded


#: By the parameter `student_init`. "pretrained" has no place here: nothing is made.
WAYS = {"layers": Way(some_layers, ("student_layers",)), "random": Way(random_weights)}
