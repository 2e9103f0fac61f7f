"""From the final hidden state to logits: a matrix product, perhaps with bias, scale or cap."""

import math
from dataclasses import dataclass

import torch

from kd_utils.models.signals import forward_signals, require_shape

#: Names in configurations of what logits are multiplied with, and divided by.
FACTORS, DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
#: HyperCLOVAX multiplies by what it calls `logits_scaling`, as Granite calls its divisor.
MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
#: Names in configurations of the cap.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass
class OutputHead:
    """How the final hidden state h becomes logits z.

    u = h W^T + b, then z = cap tanh(scale u / cap).

    Attributes:
        weight: W, (V, d).
        scale: 1 but for Granite, Cohere and a few others.
        cap: None (z = scale u) but for Gemma 2 and a few others.
        bias: b, (V,); None but for GPT-J, Phi and a few others.
    """

    weight: torch.Tensor
    scale: float = 1.0
    cap: float | None = None
    bias: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether z is u: neither scaled nor capped."""
        return self.scale == 1.0 and self.cap is None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., V), with the operations in the models' own order."""
        if self.bias is None:
            logits = hidden @ self.weight.T
        else:  # in one operation, as in the model: bfloat16 is rounded once
            logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """dz / du entry by entry, scale (1 - (z / cap)^2), from the logits z; without a cap the
        number `scale`.
        """
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)


def as_head(head: OutputHead | torch.Tensor) -> OutputHead:
    """An output layer, given as one or as its weight."""
    return head if isinstance(head, OutputHead) else OutputHead(head)


def output_head(model: torch.nn.Module) -> OutputHead:
    """The model's head, tied or not, by its configuration; `require_known_head` tests it.

    Raises:
        ValueError: the model has no output layer that is one matrix.
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if getattr(getattr(layer, "weight", None), "ndim", 0) != 2:
        raise ValueError(f"{type(model).__name__} has no output layer that is one matrix")

    def product(names: tuple[str, ...]) -> float:
        found = 1.0
        for name in names:
            found *= getattr(config, name, None) or 1.0
        return found

    multiplies = config.model_type in MULTIPLIES_BY_LOGITS_SCALING
    factors, divisors = (FACTORS + DIVISORS, ()) if multiplies else (FACTORS, DIVISORS)
    caps = [cap for name in CAPS if (cap := getattr(config, name, None))]
    scale = product(factors) / product(divisors)
    return OutputHead(layer.weight, scale, caps[0] if caps else None, getattr(layer, "bias", None))


def trained_parameters(model: torch.nn.Module, trained: str) -> list[torch.nn.Parameter]:
    """The parameters that training changes; the others want no gradient from now on.

    Args:
        trained: "all", or "layers": the input embedding and the output layer stay as they are. They
            are most of a small model with a large vocabulary.
    """
    if trained == "layers":
        for ends in (model.get_input_embeddings(), model.get_output_embeddings()):
            ends.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def model_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V) as the model itself computes them, whatever its output layer does.

    Raises:
        ValueError: they have another shape.
    """
    logits = getattr(model(input_ids=input_ids, use_cache=False), "logits", None)
    vocabulary = model.config.get_text_config().vocab_size
    remedy = "choose another model"
    require_shape(model, "logits", logits, (*input_ids.shape, vocabulary), remedy)
    return logits


NO_STUDENT = "it cannot be a student, choose another model"

#: Positions of a row that are tried: the logits of eight whole rows would be gigabytes.
TRIED = 64


@torch.no_grad()
def require_causal(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Check that a position's logits do not depend on later tokens, and return the logits.

    An encoder such as BERT sees them: its loss would be that of a model that reads the answer.

    Args:
        input_ids: (B, T), right-padded; of the first `TRIED` columns the second half is changed.

    Returns:
        (B, min(T, TRIED), V) float32.

    Raises:
        ValueError: logits of the first half change with it, are not finite, or have another shape.
    """
    input_ids = input_ids[:, :TRIED]
    logits = model_logits(model, input_ids).float()
    half = (input_ids.shape[1] + 1) // 2
    changed = input_ids.clone()
    changed[:, half:] = (changed[:, half:] + 1) % logits.shape[-1]
    first, again = logits[:, :half], model_logits(model, changed)[:, :half].float()
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    rounding, size = 1e-4 if exact else 2e-2, float(first.norm())
    if not math.isfinite(size):
        raise ValueError(
            f"{type(model).__name__} gives logits that are not finite: its weights are damaged or "
            "its training diverged, choose another model"
        )
    if not float((first - again).norm()) <= rounding * size:
        raise ValueError(
            f"{type(model).__name__} sees tokens that come later, so it is no causal language "
            "model: choose another (an encoder such as BERT needs is_decoder in its config.json)"
        )
    return logits


@torch.no_grad()
def require_known_head(
    model: torch.nn.Module, input_ids: torch.Tensor, remedy: str = NO_STUDENT
) -> float:
    """Check that the model is causal, and that `output_head` gives its own logits.

    Losses and caches rely on it. The operations are the same, so even rounding hardly differs.

    Args:
        input_ids: (B, T), right-padded; the first `TRIED` columns are used.
        remedy: how the error ends: what the caller can do with a model whose head is unknown.

    Returns:
        ||z - z'|| / ||z|| of the model's logits z and the rebuilt ones z'.

    Raises:
        ValueError: it is above 1e-5: the head does something that `OutputHead` lacks; or what
            `require_causal` and `forward_signals` raise.
    """
    input_ids = input_ids[:, :TRIED]
    logits = require_causal(model, input_ids)
    try:
        hidden, head = forward_signals(model, input_ids).hidden, output_head(model)
    except ValueError as error:
        raise ValueError(f"{error}: {remedy}") from None
    difference = torch.inf
    if head.weight.shape == (logits.shape[-1], hidden.shape[-1]):
        difference = float((logits - head.logits(hidden).float()).norm() / logits.norm())
    if not difference <= 1e-5:
        raise ValueError(
            f"{type(model).__name__}: the output head does more than a matrix product, a bias, "
            f"scaling and soft-capping (rebuilt logits differ by {difference:.2%}): {remedy}"
        )
    return difference
