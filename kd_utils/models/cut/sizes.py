"""How large the model is that a cut leaves: counts or shares of its units, and its config."""

from typing import Any, NamedTuple

from kd_utils.models.cut.layers import kept_config
from kd_utils.models.cut.slots import require_family


class Sizes(NamedTuple):
    """Units of a decoder: layers, query heads a layer, neurons of each MLP, residual channels."""

    layers: int
    heads: int
    mlp: int
    width: int


def sizes_of(config: Any) -> Sizes:
    """The sizes that a config of the table's families describes."""
    return Sizes(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.hidden_size,
    )


def kept_sizes(config: Any, cuts: int = 1, **keep: str) -> Sizes:
    """The sizes that `keep_layers`, `keep_heads`, `keep_mlp` and `keep_width` ask for.

    Args:
        cuts: in how many cuts these sizes are to be reached; the result is that of the first of
            them. Their ratios are equal, as far as the family allows. Heads, which go by whole
            groups, go early, so that the later rounds train without them.
        keep: "all", a count ("96"), or a share above 0 and below 1 ("0.5"), which is rounded to
            the nearest number that is possible.

    Raises:
        ValueError: a count that is not possible, with the nearest one that is, whatever the round;
            a share that rounds to all of them; or another family of models.
    """
    require_family(config)
    if cuts > 1:
        kept_sizes(config, 1, **keep)  # refuses in the first round what the last could not have
    whole, groups = sizes_of(config), config.num_key_value_heads
    exact = {key: cuts == 1 and "." not in text for key, text in keep.items()}
    counts = {
        key: _count(key, text, getattr(whole, key.removeprefix("keep_")), cuts)
        for key, text in keep.items()
    }
    if (heads := counts["keep_heads"]) % groups:
        nearest = max(heads // groups if cuts > 1 else round(heads / groups), 1) * groups
        if exact["keep_heads"]:
            raise ValueError(
                f"keep_heads = {heads}: the {whole.heads} query heads share {groups} key/value "
                f"heads, and each of these groups must keep as many: set it to {nearest}"
            )
        heads = nearest
    sizes = Sizes(counts["keep_layers"], heads, counts["keep_mlp"], whole.width)
    width = counts["keep_width"], "keep_width"
    sizes = sizes._replace(width=legal_width(config, sizes, *width, exact=exact["keep_width"]))
    for name, count in sizes._asdict().items():
        asked = keep[f"keep_{name}"]
        if "." in asked and count == getattr(whole, name):
            raise ValueError(
                f"keep_{name} = {asked} of {count} rounds to all of them: give a smaller share, a "
                "count, or 'all'"
            )
    return sizes


def _count(parameter: str, text: str, whole: int, cuts: int) -> int:
    """How many units of `whole` the text asks for, after the first of so many cuts."""
    if text == "all":
        return whole
    count = max(round(float(text) * whole), 1) if "." in text else int(text)
    if not 1 <= count <= whole:
        raise ValueError(f"{parameter} = {count}: choose 1 to {whole}, or 'all'")
    return round(whole * (count / whole) ** (1 / cuts))


def legal_width(config: Any, sizes: Sizes, width: int, parameter: str, *, exact: bool) -> int:
    """`width`, if the family's config accepts it with these sizes; if not, the nearest that it
    accepts, or an error that names it. Llama's hidden_size must be divisible by its heads.

    Args:
        parameter: what asks for this width.
        exact: refuse a width that is not possible.
    """
    require_family(config)
    if not 1 <= width <= config.hidden_size:
        raise ValueError(f"{parameter} = {width}: choose 1 to {config.hidden_size}")
    near = sorted(range(1, config.hidden_size + 1), key=lambda k: (abs(k - width), -k))
    found = next(k for k in near if not _refusal(config, sizes._replace(width=k)))
    if exact and found != width:
        why = _refusal(config, sizes._replace(width=width))
        raise ValueError(f"{parameter} = {width}: {why}: set it to {found}")
    return found


def _refusal(config: Any, sizes: Sizes) -> str:
    """Why the family's config refuses these sizes, in one line; "" if it accepts them."""
    try:
        cut_config(config, sizes)
    except Exception as error:  # transformers' own class of errors, and each config's
        return " ".join(str(error).split()).rpartition("Error: ")[2].removesuffix(".")
    return ""


def cut_config(config: Any, sizes: Sizes, layers: list[int] | None = None) -> Any:
    """The config of a model of the source's family with these sizes, in a new object.

    Args:
        layers: those that are kept, counted from 0, whose own settings are kept too; None: the
            first ones.
    """
    if sizes == (whole := sizes_of(config)):
        return config
    require_family(config)
    if sizes.layers < whole.layers:
        config = kept_config(config, list(range(sizes.layers)) if layers is None else layers)
    settings = config.to_dict() | {
        "head_dim": head_dim(config),
        "hidden_size": sizes.width,
        "intermediate_size": sizes.mlp,
        "num_attention_heads": sizes.heads,
    }
    return type(config).from_dict(settings)


def head_dim(config: Any) -> int:
    """P, the width of one head, which no cut changes."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
