"""From the final hidden state to logits: a matrix product, perhaps scaled or soft-capped."""

from dataclasses import dataclass

import torch

from kd_utils.models.signals import forward_signals


@dataclass
class OutputHead:
    """How the final hidden state h becomes logits z: u = h W^T, then z = cap tanh(scale u / cap).

    Attributes:
        weight: W, (V, d).
        scale: 1 but for Granite and Cohere.
        cap: None (z = scale u) but for Gemma 2.
    """

    weight: torch.Tensor
    scale: float = 1.0
    cap: float | None = None

    @property
    def is_plain(self) -> bool:
        """Nothing but a matrix product."""
        return self.scale == 1.0 and self.cap is None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., V), with the operations in the models' own order."""
        logits = hidden @ self.weight.T
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """dz / du entry by entry, scale (1 - (z / cap)^2), from the logits z; without a cap the
        number `scale`.
        """
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)


def output_head(model: torch.nn.Module) -> OutputHead:
    """The model's head, tied or not, by its configuration; `require_known_head` tests it.

    Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Gemma caps at
    `final_logit_softcapping`.

    Raises:
        ValueError: the head has a bias, which hidden state times weight would lose.
    """
    layer, config = model.get_output_embeddings(), model.config
    if getattr(layer, "bias", None) is not None:
        raise ValueError(
            f"{type(model).__name__}'s lm_head has a bias: as a teacher, set signals to 'top_k' "
            "and teacher_epochs to 0; it cannot be a student"
        )
    scale = (getattr(config, "logit_scale", None) or 1.0) / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    return OutputHead(layer.weight, scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def require_known_head(model: torch.nn.Module, input_ids: torch.Tensor) -> float:
    """Check that `output_head` turns the hidden state into the model's own logits.

    Losses and caches rely on it. The operations are the same, so even rounding hardly differs.

    Args:
        input_ids: (B, T), right-padded.

    Returns:
        ||z - z'|| / ||z|| of the model's logits z and the rebuilt ones z'.

    Raises:
        ValueError: it is above 1e-5: the head does something that `OutputHead` lacks.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits.float()
    rebuilt = output_head(model).logits(forward_signals(model, input_ids).hidden).float()
    difference = float((logits - rebuilt).norm() / logits.norm())
    if not difference <= 1e-5:
        raise ValueError(
            f"{type(model).__name__}: the output head does more than a matrix product, scaling and "
            f"soft-capping (rebuilt logits differ by {difference:.2%}): as a teacher, set signals "
            "to 'top_k' and teacher_epochs to 0; it cannot be a student"
        )
    return difference
