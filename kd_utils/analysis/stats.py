"""Statistics of trials that pair by seed: tests, intervals, equivalence, spread, power. Arrays in,
numbers out.

A trial is one method at one seed; all trials of a seed share the order of the data, dropout and the
student's initial weights, and all trials answer the same validation examples. What is tested is
therefore the difference within a seed. The tests are scipy's and statsmodels'; what is ours is
their arrangement. Differences below 1e-12 are rounding: accuracies are ratios of small integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

ALPHA = 0.05

POWER = 0.8

#: Every assignment of signs is looked at where there are no more than so many (14 pairs); else so
#: many random ones.
SIGN_FLIPS = 2**14

#: With fewer pairs neither equality nor a spread is tested: Brown and Forsythe's test always
#: rejects with two.
FEWEST = 5

ROUNDING = 1e-12


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the paired differences' mean under exchange of each pair's members (Fisher's
    sign-flip test).

    Exact for up to 14 pairs: no distribution is assumed but that, without an effect, a difference
    is as likely as its negative. The smallest p that n pairs can give is 2 / 2^n.

    Args:
        differences: one per pair; NaN where there is none.

    Returns:
        p in (0, 1]; NaN for fewer than two pairs.
    """
    values = _finite(differences)
    return float(_sign_flip_p(values[None])[0]) if len(values) > 1 else np.nan


def _sign_flip_p(rows: np.ndarray) -> np.ndarray:
    """`sign_flip_p` of each row of (m, n)."""
    from scipy.stats import permutation_test

    def mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.round(
            np.mean(values, axis=axis), 12
        )  # else rounding would break ties between assignments

    batch = max(2**22 // (len(rows) * rows.shape[1]), 1)
    return permutation_test(
        (rows,),
        mean,
        permutation_type="samples",
        axis=1,
        vectorized=True,
        batch=batch,
        n_resamples=SIGN_FLIPS,
        rng=np.random.default_rng(0),
    ).pvalue


def smallest_p(n: int) -> float:
    """The smallest two-sided p of the sign-flip test with n pairs: 2 / 2^n, or what so many random
    flips can give.
    """
    return min(max(2.0 ** (1 - n), 2 / (SIGN_FLIPS + 1) if 2**n > SIGN_FLIPS else 0.0), 1.0)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """p adjusted for the comparisons of a family (Holm 1979); NaNs stay NaN but count in the
    family's size.

    A comparison that was planned and could not be made does not make the others easier.
    """
    # statsmodels' multipletests gives the same (a test) but collects garbage at each call: 50 ms,
    # 60 times an analysis.
    p = np.asarray(p, dtype=float)
    order = np.argsort(np.where(np.isnan(p), 1.0, p))
    steps = np.maximum.accumulate(np.where(np.isnan(p), 1.0, p)[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1.0)
    return np.where(np.isnan(p), np.nan, adjusted)


def hedges_g(values: Sequence[float], baseline: Sequence[float]) -> float:
    """(mean - baseline's mean) / pooled standard deviation over seeds, corrected for few seeds
    (Hedges 1981).

    The spread is that of the trials, not of the differences, so that the published table's effect
    is measured alike. NaN for fewer than two values or no spread.
    """
    values, baseline = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    return (
        hedges_g_from_summary(
            values.mean(),
            values.std(ddof=1),
            len(values),
            baseline.mean(),
            baseline.std(ddof=1),
            len(baseline),
        )
        if min(len(values), len(baseline)) > 1
        else np.nan
    )


def hedges_g_from_summary(
    mean: float, sd: float, n: int, mean_0: float, sd_0: float, n_0: int
) -> float:
    """`hedges_g` from means, standard deviations (n - 1) and counts."""
    from statsmodels.stats.meta_analysis import effectsize_smd

    return (
        float(effectsize_smd(mean, sd, n, mean_0, sd_0, n_0)[0])
        if max(sd, sd_0) > ROUNDING
        else np.nan
    )


def equivalence_p(values: Sequence[float], baseline: Sequence[float], margin: float) -> float:
    """p of two one-sided paired t tests (TOST): small says that the mean difference lies within +-
    margin.

    A large p of a difference test says nothing of the kind. NaN for fewer than five pairs: two or
    three that happen to agree would be called equal.
    """
    from statsmodels.stats.weightstats import ttost_paired

    values, baseline = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    if len(values) < FEWEST:
        return np.nan
    if (
        np.ptp(values - baseline) < ROUNDING
    ):  # every pair differs by the same: there is no spread to test with
        return 0.0 if abs((values - baseline).mean()) < margin else 1.0
    return float(ttost_paired(values, baseline, -margin, margin)[0])


def spread_comparison(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Is the spread over seeds another one? Brown-Forsythe (Levene's test about medians), and the
    ratio's interval.

    Returns:
        sd, baseline_sd, ratio (sd / baseline's), low, high (95 %, from F, which assumes normal
        values and takes the two sets as independent: pairing makes it conservative), p. NaN for
            fewer than five values or no spread.
    """
    from scipy.stats import levene

    values, baseline = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    if min(len(values), len(baseline)) < FEWEST or min(np.ptp(values), np.ptp(baseline)) < ROUNDING:
        return dict.fromkeys(("sd", "baseline_sd", "ratio", "low", "high", "p"), np.nan)
    sd, sd_0 = float(values.std(ddof=1)), float(baseline.std(ddof=1))
    low, high = ratio_interval(sd, len(values), sd_0, len(baseline))
    return {
        "sd": sd,
        "baseline_sd": sd_0,
        "ratio": sd / sd_0,
        "low": low,
        "high": high,
        "p": float(levene(values, baseline, center="median").pvalue),
    }


def ratio_interval(
    sd: float, n: int, sd_0: float, n_0: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the ratio of two standard deviations, from the F distribution of the ratio of
    variances.
    """
    from scipy.stats import f

    low, high = f.ppf([(1 + level) / 2, (1 - level) / 2], n - 1, n_0 - 1)
    return float(sd / sd_0 / np.sqrt(low)), float(sd / sd_0 / np.sqrt(high))


def smallest_detectable(sd: float, n: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest mean difference that n pairs find with this power, in the unit of `sd`; infinite
    if none could be.

    Args:
        sd: standard deviation (n - 1) of the paired differences.
        n: pairs.
        alpha: level of the test; for one comparison of a family of m, alpha / m, which is Holm's
            first step.
    """
    effect = _detectable_effect(n, alpha, power)
    return float(sd * effect) if np.isfinite(effect) else np.inf


def detectable_ratio(n: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """The ratio of two standard deviations over n seeds each that an F test finds with this power
    (normal values).
    """
    from scipy.stats import f

    return (
        float(np.sqrt(f.ppf(1 - alpha / 2, n - 1, n - 1) / f.ppf(1 - power, n - 1, n - 1)))
        if n > 1
        else np.inf
    )


@lru_cache
def _detectable_effect(n: int, alpha: float, power: float) -> float:
    """`smallest_detectable` in standard deviations: for the sign-flip test by simulation, for many
    pairs from t.
    """
    if n < 2 or smallest_p(n) > alpha:
        return np.inf
    if n > 12:
        from statsmodels.stats.power import TTestPower

        return float(TTestPower().solve_power(nobs=n, alpha=alpha, power=power))
    noise = np.random.default_rng(0).standard_normal((2000 if n <= 10 else 500, n))
    low, high = 0.0, 8.0
    for _ in range(12):  # the same noise at each step, so the power rises with the effect
        middle = (low + high) / 2
        found = np.mean(_sign_flip_p(noise + middle) <= alpha)
        low, high = (middle, high) if found < power else (low, middle)
    return high


def interaction_p(differences: np.ndarray) -> float:
    """Does the difference depend on the task? p of no method x task interaction, exact over seeds.

    Within a seed the contrasts are the tasks' differences minus their mean. Under the null they
    average 0, and a seed's whole vector is flipped in sign: tasks may vary as they like and
    together. The statistic is Hotelling's T^2, here m^T C^+ m with the contrasts' mean m and second
    moments C, which no flip changes.

    Args:
        differences: (S, K) method minus baseline, row a seed, column a task.

    Returns:
        p in (0, 1]; NaN with fewer than two seeds or tasks. The smallest p that S seeds can give is
        2 / 2^S.
    """
    from scipy.stats import permutation_test

    differences = np.asarray(differences, dtype=float)
    differences = (
        differences[~np.isnan(differences).any(axis=1)] if differences.ndim == 2 else differences
    )
    if differences.ndim != 2 or min(differences.shape) < 2:
        return np.nan
    contrasts = np.round(differences - differences.mean(axis=1, keepdims=True), 12)
    inverse = np.linalg.pinv(contrasts.T @ contrasts, rcond=1e-9, hermitian=True)

    def hotelling(signs: np.ndarray, axis: int = -1) -> np.ndarray:
        total = np.moveaxis(signs, axis, -1) @ contrasts
        return np.round(np.einsum("...i,ij,...j->...", total, inverse, total), 9)

    return float(
        permutation_test(
            (np.ones(len(contrasts)),),
            hotelling,
            permutation_type="samples",
            vectorized=True,
            alternative="greater",
            n_resamples=SIGN_FLIPS,
            rng=np.random.default_rng(0),
        ).pvalue
    )


def welch(
    mean: float, sd: float, n: int, mean_0: float, sd_0: float, n_0: int, level: float = 0.95
) -> dict[str, float]:
    """Welch's t test of two independent means from their summaries.

    Returns:
        difference, t, df (Welch and Satterthwaite's), p (two-sided), low, high (interval of the
        difference).
    """
    from scipy.stats import t as student
    from scipy.stats import ttest_ind_from_stats

    test = ttest_ind_from_stats(mean, sd, n, mean_0, sd_0, n_0, equal_var=False)
    a, b = sd**2 / n, sd_0**2 / n_0
    df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (n_0 - 1))
    half = student.ppf((1 + level) / 2, df) * np.sqrt(a + b)
    return {
        "difference": mean - mean_0,
        "t": float(test.statistic),
        "df": float(df),
        "p": float(test.pvalue),
        "low": float(mean - mean_0 - half),
        "high": float(mean - mean_0 + half),
    }


def interval(values: Sequence[float] | pd.Series, level: float = 0.95) -> dict[str, float]:
    """Mean, standard deviation and Student's t interval of the mean: mean +- t(n - 1) sd / sqrt(n).

    NaNs are left out, and n says how many values remain. sd has n - 1 in the denominator. With n =
    1 the spread is
    unknown: sd and the interval are NaN. With n = 0 the mean is NaN too.

    Returns:
        n, mean, sd, low, high.
    """
    values = _finite(values)
    n = len(values)
    mean = float(values.mean()) if n else np.nan
    if n < 2:
        return {"n": n, "mean": mean, "sd": np.nan, "low": np.nan, "high": np.nan}
    from scipy.stats import t

    sd = float(values.std(ddof=1))
    half = float(t.ppf((1 + level) / 2, n - 1)) * sd / np.sqrt(n)
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def _finite(values: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values[~np.isnan(values)]
