"""The published table, re-read: its own claims against what its numbers give."""

import pandas as pd
import pytest

from kd_utils.analysis import published


def test_the_headline_difference_is_not_significant():
    found = published.reread().set_index("method")
    attention = found.loc["attention"]
    assert attention["difference"] == pytest.approx(1.58)
    assert (round(attention["t"], 2), round(attention["p"], 2)) == (1.26, 0.24)
    assert attention["low"] < 0 < attention["high"]
    assert attention["p_holm"] == pytest.approx(3 * attention["p"], rel=1e-6)
    assert (found["p_holm"] > 0.05).all() and (found["p_spread_holm"] > 0.05).all()


def test_the_rows_that_agree_are_found():
    assert published.identical_rows() == [["attention", "combined"]]
    other = published.TABLE.copy()
    other.loc[3, "sd"] = 1.44
    assert published.identical_rows(other) == []


def test_a_real_effect_would_be_seen_in_such_a_table():
    strong = pd.DataFrame(
        [("black_box", 90.0, 1.0), ("attention", 95.0, 1.0)], columns=["method", "mean", "sd"]
    )
    [row] = published.reread(strong).to_dict("records")
    assert (
        row["p"] < 0.001
        and row["low"] > 3
        and row["sd_ratio"] == 1
        and row["p_spread"] == pytest.approx(1)
    )
    assert published.smallest_detectable(strong) == pytest.approx(1.62, abs=0.03)


def test_the_readings_say_each_claim_and_what_supports_it():
    significant, paired, power, variance, combining, tasks = published.readings()
    assert "a paired t is 2.70 at most" in paired and "(p = 0.036)" in paired
    assert "t = 1.26, p = 0.24" in significant and significant.endswith("not supported.")
    assert "3.8 points" in power and "not supported" in variance
    assert "attention and combined agree to the last digit" in combining
    assert "sst2 +2.40, mmlu +0.79, gsm8k +0.09" in tasks
    assert "average 1.09, weighted by the data's 5,000 + 1,000 + 1,000 examples 1.84" in tasks
