"""A new term of the loss, as somebody would add it: its class, one method, one parameter."""

import torch.nn.functional as F

from kd_utils.config.fields import Weight
from kd_utils.config.trial import METHODS, Method, TrialConfig
from kd_utils.distill.teacher_terms import LayerTerm, register
from kd_utils.distill.terms.hidden import make_projector

METHODS["cosine"] = Method({"task": "alpha", "kd": "beta", "cosine": "gamma_cosine"})
TrialConfig.add_parameter("gamma_cosine", Weight, default=1.0)


@register
class Cosine(LayerTerm):
    """L_cosine: the mean over tokens of 1 - cos(P h_s, h_t), of the final hidden states."""

    name, kind = "cosine", "hidden"

    def __init__(self, pairs, teacher_layers, widths, seed):
        super().__init__(pairs, teacher_layers)
        self.projector = make_projector(*widths, seed)

    @classmethod
    def of(cls, setup):
        widths = (setup.student.hidden_size, setup.shape["hidden_size"])
        pairs = setup.pairs("hidden", "last")
        return cls(pairs, setup.shape["num_hidden_layers"], widths, setup.seed(0))

    def compare(self, k, signals, layer, targets, column):
        student = self.projector(signals.layers[layer].flatten(0, 1)[targets.places])
        cosine = F.cosine_similarity(student.float(), targets.signals[column].float(), dim=-1)
        return (1 - cosine).sum() / self.count(targets.whole)
