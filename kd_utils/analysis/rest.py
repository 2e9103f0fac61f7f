"""Has training come to rest? If not, a comparison is of speeds, not of ends.

Two criteria, both on held-out rows, which choose nothing that is compared: a method's mean over
seeds moves by less than a point in the last tenth of the steps, and with twice the steps under the
same schedule. The first alone does not do: a rate that decays to zero stops any run.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis import stats, tables
from kd_utils.config.base import NEVER_IN_A_RESULT
from kd_utils.config.trial import TrialConfig

Record = Mapping[str, Any]

#: A method is at rest if its mean moves by less: a point.
LIMIT = 0.01

#: Of so many seeds the mean is taken that twice the steps move: of fewer it moves by chance.
SEEDS = 3

HELD_OUT = "held_out_accuracy/macro"

#: The metrics of the two criteria, as in `analysis.csv`.
LAST_TENTH, TWICE = f"{HELD_OUT}, last tenth", f"{HELD_OUT}, twice the steps"

#: In what a trial and the one that measures its rest may differ.
FREE = NEVER_IN_A_RESULT | {"seed", "epochs"}


def last_tenth(records: Iterable[Record]) -> pd.DataFrame:
    """How far each method moves between 90 and 100 % of its steps.

    Args:
        records: of `run_folder.done_records`. The epoch rows of older ones have no `step`, or no
            held-out accuracy.

    Returns:
        metric (`LAST_TENTH`), setting, distill_type; planned (trained trials), n (those with the
        rows); mean, sd, low, high of the change over seeds, fractions. NaN where n is 0.
    """
    arms = _arms(records).items()
    return _moves(LAST_TENTH, {arm: list(map(_last_tenth, trials)) for arm, trials in arms})


def _last_tenth(record: Record) -> float:
    *rows, last = record["epochs"]
    steps = last.get("step", np.nan)
    before = [row for row in rows if abs(row.get("step", np.nan) - 0.9 * steps) < 1]
    return last.get(HELD_OUT, np.nan) - before[0].get(HELD_OUT, np.nan) if before else np.nan


def twice(
    records: Iterable[Record], of_run: Iterable[Record], beside: Iterable[Record] = ()
) -> pd.DataFrame:
    """How far twice the steps move each method.

    Rest is a property of the experiment, so the run that measured it may have another cache (made
    on another machine, say). Two trials are compared only with one cache and one initial student.

    Args:
        records: of the run. Its parameters must be those of the trials that measure its rest in all
            but `FREE`, where a method uses them.
        of_run: of the run that measured its rest: the same trials with twice the `epochs`.
        beside: trials with as many `epochs`; some may be in `of_run` instead.

    Returns:
        As `last_tenth`, of the metric `TWICE`; a seed counts where both its trials are done.
    """
    measuring = list(of_run)
    ends, longer_ends = _ends([*beside, *measuring]), _ends(measuring)
    changes = {}
    for arm, trials in _arms(records).items():
        place, epochs = _parameters(trials[0]), _epochs(trials[0])
        once, longer = ends.get((place, epochs), {}), longer_ends.get((place, 2 * epochs), {})
        changes[arm] = [longer[trial] - once[trial] for trial in once if trial in longer]
    return _moves(TWICE, changes)


def measured(
    records: list[Record], runs: Iterable[tuple[str, list[Record], list[Record]]]
) -> tuple[str, pd.DataFrame]:
    """The run that measured the rest of `records`, and `twice` of it: the first that agrees with
    them in some method; "" if there is none.

    Args:
        runs: of `run_folder.rest_runs`.
    """
    for name, of_run, beside in runs:
        moved = twice(records, of_run, beside)
        if moved["n"].any():
            return name, moved
    return "", twice(records, [])


def at_rest(moves: pd.DataFrame) -> bool | None:
    """Whether every method is at rest; None where that is not known (`unknown`).

    Args:
        moves: the rows of `last_tenth` and `twice`, one below the other.
    """
    if len(moving(moves)):
        return False
    return None if moves.empty or len(unknown(moves)) else True


def others_rest(moves: pd.DataFrame) -> bool:
    """Whether, of several methods, all are known to be at rest but those that are moving."""
    arms = pd.MultiIndex.from_frame(moves[tables.KEYS])
    moved = pd.MultiIndex.from_frame(moving(moves)[tables.KEYS])
    return at_rest(moves[~arms.isin(moved)]) is True


def moving(moves: pd.DataFrame) -> pd.DataFrame:
    """The rows of `moves` that show a method that is not at rest."""
    known = moves.drop(unknown(moves).index)
    return known[known["mean"].abs().round(12) >= LIMIT]


def unknown(moves: pd.DataFrame) -> pd.DataFrame:
    """The rows of `moves` that say nothing: of no trial, or of fewer than `SEEDS` twice as long."""
    least = (moves["metric"] == TWICE).map({True: SEEDS, False: 1})
    return moves[moves["n"] < least]


def _arms(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """(setting, method) -> its trained trials."""
    arms: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["final"]["epoch"] > 0:
            arm = tables.setting_text(record["swept"]), record["config"]["distill_type"]
            arms.setdefault(arm, []).append(record)
    return arms


def _ends(records: Iterable[Record]) -> dict[tuple[str, int], dict[tuple[str, ...], float]]:
    """(parameters, epochs) -> cache, initial student and seed -> held-out accuracy at the end."""
    ends: dict[tuple[str, int], dict[tuple[str, ...], float]] = {}
    for record in records:
        of_arm = ends.setdefault((_parameters(record), _epochs(record)), {})
        cache, student = record.get("cache", {}), record.get("student", {})
        made_from = cache.get("content_hash", ""), student.get("fingerprint", "")
        trial = (*made_from, record.get("initial", ""), record["config"]["seed"])
        of_arm[trial] = record["final"].get(HELD_OUT, np.nan)
    return ends


def _epochs(record: Record) -> int:
    return record["config"].get("epochs", 0)


def _parameters(record: Record) -> str:
    config, left_out = record["config"], set(FREE)
    with suppress(ValueError):  # keys of other code: all of them count
        known = TrialConfig(**config)
        # Of a parameter that is newer than the record, the default is what was done before.
        config, left_out = known.model_dump(), left_out | known.without_effect
    return repr(sorted((key, value) for key, value in config.items() if key not in left_out))


def _moves(metric: str, changes: Mapping[tuple[str, str], list[float]]) -> pd.DataFrame:
    rows = [
        {"metric": metric, "setting": setting, "distill_type": method, "planned": len(values)}
        | stats.interval(values)
        for (setting, method), values in changes.items()
    ]
    return pd.DataFrame(rows, columns=["metric", *tables.KEYS, *tables.SUMMARY])
