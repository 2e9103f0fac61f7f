"""The weights of the loss's terms: fixed, or set once, by shares of the gradient."""

import math
from collections.abc import Callable, Mapping

import torch

from kd_utils.distill import schedules, training
from kd_utils.distill.batches import TrialData
from kd_utils.distill.meter import Meter
from kd_utils.models.devices import autocast
from kd_utils.models.output_head import output_head
from kd_utils.models.signals import Signals


def weights_by_shares(
    norms: Mapping[str, float], weights: Mapping[str, float], shares: Mapping[str, float]
) -> dict[str, float]:
    """w_i = s_i / n_i * sum_j w_j n_j / (1 - sum_i s_i) for terms i with a share, j without one.

    Then w_i n_i is the share s_i of the sum over all terms, as `training.gradient_shares` counts.

    Args:
        norms: n, of each unweighted term's gradient.
        weights: of all terms; those of terms without a share are kept.
        shares: s, which sum to less than 1.

    Raises:
        ValueError: a norm is 0 or not finite, so that no weight gives the share.
    """
    rest = sum(weights[name] * norms[name] for name in weights if name not in shares)
    for what, norm, remedy in (
        *(
            (f"of {name!r}", norms[name], f"set {name}_share to 0")
            for name in shares
            if shares[name]
        ),
        ("of the terms without a share", rest, "raise alpha or beta"),
    ):
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(
                f"the gradient {what} on the probe batch has norm {norm:g}, and no weight gives "
                f"the shares that were asked for: {remedy}, or set weighting to 'fixed'"
            )
    whole = rest / (1 - sum(shares.values()))
    set_now = {name: share and share * whole / norms[name] for name, share in shares.items()}
    return {**weights, **set_now}


class Weighting:
    """The weights of a trial's terms.

    With `weighting` "fixed" they are the config's. With "share" they are the config's until the
    learning rate has warmed up (without warm-up: for the first 1 % of the steps, at least one), and
    then for the rest of the trial those of `weights_by_shares` for a fixed batch,
    `TrialData.probe`, measured once without dropout.

    Args:
        data: the trial's; model: the student.
        signals_of, terms_of: as for `training.evaluate`.

    Attributes:
        weights: of the next step, by term.
        step: how many steps are done when they are set.

    Raises:
        ValueError: training ends before the weights are set.
    """

    def __init__(
        self,
        data: TrialData,
        model: torch.nn.Module,
        signals_of: Callable[[torch.Tensor], Signals],
        terms_of: Callable[..., dict[str, torch.Tensor]],
    ) -> None:
        self.data, self.config, self.model = data, data.config, model
        self.signals_of, self.terms_of = signals_of, terms_of
        self.weights, steps = self.config.weights, data.total_steps
        warm_up = schedules.warmup_steps(steps, self.config.warmup_ratio)
        self.step = warm_up or max(round(steps / 100), 1)
        self._set: dict[str, float] = {}
        if self.config.shares:
            if self.step >= steps:
                raise ValueError(
                    f"weighting 'share' sets the weights after {self.step} of {steps} steps, which "
                    "leaves no step to use them: raise epochs or lower warmup_ratio"
                )
            self._probe = data.probe()  # now, while no thread reads the cache

    def before_step(self, measure: Meter) -> dict[str, float]:
        """The weights of the step that comes next, after they were set if it is time.

        A trial that resumes after that has them from the last row of its record.
        """
        if self.config.shares:
            if measure.global_step < self.step:
                self.weights = self.config.weights
            elif measure.global_step == self.step:
                self.weights = self._set = self._measured()
            else:
                self.weights = self._set or {
                    name: measure.rows[-1][f"weight/{name}"] for name in self.config.weights
                }
        return self.weights

    def _measured(self) -> dict[str, float]:
        was_training = self.model.training
        self.model.eval()
        with autocast(self.data.device, self.config.precision):
            signals = self.signals_of(self._probe.input_ids)
            terms = self.terms_of(signals, output_head(self.model), batch=self._probe)
        norms = training.gradient_norms(terms, self.model)
        self.model.train(was_training)
        return weights_by_shares(norms, self.config.weights, self.config.shares)
