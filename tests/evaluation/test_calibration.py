"""Expected calibration error: by hand, at its limits, and over a trial's predictions."""

import numpy as np
import pandas as pd
import pytest

from kd_utils.evaluation.calibration import (
    calibrated_error,
    calibration_errors,
    confidences,
    expected_calibration_error,
    reliability,
)


def test_the_error_by_hand():
    # Two bins of 15: (8/15, 9/15] holds 0.55 and 0.6, one right; (14/15, 1] holds 1.0, right.
    confidence, correct = np.array([0.55, 0.6, 1.0]), np.array([True, False, True])
    table = reliability(confidence, correct)
    assert table[["n", "accuracy"]].values.tolist() == [[2, 0.5], [1, 1.0]]
    assert table[["low", "high"]].to_numpy() == pytest.approx(np.array([[8, 9], [14, 15]]) / 15)
    assert expected_calibration_error(confidence, correct) == pytest.approx(2 / 3 * 0.075)


def test_sure_and_right_is_0_and_sure_and_wrong_is_1():
    assert expected_calibration_error(np.ones(5), np.ones(5, bool)) == 0
    assert expected_calibration_error(np.ones(5), np.zeros(5, bool)) == 1


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_its_excess():
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 0.9, 200_000)
    right = rng.uniform(size=sure.size) < sure
    assert expected_calibration_error(sure, right) < 0.01
    assert expected_calibration_error(sure + 0.1, right) == pytest.approx(0.1, abs=0.01)


def test_a_calibrated_models_error_on_few_examples_is_not_0():
    sure = np.full(80, 0.4)
    floor = calibrated_error(sure)
    # |share of 80 right - 0.4| has mean sqrt(2 / pi) sqrt(0.24 / 80)
    assert floor == pytest.approx(np.sqrt(2 / np.pi * 0.24 / 80), rel=0.15)
    assert calibrated_error(np.full(8000, 0.4)) < floor / 5
    # Outcome by outcome, as the definition says.
    rng, mixed = np.random.default_rng(0), np.random.default_rng(1).uniform(0.25, 1, 50)
    each = [
        expected_calibration_error(mixed, right) for right in rng.uniform(size=(200, 50)) < mixed
    ]
    assert calibrated_error(mixed) == pytest.approx(np.mean(each))


def test_the_confidence_is_among_the_choices():
    table = pd.DataFrame(
        {
            "task": ["mmlu", "gsm8k", "mmlu"],
            "correct": [True, False, False],
            "loglikelihoods": [np.log([0.1, 0.3, 0.05, 0.05]) - 800, None, np.array([-1.0] * 4)],
        }
    )
    sure = confidences(table)
    assert sure["confidence"].tolist() == pytest.approx([0.6, 0.25])
    assert list(calibration_errors(table)) == ["calibration_error/mmlu"]
    assert calibration_errors(table)["calibration_error/mmlu"] == pytest.approx((0.4 + 0.25) / 2)


def test_generated_answers_alone_have_no_calibration():
    assert (
        calibration_errors(
            pd.DataFrame({"task": ["gsm8k"], "correct": [True], "loglikelihoods": [None]})
        )
        == {}
    )


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "0 confidences"),
        ([0.5], [True, False], "1 confidences and 2"),
        ([1.2], [True], "in \\[0, 1\\]"),
    ],
)
def test_what_is_no_probability_is_refused(confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        reliability(np.array(confidence), np.array(correct, dtype=bool))
