"""Draw the README's figure from the records: `python docs/figures/make.py`.

A panel shows the mean accuracy over tasks of every trial of one record. The picture is written to
`docs/figures/accuracy.png`. A panel is the newest record of an experiment of `EXPERIMENTS`: when a
record is replaced, run again.
"""

from pathlib import Path

import altair as alt
import pandas as pd

from kd_utils.analysis import tables
from kd_utils.analysis.words import findings
from kd_utils.figures import plots, result_plots
from kd_utils.records.run_folder import SUMMARY
from kd_utils.records.trial_record import read_record

ROOT = Path(__file__).resolve().parents[2]
MACRO = f"{tables.ACCURACY}/macro"
EXPERIMENTS = ("toy", "smol")
NEWEST = {findings.experiment(path): path for path in findings.newest(ROOT / "runs")}
PANELS = {name: f"runs/{NEWEST[name].name}" for name in EXPERIMENTS}


def accuracy_by_record(panels: dict[str, str]) -> alt.Chart:
    """The figure.

    Args:
        panels: a panel's title -> a run folder.
    """
    trials, teachers = [], {}
    for title, run_dir in panels.items():
        results = pd.read_csv(ROOT / run_dir / SUMMARY)
        values = tables.trial_values(results, MACRO).rename(columns={"value": "accuracy"})
        trials.append(values[values["distill_type"] != "untrained"].assign(task=title))
        trial = next((ROOT / run_dir).glob("trials/*/metrics.json")).parent
        teachers[f"{tables.ACCURACY}/{title}"] = read_record(trial)["teacher"]["accuracy"][MACRO]
    chart = result_plots.accuracy_by_task(pd.concat(trials), teachers)
    chart.title.text = "Accuracy, mean of the tasks, by method and record; one point per seed"
    return chart


if __name__ == "__main__":
    path = Path(__file__).with_name("accuracy.png")
    path.write_bytes(plots.show(accuracy_by_record(PANELS), scale=1.0).data)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")
