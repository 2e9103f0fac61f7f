"""The published table, re-read: its own claims against what its numbers give."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

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
    assert "average 1.09, or weighted by the data's 5,000 + 1,000 + 1,000 examples 1.84" in tasks


def test_welch_is_scipys_and_the_published_one():
    a, b = np.random.default_rng(3).normal(0, 1, 7), np.random.default_rng(4).normal(1, 3, 7)
    found = published.welch(a.mean(), a.std(ddof=1), b.mean(), b.std(ddof=1), 7)
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval()
    assert (found["t"], found["p"], found["df"]) == pytest.approx(
        (test.statistic, test.pvalue, test.df)
    )
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_a_paired_test_gives_at_most_what_perfectly_correlated_trials_give():
    trials = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0])
    other = 10 + 2 * trials  # a correlation of 1
    rows = [(name, x.mean(), x.std(ddof=1)) for name, x in (("black_box", trials), ("new", other))]
    table = pd.DataFrame(rows, columns=["method", "mean", "sd"])
    [row] = published.paired(table).to_dict("records")
    test = stats.ttest_rel(other, trials)
    low, high = test.confidence_interval()
    assert (row["t"], row["p"]) == pytest.approx((test.statistic, test.pvalue))
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    mean = stats.t.interval(0.95, 6, other.mean(), stats.sem(other))
    assert published.means(table)[["low", "high"]].iloc[1].tolist() == pytest.approx(mean)
