"""The ways in which an initial student is made of its source: one row each, in one table.

Which parameters of a trial a way reads is said by `config.trial.INITIAL`, under the same names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kd_utils.models import loading
from kd_utils.models.cut import bases, layers, narrowing, pruning, sizes
from kd_utils.models.cut.slots import StoredModel
from kd_utils.models.importance import choosing
from kd_utils.models.importance.calibration import Calibration, leave_one_out, second_moments
from kd_utils.models.importance.scores import scores


class Way(NamedTuple):
    """How one value of `student_init` makes a model.

    Attributes:
        build: `build(name, revision, calibration, **settings)`: the same float32 model in every
            call. `name` and `revision` are the source's; `calibration` gives training rows.
        config: `config(source's config, **settings)`: that model's, for what only needs its sizes.
        reads_rows: whether the model depends on training rows, by the values of the settings.
    """

    build: Callable[..., torch.nn.Module]
    config: Callable[..., Any]
    reads_rows: Callable[[set[Any]], bool] = lambda _: False


def some_layers(
    name: str,
    revision: str = "",
    _: Calibration | None = None,
    *,
    student_layers: int,
) -> torch.nn.Module:
    """That many evenly spaced layers of a folder's or the hub's model, the first and the last too.

    DistilBERT was initialised with every second layer (Sanh et al. 2019).

    Raises:
        ValueError: more layers than there are, or fewer than two; or they are no model of their
            own.
    """
    model = loading.load_causal_lm(name, revision)
    return layers.keep_layers(model, layers.evenly_spaced(model, student_layers))


def random_weights(
    name: str,
    revision: str = "",
    _: Calibration | None = None,
    *,
    student_seed: int = 0,
    **keep: Any,
) -> torch.nn.Module:
    """The architecture only, in the sizes that `keep` leaves, with random weights from one seed."""
    from transformers import AutoModelForCausalLM

    source = loading.load_pretrained("AutoConfig", name, ("*.json",), revision)
    config = smaller_config(source, **keep)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(student_seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return loading.with_soft_capping(model).eval()  # no dropout, as a model that was loaded


def smaller_config(source: Any, rounds: int = 1, round: int = 1, **settings: Any) -> Any:
    """The config of the sizes that `keep_layers`, `keep_heads`, `keep_mlp`, `keep_width` leave, in
    this round of several cuts.
    """
    keep = {key: value for key, value in settings.items() if key.startswith("keep_")}
    if {*keep.values()} <= {"all"}:
        return source  # of any family
    return sizes.cut_config(source, sizes.kept_sizes(source, rounds - round + 1, **keep))


def narrowed(
    name: str,
    revision: str,
    calibration: Calibration,
    *,
    student_width: int,
    student_basis: str,
    student_output: str = "own",
    student_seed: int = 0,
) -> torch.nn.Module:
    """The source with a narrower residual stream, in a basis of `cut.bases`."""
    source = StoredModel(name, revision)
    size = source.config.hidden_size
    tied = student_output == "tied"
    narrowing.narrow_config(source.config, student_width, tied)  # refuses what is not possible
    calibration.require_known(source.config, name)
    if student_basis == "weights":
        basis = bases.of_weights(source, student_width)
    elif student_basis == "activations":
        model = loading.load_causal_lm(name, revision).eval()
        moments = second_moments(model, calibration.few_rows)
        basis = bases.top_eigenvectors(moments, student_width)
    elif student_basis == "channels":
        known = scores(calibration.sums_of(name, revision))
        kept = sizes.sizes_of(source.config)._replace(width=student_width)
        basis = bases.of_channels(choosing.kept_units(source.config, kept, known).width, size)
    else:
        basis = bases.at_random(size, student_width, student_seed)
    return narrowing.narrowed(source, basis, tied)


def pruned(
    name: str,
    revision: str,
    calibration: Calibration,
    *,
    importance: str,
    student_seed: int = 0,
    rounds: int = 1,
    round: int = 1,
    **keep: str,
) -> torch.nn.Module:
    """The source's units that `importance` ranks highest, in the sizes that `keep` leaves, in this
    round of several cuts; the source is the student of the round before.
    """
    source = StoredModel(name, revision)
    kept = sizes.kept_sizes(source.config, rounds - round + 1, **keep)
    calibration.require_known(source.config, name)
    if importance == "random":
        known = choosing.random_scores(source.config, student_seed)
    else:
        known = scores(calibration.sums_of(name, revision))
    if importance == "leave_one_out":
        model = loading.load_causal_lm(name, revision).eval()
        known = known._replace(layers=leave_one_out(model, calibration.few_rows))
    if importance == "lowest":
        known = choosing.reversed_scores(known)
    return pruning.pruned(source, choosing.kept_units(source.config, kept, known))


def _narrow(source: Any, *, student_width: int, student_output: str = "own", **_: Any) -> Any:
    return narrowing.narrow_config(source, student_width, student_output == "tied")


def _evenly(source: Any, *, student_layers: int) -> Any:
    return layers.kept_config(source, list(range(student_layers)))


#: By the parameter `student_init`. "pretrained" has no place here: nothing is made.
WAYS = {
    "layers": Way(some_layers, _evenly),
    "random": Way(random_weights, smaller_config),
    "svd": Way(
        narrowed,
        _narrow,
        reads_rows=lambda values: bool(values & {"activations", "channels"}),
    ),
    "pruned": Way(pruned, smaller_config, reads_rows=lambda values: "random" not in values),
}
