"""A parameter file of several worlds: one experiment with other teachers, students or rows.

`worlds` lists the worlds' names, and `{world}` in any value stands for the name. A sweep alone
reads them: what a notebook gets are the values of one world.
"""

import re
from typing import Any

from kd_utils.config.fields import shown
from kd_utils.config.parameter_files import WORLDS

FIELD = "{world}"

MOST = 100


def parameters_by_world(parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters of each world; {} where there is one experiment alone.

    `{world}` as a whole value becomes a number where the world's name is one (`data_seed`). Each
    world is an experiment `NAME-WORLD`, with its own data, cache and models.

    Args:
        parameters: as `load_parameters` returns them. `worlds` has names or ranges of numbers, with
            spaces between: `1-7`, `llama2 mistral`.

    Raises:
        ValueError: `worlds` is no such list, or has fewer than two; or there are worlds without
            `{world}` in any value, or the other way round.
    """
    fields = [key for key, value in parameters.items() if FIELD in str(value)]
    if WORLDS not in parameters:
        if fields:
            raise ValueError(
                f"{fields[0]} has {FIELD}, but no {WORLDS} are given: add `{WORLDS}: 1-7`"
            )
        return {}
    names = _names(str(parameters[WORLDS]))
    if not fields:
        raise ValueError(
            f"{WORLDS} would all be the same, for no value has {FIELD}: write it into "
            f"what differs, such as `teacher: artifacts/embedded/toy-{FIELD}/teacher`"
        )
    rest = {key: value for key, value in parameters.items() if key != WORLDS}
    rest["name"] = f"{rest.get('name', 'toy')}-{FIELD}"
    return {name: {key: _of_world(value, name) for key, value in rest.items()} for name in names}


def _names(text: str) -> list[str]:
    names: list[str] = []
    for word in text.split():
        span = re.fullmatch(r"(\d{1,4})-(\d{1,4})", word)
        names += map(str, range(int(span[1]), int(span[2]) + 1)) if span else [word]
        if len(names) > MOST:
            break
    known = all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,49}", name) for name in names)
    if not known or not 2 <= len(set(names)) == len(names) <= MOST:
        raise ValueError(
            f"{WORLDS} = {shown(text)} must be 2 to {MOST} different names or ranges of numbers, "
            "with spaces between, such as 1-7, or llama2 mistral"
        )
    return names


def _of_world(value: Any, name: str) -> Any:
    if value == FIELD and re.fullmatch("0|[1-9][0-9]{0,3}", name):
        return int(name)
    return value.replace(FIELD, name) if isinstance(value, str) else value
