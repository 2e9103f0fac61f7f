"""The published claim, re-read: what its own means, standard deviations and number of seeds
support.

Source: "Attention Alignment Outperforms Logit Distillation for LLM Compression" (2025),
doi:10.5281/zenodo.18043310: Llama-2-7B to TinyLlama-1.1B, table 1, and the text's differences per
task. Nothing here is a result of ours.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from kd_utils.analysis import stats

SEEDS = 7

#: Accuracy in per cent over SST-2, MMLU and GSM8K together.
TABLE = pd.DataFrame(
    [
        ("black_box", 93.98, 2.98),
        ("hidden_state", 94.71, 1.05),
        ("attention", 95.56, 1.43),
        ("combined", 95.56, 1.43),
    ],
    columns=["method", "mean", "sd"],
)

CLAIMED_T, CLAIMED_P = 3.44, 0.01

#: Attention minus black box in points, given without any spread.
TASK_DIFFERENCES = {"sst2": 2.40, "mmlu": 0.79, "gsm8k": 0.09}

#: Examples of each task in the paper's data.
TASK_EXAMPLES = {"sst2": 5000, "mmlu": 1000, "gsm8k": 1000}


def reread(
    table: pd.DataFrame = TABLE, seeds: int = SEEDS, baseline: str = "black_box"
) -> pd.DataFrame:
    """Welch's tests against the baseline with Holm, and the ratio of spreads with an F test.

    Brown and Forsythe's test needs the trials themselves; of the summaries only F can be had.

    Args:
        table: method, mean, sd (n - 1).
        seeds: trials behind each row.

    Returns:
        method, difference, low, high (95 %), t, df, p, p_holm, g (Hedges), sd_ratio, sd_ratio_low,
        sd_ratio_high, p_spread (two-sided F), p_spread_holm; in the table's unit.
    """
    from scipy.stats import f

    [base] = table[table["method"] == baseline].to_dict("records")
    rows = []
    for row in table[table["method"] != baseline].to_dict("records"):
        summaries = (row["mean"], row["sd"], seeds, base["mean"], base["sd"], seeds)
        low, high = stats.ratio_interval(row["sd"], seeds, base["sd"], seeds)
        tail = f.cdf((row["sd"] / base["sd"]) ** 2, seeds - 1, seeds - 1)
        rows.append(
            {
                "method": row["method"],
                **stats.welch(*summaries),
                "g": stats.hedges_g_from_summary(*summaries),
                "sd_ratio": row["sd"] / base["sd"],
                "sd_ratio_low": low,
                "sd_ratio_high": high,
                "p_spread": float(2 * min(tail, 1 - tail)),
            }
        )
    found = pd.DataFrame(rows)
    return found.assign(p_holm=stats.holm(found["p"]), p_spread_holm=stats.holm(found["p_spread"]))


def identical_rows(table: pd.DataFrame = TABLE) -> list[list[str]]:
    """Groups of methods whose mean and standard deviation agree to the last digit given."""
    groups = table.groupby(["mean", "sd"], sort=False)["method"].agg(list)
    return [methods for methods in groups if len(methods) > 1]


def smallest_detectable(
    table: pd.DataFrame = TABLE,
    seeds: int = SEEDS,
    method: str = "attention",
    baseline: str = "black_box",
) -> float:
    """The difference that two independent sets of so many seeds find with power 0.8 at 5 %, in the
    table's unit.
    """
    from statsmodels.stats.power import TTestIndPower

    sd = table.set_index("method")["sd"]
    pooled = np.sqrt((sd[method] ** 2 + sd[baseline] ** 2) / 2)
    return float(
        pooled * TTestIndPower().solve_power(nobs1=seeds, alpha=stats.ALPHA, power=stats.POWER)
    )


def largest_paired_t(method: str = "attention", baseline: str = "black_box") -> float:
    """The largest t that a paired test of these means and spreads can give, which is at a
    correlation of 1.

    The differences' standard deviation is at least |sd - baseline's sd|.
    """
    rows = TABLE.set_index("method")
    least = abs(rows.loc[method, "sd"] - rows.loc[baseline, "sd"])
    return float((rows.loc[method, "mean"] - rows.loc[baseline, "mean"]) / (least / np.sqrt(SEEDS)))


def smallest_paired_p() -> float:
    """Two-sided p of `largest_paired_t`."""
    from scipy.stats import t

    return float(2 * t.sf(largest_paired_t(), SEEDS - 1))


def chance_of_equal_means(
    sd: float, seeds: int = SEEDS, step: float = 0.01, correlation: float = 0.0
) -> float:
    """Chance that two sets of trials with one true mean and this spread have means less than one
    last digit apart.

    Normal values; `correlation` of the two trials of a seed.
    """
    from scipy.stats import norm

    scale = sd * np.sqrt(2 * (1 - correlation) / seeds)
    return float(norm.cdf(step, scale=scale) - norm.cdf(-step, scale=scale))


def readings() -> list[str]:
    """What the published numbers support, a sentence per claim."""
    found = reread().set_index("method")
    attention = found.loc["attention"]
    values = list(TASK_DIFFERENCES.values())
    weighted = np.average(values, weights=list(TASK_EXAMPLES.values()))
    [same] = identical_rows()
    sd = TABLE.set_index("method").loc[same[0], "sd"]
    return [
        f'"Attention is significantly better" (t = {CLAIMED_T}, p < {CLAIMED_P}): its means, spreads and {SEEDS} '
        f"seeds give Welch's t = {attention['t']:.2f}, p = {attention['p']:.2f} (Holm over three "
        f"methods "
        f"{attention['p_holm']:.2f}), {attention['difference']:+.2f} points "
        f"[{attention['low']:+.2f}, "
        f"{attention['high']:+.2f}]: not supported.",
        f"Nor by pairing the seeds: with these spreads a paired t is {largest_paired_t():.2f} at "
        f"most, whatever the "
        f"correlation (p = {smallest_paired_p():.3f}). No test of these numbers gives t = "
        f"{CLAIMED_T}.",
        f"With these spreads {SEEDS} seeds find a difference of {smallest_detectable():.1f} points "
        f"with power "
        f"{stats.POWER}; the claimed one is {attention['difference']:.2f}.",
        f'"Lower variance": the ratio of standard deviations is {attention["sd_ratio"]:.2f} '
        f"[{attention['sd_ratio_low']:.2f}, {attention['sd_ratio_high']:.2f}], F test p = "
        f"{attention['p_spread']:.2f} "
        f"(Holm {attention['p_spread_holm']:.2f}) for attention; for hidden states "
        f"{found.loc['hidden_state', 'sd_ratio']:.2f}, p = "
        f"{found.loc['hidden_state', 'p_spread']:.3f} (Holm "
        f"{found.loc['hidden_state', 'p_spread_holm']:.2f}): "
        + (
            "supported for " + ", ".join(found.index[found["p_spread_holm"] < stats.ALPHA])
            if (found["p_spread_holm"] < stats.ALPHA).any()
            else "not supported"
        )
        + ".",
        f'"Combining adds nothing": the rows of {" and ".join(same)} agree to the last digit in mean and spread. Two '
        f"independent sets of {SEEDS} trials would have means this close with a chance of "
        f"{chance_of_equal_means(sd):.3f} ({chance_of_equal_means(sd, correlation=0.99):.2f} where "
        f"seeds correlate by "
        "0.99), and equal spreads besides: the same trials may stand in both rows; nothing follows "
        "about combining.",
        '"It helps language, not mathematics" ('
        + ", ".join(f"{task} {value:+.2f}" for task, value in TASK_DIFFERENCES.items())
        + "): no spread is given, so neither a difference nor an interaction can be tested; even with the overall "
        f"spread {max(values):.2f} points is less than what {SEEDS} seeds find. The three average "
        f"{np.mean(values):.2f}, weighted by the data's "
        f"{' + '.join(f'{n:,}' for n in TASK_EXAMPLES.values())} "
        f"examples {weighted:.2f}; the table's overall difference is "
        f"{attention['difference']:.2f}.",
    ]
