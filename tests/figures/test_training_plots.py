"""The figure of one trial: a line per loss term and per task, and a picture that is small."""

import pandas as pd
import pytest
from test_result_plots import rows_of

from kd_utils.figures import plots
from kd_utils.figures.plots import SMALL, trial_curves
from kd_utils.records.provenance import code_of


def epoch(number: int, **terms: float) -> dict:
    accuracy = {
        "": 0.5,
        "/macro": 0.5,
        "/sst2": 0.1 * number,
        "/gsm8k": 0.3,
        "/gsm8k_flexible": 0.4,
    }
    return {
        "epoch": number,
        "train_loss": 1.0,
        **{f"train_loss/{term}": value / number for term, value in terms.items()},
        "held_out_loss": 0.4,
        "held_out_loss/kd": 0.7,
        **{f"held_out_accuracy{task}": value for task, value in accuracy.items()},
        "tok_per_sec": 19000.0,
    }


def lines(chart) -> dict[str, list]:
    found = {}
    for row in sorted(rows_of(chart), key=lambda row: row["epoch"]):
        found.setdefault(row["variable"], []).append(row["value"])
    return found


def test_a_line_per_term_of_the_trial_and_per_task():
    rows = [epoch(number, task=1.0, kd=2.0, new=3.0) for number in (1, 2)]
    assert lines(trial_curves(rows)) == {
        "task": [1.0, 0.5],
        "kd": [2.0, 1.0],
        "new": [3.0, 1.5],
        "task, held out": [0.4, 0.4],
        "sst2": [10.0, 20.0],
        "gsm8k": [30.0, 30.0],
    }


def test_an_untrained_student_has_one_point_per_line():
    assert list(lines(trial_curves([epoch(0)]))) == ["task, held out", "sst2", "gsm8k"]


@pytest.mark.parametrize(
    ("seen", "labelled"),
    [([1, 2, 3], [1, 2, 3]), ([0.3, 0.9, 1.8, 2.7, 3.0], [1, 2, 3]), ([0.1, 0.9, 1.0], None)],
)
def test_whole_epochs_are_labelled_where_parts_of_them_are_drawn(seen, labelled):
    axis = plots.epoch_axis(pd.Series(seen)).to_dict()["axis"]
    assert axis.get("values") == labelled and ("tickCount" in axis) == (labelled is None)


def test_the_picture_for_a_record_is_small():
    rows = [epoch(n, task=1.0, kd=2.0, hidden=0.5, attention=0.02) for n in range(1, 21)]
    image = plots.show(trial_curves(rows), **SMALL)
    assert image.data.startswith(b"\x89PNG") and len(image.data) < 12_000


def test_a_trial_that_draws_it_does_not_depend_on_the_analysis():
    code = code_of("03_train_student", start={"figures.plots"})
    assert not [name for name in code if "/analysis/" in name]
