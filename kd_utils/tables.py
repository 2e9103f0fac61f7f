"""Tables over trials: means with intervals over seeds, differences paired by seed, curves. Tidy tables in and out.

The unit is the trial (one method, one seed): all intervals are over seeds, and say nothing about other validation
examples, other data or another teacher. Accuracies are fractions (0 to 1) in every table but `display_table`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .config import METHODS, ROOT, resolve

BASELINE = "black_box"
ACCURACY = "validation_accuracy"
LOSS = "validation_loss"
NOT_A_TASK = ("macro", "gsm8k_flexible")
KEYS = ["setting", "distill_type"]


def find_run(name: str, run_dir: str = "", runs: Path = ROOT / "runs") -> Path:
    """The run folder to read: `run_dir` if given, else `runs/NAME` (what a sweep writes), else its latest dated record,
    else `runs/explore` (what 03 leaves when it is run by hand).

    Without `run_dir`, a folder counts when it has at least one trial's `metrics.json`. Records are `YYYY-MM-DD-NAME`;
    the date in the name decides, because a clone gives every file a new time.

    Raises:
        FileNotFoundError: `run_dir` is no folder, or no run of that name has trials; names the runs that have.
    """
    having = sorted({path.parents[2].name for path in runs.glob("*/trials/[!.]*/metrics.json")})
    hint = f"(runs with trials: {', '.join(having) or 'none'}): sweep it, or set run_dir to a run folder"
    if run_dir:
        if not resolve(run_dir).is_dir():
            raise FileNotFoundError(f"no run folder {run_dir} {hint}")
        return resolve(run_dir)
    own = [run for run in having if re.fullmatch(rf"(\d{{4}}-\d\d-\d\d-)?{re.escape(name)}", run)]
    if not own and "explore" in having:
        return runs / "explore"
    if not own:
        raise FileNotFoundError(f"no run of {name!r} with trials under {runs} {hint}")
    return runs / (name if name in own else own[-1])


def method_order(methods: Iterable[str]) -> list[str]:
    """The distinct methods, the known ones in the order of `config.METHODS`, then any other as first met."""
    present = list(dict.fromkeys(methods))
    return [m for m in METHODS if m in present] + [m for m in present if m not in METHODS]


def swept_keys(results: pd.DataFrame) -> list[str]:
    """Keys that the grid swept besides the method and the seed, from the columns `config/KEY`."""
    keys = [column.removeprefix("config/") for column in results.columns if column.startswith("config/")]
    return [key for key in keys if key not in ("distill_type", "seed")]


def tasks_of(results: pd.DataFrame) -> list[str]:
    """Tasks that have an accuracy of their own, in the table's order (`validation_accuracy/TASK`)."""
    found = [column.split("/", 1)[1] for column in results.columns if column.startswith(f"{ACCURACY}/")]
    return [task for task in found if task not in NOT_A_TASK]


def coverage(results: pd.DataFrame) -> str:
    """One sentence: how many of the trials are done, and which failed or are missing, by name."""
    parts = [f"{(results['status'] == 'done').sum()} of {len(results)} trials are done"]
    for status, rows in results[results["status"] != "done"].groupby("status"):
        parts.append(f"{len(rows)} {status}: {', '.join(rows['trial'])}")
    return "; ".join(parts) + "."


def trial_values(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric of every planned trial, NaN where the trial is not done or the value is not finite.

    Args:
        results: row per planned trial: `config/distill_type`, `config/seed`, further `config/KEY`, `status`, metrics.
        metric: a column of `results`.

    Returns:
        setting (the other swept keys, "temperature=4"; "" if none), distill_type, seed, value.

    Raises:
        ValueError: no trial is done, the column is not there, or two rows are the same trial.
    """
    if not (results["status"] == "done").any():
        raise ValueError(f"no trial is done, so there is nothing to compare: {coverage(results)} Run the sweep first.")
    for column in ("config/distill_type", "config/seed", metric):
        if column not in results:
            near = ", ".join(c for c in results.columns if c.startswith(column.split("/")[0])) or ", ".join(results)
            raise ValueError(f"the results have no column {column!r} (there are: {near}): "
                             "collect them again, or choose one of these")
    value = pd.to_numeric(results[metric], errors="coerce").replace([np.inf, -np.inf], np.nan)
    table = pd.DataFrame({
        "setting": [_setting(row, swept_keys(results), "config/") for row in results.to_dict("records")],
        "distill_type": results["config/distill_type"].to_numpy(),
        "seed": results["config/seed"].to_numpy(),
        "value": value.where(results["status"] == "done").to_numpy(dtype=float)})
    twice = table[table.duplicated([*KEYS, "seed"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(f"two rows for {first.distill_type}, seed {first.seed} {first.setting}: "
                         "give one row per trial, or all swept keys as config/KEY columns")
    return table


def interval(values: Sequence[float] | pd.Series, level: float = 0.95) -> dict[str, float]:
    """Mean, standard deviation and Student's t interval of the mean: mean +- t(n - 1) sd / sqrt(n).

    NaNs are left out, and n says how many values remain. sd has n - 1 in the denominator. With n = 1 the spread is
    unknown: sd and the interval are NaN. With n = 0 the mean is NaN too.

    Returns:
        n, mean, sd, low, high.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    n = len(values)
    mean = float(values.mean()) if n else np.nan
    if n < 2:
        return {"n": n, "mean": mean, "sd": np.nan, "low": np.nan, "high": np.nan}
    from scipy.stats import t

    sd = float(values.std(ddof=1))
    half = float(t.ppf((1 + level) / 2, n - 1)) * sd / np.sqrt(n)
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def paired_differences(results: pd.DataFrame, metric: str, baseline: str = BASELINE) -> pd.DataFrame:
    """Method minus baseline within each seed (and setting), for every seed of which both trials have a value.

    Returns:
        metric, setting, distill_type, seed, difference. Seeds without a partner are not in it; `summary_table`
        counts them.
    """
    values = trial_values(results, metric).dropna(subset=["value"])
    base = values[values["distill_type"] == baseline].rename(columns={"value": "base"})
    pairs = values[values["distill_type"] != baseline].merge(base[["setting", "seed", "base"]], on=["setting", "seed"])
    pairs = pairs.assign(metric=metric, difference=pairs["value"] - pairs["base"])
    return pairs[["metric", *KEYS, "seed", "difference"]]


def summary_table(results: pd.DataFrame, metric: str, baseline: str = BASELINE) -> pd.DataFrame:
    """One row per method: mean and spread over seeds, and the difference from the baseline paired by seed.

    Args:
        results: row per planned trial, as `records.collect` gives it.
        metric: a column of `results`; its unit is the unit of all values here.
        baseline: the method that the others are compared with, setting by setting.

    Returns:
        metric, setting, distill_type; planned (trials in the plan), n (done, with a finite value); mean, sd (n - 1),
        low, high (95 % t interval of the mean); pairs (seeds of which method and baseline both have a value),
        unpaired (seeds of which only one of the two has, left out of the difference); difference (mean over pairs),
        difference_sd, difference_low, difference_high (95 % t interval of the mean difference; no correction for
        the number of comparisons). NaN where n or pairs is too small to say, and in the baseline's own row.
    """
    values, differences = trial_values(results, metric), paired_differences(results, metric, baseline)
    rows = []
    for setting, of_setting in values.groupby("setting", sort=False):
        have = {method: set(of_method.dropna(subset=["value"])["seed"])
                for method, of_method in of_setting.groupby("distill_type")}
        for method in method_order(of_setting["distill_type"]):
            mine = of_setting.loc[of_setting["distill_type"] == method, "value"]
            chosen = (differences["setting"] == setting) & (differences["distill_type"] == method)
            paired = interval(differences.loc[chosen, "difference"])
            unpaired = 0 if method == baseline else len(have[method] ^ have.get(baseline, set()))
            rows.append({"metric": metric, "setting": setting, "distill_type": method, "planned": len(mine),
                         **interval(mine), "pairs": paired["n"], "unpaired": unpaired, "difference": paired["mean"],
                         **{f"difference_{key}": paired[key] for key in ("sd", "low", "high")}})
    return pd.DataFrame(rows)


def per_task(results: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every done trial on every task, long.

    Returns:
        setting, distill_type, seed, task, accuracy (fraction); a row per trial and task with a finite accuracy.
    """
    parts = [trial_values(results, f"{ACCURACY}/{task}").assign(task=task) for task in tasks_of(results)]
    if not parts:
        raise ValueError(f"the results have no column {ACCURACY}/TASK: collect them from trials that are done")
    table = pd.concat(parts, ignore_index=True).dropna(subset=["value"]).rename(columns={"value": "accuracy"})
    return table[[*KEYS, "seed", "task", "accuracy"]].reset_index(drop=True)


def learning_curves(records: Iterable[Mapping[str, Any]], swept: Sequence[str] = ()) -> pd.DataFrame:
    """The epoch rows of many trials as one table.

    Args:
        records: `metrics.json` of each trial (`config`, `epochs`).
        swept: keys of the config that the grid swept besides method and seed (`swept_keys`).

    Returns:
        setting, distill_type, seed, epoch, then every metric of the epoch rows (NaN where a method has no such term).
    """
    rows = [{"setting": _setting(record["config"], swept), "distill_type": record["config"]["distill_type"],
             "seed": record["config"]["seed"], **epoch}
            for record in records for epoch in record["epochs"]]
    if not rows:
        raise ValueError("no trial has an epoch: pass the records of at least one done trial")
    table = pd.DataFrame(rows)
    return table[[*KEYS, "seed", "epoch", *(c for c in table.columns if c not in (*KEYS, "seed", "epoch"))]]


def curve_spread(curves: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean over seeds of one metric at each epoch, with one standard deviation (n - 1) below and above it.

    Returns:
        setting, distill_type, epoch, n, mean, low, high; low and high are NaN where n = 1.
    """
    grouped = curves.dropna(subset=[metric]).groupby([*KEYS, "epoch"], sort=False)[metric]
    table = grouped.agg(n="count", mean="mean", sd="std").reset_index()
    return table.assign(low=table["mean"] - table["sd"], high=table["mean"] + table["sd"]).drop(columns="sd")


def gradient_shares(curves: pd.DataFrame) -> pd.DataFrame:
    """Each loss term's share of the gradient norm, mean over seeds.

    Returns:
        setting, distill_type, epoch, term, share (fraction); only the terms that a method has.
    """
    terms = [column for column in curves.columns if column.startswith("grad_share/")]
    if not terms:
        raise ValueError("the curves have no column grad_share/TERM: take them from records of 03_train_student")
    long = curves.melt([*KEYS, "seed", "epoch"], terms, "term", "share").dropna(subset=["share"])
    long["term"] = long["term"].str.removeprefix("grad_share/")
    return long.groupby([*KEYS, "epoch", "term"], sort=False)["share"].mean().reset_index()


def is_accuracy(metric: str) -> bool:
    """Whether the metric is a fraction that tables show in per cent (and differences in points)."""
    return "accuracy" in metric


def display_table(summary: pd.DataFrame) -> pd.DataFrame:
    """`summary_table`'s rows for the eye: accuracies in per cent and points, losses in nats per token, n of planned."""
    def show(row: dict[str, Any], keys: Sequence[str], form: str) -> str:
        accuracy = is_accuracy(row["metric"])
        values = [row[key] * (100 if accuracy else 1) for key in keys]
        digits = form.replace("#", ".1f" if accuracy else ".3f")
        return "–" if np.isnan(values).any() else digits.format(*values)

    swept = summary["setting"].any()
    shown = [{"metric": row["metric"], **({"setting": row["setting"]} if swept else {}),
              "method": row["distill_type"], "n": f"{row['n']} of {row['planned']}",
              "mean": show(row, ["mean"], "{:#}"), "sd": show(row, ["sd"], "{:#}"),
              "95 % interval": show(row, ["low", "high"], "[{:#}, {:#}]"),
              "minus black box": show(row, ["difference"], "{:+#}"),
              "its 95 % interval": show(row, ["difference_low", "difference_high"], "[{:+#}, {:+#}]"),
              "pairs": row["pairs"] or "–"}
             for row in summary.to_dict("records")]
    return pd.DataFrame(shown).set_index([key for key in ("metric", "setting", "method") if key in shown[0]])


def reading(summary: pd.DataFrame) -> list[str]:
    """Sentences that say each difference from the baseline with its interval, and which seeds were left out.

    No verdict: an interval that holds 0 does not show equality, and these intervals are not corrected for how many
    there are.
    """
    lines = []
    for row in summary.to_dict("records"):
        if row["distill_type"] == BASELINE:
            continue
        scale, unit, form = (100, "points", "+.1f") if is_accuracy(row["metric"]) else (1, "nats per token", "+.3f")
        setting = f" ({row['setting']})" if row["setting"] else ""
        what = f"{row['metric']}: {row['distill_type']} minus {BASELINE}{setting}"
        left_out = f"; {row['unpaired']} unpaired left out" if row["unpaired"] else ""
        if not row["pairs"]:
            lines.append(f"{what}: no seed has both trials{left_out}.")
            continue
        low, high = row["difference_low"] * scale, row["difference_high"] * scale
        over = f"[{low:{form}}, {high:{form}}] over {row['pairs']} paired seeds"
        over = over if row["pairs"] > 1 else "over 1 paired seed, which gives no interval"
        lines.append(f"{what}: {row['difference'] * scale:{form}} {unit} {over}{left_out}.")
    return lines


def against_teacher(summary: pd.DataFrame, teacher: Mapping[str, float]) -> pd.DataFrame:
    """Each method's mean beside the teacher's value of the same metric, for the metrics that the teacher has.

    Args:
        summary: rows of `summary_table`.
        teacher: metric -> value, as `evaluation.accuracies` gives it.

    Returns:
        metric, setting, distill_type, mean, teacher, gap (mean - teacher), all fractions.
    """
    table = summary[summary["metric"].isin(list(teacher))][["metric", *KEYS, "mean"]]
    table = table.assign(teacher=table["metric"].map(dict(teacher)).astype(float))
    return table.assign(gap=table["mean"] - table["teacher"]).reset_index(drop=True)


def _setting(values: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> str:
    return ", ".join(f"{key}={_short(values[prefix + key])}" for key in keys)


def _short(value: Any) -> str:
    # A CSV column read as 4.0 and a config's 4 are the same setting, and carry one name.
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
