"""Which layers of the teacher are compared with which of the student: pairs of numbers, counted
from 1.
"""

from __future__ import annotations

import difflib
import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError

PAIRS = re.compile(r"[1-9]\d{0,3}:[1-9]\d{0,3}( [1-9]\d{0,3}:[1-9]\d{0,3})*")

NAMED = ("last", "uniform", "reversed", "random")


def check_layers(choice: str) -> str:
    """The choice as it is.

    Raises:
        ValueError: neither a named choice nor pairs.
    """
    if choice not in NAMED and not PAIRS.fullmatch(choice):
        raise ValueError(
            f"Input should be one of {', '.join(NAMED)}, or pairs TEACHER:STUDENT with spaces "
            f"between, "
            "counted from 1 (such as '16:11 32:22')"
        )
    return choice


def _place(text: str) -> str:
    """A folder, or a model of the hub, which may be one: refused is what no file system takes."""
    if (
        not text.strip()
        or os.path.expanduser(text)[:1] == "~"
        or re.search(rb"(?s)[^/]{256}|.{1001}", text.encode())
    ):
        raise ValueError(
            "Input should be a path or a name: not blank, no unknown ~user, 255 bytes a part, 1000 "
            "in all"
        )
    return text


def _more_teachers(text: str) -> str:
    teacher_weights(text)
    return text


def teacher_weights(text: str) -> dict[str, float]:
    """`"other=0.4 another=.1"` -> {"other": 0.4, "another": 0.1}.

    Raises:
        ValueError: not of this form, or the trial's own teacher would have no weight.
    """
    weights: dict[str, float] = {}
    for part in text.split():
        name, _, weight = part.partition("=")
        if (
            not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name)
            or not re.fullmatch(r"0?\.\d{1,9}", weight)
            or name in weights
            or float(weight) == 0
        ):
            raise ValueError(
                "Input should be experiments with the weights of their teachers, above 0 and below "
                "1, "
                "such as 'other=0.4' (the trial's own has the rest), or ''"
            )
        weights[name] = float(weight)
    if sum(weights.values()) >= 1:
        raise ValueError(
            "Input should leave the trial's own teacher a weight: these sum to 1 or more"
        )
    return weights


def _named_places(text: str) -> str:
    for part in text.split():
        name, _, place = part.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name) or not place:
            raise ValueError("Input should be NAME=TOKENIZER, several with spaces between, or ''")
        _place(place)
    return text


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]

Place = Annotated[str, AfterValidator(_place)]

NamedPlaces = Annotated[str, AfterValidator(_named_places)]

MoreTeachers = Annotated[str, AfterValidator(_more_teachers)]

Layers = Annotated[str, AfterValidator(check_layers)]

PlaceOrBlank = Annotated[str, AfterValidator(lambda text: text.strip() and _place(text))]

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")]

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]  # more overflows in one or the other library

Count = Seed = Annotated[int, Field(ge=0, lt=2**31)]

Weight = Annotated[float, Field(ge=0.0)]

PositiveFloat = Annotated[float, Field(gt=0.0)]


def shown(value: Any) -> str:
    """A value as an error's one line shows it: its repr, cut where it is long."""
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:  # an int of more than 4,300 digits has no repr, and a stranger's may fail
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 150 else f"{text[:120]}... ({len(text):,} characters)"


def in_one_line(error: ValidationError, config: type[BaseModel]) -> str:
    """All that is wrong with a config: of each parameter its key, its value and what is allowed."""
    parts = []
    for item in error.errors():
        key, message = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        if item["type"] == "int_parsing_size":  # pydantic's words name no limit
            message = "Input should be positive and less than 2147483648"
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, config.model_fields, n=1)
            message = "no such parameter" + (f", did you mean {near[0]!r}?" if near else "")
        value = "" if not key or item["type"] == "missing" else f" = {shown(item['input'])}"
        parts.append(f"{key}{value}: {message}" if key else message)
    return f"{config.__name__}: " + "; ".join(parts)
