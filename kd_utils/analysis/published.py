"""The published claim, re-read: what its own means, standard deviations and seeds support.

Source: "Attention Alignment Outperforms Logit Distillation for LLM Compression" (2025),
doi:10.5281/zenodo.18043310: Llama-2-7B to TinyLlama-1.1B, table 1, and the differences per task
from its text. No number here was measured in this project.
"""

import numpy as np
import pandas as pd
import scipy

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

#: Attention minus black box in points, published without any spread.
TASK_DIFFERENCES = {"sst2": 2.40, "mmlu": 0.79, "gsm8k": 0.09}

#: Examples of each task in the paper's data.
TASK_EXAMPLES = {"sst2": 5000, "mmlu": 1000, "gsm8k": 1000}


def means(table: pd.DataFrame = TABLE) -> pd.DataFrame:
    """The table with the 95 % t interval of each mean: method, mean, sd, n, low, high."""
    half = scipy.stats.t.ppf(0.975, SEEDS - 1) * table["sd"] / np.sqrt(SEEDS)
    return table.assign(n=SEEDS, low=table["mean"] - half, high=table["mean"] + half)


def welch(mean: float, sd: float, mean_0: float, sd_0: float, n: int) -> dict[str, float]:
    """Welch's t test of two independent means of n values each, from their summaries.

    Returns:
        difference, t, df (Welch and Satterthwaite's), p (two-sided), low, high (95 % interval of
        the difference).
    """
    test = scipy.stats.ttest_ind_from_stats(mean, sd, n, mean_0, sd_0, n, equal_var=False)
    a, b = sd**2 / n, sd_0**2 / n
    df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (n - 1))
    half = scipy.stats.t.ppf(0.975, df) * np.sqrt(a + b)
    return {
        "difference": mean - mean_0,
        "t": float(test.statistic),
        "df": float(df),
        "p": float(test.pvalue),
        "low": float(mean - mean_0 - half),
        "high": float(mean - mean_0 + half),
    }


def reread(table: pd.DataFrame = TABLE) -> pd.DataFrame:
    """Welch's tests against black box with Holm's correction, and the ratio of spreads with an F
    test (Brown and Forsythe's needs the trials themselves).

    Returns:
        method, difference, t, df, p, low, high (95 %), g (Hedges), sd_ratio, sd_ratio_low,
        sd_ratio_high, p_spread (two-sided F), p_holm, p_spread_holm; in the table's unit.
    """
    mean_0, sd_0 = table.set_index("method").loc["black_box"]
    rows = []
    for method, mean, sd in table[table["method"] != "black_box"].itertuples(index=False):
        tail = scipy.stats.f.cdf((sd / sd_0) ** 2, SEEDS - 1, SEEDS - 1)
        rows.append(
            {
                "method": method,
                **welch(mean, sd, mean_0, sd_0, SEEDS),
                "g": stats.hedges_g_from_summary(mean, sd, mean_0, sd_0, SEEDS),
                **stats.ratio_interval(sd, sd_0, SEEDS),
                "p_spread": 2 * min(tail, 1 - tail),
            }
        )
    found = pd.DataFrame(rows)
    return found.assign(p_holm=stats.holm(found["p"]), p_spread_holm=stats.holm(found["p_spread"]))


def identical_rows(table: pd.DataFrame = TABLE) -> list[list[str]]:
    """Groups of methods whose mean and standard deviation agree to the last digit given."""
    groups = table.groupby(["mean", "sd"], sort=False)["method"].agg(list)
    return groups[groups.map(len) > 1].tolist()


def smallest_detectable(table: pd.DataFrame = TABLE) -> float:
    """The difference of attention from black box that two independent sets of so many seeds find
    with power 0.8 at 5 %, in the table's unit.
    """
    from statsmodels.stats.power import TTestIndPower

    sd = table.set_index("method")["sd"]
    pooled = np.sqrt((sd["attention"] ** 2 + sd["black_box"] ** 2) / 2)
    effect = TTestIndPower().solve_power(nobs1=SEEDS, alpha=stats.ALPHA, power=stats.POWER)
    return float(pooled * effect)


def paired(table: pd.DataFrame = TABLE) -> pd.DataFrame:
    """The most that a paired test against black box can give: at a correlation of 1, where the
    standard deviation of the differences is |sd - black box's sd|.

    Returns:
        method, difference, t (the largest), p (two-sided, the smallest), low, high (95 %, the
        narrowest interval).
    """
    mean_0, sd_0 = table.set_index("method").loc["black_box"]
    rest = table[table["method"] != "black_box"]
    difference, error = rest["mean"] - mean_0, (rest["sd"] - sd_0).abs() / np.sqrt(SEEDS)
    half = scipy.stats.t.ppf(0.975, SEEDS - 1) * error
    return pd.DataFrame(
        {
            "method": rest["method"],
            "difference": difference,
            "t": difference / error,
            "p": 2 * scipy.stats.t.sf((difference / error).abs(), SEEDS - 1),
            "low": difference - half,
            "high": difference + half,
        }
    )


def chance_of_equal_means(sd: float, correlation: float = 0.0) -> float:
    """Chance that the means of two sets of normal trials with the same true mean and `sd` are less
    than one last digit (0.01) apart; `correlation` is that of the two trials of a seed.
    """
    norm = scipy.stats.norm(scale=sd * np.sqrt(2 * (1 - correlation) / SEEDS))
    return float(norm.cdf(0.01) - norm.cdf(-0.01))


def readings() -> list[str]:
    """What the published numbers support, a sentence per claim."""
    found, best = reread().set_index("method"), paired().set_index("method").loc["attention"]
    attention, hidden = found.loc["attention"], found.loc["hidden_state"]
    lower = found.index[found["p_spread_holm"] < stats.ALPHA]
    values, examples = list(TASK_DIFFERENCES.values()), list(TASK_EXAMPLES.values())
    by_task = ", ".join(f"{task} {value:+.2f}" for task, value in TASK_DIFFERENCES.items())
    [same] = identical_rows()
    sd = TABLE.set_index("method").loc[same[0], "sd"]
    return [
        f'"Attention is significantly better" (t = {CLAIMED_T}, p < {CLAIMED_P}): the published '
        f"means, spreads and {SEEDS} seeds give Welch's t = {attention['t']:.2f}, p = "
        f"{attention['p']:.2f} (Holm over three methods {attention['p_holm']:.2f}), "
        f"{attention['difference']:+.2f} points "
        f"[{attention['low']:+.2f}, {attention['high']:+.2f}]: not supported.",
        f"Pairing the seeds does not support it either: with these spreads a paired t is "
        f"{best['t']:.2f} at most, whatever the correlation (p = {best['p']:.3f}). No test of "
        f"these numbers gives t = {CLAIMED_T}.",
        f"With these spreads {SEEDS} seeds detect a difference of {smallest_detectable():.1f} "
        f"points with power {stats.POWER}; the claimed difference is "
        f"{attention['difference']:.2f}.",
        f'"Lower variance": the ratio of standard deviations is {attention["sd_ratio"]:.2f} '
        f"[{attention['sd_ratio_low']:.2f}, {attention['sd_ratio_high']:.2f}], F test p = "
        f"{attention['p_spread']:.2f} (Holm {attention['p_spread_holm']:.2f}) for attention; for "
        f"hidden states {hidden['sd_ratio']:.2f}, p = {hidden['p_spread']:.3f} (Holm "
        f"{hidden['p_spread_holm']:.2f}): "
        + (f"supported for {', '.join(lower)}." if len(lower) else "not supported."),
        f'"Combining adds nothing": the rows of {" and ".join(same)} agree to the last digit in '
        f"mean and spread. Two independent sets of {SEEDS} trials would have means this close with "
        f"a chance of {chance_of_equal_means(sd):.3f} "
        f"({chance_of_equal_means(sd, correlation=0.99):.2f} if seeds correlate by 0.99); "
        f"the spreads agree too. Both rows may hold the same trials, so nothing follows about "
        f"combining.",
        f'"It helps language, not mathematics" ({by_task}): no spread is given, so neither a '
        f"difference nor an interaction can be tested; even with the overall spread "
        f"{max(values):.2f} points is less than what {SEEDS} seeds detect. The three "
        f"differences average {np.mean(values):.2f}, or weighted by the data's "
        f"{' + '.join(f'{n:,}' for n in examples)} examples "
        f"{np.average(values, weights=examples):.2f}; the table's overall difference is "
        f"{attention['difference']:.2f}.",
    ]
