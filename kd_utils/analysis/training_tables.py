"""Tables over trials: what was planned and done, means with intervals over seeds, curves. Tidy in
and out.

The unit is the trial (one method, one seed). Accuracies are fractions (0 to 1) in every table but
`display_table` and `glance`. What the differences between methods are worth is for `comparisons`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis.tables import (
    KEYS,
    _setting,
)


def learning_curves(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The epoch rows of many trials as one table; an untrained student has no curve and is left
    out.

    Args:
        records: `records.done_records`: `metrics.json` of each trial (`config`, `epochs`) with
            `swept`.

    Returns:
        setting, distill_type, seed, epoch, then every metric of the epoch rows (NaN where a method
        has no such term).
    """
    rows = [
        {
            "setting": _setting(
                record["swept"], [k for k in record["swept"] if k not in ("distill_type", "seed")]
            ),
            "distill_type": record["config"]["distill_type"],
            "seed": record["config"]["seed"],
            **epoch,
        }
        for record in records
        for epoch in record["epochs"]
        if epoch["epoch"] > 0
    ]
    table = pd.DataFrame(rows, columns=None if rows else [*KEYS, "seed", "epoch"])
    return table[
        [*KEYS, "seed", "epoch", *(c for c in table.columns if c not in (*KEYS, "seed", "epoch"))]
    ]


def curve_spread(curves: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean over seeds of one metric at each epoch, with one standard deviation (n - 1) below and
    above it.

    Returns:
        setting, distill_type, epoch, n, mean, low, high; low and high are NaN where n = 1.
    """
    grouped = curves.dropna(subset=[metric]).groupby([*KEYS, "epoch"], sort=False)[metric]
    table = grouped.agg(n="count", mean="mean", sd="std").reset_index()
    return table.assign(low=table["mean"] - table["sd"], high=table["mean"] + table["sd"]).drop(
        columns="sd"
    )


def loss_terms(curves: pd.DataFrame) -> pd.DataFrame:
    """Each loss term by epoch, mean over seeds: its value, its value times its weight, its share of
    the gradient norm.

    Returns:
        setting, distill_type, epoch, term, quantity ("value", "weighted value", "gradient share"),
        value; only the terms that a method has. Records from before weights were kept have no
        weighted values.
    """
    terms = [
        column.removeprefix("grad_share/")
        for column in curves.columns
        if column.startswith("grad_share/")
    ]
    if not terms:
        raise ValueError(
            "the curves have no column grad_share/TERM: take them from records of 03_train_student"
        )
    parts = []
    for term in terms:
        absent = pd.Series(np.nan, index=curves.index)
        value, weight = (
            curves.get(f"{prefix}/{term}", absent) for prefix in ("train_loss", "weight")
        )
        for quantity, column in (
            ("value", value),
            ("weighted value", value * weight),
            ("gradient share", curves[f"grad_share/{term}"]),
        ):
            parts.append(
                curves[[*KEYS, "epoch"]].assign(term=term, quantity=quantity, value=column)
            )
    long = pd.concat(parts, ignore_index=True).dropna(subset=["value"])
    return (
        long.groupby([*KEYS, "epoch", "term", "quantity"], sort=False)["value"].mean().reset_index()
    )
