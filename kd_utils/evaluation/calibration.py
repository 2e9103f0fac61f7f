"""Calibration of choices: confidence, reliability and expected calibration error."""

import numpy as np
import pandas as pd

#: Of the bins of confidence, 15 of equal width.
EDGES = np.linspace(0, 1, 16)


def confidences(predictions: pd.DataFrame) -> pd.DataFrame:
    """The model's confidence in each choice that it made: a probability among those offered.

    It is the largest value of the softmax over the choices' log-likelihoods, as in Jiang et al.
    2021 ("How can we know when language models know?").

    Args:
        predictions: `task`, `loglikelihoods` (nats, one per choice; None for generated answers),
            `correct`; further columns are kept.

    Returns:
        The rows that have choices, without `loglikelihoods`, with `confidence` in [1 / choices, 1].
    """
    chosen = predictions[predictions["loglikelihoods"].notna()]
    confidence = [
        float(1 / np.exp(np.subtract(values, max(values))).sum())
        for values in chosen["loglikelihoods"]
    ]
    return chosen.drop(columns="loglikelihoods").assign(
        confidence=confidence, correct=chosen["correct"].astype(bool)
    )


def reliability(confidence: np.ndarray, correct: np.ndarray) -> pd.DataFrame:
    """Accuracy and mean confidence in 15 bins of equal width (Guo et al. 2017, section 2).

    A bin includes its upper edge.

    Args:
        confidence: (n,) in [0, 1]; correct: (n,) bool.

    Returns:
        low, high, n, confidence (mean), accuracy; a row per bin that has examples.
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    if len(confidence) != len(correct) or not len(confidence):
        raise ValueError(
            f"{len(confidence)} confidences and {len(correct)} outcomes: give both per example"
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("a confidence is a probability: values must lie in [0, 1]")
    table = (
        pd.DataFrame({"bin": _bins(confidence), "confidence": confidence, "correct": correct})
        .groupby("bin", as_index=False)
        .agg(n=("correct", "size"), confidence=("confidence", "mean"), accuracy=("correct", "mean"))
    )
    table = table.assign(low=EDGES[table["bin"]], high=EDGES[table["bin"] + 1])
    return table[["low", "high", "n", "confidence", "accuracy"]]


def _bins(confidence: np.ndarray) -> np.ndarray:
    return pd.cut(confidence, EDGES, labels=False, include_lowest=True)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """ECE = sum over bins of n_b / n |accuracy_b - confidence_b| (Guo et al. 2017, eq. 3).

    It is between 0 (calibrated) and 1. With few examples it is biased upwards: even a calibrated
    model's is above 0.
    """
    table = reliability(confidence, correct)
    return float(np.average((table["accuracy"] - table["confidence"]).abs(), weights=table["n"]))


def calibrated_error(confidence: np.ndarray, draws: int = 200) -> float:
    """The mean calibration error of a calibrated model with these confidences: the bias of ECE."""
    confidence = np.asarray(confidence, dtype=float)
    right = np.random.default_rng(0).uniform(size=(draws, confidence.size)) < confidence
    in_bin = _bins(confidence)[:, None] == np.arange(len(EDGES) - 1)
    # n_b |accuracy_b - confidence_b| is the absolute sum over the bin of outcome minus confidence.
    return float(np.abs((right - confidence) @ in_bin).sum(axis=1).mean() / confidence.size)


def calibration_errors(predictions: pd.DataFrame) -> dict[str, float]:
    """`calibration_error/TASK`: expected calibration error of each task with choices."""
    return {
        f"calibration_error/{task}": expected_calibration_error(rows["confidence"], rows["correct"])
        for task, rows in confidences(predictions).groupby("task", sort=False)
    }


def reliability_by_method(predictions: pd.DataFrame) -> pd.DataFrame:
    """`reliability` of each method on each task with choices, all seeds together, for a figure.

    Args:
        predictions: `task`, `distill_type`, `loglikelihoods`, `correct`, as the run's records have
            them; also `setting` where further keys were swept, whose answers are kept apart.

    Returns:
        task, setting (if given), distill_type; low, high, n, confidence, accuracy of each bin that
        has answers; error, the expected calibration error over these bins. No rows if no task has
        choices.
    """
    keys = [key for key in ("task", "setting", "distill_type") if key in predictions]
    parts = []
    for names, rows in confidences(predictions).groupby(keys, sort=False):
        error = expected_calibration_error(rows["confidence"], rows["correct"])
        table = reliability(rows["confidence"], rows["correct"])
        parts.append(table.assign(**dict(zip(keys, names, strict=True)), error=error))
    columns = [*keys, "low", "high", "n", "confidence", "accuracy", "error"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
