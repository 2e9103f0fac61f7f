"""How often does a verdict repeat, in other worlds or on other machines?"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from kd_utils.analysis import questions
from kd_utils.config.project_paths import short_path
from kd_utils.records import run_folder

NUMBERS = ("difference", "difference_sd", "low", "high")


def outcomes(run_dirs: Iterable[str | Path]) -> pd.DataFrame:
    """Every comparison's outcome in every run.

    Args:
        run_dirs: runs that notebook 04 has analysed; of a run with several worlds, each world's.

    Returns:
        run, commit and threads (of torch; 0: not known) of the first trial that is done; of the
        primary metric question, setting, method, baseline, pairs, difference, difference_sd, low,
        high, outcome.

    Raises:
        FileNotFoundError: a run was not analysed.
    """
    keys = [*"question setting method baseline pairs".split(), *NUMBERS, "outcome"]
    parts = []
    for folder in _each(run_dirs):
        path = folder / run_folder.COMPARISONS
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no run folder {short_path(folder)}: give a folder such as runs/NAME"
            )
        if not path.is_file():
            raise FileNotFoundError(
                f"{short_path(folder)} has no {path.name}: finish its sweep first"
            )
        table = pd.read_csv(path).fillna({"setting": ""})
        table = table.loc[table["metric"] == questions.primary(table["metric"]), keys]
        records = run_folder.done_records(folder)
        first = records[0] if records else {}
        made = {
            "commit": first.get("git_commit", ""),
            "threads": first.get("arithmetic", {}).get("threads", 0),
        }
        parts.append(table.assign(run=short_path(folder.resolve()), **made))
    return pd.concat(parts, ignore_index=True)[["run", "commit", "threads", *keys]]


def repeated(table: pd.DataFrame) -> pd.DataFrame:
    """How often each comparison had each outcome.

    Args:
        table: of `outcomes`.

    Returns:
        question, setting, comparison; runs; a column of counts for each outcome that there is;
        lowest and highest difference, and the root mean square of difference_sd, in points.
    """
    table = table.assign(comparison=table["method"] + " minus " + table["baseline"])
    keys = ["question", "setting", "comparison"]
    groups = table.groupby(keys, sort=False)
    counts = pd.crosstab([table[key] for key in keys], table["outcome"]).reindex(
        groups.size().index
    )
    found = 100 * groups["difference"].agg(["min", "max"])
    spread = 100 * groups["difference_sd"].agg(lambda values: (values**2).mean() ** 0.5)
    shown = counts.assign(lowest=found["min"], highest=found["max"], sd=spread).round(1)
    shown.insert(0, "runs", groups.size())
    return shown.rename_axis(columns=None).reset_index()


def _each(run_dirs: Iterable[str | Path]) -> Iterator[Path]:
    """The run folders, with the worlds of those that have some."""
    for run in run_dirs:
        yield from run_folder.world_runs(run).values() or [Path(run)]
