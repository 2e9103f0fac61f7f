"""Types of parameters, and how a bad value is shown: each type says which values it allows."""

import difflib
import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}"
PAIRS = re.compile(r"[1-9]\d{0,3}:[1-9]\d{0,3}( [1-9]\d{0,3}:[1-9]\d{0,3})*")
NAMED = ("last", "uniform", "reversed", "random")


def check_layers(choice: str) -> str:
    """Return a choice of layers: a named one, or pairs of teacher and student layers.

    Raises:
        ValueError: it is neither.
    """
    if choice not in NAMED and not PAIRS.fullmatch(choice):
        raise ValueError(
            f"Input should be one of {', '.join(NAMED)}, or pairs TEACHER:STUDENT separated by "
            "spaces, counted from 1 (such as '16:11 32:22')"
        )
    return choice


def _kept(value: Any) -> Any:
    """Text of how much of something is kept: a share of 1 is "all", a whole number a count."""
    return "all" if isinstance(value, float) and value == 1 else _as_text(value)


def _check_kept(text: str) -> str:
    if not re.fullmatch(r"all|[1-9]\d{0,8}|0?\.\d{1,9}", text) or text.strip("0.") == "":
        raise ValueError(
            "Input should be 'all', how many are kept (such as 96), or a share of them above 0 "
            "and below 1 (such as 0.5)"
        )
    return text


def teacher_weights(text: str) -> dict[str, float]:
    """`"other=0.4 another=.1"` -> {"other": 0.4, "another": 0.1}.

    Raises:
        ValueError: the text has another form, or leaves the trial's own teacher no weight.
    """
    pairs = re.findall(rf"(?<!\S)({NAME})=(0?\.\d{{1,9}})(?!\S)", text)
    weights = {name: float(weight) for name, weight in pairs}
    if len(weights) != len(text.split()) or 0 in weights.values():
        raise ValueError(
            "Input should be experiments with the weights of their teachers, above 0 and below 1, "
            "such as 'other=0.4' (the trial's own teacher gets the rest), or ''"
        )
    if sum(weights.values()) >= 1:
        raise ValueError(
            "Input should leave some weight to the trial's own teacher: these sum to 1 or more"
        )
    return weights


def rows_by_task(text: str) -> dict[str, int]:
    """`"sst2:600 mmlu:730"` -> {"sst2": 600, "mmlu": 730}.

    Raises:
        ValueError: not of this form, a task without rows, or a task that is named twice.
    """
    rows = _counts(text, ":", least=1)
    if not rows:
        raise ValueError(
            "Input should be TASK:ROWS, several with spaces between, such as 'sst2:600 mmlu:730': "
            "each task once and with at least 1 row (leave out a task that should have none)"
        )
    return rows


def _counts(text: str, sign: str, least: int) -> dict[str, int]:
    """Task -> number, of `"TASK:NUMBER TASK:NUMBER"` with another sign; {} for other text."""
    parts = [part.partition(sign)[::2] for part in text.split()]
    counts = {task: int(n) for task, n in parts if re.fullmatch("0|[1-9][0-9]{0,8}", n)}
    well_formed = len(counts) == len(parts) and "" not in counts
    return counts if well_formed and min(counts.values(), default=0) >= least else {}


TaskRows = Annotated[str, AfterValidator(lambda text: rows_by_task(text) and text)]


def label_counts(text: str, rows: dict[str, int]) -> dict[str, int]:
    """How many training rows of each task have a label.

    Args:
        text: a share of every task's rows, rounded, at least one row (`"0.15"`; "0" is none), or
            the most labels of some tasks (`"sst2:90 mmlu:100"`, or with `=`; the others have all
            their labels).
        rows: the training rows of each task.
    """
    if SHARE.fullmatch(text):
        share = float(text)
        return {task: max(round(share * n), 1) if share else 0 for task, n in rows.items()}
    counts = named_labels(text)
    return {task: min(counts.get(task, n), n) for task, n in rows.items()}


def named_labels(text: str) -> dict[str, int]:
    """The tasks whose labels a text counts, and how many; {} for a share."""
    return _counts(text, "=" if "=" in text else ":", least=0)


SHARE = re.compile(r"0|1|0?\.\d{1,9}")


def _labels(text: str) -> str:
    if not SHARE.fullmatch(text) and not named_labels(text):
        raise ValueError(
            "Input should be a share of every task's training rows, from 0 to 1 (such as '0.15'), "
            "or TASK:ROWS, several with spaces between (such as 'sst2:90 mmlu:0'), each task once"
        )
    return text


def _as_text(value: Any) -> Any:
    """A number as YAML reads it, as text: 1.0 is "1"."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:.9g}" if number else value


Labelled = Annotated[str, BeforeValidator(_as_text), AfterValidator(_labels)]


def _place(text: str) -> str:
    """Check a path, or the name of a model on the hub: refuse only what no file system accepts."""
    too_long = re.search(rb"(?s)[^/]{256}|.{1001}", text.encode())
    if not text.strip() or os.path.expanduser(text).startswith("~") or too_long:
        raise ValueError(
            "Input should be a path or a name: not blank, no unknown ~user, at most 255 bytes "
            "between slashes and 1000 bytes in all"
        )
    return text


def _named_places(text: str) -> str:
    for part in text.split():
        if not re.fullmatch(rf"{NAME}=.+", part):
            raise ValueError("Input should be NAME=TOKENIZER, several separated by spaces, or ''")
        _place(part.partition("=")[2])
    return text


Name = Annotated[str, Field(pattern=rf"^{NAME}$", max_length=80)]
Place = Annotated[str, AfterValidator(_place)]
NamedPlaces = Annotated[str, AfterValidator(_named_places)]
MoreTeachers = Annotated[str, AfterValidator(lambda text: text if teacher_weights(text) else "")]
Kept = Annotated[str, BeforeValidator(_kept), AfterValidator(_check_kept)]
Layers = Annotated[str, AfterValidator(check_layers)]
PlaceOrBlank = Annotated[str, AfterValidator(lambda text: text.strip() and _place(text))]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]  # more overflows in one library or another
Count = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Count
Weight = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Schedule = Literal["constant", "linear", "cosine"]  # of a learning rate: `distill.schedules`


def shown(value: Any) -> str:
    """A value as an error message shows it: its repr in one line, cut where it is long."""
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:  # an int of more than 4,300 digits has no repr; a foreign repr may fail
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 150 else f"{text[:120]}... ({len(text):,} characters)"


#: What users call the types that a value may have.
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "nothing",
}


def kind_of(value: Any) -> str:
    """The type of a value, in words and as Python names it: "text (str)"."""
    kind = type(value)
    return f"{KINDS.get(kind, 'a value')} ({kind.__name__})"


#: Errors of a wrong type, as pydantic names them -> what should have come.
EXPECTED = {
    "int_type": "a valid integer",
    "int_parsing": "a valid integer",
    "int_from_float": "a valid integer",
    "float_type": "a valid number",
    "float_parsing": "a valid number",
    "string_type": "text",
}


def in_one_line(error: ValidationError, config: type[BaseModel]) -> str:
    """Everything that is wrong with a config: each parameter's name, value and allowed values."""
    parts = []
    for item in error.errors():
        key, message = ".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")
        if expected := EXPECTED.get(item["type"]):
            quotes = ": put it in quotes" * isinstance(item["input"], (bool, int, float))
            message = f"Input should be {expected}, got {kind_of(item['input'])}"
            message += quotes * (item["type"] == "string_type")
        if item["type"] == "int_parsing_size":  # pydantic's message does not name the limit
            message = "Input should be positive and less than 2147483648"
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, config.model_fields, n=1)
            message = "no such parameter" + (f", did you mean {near[0]!r}?" if near else "")
        value = "" if not key or item["type"] == "missing" else f" = {shown(item['input'])}"
        parts.append(f"{key}{value}: {message}" if key else message)
    return f"{config.__name__}: " + "; ".join(parts)
