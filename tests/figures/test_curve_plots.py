"""Figures of training over all trials: every seed, the mean with its spread, and the loss terms that the records
have.
"""

import numpy as np
import pytest
from test_result_plots import TRAINED, curves, rows_of, swept_terms, terms

from kd_utils.analysis import tables
from kd_utils.figures import curve_plots


def test_curves_hold_every_seed_and_the_mean_with_one_standard_deviation():
    rows = rows_of(curve_plots.learning_curves(curves(7), "validation_accuracy"))
    assert sum(r["row"] == "seed" for r in rows) == len(TRAINED) * 7 * 3
    [last] = [
        r
        for r in rows
        if r["row"] == "mean" and r["distill_type"] == "combined" and r["epoch"] == 3
    ]
    sd = np.std(np.arange(7.0), ddof=1)  # seeds differ by 1 point
    assert last["mean"] == pytest.approx(33.0) and last["high"] - last["mean"] == pytest.approx(sd)


def test_no_share_of_the_gradient_falls_off_the_log_scale():
    rows = [
        r for r in rows_of(curve_plots.loss_terms(terms(2))) if r["quantity"] == "gradient share"
    ]
    assert len(rows) == len(TRAINED) * 3 * 3
    shares = [r["value"] for r in rows if r["term"] == "attention"]
    assert shares == pytest.approx([0.01] * len(TRAINED) * 3)


def test_loss_terms_have_a_row_per_quantity_that_the_records_have():
    def titles(table):
        return [
            row["spec"]["encoding"]["y"]["title"]
            for row in curve_plots.loss_terms(table).to_dict()["vconcat"]
        ]

    assert titles(terms(2)) == ["value (log)", "value × weight (log)", "gradient share (%, log)"]
    without = curves(2).drop(columns=[f"weight/{term}" for term in ("task", "kd", "attention")])
    assert titles(tables.loss_terms(without)) == ["value (log)", "gradient share (%, log)"]


def test_loss_terms_of_several_settings_are_those_of_the_last_epoch_by_value():
    chart = curve_plots.loss_terms(swept_terms(2))
    rows = [r for r in rows_of(chart) if r["quantity"] == "value"]
    assert {r["epoch"] for r in rows} == {3} and len(rows) == 2 * 3 * 3
    assert {r["at"] for r in rows if r["distill_type"] == "black_box"} == {"10", "0.1", "1"}
    assert chart.to_dict()["vconcat"][0]["spec"]["encoding"]["x"]["scale"]["domain"] == [
        "0.1",
        "1",
        "10",
    ]
