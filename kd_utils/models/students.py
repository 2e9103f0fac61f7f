"""Students: their initial weights, layers taken from a larger model, and projectors."""

from typing import Any, NamedTuple

import torch

from kd_utils.models import loading
from kd_utils.models.signals import decoder_layers


class StudentSource(NamedTuple):
    """Where the student's initial weights come from; `fingerprint` is that of their content."""

    name: str
    revision: str
    fingerprint: str


def student_source(name: str, manifest: dict[str, Any]) -> StudentSource:
    """The source that the parameter `student` names; "teacher" is that of this cache's manifest.

    Raises:
        ValueError: the teacher's weights changed after they were cached.
    """
    if name != "teacher":
        return StudentSource(name, "", loading.model_fingerprint(name))
    name, revision = manifest["teacher"], manifest["teacher_revision"]
    fingerprint = loading.model_fingerprint(name, revision)
    if fingerprint != manifest["key"]["teacher"]:
        raise ValueError(
            f"the weights of {name} are not those that were cached: run 02_cache_teacher again"
        )
    return StudentSource(name, revision, fingerprint)


def build_student(name: str, init: str, layers: int, revision: str = "") -> torch.nn.Module:
    """A float32 causal LM with the student's initial weights, the same in every trial.

    Args:
        name: a folder or hub name.
        init: "pretrained" takes the weights unchanged; "layers" keeps that many evenly spaced
            layers, the first and the last among them (as DistilBERT, Sanh et al. 2019); "random"
            keeps the architecture only.

    Raises:
        ValueError: more layers than there are, or fewer than two.
    """
    if init == "random":
        from transformers import AutoModelForCausalLM

        config = loading.load_pretrained("AutoConfig", name, ("*.json",), revision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return loading.with_soft_capping(model).eval()  # no dropout, as a model that was loaded
    model = loading.load_causal_lm(name, revision)
    if init == "pretrained":
        return model
    total = model.config.num_hidden_layers
    if not 2 <= layers <= total:
        raise ValueError(
            f"student_layers = {layers}: choose 2 to {total}, the model has {total} layers"
        )
    # Of 30 layers, 6 are 0 6 12 17 23 29.
    return keep_layers(model, [round(i * (total - 1) / (layers - 1)) for i in range(layers)])


def keep_layers(model: torch.nn.Module, indices: list[int]) -> torch.nn.Module:
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
    # Lists with one entry per layer: `layer_types`, SmolLM3's `no_rope_layers`.
    for name, value in vars(model.config).items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(model.config, name, [value[i] for i in indices])
    return model


def make_projector(student_width: int, teacher_width: int, seed: int) -> torch.nn.Linear:
    """`Linear(d_student, d_teacher, bias=False)` with initial weights from this seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Linear(student_width, teacher_width, bias=False)
