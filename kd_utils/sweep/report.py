"""What the `sweep` command prints: the plan before a run, and the outcome after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd

from kd_utils.analysis import comparisons, stats, tables
from kd_utils.records import run_folder

if TYPE_CHECKING:
    from kd_utils.sweep.planning import Trial
    from kd_utils.sweep.sweep import Sweep


def dry_run(sweep: Sweep) -> Iterator[str]:
    """What a run would do: the state of 01, 02 and each trial, and what these trials can show."""
    why, states = sweep.why_to_run(), sweep.states(sweep.chosen)
    for stem, reason in why.items():
        yield f"{stem:<32} {f'to run: {reason}' if reason else 'done'}"
    for name, state in states.items():
        yield f"{name:<32} {state.state}" + f": {state.why}" * bool(state.why)
    done = sum(state.state == "done" for state in states.values())
    yield (
        f"{done} of {len(states)} trials are done, {len(states) - done} to run; "
        f"records: {sweep.place}"
    )
    if done and any(why.values()):
        yield "If 01 or 02 make other data or another cache, the trials that are done run again too"
    yield from reach(sweep.chosen)


def reach(trials: list[Trial]) -> Iterator[str]:
    """Whether these trials can show anything: with many comparisons and few pairs no effect is
    significant, however large it is.
    """
    planned = pd.DataFrame(
        {
            "trial": trial.trial,
            "status": "done",
            **{f"config/{key}": value for key, value in trial.swept.items()},
        }
        for trial in trials
    )
    for row in comparisons.reach(tables.planned_trials(planned)).itertuples():
        can = row.smallest_p < stats.ALPHA
        yield (
            f"question {row.question}: {row.comparisons} comparisons of {row.pairs} pairs, "
            f"smallest corrected p {row.smallest_p:.3f}, "
            + ("can be significant" if can else "CANNOT be significant: give more seeds")
        )


def outcome(sweep: Sweep, results: pd.DataFrame) -> Iterator[str]:
    """The verdict of 04, or which trials are done; and where the records are."""
    analysed, verdict = "done" in set(results["status"]), sweep.run_dir / run_folder.VERDICT
    if analysed and verdict.exists():
        yield verdict.read_text(encoding="utf-8")
    else:
        yield tables.coverage(results)
    yield (
        f"Records: {sweep.place}/ (one executed notebook per trial in "
        f"trials/, {run_folder.SUMMARY}" + ", 04_analyse_results.ipynb" * analysed + ")"
    )
