"""The figure of one trial's training, for the record that the trial leaves.

It reads the rows of one trial only and imports nothing of the analysis, so that a change there
leaves the trials as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from kd_utils.figures.plots import TERM_COLOURS, colour, epoch_axis, finish

#: Scale for `plots.show` with which the picture of a trial takes about 10 kB.
SMALL = 1.0


def trial_curves(rows: Sequence[Mapping[str, Any]]) -> alt.HConcatChart:
    """The learning curve of one trial: its loss terms in training and its validation loss by epoch,
    and the accuracy on each task.

    Args:
        rows: of `metrics.json`, one per epoch: `epoch`, `train_loss/TERM` (unweighted),
            `validation_loss` (nats per answer token), `validation_accuracy/TASK` (fraction).
    """
    long = pd.DataFrame(rows).melt("epoch", var_name="metric").dropna(subset=["value"])
    kind = long["metric"].str.partition("/")
    long = long.assign(kind=kind[0], name=kind[2])
    is_validation = long["metric"] == "validation_loss"
    long.loc[is_validation, "name"] = "task, validation"
    losses = long[((long["kind"] == "train_loss") & (long["name"] != "")) | is_validation]
    is_task = (long["kind"] == "validation_accuracy") & ~long["name"].isin(
        ["", "macro", "gsm8k_flexible"]
    )
    accuracies = long[is_task].assign(value=100 * long["value"])
    known = TERM_COLOURS | {"task, validation": "#000000"}
    log = alt.Scale(type="log", nice=False, padding=8)
    panels = [
        _panel(losses, alt.Y("value:Q", title="loss (log)", scale=log), known),
        _panel(accuracies, alt.Y("value:Q", title="accuracy (%)", scale=alt.Scale(zero=False)), {}),
    ]
    chart = alt.hconcat(*panels).resolve_scale(color="independent")
    return finish(chart, "Learning curve", "left: training terms, unweighted")


def _panel(data: pd.DataFrame, y: alt.Y, known: Mapping[str, str]) -> alt.Chart:
    names = list(dict.fromkeys(data["name"]))
    legend = alt.Legend(title=None, values=names)
    lines = alt.Chart(data).mark_line(point={"size": 30}, strokeWidth=1.5)
    lines = lines.encode(
        x=epoch_axis(data["epoch"]), y=y, color=colour("name", names, known, legend=legend)
    )
    return lines.properties(width=170, height=130)
