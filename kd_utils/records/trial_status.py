"""Whether a whole record of a trial is made from what is expected."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from kd_utils.config.base import NEVER_IN_A_RESULT
from kd_utils.records.provenance import Ingredients

#: A sweep's plan, in its run folder.
PLAN = "sweep.json"


class Status(NamedTuple):
    """`state` is done, failed, stale (made from something else), broken, missing or, without a
    plan, repeated (a newer record is of the same trial).
    """

    state: str
    why: str = ""


def why_stale(
    metrics: dict[str, Any],
    config_hash: str,
    made: Mapping[str, Any],
    parameters: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Why a whole record is not what is expected, in one line, or "".

    Args:
        config_hash, made, parameters: as for `run_folder.trial_status`.
    """
    config, student = metrics["config"], metrics["config"].get("student")
    if metrics["config_hash"] != config_hash:
        known = parameters.keys() & config.keys() - NEVER_IN_A_RESULT
        changed = [key for key in known if config[key] != parameters[key]]
        # A parameter that was reset to its notebook's default is not in `parameters`.
        was = {key: config[key] for key in changed} or {"config_hash": metrics["config_hash"]}
        asked = {key: parameters[key] for key in changed} or {"config_hash": config_hash}
        return Ingredients(config=was).why_stale(Ingredients(config=asked))
    weights, experiment = f"initial weights of {student}", str(config.get("name", "experiment"))
    then: dict[str, Any] = {
        "teacher cache": {
            experiment: metrics["cache"]["content_hash"],
            **metrics.get("more_caches", {}),
        },
        "student": {
            "tokenizer": metrics.get("tokenizer"),
            weights: metrics.get("student", {}).get("fingerprint"),
        },
    }
    expected = {
        "teacher cache": {
            experiment: (made.get("cache") or {}).get("content_hash"),
            **made.get("more_caches", {}),
        },
        "student": {
            "tokenizer": made.get("tokenizer"),
            weights: made.get("students", {}).get(student),
        },
    }
    now = {
        kind: {name: expected[kind].get(name) or value for name, value in names.items()}
        for kind, names in then.items()
    }
    then["code"] = metrics.get("code")
    return Ingredients(then).why_stale(Ingredients(now, code=made.get("code") or then["code"]))
