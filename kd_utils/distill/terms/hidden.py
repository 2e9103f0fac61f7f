"""L_hidden: the student's projected hidden states against the teacher's."""

from typing import Self

import torch
from torch import Tensor, nn

from kd_utils.distill.targets import Targets
from kd_utils.distill.teacher_terms import LayerTerm, TermSetup, register
from kd_utils.models.signals import Signals


@register
class Hidden(LayerTerm):
    """Mean squared error of hidden states, through one trained projector per pair of layers.

    Args:
        pairs, teacher_layers: as in `LayerTerm`.
        widths: (student's, teacher's) hidden size.
        seeds: of each projector's initial weights.
    """

    name = kind = "hidden"

    def __init__(
        self,
        pairs: list[tuple[int, int]],
        teacher_layers: int,
        widths: tuple[int, int],
        seeds: list[int],
    ) -> None:
        super().__init__(pairs, teacher_layers)
        self.projectors = nn.ModuleList(make_projector(*widths, seed) for seed in seeds)

    @classmethod
    def of(cls, setup: TermSetup) -> Self:
        pairs = setup.pairs("hidden", setup.config.hidden_layers)
        widths = (setup.student.hidden_size, setup.cache.manifest["hidden_size"])
        seeds = [setup.seed(k) for k in range(len(pairs))]
        return cls(pairs, setup.shape["num_hidden_layers"], widths, seeds)

    def compare(
        self, k: int, signals: Signals, layer: int, targets: Targets, column: str
    ) -> Tensor:
        projected = self.projectors[k](signals.layers[layer].flatten(0, 1)[targets.places])
        return hidden_mse(projected, targets.signals[column], self.count(targets.whole))


def hidden_mse(
    projected_student: Tensor, teacher_hidden: Tensor, normaliser: int | None = None
) -> Tensor:
    """L_hidden = sum over tokens of ||P h_s - h_t||^2 / d_t, / normaliser.

    FitNets, Romero et al. 2015, eq. 3.

    Args:
        projected_student: (N, d_t) `projector(student_hidden)`.
        teacher_hidden: (N, d_t).
        normaliser: number of distilled tokens in the whole batch; None: N.

    Returns:
        Scalar, mean over tokens and width.
    """
    total = nn.functional.mse_loss(
        projected_student.float(), teacher_hidden.float(), reduction="sum"
    )
    return total / ((normaliser or max(len(teacher_hidden), 1)) * teacher_hidden.shape[-1])


def make_projector(student_width: int, teacher_width: int, seed: int) -> nn.Linear:
    """`Linear(d_student, d_teacher, bias=False)` with initial weights from this seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(student_width, teacher_width, bias=False)
