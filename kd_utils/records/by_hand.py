"""Trials that were made by hand, without a sweep's plan: their names, where they are, and which of
them may stand in one table.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from kd_utils.config.base import NEVER_IN_A_RESULT
from kd_utils.config.project_paths import ROOT, project_path
from kd_utils.config.trial import TrialConfig, initial_settings, trial_name
from kd_utils.records import trial_record
from kd_utils.records.provenance import COMPUTING, Ingredients
from kd_utils.records.trial_status import PLAN, Status, why_stale
from kd_utils.store.sealed import RecordError

Metrics = dict[str, Any]

#: A trial is one of a method and a seed.
ALWAYS = ("distill_type", "seed")


def named_apart(config: TrialConfig) -> TrialConfig:
    """The config with a trial name under which no other trial has its record.

    The name is what `trial` gives, or METHOD_seedN. Where that is the record of a trial with other
    parameters, these are appended (`black_box_seed0_temperature=4.0`), so that nothing is
    overwritten but an earlier record of this very trial. A sweep's names are kept.

    03 asks twice, before it trains and before it writes: meanwhile another kernel may have written.

    Raises:
        ValueError: no sweep runs this trial, but the run folder is a sweep's, whose records it
            would replace.
    """
    if "KD_PROGRESS" in os.environ:  # a sweep runs it
        return config
    if (project_path(config.run_dir) / PLAN).exists():
        raise ValueError(
            f"run_dir = {config.run_dir!r} has the records of a sweep, which a trial by hand would "
            "replace: set run_dir to another folder, such as 'runs/explore'"
        )
    holder = _recorded(config)
    if holder is None or _is_same(holder, config):
        return config
    now, was = config.model_dump(), holder["config"]
    free = ({*now} - NEVER_IN_A_RESULT - {*ALWAYS} - config.without_effect) | {"name"}
    others = {key: now[key] for key in free if was.get(key) != now[key]}
    plain = trial_name(config.distill_type, config.seed)
    unlike = trial_name(config.distill_type, config.seed, **others).removeprefix(plain)
    name = config.trial_name[:100] + unlike
    apart = config.model_copy(update={"trial": name})
    taken = len(name) > 150 or not others or not _is_same(_recorded(apart), config)
    digest = Ingredients(config={"name": config.name, "config": config.fingerprint()}).digest
    whole = f"{config.trial_name[:100]}_{digest}"
    return config.model_copy(update={"trial": whole}) if taken else apart


def _recorded(config: TrialConfig) -> Metrics | None:
    """The whole record at the config's place, if there is one."""
    try:
        return trial_record.read_record(config.record_folder)
    except RecordError:
        return None


def _is_same(record: Metrics | None, config: TrialConfig) -> bool:
    """Whether a record may be replaced by one of this config: it is of the same trial, or none."""
    if record is None:
        return True
    found = record["config_hash"], record["config"].get("name")
    return found == (config.fingerprint(), config.name)


def find_run(name: str, run_dir: str = "", runs: Path = ROOT / "runs") -> Path:
    """The run folder to read: `run_dir` if given, else where a trial of this experiment was made
    last, by a sweep (`runs/NAME`) or by hand (`runs/explore`), else its latest dated record.

    Without `run_dir`, a folder counts only if it has the `metrics.json` of at least one trial.
    Records are named `YYYY-MM-DD-NAME`, and a day's second one `YYYY-MM-DD-NAME-2`. Their order is
    that of the names, because a clone gives every file a new time.

    Raises:
        FileNotFoundError: `run_dir` is no folder, or no run of this name has trials.
    """
    found = sorted({path.parents[2].name for path in runs.glob("*/trials/[!.]*/metrics.json")})
    hint = (
        f"(runs with trials: {', '.join(found) or 'none'}): run the sweep, or set run_dir to a run "
        f"folder"
    )
    if run_dir and not project_path(run_dir).is_dir():
        raise FileNotFoundError(f"there is no run folder {run_dir} {hint}")
    if run_dir:
        return project_path(run_dir)
    made_here = {folder: _last_trial(runs / folder, name) for folder in (name, "explore")}
    # Whatever lies in runs/NAME is of this experiment, damaged or not.
    made_here = {folder: time for folder, time in made_here.items() if time or folder == name}
    made_here = {folder: time for folder, time in made_here.items() if folder in found}
    if made_here:
        return runs / max(made_here, key=lambda folder: made_here[folder])
    records = [match for match in map(dated(name).fullmatch, found) if match]
    if records:
        return runs / max(records, key=lambda match: (match[1], int(match[2] or 1)))[0]
    raise FileNotFoundError(f"no run of {name!r} under {runs} has trials {hint}")


def dated(name: str) -> re.Pattern[str]:
    """What the folders of an experiment's kept records are called; they are never changed."""
    return re.compile(rf"(\d{{4}}-\d\d-\d\d)-{re.escape(name)}(?:-(\d+))?")


def _last_trial(run_dir: Path, experiment: str) -> float:
    """When the newest trial of an experiment began in a run's folder, seconds; 0: it has none."""
    times = [0.0]
    for path in run_dir.glob("trials/[!.]*/metrics.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            metrics = json.loads(path.read_bytes())
            times += [_started(metrics)] if metrics["config"]["name"] == experiment else []
    return max(times)


def found_trials(run_dir: str | Path, experiment: str = "") -> list[tuple[Metrics, Status]]:
    """Each record in a folder without a plan, as a plan would list it, with its status.

    The newest trial stands for the plan. Trials that were made from another teacher cache, initial
    student, tokenizer or code, with other versions of packages or another precision, are `stale`
    beside it; of several records of one trial the newest counts. Parameters that differ among the
    others are swept keys, so that only trials that agree in them are compared.

    Args:
        experiment: the newest trial of this experiment counts, if there is one; else of any.

    Returns:
        (`trial`, `swept`, `config_hash`) and its status, by name.
    """
    whole: dict[str, Metrics] = {}
    states: dict[str, Status] = {}
    for path in sorted(Path(run_dir).glob("trials/[!.]*/metrics.json")):
        try:
            whole[path.parent.name] = trial_record.read_record(path.parent)
        except RecordError as error:
            states[path.parent.name] = Status("broken", str(error))
    own = [name for name in whole if whole[name]["config"].get("name") == experiment]
    newest_first = sorted(whole, key=lambda name: _started(whole[name]), reverse=True)
    newest = next((name for name in newest_first if name in own), (newest_first or [""])[0])
    seen: dict[str, str] = {}
    known: dict[Any, Any] = {}
    for name in newest_first:
        if not (why := _unlike(whole[name], whole[newest], known)):
            known = _initial_weights(whole[name]) | known
        first = seen.setdefault(whole[name]["config_hash"], name) if not why else name
        states[name] = Status("stale", why) if why else Status("done")
        if first != name:
            states[name] = Status("repeated", f"{first} is the same trial, and newer")
    done = {name: whole[name] for name in whole if states[name].state == "done"}
    swept = _swept({name: metrics["config"] for name, metrics in done.items()})
    return [
        (
            {
                "trial": name,
                "swept": swept.get(name, {}),
                "config_hash": whole[name]["config_hash"] if name in whole else None,
            },
            states[name],
        )
        for name in sorted(states)
    ]


def _started(metrics: Metrics) -> float:
    try:
        return datetime.fromisoformat(metrics["started"]).timestamp()
    except ValueError:
        return 0.0


def _initial_weights(metrics: Metrics) -> dict[Any, Any]:
    """The model that a trial names -> its fingerprint; how the initial student is made -> its."""
    config, model = metrics["config"], metrics["config"].get("student")
    way = (model, config.get("student_init"), *initial_settings(config).values())
    return {model: metrics.get("student", {}).get("fingerprint"), way: metrics.get("initial")}


def _unlike(metrics: Metrics, newest: Metrics, known: dict[Any, Any]) -> str:
    """Why a trial cannot stand in one table with the newest one; "" if it can.

    Args:
        known: `_initial_weights` of newer trials. Students that are named or made in other ways
            differ by intention, but one way gives one student.
    """
    experiments = metrics["config"].get("name"), newest["config"].get("name")
    if experiments[0] != experiments[1]:
        return "it is of experiment {!r}, this table is of {!r}".format(*experiments)
    own = _initial_weights(metrics)
    model, way = own
    made = {
        "cache": newest["cache"],
        "more_caches": newest.get("more_caches", {}),
        "tokenizer": newest.get("tokenizer"),
        "students": {model: known.get(model)},
        "code": newest.get("code"),
    }
    reasons = [why_stale(metrics, metrics["config_hash"], made)]
    sides = [
        Ingredients(
            versions={name: record["versions"].get(name) for name in COMPUTING},
            arithmetic={"precision": record.get("precision")},
            student={"the initial student": initial},
        )
        for record, initial in ((metrics, own[way]), (newest, known.get(way, own[way])))
    ]
    return "; ".join(filter(None, [*reasons, sides[0].why_stale(sides[1])]))


def _swept(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Trial -> method, seed, and the parameters in which the trials differ, where it uses them."""
    used = {name: config.keys() - _without_effect(config) for name, config in configs.items()}
    keys = [key for config in configs.values() for key in config if key not in NEVER_IN_A_RESULT]
    differing = [
        key
        for key in dict.fromkeys(keys)
        if key not in ALWAYS
        and len({repr(configs[name].get(key)) for name in configs if key in used[name]}) > 1
    ]
    return {
        name: {key: config.get(key) for key in ALWAYS}
        | {key: config[key] for key in differing if key in used[name]}
        for name, config in configs.items()
    }


def _without_effect(config: dict[str, Any]) -> set[str]:
    """What a recorded config says has no effect; nothing, where it has keys that are not known."""
    try:
        return TrialConfig(**config).without_effect
    except ValueError:
        return set()
