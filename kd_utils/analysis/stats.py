"""Statistics of trials that pair by seed: tests, intervals, equivalence, spread and power.

Arrays in, numbers out. A trial is one method at one seed. All trials of a seed share the order of
the data, dropout and the student's initial weights, and all trials answer the same validation
examples, so the tests are on the differences within a seed. The tests themselves come from scipy
and statsmodels. Differences below 1e-12 are rounding errors: accuracies are ratios of small
integers.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import scipy  # which imports `scipy.stats`, a slow one, at its first use

ALPHA = 0.05

POWER = 0.8

#: Up to this many assignments of signs (14 pairs) all of them are tried; above, this many random
#: ones.
SIGN_FLIPS = 2**14

#: With fewer pairs neither equality nor a spread is tested: with two, Brown and Forsythe's test
#: always rejects.
FEWEST = 5

ROUNDING = 1e-12

#: Up to this many pairs the power of the sign-flip test is simulated; above, t's is as good.
SIMULATED = 12


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of a mean paired difference, by Fisher's sign-flip test.

    Exact for up to 14 pairs. The only assumption is that without an effect a difference is as
    likely as its negative. NaN for fewer than two pairs; differences that are NaN are left out.
    """
    values = pd.Series(differences, dtype=float).dropna().to_numpy()
    return float(_sign_flip_p(values[None])[0]) if len(values) > 1 else np.nan


def _sign_flip_p(rows: np.ndarray) -> np.ndarray:
    """`sign_flip_p` of each row of (m, n)."""
    return _flipped_p(
        rows,
        # Rounded, because rounding errors would break ties between assignments.
        lambda values, axis: np.round(np.mean(values, axis=axis), 12),
        axis=1,
        batch=max(2**22 // rows.size, 1),
    )


def _flipped_p(data: np.ndarray, statistic: Callable[..., np.ndarray], **options: Any) -> Any:
    return scipy.stats.permutation_test(
        (data,),
        statistic,
        permutation_type="samples",
        vectorized=True,
        n_resamples=SIGN_FLIPS,
        rng=np.random.default_rng(0),
        **options,
    ).pvalue


def smallest_p(n: int, family: int = 1) -> float:
    """The smallest two-sided p that the sign-flip test can give with n pairs: 2 / 2^n, or what
    random flips can give; times the size of the family, as in Holm's first step.
    """
    return min(max(2.0 ** (1 - n), 2 / (SIGN_FLIPS + 1)) * family, 1.0)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """p adjusted for the comparisons of a family (Holm 1979).

    NaNs stay NaN but count in the family's size: a planned comparison that could not be made does
    not make the others easier.
    """
    # statsmodels' multipletests gives the same (a test checks it), but collects garbage at each
    # call: 50 ms, 60 times an analysis.
    p = np.asarray(p, dtype=float)
    known = np.nan_to_num(p, nan=1.0)
    order = np.argsort(known)
    steps = np.maximum.accumulate(known[order] * np.arange(len(known), 0, -1))
    return np.where(np.isnan(p), np.nan, np.minimum(steps, 1.0)[np.argsort(order)])


def joint_holm(p: Sequence[float] | np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """p for "all of the group": an intersection-union test (Berger 1982), Holm's over the groups.

    To be better than the best of several is to be better than each of them. So the largest p of a
    group counts, and nothing is corrected within it. Each p is corrected as if it were its group's
    largest, so that the largest result of a group is the group's. NaNs stay NaN and count as 1.
    """
    values = pd.DataFrame({"p": np.asarray(p, dtype=float), "group": list(groups)})
    largest = values.fillna({"p": 1.0}).groupby("group", sort=False)["p"].max()
    return np.array(
        [
            np.nan if np.isnan(value) else holm(largest.mask(largest.index == group, value))[at]
            for value, group in values.itertuples(index=False)
            for at in [largest.index.get_loc(group)]
        ]
    )


def hedges_g(values: Sequence[float], baseline: Sequence[float]) -> float:
    """(mean - baseline's mean) / pooled standard deviation, corrected for few seeds (Hedges 1981).

    The standard deviation is that of the trials, not of the differences, so that it compares with
    the published table. NaN for fewer than two pairs or no spread.
    """
    if len(values) < 2:
        return np.nan
    summaries = [
        (float(np.mean(trials)), float(np.std(trials, ddof=1))) for trials in (values, baseline)
    ]
    return hedges_g_from_summary(*summaries[0], *summaries[1], len(values))


def hedges_g_from_summary(mean: float, sd: float, mean_0: float, sd_0: float, n: int) -> float:
    """`hedges_g` from means and standard deviations (n - 1) of n values each."""
    from statsmodels.stats.meta_analysis import effectsize_smd

    if max(sd, sd_0) <= ROUNDING:
        return np.nan
    return float(effectsize_smd(mean, sd, n, mean_0, sd_0, n)[0])


def equivalence_p(values: np.ndarray, baseline: np.ndarray, margin: float) -> float:
    """p of two one-sided paired t tests (TOST): a small p shows that the mean difference lies
    within +- margin. NaN for fewer than five pairs: two that happen to agree would be called equal.
    """
    from statsmodels.stats.weightstats import ttost_paired

    if len(values) < FEWEST:
        return np.nan
    if np.ptp(values - baseline) < ROUNDING:  # all differences are equal: t is not defined
        return 0.0 if abs((values - baseline).mean()) < margin else 1.0
    return float(ttost_paired(values, baseline, -margin, margin)[0])


def spread_comparison(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Does the spread over seeds differ? Brown-Forsythe (Levene's test about medians).

    Returns:
        sd, baseline_sd, sd_ratio (sd / baseline_sd), sd_ratio_low, sd_ratio_high (95 %, from F,
        which assumes normal, independent values; with pairs it is conservative), p_spread. NaN for
        fewer than five pairs or no spread.
    """
    both = np.array([values, baseline], dtype=float)
    n = len(values)
    if n < FEWEST or np.ptp(both, axis=1).min() < ROUNDING:
        keys = "sd baseline_sd sd_ratio sd_ratio_low sd_ratio_high p_spread".split()
        return dict.fromkeys(keys, np.nan)
    sd, baseline_sd = both.std(axis=1, ddof=1).tolist()
    return {
        "sd": sd,
        "baseline_sd": baseline_sd,
        **ratio_interval(sd, baseline_sd, n),
        "p_spread": float(scipy.stats.levene(*both, center="median").pvalue),
    }


def ratio_interval(sd: float, baseline_sd: float, n: int) -> dict[str, float]:
    """The ratio of two standard deviations of n values each: sd_ratio, sd_ratio_low, sd_ratio_high
    (95 %, from the F distribution of the ratio of variances).
    """
    ratio, quantiles = sd / baseline_sd, np.array([1 + 0.95, 1 - 0.95]) / 2
    low, high = (ratio / np.sqrt(scipy.stats.f.ppf(quantiles, n - 1, n - 1))).tolist()
    return {"sd_ratio": ratio, "sd_ratio_low": low, "sd_ratio_high": high}


def smallest_detectable(sd: float, n: int, alpha: float = ALPHA) -> float:
    """The smallest mean difference that n pairs find with power 0.8; infinite if they find none.

    `sd` is the standard deviation (n - 1) of the paired differences. For one comparison of a family
    of m, alpha is 0.05 / m, Holm's first step.
    """
    effect = _detectable_effect(n, alpha)
    return float(sd * effect) if np.isfinite(effect) else np.inf


def seeds_needed(sd: float, difference: float, family: int, most: int = 99) -> int | None:
    """The fewest pairs that find a difference with power 0.8 at Holm's first step of a family, over
    seeds alone; None if `most` do not.
    """
    alpha = ALPHA / family
    few = smallest_detectable(sd, SIMULATED + 1, alpha) <= difference
    numbers = range(2, SIMULATED + 2) if few else range(SIMULATED + 2, most + 1)
    return next((n for n in numbers if smallest_detectable(sd, n, alpha) <= difference), None)


@lru_cache
def _detectable_effect(n: int, alpha: float) -> float:
    """In standard deviations: by simulation of the sign-flip test, or from t for many pairs."""
    if n < 2 or smallest_p(n) > alpha:
        return np.inf
    if n > SIMULATED:
        # Not statsmodels' TTestPower: at some n (73 with alpha 0.05) it finds a negative effect.
        found = scipy.stats.t.isf(alpha / 2, n - 1)
        short = lambda shift: scipy.stats.nct.sf(found, n - 1, shift) - POWER
        return float(scipy.optimize.brentq(short, 0.0, 2 * found + 2)) / np.sqrt(n)
    noise = np.random.default_rng(0).standard_normal((2000 if n <= 10 else 500, n))
    low, high = 0.0, 8.0
    for _ in range(12):  # the same noise at each step, so the power rises with the effect
        middle = (low + high) / 2
        found = np.mean(_sign_flip_p(noise + middle) <= alpha)
        low, high = (middle, high) if found < POWER else (low, middle)
    return high


def detectable_ratio(n: int, alpha: float = ALPHA) -> float:
    """The ratio of two standard deviations of n normal values that F finds with power 0.8."""
    found, missed = scipy.stats.f.ppf([1 - alpha / 2, 1 - POWER], n - 1, n - 1)
    return float(np.sqrt(found / missed))


def interaction_p(differences: np.ndarray) -> float:
    """p of no method x task interaction (does the difference depend on the task?), over seeds.

    A seed's contrasts are the tasks' differences minus their mean. Without an interaction they
    average 0, and the test flips the sign of a seed's whole vector, so tasks may vary and correlate
    in any way. The statistic is Hotelling's T^2, here m^T C^+ m with the contrasts' mean m and
    second moments C, which no flip changes.

    Args:
        differences: (S, K) method minus baseline, a row per seed, a column per task; with fewer
            than two of either p is NaN.
    """
    if min(differences.shape) < 2:
        return np.nan
    contrasts = np.round(differences - differences.mean(axis=1, keepdims=True), 12)
    inverse = np.linalg.pinv(contrasts.T @ contrasts, rcond=1e-9, hermitian=True)

    def hotelling(signs: np.ndarray, axis: int = -1) -> np.ndarray:
        total = np.moveaxis(signs, axis, -1) @ contrasts
        return np.round(np.einsum("...i,ij,...j->...", total, inverse, total), 9)

    return float(_flipped_p(np.ones(len(contrasts)), hotelling, alternative="greater"))


def interval(values: Sequence[float] | pd.Series) -> dict[str, float]:
    """Mean, standard deviation and 95 % t interval of the mean: mean +- t(n - 1) sd / sqrt(n).

    NaNs are left out, and n says how many values remain. With one value sd (n - 1) and the interval
    are NaN, with none the mean is NaN too.

    Returns:
        n, mean, sd, low, high, in this order.
    """
    finite = pd.Series(values, dtype=float).dropna()
    n, mean, sd = len(finite), finite.mean(), finite.std()
    half = scipy.stats.t.ppf(0.975, n - 1) * sd / np.sqrt(n)
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}
