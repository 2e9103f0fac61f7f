"""Whether a choice model is as often right as it is sure: confidence, reliability and expected
calibration error.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

BINS = 15


def confidences(predictions: pd.DataFrame) -> pd.DataFrame:
    """How sure the model was of each choice that it made.

    The confidence is the largest of the softmax over the choices' log-likelihoods, as Jiang et al.
    2021 ("How can we know when language models know?") take it: probability among the choices
    offered, not among all continuations.

    Args:
        predictions: `task`, `loglikelihoods` (nats, one per choice; None for generated answers),
            `correct`; columns beside these are kept.

    Returns:
        The rows that have choices, without `loglikelihoods`, with `confidence` in [1 / choices, 1].
    """
    chosen = predictions[predictions["loglikelihoods"].notna()]
    values = [np.asarray(each, dtype=float) for each in chosen["loglikelihoods"]]
    sure = [float(1 / np.exp(each - each.max()).sum()) for each in values]
    return chosen.drop(columns="loglikelihoods").assign(
        confidence=sure, correct=chosen["correct"].astype(bool)
    )


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> pd.DataFrame:
    """Accuracy and mean confidence in bins of equal width; a bin holds its upper edge (Guo et al.
    2017, section 2).

    Args:
        confidence: (n,) in [0, 1]; correct: (n,) bool.

    Returns:
        low, high, n, confidence (mean), accuracy; a row per bin that has examples.
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    if len(confidence) != len(correct) or not len(confidence):
        raise ValueError(
            f"{len(confidence)} confidences and {len(correct)} outcomes: give one of each per "
            f"example"
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("a confidence is a probability: values must lie in [0, 1]")
    edges = np.linspace(0, 1, bins + 1)
    binned = pd.DataFrame(
        {"bin": _places(confidence, bins), "confidence": confidence, "correct": correct}
    )
    table = (
        binned.groupby("bin")
        .agg(n=("correct", "size"), confidence=("confidence", "mean"), accuracy=("correct", "mean"))
        .reset_index()
    )
    return table.assign(low=edges[table["bin"]], high=edges[table["bin"] + 1])[
        ["low", "high", "n", "confidence", "accuracy"]
    ]


def _places(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Which bin each confidence is in; a bin holds its upper edge."""
    return np.clip(
        np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1, 0, bins - 1
    )


def expected_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, bins: int = BINS
) -> float:
    """ECE = sum over bins of n_b / n |accuracy_b - confidence_b| (Guo et al. 2017, eq. 3); 0 is
    calibrated, at most 1.

    With few examples it is biased upwards: a calibrated model's is above 0 too.
    """
    table = reliability(confidence, correct, bins)
    return float(np.average((table["accuracy"] - table["confidence"]).abs(), weights=table["n"]))


def calibrated_error(confidence: np.ndarray, bins: int = BINS, draws: int = 200) -> float:
    """The expected calibration error that right confidences would have on average: the bias of few
    examples.
    """
    confidence = np.asarray(confidence, dtype=float)
    right = np.random.default_rng(0).uniform(size=(draws, confidence.size)) < confidence
    in_bin = _places(confidence, bins)[:, None] == np.arange(bins)
    # n_b |accuracy_b - confidence_b| is the absolute sum over the bin of outcome minus confidence.
    return float(np.abs((right - confidence) @ in_bin).sum(axis=1).mean() / confidence.size)


def calibration_errors(predictions: pd.DataFrame) -> dict[str, float]:
    """`calibration_error/TASK`: the expected calibration error of each choice task, a fraction."""
    return {
        f"calibration_error/{task}": expected_calibration_error(rows["confidence"], rows["correct"])
        for task, rows in confidences(predictions).groupby("task", sort=False)
    }


def reliability_by_method(predictions: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """`reliability` of each method on each choice task, the answers of all its seeds together: for
    a figure.

    Args:
        predictions: `records.predictions`: `task`, `distill_type`, `loglikelihoods`, `correct`;
            `setting` too where other keys were swept (from `tables.planned_trials`, by `trial`),
            else their answers would be mixed.

    Returns:
        task, setting (if it came), distill_type; low, high, n, confidence, accuracy of each bin
        that has answers;
        error: the expected calibration error over these bins. No rows if no task has choices.
    """
    keys = [key for key in ("task", "setting", "distill_type") if key in predictions]
    parts = [
        reliability(rows["confidence"], rows["correct"], bins).assign(
            **dict(zip(keys, names)),
            error=expected_calibration_error(rows["confidence"], rows["correct"], bins),
        )
        for names, rows in confidences(predictions).groupby(keys, sort=False)
    ]
    columns = [*keys, "low", "high", "n", "confidence", "accuracy", "error"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
