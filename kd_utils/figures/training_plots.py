"""The figure of one trial's training, for the record that the trial leaves.

It reads the rows of one trial only and imports nothing of the analysis, so that a change there
leaves the trials as they are.
"""

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
    table = pd.DataFrame(rows).set_index("epoch")
    losses = table.filter(regex="^train_loss/").rename(columns=lambda key: key.split("/")[1])
    losses["task, validation"] = table["validation_loss"]
    losses = losses[losses > 0]
    tasks = table.filter(regex="^validation_accuracy/(?!macro|gsm8k_flexible)")
    tasks = 100 * tasks.rename(columns=lambda key: key.split("/")[1])
    known = TERM_COLOURS | {"task, validation": "#000000"}
    log = {"scale": alt.Scale(type="log", nice=False, padding=8), "axis": alt.Axis(format=".2~g")}
    linear = {"scale": alt.Scale(zero=False, padding=8)}
    chart = alt.hconcat(
        _panel(losses, alt.Y("value:Q", title="loss, unweighted (log)", **log), known),
        _panel(tasks, alt.Y("value:Q", title="validation accuracy (%)", **linear), {}),
    )
    return finish(chart.resolve_scale(color="independent"), "Learning curve", "")


def _panel(wide: pd.DataFrame, y: alt.Y, known: Mapping[str, str]) -> alt.Chart:
    """A line per column of the table."""
    legend = alt.Legend(title=None, values=list(wide))
    data = wide.reset_index().melt("epoch").dropna()
    lines = alt.Chart(data).mark_line(point={"size": 30}, strokeWidth=1.5)
    colours = colour("variable", wide, known, legend=legend)
    lines = lines.encode(x=epoch_axis(data["epoch"]), y=y, color=colours)
    return lines.properties(width=170, height=130)
