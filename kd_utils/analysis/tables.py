"""Tables over trials: what was planned and done, means with intervals over seeds, curves. Tidy in
and out.

The unit is the trial (one method, one seed). Accuracies are fractions (0 to 1) in every table but
`display_table` and `glance`. What the differences between methods are worth is for `comparisons`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis.stats import interval
from kd_utils.config.project_paths import ROOT, project_path
from kd_utils.config.trial import METHODS
from kd_utils.data.tasks.base import FLEXIBLE

ACCURACY = "validation_accuracy"

KEYS = ["setting", "distill_type"]


def find_run(name: str, run_dir: str = "", runs: Path = ROOT / "runs") -> Path:
    """The run folder to read: `run_dir` if given, else `runs/NAME` (what a sweep writes), else its
    latest dated record, else `runs/explore` (what 03 leaves when it is run by hand).

    Without `run_dir`, a folder counts when it has at least one trial's `metrics.json`. Records are
    `YYYY-MM-DD-NAME`, a day's second one `YYYY-MM-DD-NAME-2`; the name decides, because a clone
    gives every file a new time.

    Raises:
        FileNotFoundError: `run_dir` is no folder, or no run of that name has trials; names the runs
            that have.
    """
    having = sorted({path.parents[2].name for path in runs.glob("*/trials/[!.]*/metrics.json")})
    hint = f"(runs with trials: {', '.join(having) or 'none'}): sweep it, or set run_dir to a run folder"
    if run_dir:
        if not project_path(run_dir).is_dir():
            raise FileNotFoundError(f"no run folder {run_dir} {hint}")
        return project_path(run_dir)
    dated = re.compile(rf"(\d{{4}}-\d\d-\d\d)-{re.escape(name)}(?:-(\d+))?")
    own = [name] * (name in having) + sorted(
        filter(dated.fullmatch, having),
        key=lambda run: (dated.fullmatch(run)[1], int(dated.fullmatch(run)[2] or 1)),
    )
    if not own and "explore" in having:
        return runs / "explore"
    if not own:
        raise FileNotFoundError(f"no run of {name!r} with trials under {runs} {hint}")
    return runs / (name if name in own else own[-1])


def method_order(methods: Iterable[str]) -> list[str]:
    """The distinct methods, the known ones in the order of `config.METHODS`, then any other as
    first met.
    """
    present = list(dict.fromkeys(methods))
    return [m for m in METHODS if m in present] + [m for m in present if m not in METHODS]


def swept_keys(results: pd.DataFrame) -> list[str]:
    """Keys that the grid swept besides the method and the seed, from the columns `config/KEY`."""
    keys = [
        column.removeprefix("config/") for column in results.columns if column.startswith("config/")
    ]
    return [key for key in keys if key not in ("distill_type", "seed")]


def tasks_of(results: pd.DataFrame) -> list[str]:
    """Tasks that have an accuracy of their own, in the table's order
    (`validation_accuracy/TASK`).
    """
    found = [
        column.split("/", 1)[1] for column in results.columns if column.startswith(f"{ACCURACY}/")
    ]
    return [task for task in found if task != "macro" and not task.endswith(FLEXIBLE)]


def coverage(results: pd.DataFrame) -> str:
    """One sentence: how many of the trials are done, and which failed or are missing, by name."""
    parts = [f"{(results['status'] == 'done').sum()} of {len(results)} trials are done"]
    for status, rows in results[results["status"] != "done"].groupby("status"):
        parts.append(f"{len(rows)} {status}: {', '.join(rows['trial'])}")
    return "; ".join(parts) + "."


def planned_trials(results: pd.DataFrame) -> pd.DataFrame:
    """What each row of the results is: trial, setting (the other swept keys), distill_type, seed,
    done (bool).

    Raises:
        ValueError: no trial is done, a key is missing, or two rows are the same trial.
    """
    if not (results["status"] == "done").any():
        raise ValueError(
            f"no trial is done, so there is nothing to compare: {coverage(results)} Run the sweep "
            f"first."
        )
    _require_columns(results, "config/distill_type", "config/seed")
    table = pd.DataFrame(
        {
            "trial": results["trial"].to_numpy(),
            "setting": [
                _setting(row, swept_keys(results), "config/") for row in results.to_dict("records")
            ],
            "distill_type": results["config/distill_type"].to_numpy(),
            "seed": results["config/seed"].to_numpy(),
            "done": (results["status"] == "done").to_numpy(),
        }
    )
    twice = table[table.duplicated([*KEYS, "seed"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(
            f"two rows for {first.distill_type}, seed {first.seed} {first.setting}: "
            "give one row per trial, or all swept keys as config/KEY columns"
        )
    return table


def trial_values(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric of every planned trial, NaN where the trial is not done or the value is not
    finite.

    Args:
        results: row per planned trial: `trial`, `config/distill_type`, `config/seed`, further
            `config/KEY`, `status`, metrics.
        metric: a column of `results`.

    Returns:
        setting (the other swept keys that the trial uses, "temperature=4"; "" if none),
        distill_type, seed, value.

    Raises:
        ValueError: the column is not there; what `planned_trials` raises.
    """
    table = planned_trials(results)
    _require_columns(results, metric)
    value = pd.to_numeric(results[metric], errors="coerce").replace([np.inf, -np.inf], np.nan)
    return table.assign(value=np.where(table["done"], value, np.nan)).drop(
        columns=["trial", "done"]
    )


def _require_columns(results: pd.DataFrame, *columns: str) -> None:
    for column in columns:
        if column not in results:
            near = ", ".join(
                c for c in results.columns if c.startswith(column.split("/")[0])
            ) or ", ".join(results)
            raise ValueError(
                f"the results have no column {column!r} (there are: {near}): "
                "collect them again, or choose one of these"
            )


def summary_table(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per method and setting: mean and spread over seeds.

    Args:
        results: row per planned trial, as `records.collect` gives it.
        metric: a column of `results`; its unit is the unit of all values here.

    Returns:
        metric, setting, distill_type; planned (trials in the plan), n (done, with a finite value);
        mean, sd (n - 1), low, high (95 % t interval of the mean over seeds). NaN where n is too
        small to say.
    """
    values = trial_values(results, metric)
    rows = [
        {
            "metric": metric,
            "setting": setting,
            "distill_type": method,
            "planned": len(mine),
            **interval(mine["value"]),
        }
        for method in method_order(values["distill_type"])
        for setting, mine in values[values["distill_type"] == method].groupby("setting", sort=False)
    ]
    return pd.DataFrame(rows)


def per_task(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every done trial on every task, long.

    Returns:
        setting, distill_type, seed, task, accuracy (fraction); a row per trial and task with a
        finite accuracy.
    """
    parts = [
        trial_values(results, f"{ACCURACY}/{task}").assign(task=task) for task in tasks_of(results)
    ]
    if not parts:
        raise ValueError(
            f"the results have no column {ACCURACY}/TASK: collect them from trials that are done"
        )
    table = (
        pd.concat(parts, ignore_index=True)
        .dropna(subset=["value"])
        .rename(columns={"value": "accuracy"})
    )
    return table[[*KEYS, "seed", "task", "accuracy"]].reset_index(drop=True)


def is_accuracy(metric: str) -> bool:
    """Whether the metric is a fraction that tables show in per cent (and differences in points)."""
    return "accuracy" in metric or "calibration" in metric


def display_table(summary: pd.DataFrame) -> pd.DataFrame:
    """`summary_table`'s rows for the eye: accuracies in per cent, losses in nats per token, n of
    planned.
    """
    swept = summary["setting"].any()
    shown = [
        {
            "metric": row["metric"],
            **({"setting": row["setting"]} if swept else {}),
            "method": row["distill_type"],
            "n": f"{row['n']} of {row['planned']}",
            "mean": _number(row, ["mean"], "{}"),
            "sd": _number(row, ["sd"], "{}"),
            "95 % interval": _number(row, ["low", "high"], "[{}, {}]"),
        }
        for row in summary.to_dict("records")
    ]
    return pd.DataFrame(shown).set_index(
        [key for key in ("metric", "setting", "method") if key in shown[0]]
    )


def glance(results: pd.DataFrame, teacher: Mapping[str, float]) -> pd.DataFrame:
    """All rows at a glance, per cent: the teacher, the untrained student, and every method's mean
    +- sd over seeds.

    Args:
        results: as in `summary_table`.
        teacher: metric -> fraction, as `evaluation.accuracies` gives it.

    Returns:
        Index method (and setting where the grid swept more); n, mean of tasks, all examples, a
        column per task.
    """
    metrics = {
        "mean of tasks": f"{ACCURACY}/macro",
        "all examples": ACCURACY,
        **{task: f"{ACCURACY}/{task}" for task in tasks_of(results)},
    }
    columns = {}
    for name, metric in metrics.items():
        table = display_table(summary_table(results, metric)).droplevel("metric")
        columns.setdefault("n", table["n"])
        spread = table["sd"].map(lambda sd: "" if sd == "–" else f" ± {sd}")
        columns[name] = table["mean"] + spread
    shown = pd.DataFrame(columns)
    last = ("teacher",) if shown.index.nlevels == 1 else ("", "teacher")
    own = {
        name: f"{100 * teacher[metric]:.1f}" if metric in teacher else "–"
        for name, metric in metrics.items()
    }
    shown.loc[last if len(last) > 1 else last[0], :] = pd.Series({"n": "1"} | own)
    return shown


def _number(row: Mapping[str, Any], keys: Sequence[str], form: str) -> str:
    """Values for the eye, accuracies in per cent; a dash where there are none."""
    accuracy = is_accuracy(row["metric"])
    values = [row[key] * (100 if accuracy else 1) for key in keys]
    return (
        "–"
        if np.isnan(values).any()
        else form.format(*(f"{v:.1f}" if accuracy else f"{v:.3f}" for v in values))
    )


def setting_items(setting: str) -> dict[str, str]:
    """The swept keys of a setting's text: "temperature=4, gamma_hidden=1" -> their values, as
    text.
    """
    return dict(part.split("=", 1) for part in setting.split(", ")) if setting else {}


def beside_each_setting(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each whole setting, with those of methods that use fewer of its keys (or none)
    repeated there.
    """
    if table.empty:
        return table
    items = {setting: setting_items(setting).items() for setting in dict.fromkeys(table["setting"])}
    whole = [
        setting for setting in items if not any(items[setting] < other for other in items.values())
    ]
    return pd.concat(
        [
            table[[items[other] <= items[setting] for other in table["setting"]]].assign(
                setting=setting
            )
            for setting in whole
        ],
        ignore_index=True,
    )


def _setting(values: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> str:
    # A method that does not use a swept key has no value of it.
    return ", ".join(
        f"{key}={_short(values[prefix + key])}" for key in keys if not pd.isna(values[prefix + key])
    )


def _short(value: Any) -> str:
    # A CSV column read as 4.0 and a config's 4 are the same setting, and carry one name.
    return (
        f"{value:g}"
        if isinstance(value, int | float) and not isinstance(value, bool)
        else str(value)
    )
