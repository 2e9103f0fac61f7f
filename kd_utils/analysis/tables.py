"""Tidy tables over trials: what was planned and done, means with intervals over seeds, curves.

The unit is the trial (one method, one seed). Accuracies are fractions (0 to 1). A setting is the
text of the swept keys besides method and seed that a trial uses: "temperature=4, gamma_hidden=1",
or "". The module `comparisons` compares methods, and `words.formatting` formats tables for a
reader.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis.stats import interval
from kd_utils.config.trial import METHODS
from kd_utils.data.tasks.base import FLEXIBLE

ACCURACY = "validation_accuracy"

#: The mean over the tasks on which the teacher has something to hand on, where some have nothing.
INFORMED = "informed"

#: The metrics over all examples or tasks; the other ones are tasks.
MEANS = ("macro", "micro", INFORMED)

KEYS = ["setting", "distill_type"]

#: What a table says of each metric and method.
SUMMARY = ["planned", "n", "mean", "sd", "low", "high"]


def known_first(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The distinct names: the known ones in their order, then the others in the order given."""
    place = {name: at for at, name in enumerate(known)}
    return sorted(dict.fromkeys(names), key=lambda name: place.get(name, len(place)))


def method_order(methods: Iterable[str]) -> list[str]:
    """The distinct methods in the order of `config.trial.METHODS`, unknown ones last."""
    return known_first(methods, METHODS)


def tasks_of(results: pd.DataFrame) -> list[str]:
    """Tasks with an accuracy of their own (`validation_accuracy/TASK`), in the table's order."""
    prefix = f"{ACCURACY}/"
    found = [column.removeprefix(prefix) for column in results if column.startswith(prefix)]
    return [task for task in found if task not in MEANS and not task.endswith(FLEXIBLE)]


def coverage(results: pd.DataFrame) -> str:
    """One sentence: how many trials are done, and the names of the failed and missing ones."""
    done = results["status"] == "done"
    others = [
        f"; {len(rows)} {status}: {', '.join(rows['trial'])}"
        for status, rows in results[~done].groupby("status")
    ]
    return f"{done.sum()} of {len(results)} trials are done{''.join(others)}."


def planned_trials(results: pd.DataFrame) -> pd.DataFrame:
    """The planned trials: trial, setting, distill_type, seed, done (bool).

    Without a plan these are the trials that are done; a row of another one has no `config/` values.

    Args:
        results: the table of `run_folder.collect`: a row per planned trial with `trial`,
            `config/distill_type`, `config/seed`, further `config/KEY`, `status` and metrics.

    Raises:
        ValueError: no trial is done, a column is missing, or two rows are the same trial.
    """
    if not (results["status"] == "done").any():
        raise ValueError(
            f"no trial is done, so there is nothing to compare: {coverage(results)} Run the sweep "
            f"first."
        )
    _require_columns(results, "config/distill_type", "config/seed")
    results = results[results["config/distill_type"].notna()]
    swept = results.filter(regex="^config/").rename(columns=lambda key: key.removeprefix("config/"))
    table = pd.DataFrame(
        {
            "trial": results["trial"].to_numpy(),
            "setting": [setting_text(row) for row in swept.to_dict("records")],
            "distill_type": results["config/distill_type"].to_numpy(),
            "seed": results["config/seed"].to_numpy(int),
            "done": (results["status"] == "done").to_numpy(),
        }
    )
    if (twice := table.duplicated([*KEYS, "seed"])).any():
        first = table[twice].iloc[0]
        raise ValueError(
            f"two rows for {first.distill_type}, seed {first.seed} {first.setting}: "
            "give one row per trial, or all swept keys as config/KEY columns"
        )
    return table


def trial_values(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric of every planned trial: trial, setting, distill_type, seed, value (NaN where the
    trial is not done or its value is not finite).

    Raises:
        ValueError: there is no such column, or as `planned_trials`.
    """
    table = planned_trials(results)
    _require_columns(results, metric)
    results = results[results["trial"].isin(table["trial"])]
    value = pd.to_numeric(results[metric], errors="coerce").replace([np.inf, -np.inf], np.nan)
    return table.assign(value=np.where(table["done"], value, np.nan)).drop(columns="done")


def _require_columns(results: pd.DataFrame, *columns: str) -> None:
    for column in columns:
        if column not in results:
            near = [name for name in results if name.startswith(column.split("/")[0])]
            raise ValueError(
                f"the results have no column {column!r} (there are: {', '.join(near or results)}): "
                "collect them again, or choose one of these"
            )


def summary_table(results: pd.DataFrame, *metrics: str) -> pd.DataFrame:
    """Mean and spread over seeds, a row per metric, method and setting.

    Args:
        results: as in `planned_trials`.
        metrics: columns of `results`; values are in the metric's unit.

    Returns:
        metric, setting, distill_type; planned (trials), n (done, with a finite value); mean, sd (n
        - 1), low, high (95 % t interval of the mean over seeds). NaN where n is too small.
    """
    rows = []
    for metric in metrics:
        values = trial_values(results, metric)
        order = method_order(values["distill_type"])
        arms = values.groupby(KEYS, sort=False)["value"]
        rows += [
            {"metric": metric, "setting": setting, "distill_type": method, "planned": len(trials)}
            | interval(trials)
            for (setting, method), trials in sorted(arms, key=lambda arm: order.index(arm[0][1]))
        ]
    return pd.DataFrame(rows, columns=["metric", *KEYS, *SUMMARY])


def per_task(results: pd.DataFrame, tasks: Sequence[str] = ()) -> pd.DataFrame:
    """Accuracy of every done trial on every task, long.

    Args:
        results: as in `planned_trials`.
        tasks: those of `tasks_of` if empty; "macro" may be one.

    Returns:
        setting, distill_type, seed, task, accuracy (fraction); a row per trial and task with a
        finite accuracy.
    """
    tasks = tasks or tasks_of(results) or ["TASK"]
    parts = [trial_values(results, f"{ACCURACY}/{task}").assign(task=task) for task in tasks]
    table = pd.concat(parts, ignore_index=True).rename(columns={"value": "accuracy"})
    return table[[*KEYS, "seed", "task", "accuracy"]].dropna(ignore_index=True)


def is_accuracy(metric: str) -> bool:
    """Whether the metric is a fraction, shown in per cent (and its differences in points)."""
    return "accuracy" in metric or "calibration" in metric


def setting_text(swept: Mapping[str, Any]) -> str:
    """The setting of a trial from its swept keys and values; NaN: its method has no such key."""
    return ", ".join(
        f"{key}={_short(value)}"
        for key, value in swept.items()
        if key not in ("distill_type", "seed") and not pd.isna(value)
    )


def _short(value: Any) -> str:
    # A CSV column read as 4.0 and a config's 4 are the same setting and get the same text.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:g}" if is_number else str(value)


def setting_items(setting: str) -> dict[str, str]:
    """The keys of a setting and their values, as text: "a=4, b=1" -> {"a": "4", "b": "1"}."""
    return dict(part.split("=", 1) for part in setting.split(", ")) if setting else {}


def beside_each_setting(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each full setting, and beside it those of methods that use only some of its keys
    or none, repeated.
    """
    items = {setting: setting_items(setting).items() for setting in dict.fromkeys(table["setting"])}
    full = [key for key in items if not any(items[key] < other for other in items.values())]
    parts = [
        table[[items[other] <= items[setting] for other in table["setting"]]].assign(
            setting=setting
        )
        for setting in full
    ]
    return pd.concat(parts, ignore_index=True) if parts else table


def learning_curves(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """What many trials measured while they trained, as one table; an untrained student has none.

    Args:
        records: of `run_folder.done_records`: `metrics.json` of each trial with `swept`.

    Returns:
        setting, distill_type, seed, epoch, then every metric of the rows (NaN where there is none).
    """
    rows = [
        {
            "setting": setting_text(record["swept"]),
            "distill_type": record["config"]["distill_type"],
            "seed": record["config"]["seed"],
            **row,
        }
        for record in records
        for row in record["epochs"]
        if row["epoch"] > 0
    ]
    return pd.DataFrame(rows, columns=None if rows else [*KEYS, "seed", "epoch"])


def while_training(curves: pd.DataFrame, quantity: str) -> str:
    """The column that has "accuracy" or "loss" while the students trained: of the held-out rows, or
    of the validation rows in records from before there were held-out rows.
    """
    return f"held_out_{quantity}" if f"held_out_{quantity}" in curves else f"validation_{quantity}"


def curve_spread(curves: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric by epoch: setting, distill_type, epoch, n, mean over seeds, and low and high,
    one standard deviation (n - 1) below and above it; NaN where n = 1.
    """
    by_epoch = curves.dropna(subset=[metric]).groupby([*KEYS, "epoch"], sort=False)[metric]
    table = by_epoch.agg(n="count", mean="mean", sd="std").reset_index()
    sd = table.pop("sd")
    return table.assign(low=table["mean"] - sd, high=table["mean"] + sd)


def loss_terms(curves: pd.DataFrame) -> pd.DataFrame:
    """Each loss term by epoch, mean over seeds.

    Returns:
        setting, distill_type, epoch, term, quantity ("value", "weighted value", "gradient share" of
        the norm), value; only the terms that a method has. Older records have no weights.
    """
    columns = [*KEYS, "epoch", "term", "quantity"]
    if curves.empty:
        return pd.DataFrame(columns=[*columns, "value"])
    terms = [name.removeprefix("grad_share/") for name in curves if name.startswith("grad_share/")]
    if not terms:
        raise ValueError(
            "the curves have no column grad_share/TERM: take them from records of 03_train_student"
        )
    parts, absent = [], pd.Series(np.nan, index=curves.index)
    for term in terms:
        value = curves.get(f"train_loss/{term}", absent)
        quantities = {
            "value": value,
            "weighted value": value * curves.get(f"weight/{term}", absent),
            "gradient share": curves[f"grad_share/{term}"],
        }
        parts += [
            curves[columns[:3]].assign(term=term, quantity=quantity, value=values)
            for quantity, values in quantities.items()
        ]
    long = pd.concat(parts).dropna(subset=["value"])
    return long.groupby(columns, sort=False)["value"].mean().reset_index()
