"""The research questions answered in words, by rule: the same numbers always give the same
sentence.

A difference that is not significant is never called equality, every answer says on how many pairs
it rests, and beside each null result stands the smallest difference that so many pairs could have
found.
"""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis import stats
from kd_utils.analysis.comparisons import BASELINE, PRIMARY, WHITE_BOX
from kd_utils.analysis.tables import beside_each_setting

QUESTION_TEXTS = {
    "teacher": "Do the teacher's logits help at all, beside the same training without a teacher?",
    "white_box": "Do white-box signals help beyond logits?",
    "which": "Which helps more, attention maps or hidden states?",
    "combining": "Does combining help, beyond the better of the two?",
    "task": "Does the gain over logits, in points of accuracy, depend on the task (an interaction)?",
    "spread": "Do white-box signals lower the spread over seeds?",
    "hypothesis": "Hypothesis: similar on sentiment, better on reasoning (MMLU) and mathematics (GSM8K).",
}

SIMILAR_ON, BETTER_ON = ("sst2",), ("mmlu", "gsm8k")

#: What the numbers are over, and what they do not speak of.
SCOPE = (
    "A seed varies the order of the data, the projector's initial weights, and dropout where a "
    "model has any. p "
    "flips the signs of the seeds' differences, on these validation rows; better and worse must "
    "also hold over "
    "other rows (rows p); both are corrected by Holm, the 95 % intervals, over seeds and rows, are "
    "not. All "
    "trials share one teacher and the student's initial weights, so another teacher or student is "
    "not spoken of."
)

NOT_SHOWN, NOT_TESTED = "Not shown.", "Not tested."


def verdicts(table: pd.DataFrame, interaction: pd.DataFrame, margin: float = 0.01) -> pd.DataFrame:
    """Every question with its answer.

    Args:
        table: `comparisons.compare`'s rows; interaction: `comparisons.interactions`'s.
        margin: the one that they were made with, a fraction.

    Returns:
        question (key of `QUESTION_TEXTS`), setting, answer (a few words), evidence (sentences with
        the numbers).
    """
    rows: list[tuple[str, str, str, list[str]]] = []
    primary = table[table["metric"] == PRIMARY]
    for question, answer in ANSWERS.items():
        for setting, family in _by_setting(primary[primary["question"] == question]):
            rows.append(
                (
                    question,
                    setting,
                    answer(family, margin) if _tested(family) else NOT_TESTED,
                    [sentence(row, margin) for row in family],
                )
            )
    for setting, family in _by_setting(interaction):
        rows.append(("task", setting, *_answer_task(family)))
    white_box = table[table["question"] == "white_box"]
    for setting, family in _by_setting(white_box[white_box["metric"] == PRIMARY]):
        rows.append(("spread", setting, *_answer_spread(family)))
    for setting, by_task in _by_setting(
        white_box[white_box["metric"].isin({*SIMILAR_ON, *BETTER_ON})]
    ):
        rows.append(("hypothesis", setting, *_answer_hypothesis(by_task, margin)))
    return pd.DataFrame(rows, columns=["question", "setting", "answer", "evidence"])


def _by_setting(table: pd.DataFrame) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows by setting; those with fewer swept keys stand beside every fuller setting that they go
    with.
    """
    return [
        (setting, rows.to_dict("records"))
        for setting, rows in beside_each_setting(table).groupby("setting", sort=False)
    ]


def _tested(family: list[dict[str, Any]]) -> bool:
    return any(row["outcome"] != "not tested" for row in family)


def verdict_text(found: pd.DataFrame, coverage: str) -> str:
    """The verdicts as lines to print, after how many trials they rest on.

    Args:
        found: of `verdicts`.
        coverage: `tables.coverage`'s sentence: failed and missing trials by name.
    """
    lines = [
        *_wrapped(coverage),
        *_wrapped(SCOPE if len(found) else "There is no pair of trials to compare."),
    ]
    for question, rows in found.groupby("question", sort=False):
        lines += ["", *_wrapped(QUESTION_TEXTS[question])]
        for row in rows.itertuples():
            where = f"[{row.setting}] " if row.setting else ""
            lines += _wrapped(where + row.answer, "  ")
            for each in row.evidence:
                lines += _wrapped(f"- {each}", "    ")
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "") -> list[str]:
    more = indent + "  " * text.startswith("- ")
    return textwrap.wrap(
        text, 118, initial_indent=indent, subsequent_indent=more, break_on_hyphens=False
    )


def sentence(row: dict[str, Any], margin: float) -> str:
    """One comparison in words: what was found, on how many pairs, and what could have been
    found.
    """
    what = f"{row['method']} minus {row['baseline']}"
    pairs = f"{row['pairs']} of {row['planned']} pairs"
    if row["outcome"] == "not tested":
        return f"{what}: not tested, {pairs} are done and a test needs two."
    size = "" if np.isnan(row["g"]) else f", g = {row['g']:.2f}"
    numbers = (
        f"{what}: {_points(row['difference'])} points [{_points(row['low'])}, "
        f"{_points(row['high'])}], "
        f"{_p(row['p'])}, Holm {_p(row['p_holm'])}, rows {_p(row['p_rows_holm'])}{size}, {pairs}"
    )
    within = f" (and equal within {_margin(margin)})" if row["equal"] else ""
    if row["outcome"] in ("better", "worse"):
        return f"{numbers}: {row['outcome']}{within}."
    if row["outcome"].endswith("on these rows"):
        return f"{numbers}: {row['outcome']}{within}; other validation rows might not show it."
    if row["outcome"] == "equivalent":
        return f"{numbers}: equal within {_margin(margin)} (TOST {_p(row['p_equivalence_holm'])})."
    return f"{numbers}: neither a difference nor equality is shown; {_could_have(row)}."


def _could_have(row: dict[str, Any]) -> str:
    """Beside a null result: the difference found with power 0.8, or how many pairs a finding would
    take.
    """
    if stats.smallest_p(row["pairs"]) * row["family"] > stats.ALPHA:
        needed = next(n for n in range(2, 99) if stats.smallest_p(n) * row["family"] <= stats.ALPHA)
        return f"no difference, however large, could be significant with {row['pairs']} pairs: {needed} are needed"
    if not row["detectable"] > 0:
        return "no pair differs"
    return (
        f"{row['pairs']} pairs find {100 * row['detectable']:.1f} points with power {stats.POWER}"
    )


def _names(family: list[dict[str, Any]], outcome: str) -> str:
    return ", ".join(row["method"] for row in family if row["outcome"] == outcome)


def _answer_teacher(family: list[dict[str, Any]], margin: float) -> str:
    [row] = family
    return {
        "better": "Yes.",
        "worse": "No: they make it worse.",
        "equivalent": _no_benefit(margin),
    }.get(row["outcome"], _only_here(family))


def _answer_white_box(family: list[dict[str, Any]], margin: float) -> str:
    better, worse = _names(family, "better"), _names(family, "worse")
    if better:
        return f"Yes: {better}." + (f" But worse: {worse}." if worse else "")
    complete = {row["method"] for row in family} == set(WHITE_BOX)
    if complete and all(row["outcome"] == "equivalent" for row in family):
        return _no_benefit(margin)
    if complete and worse and all(row["outcome"] in ("worse", "equivalent") for row in family):
        return f"No: worse: {worse}" + (
            f"; equal: {_names(family, 'equivalent')}." if worse.count(",") < 2 else "."
        )
    return _only_here(family) + (f" Worse: {worse}." if worse else "")


def _answer_which(family: list[dict[str, Any]], margin: float) -> str:
    [row] = family
    return {
        "better": "Attention maps.",
        "worse": "Hidden states.",
        "equivalent": f"Neither: equal within {_margin(margin)}.",
    }.get(row["outcome"], _only_here(family))


def _answer_combining(family: list[dict[str, Any]], margin: float) -> str:
    outcomes = [row["outcome"] for row in family]
    if "worse" in outcomes:
        return (
            "No: worse than "
            + ", ".join(row["baseline"] for row in family if row["outcome"] == "worse")
            + "."
        )
    if len(family) == 2 and all(outcome == "better" for outcome in outcomes):
        return "Yes: better than either alone."
    if len(family) == 2 and all(outcome == "equivalent" for outcome in outcomes):
        return _no_benefit(margin)
    only = [row["baseline"] for row in family if row["outcome"] == "better"]
    return f"Not shown: better than {only[0]}, but not than both." if only else _only_here(family)


def _only_here(family: list[dict[str, Any]]) -> str:
    """Nothing is shown that would hold on other rows; what these rows show is named."""
    here = [
        f"{row['method']} {row['outcome'].split()[0]} than {row['baseline']}"
        for row in family
        if row["outcome"].endswith("on these rows")
    ]
    return (
        f"Not shown beyond these validation rows, where {', '.join(here)}." if here else NOT_SHOWN
    )


ANSWERS = {
    "teacher": _answer_teacher,
    "white_box": _answer_white_box,
    "which": _answer_which,
    "combining": _answer_combining,
}


def _answer_task(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    on_rows = [row["method"] for row in rows if row["p_holm"] < stats.ALPHA]
    found = [
        row["method"]
        for row in rows
        if row["method"] in on_rows and row["p_rows_holm"] < stats.ALPHA
    ]
    known = {
        "setting",
        "method",
        "baseline",
        "planned",
        "pairs",
        "p",
        "p_rows",
        "p_holm",
        "p_rows_holm",
        "smallest_p",
    }
    lines = []
    for row in rows:
        by_task = {key: value for key, value in row.items() if key not in known}
        pairs = f"{row['pairs']} of {row['planned']} pairs"
        if np.isnan(row["p"]):
            lines.append(
                f"{row['method']} minus {row['baseline']}: not tested, {len(by_task)} tasks and "
                f"{pairs}."
            )
            continue
        few = "" if row["smallest_p"] <= stats.ALPHA else "; so few pairs could show none"
        lines.append(
            f"{row['method']} minus {row['baseline']}: "
            + ", ".join(f"{task} {_points(value)}" for task, value in by_task.items())
            + f" points; interaction {_p(row['p'])}, Holm {_p(row['p_holm'])}, rows "
            f"{_p(row['p_rows_holm'])}, {pairs}{few}."
        )
    if all(np.isnan(row["p"]) for row in rows):
        return NOT_TESTED, lines
    if found:
        return f"Yes: {', '.join(found)}.", lines
    here = (
        f"beyond these validation rows: {', '.join(on_rows)}"
        if on_rows
        else "which is not the same as independence"
    )
    return f"Not shown, {here}.", lines


def _answer_spread(family: list[dict[str, Any]]) -> tuple[str, list[str]]:
    shown = [
        row
        for row in family
        if row["p_spread_holm"] < stats.ALPHA
        and not row["sd_ratio_low"] <= 1 <= row["sd_ratio_high"]
    ]
    lower = ", ".join(row["method"] for row in shown if row["sd_ratio"] < 1)
    higher = ", ".join(row["method"] for row in shown if row["sd_ratio"] > 1)
    lines = []
    for row in family:
        if np.isnan(row["p_spread"]):
            lines.append(
                f"{row['method']}: not tested, {row['pairs']} of {row['planned']} pairs"
                + (
                    ", and a spread needs five."
                    if row["pairs"] < stats.FEWEST
                    else " and no spread."
                )
            )
            continue
        ratio = stats.detectable_ratio(row["pairs"], stats.ALPHA / row["family"])
        lines.append(
            f"{row['method']}: sd {100 * row['sd']:.1f} against {100 * row['baseline_sd']:.1f} "
            f"points, ratio "
            f"{row['sd_ratio']:.2f} [{row['sd_ratio_low']:.2f}, {row['sd_ratio_high']:.2f}], "
            f"Brown-Forsythe "
            f"{_p(row['p_spread'])}, Holm {_p(row['p_spread_holm'])}; {row['pairs']} seeds find a "
            f"ratio of "
            f"{ratio:.1f} or 1/{ratio:.1f} with power {stats.POWER} (normal values)."
        )
    if all(np.isnan(row["p_spread"]) for row in family):
        return NOT_TESTED, lines
    return " ".join(
        filter(None, [lower and f"Yes: {lower}.", higher and f"Higher: {higher}."])
    ) or NOT_SHOWN, lines


def _answer_hypothesis(by_task: list[dict[str, Any]], margin: float) -> tuple[str, list[str]]:
    lines, answers = [], {}
    for method in dict.fromkeys(row["method"] for row in by_task):
        mine = {row["metric"]: row for row in by_task if row["method"] == method}
        if not _tested(list(mine.values())):
            answers[method] = "not tested"
            lines.append(sentence(next(iter(mine.values())), margin))
            continue
        against = [
            f"{task} differs by more than {_margin(margin)}"
            for task in SIMILAR_ON
            if task in mine
            and "on these rows" not in mine[task]["outcome"]
            and mine[task]["outcome"] in ("better", "worse")
            and (mine[task]["low"] > margin or mine[task]["high"] < -margin)
        ]
        against += [
            f"{task} {mine[task]['outcome']}"
            for task in BETTER_ON
            if task in mine and mine[task]["outcome"] in ("worse", "equivalent")
        ]
        holds = all(task in mine and mine[task]["equal"] for task in SIMILAR_ON) and all(
            task in mine and mine[task]["outcome"] == "better" for task in BETTER_ON
        )
        answers[method] = (
            "supported"
            if holds
            else f"contradicted ({', '.join(against)})"
            if against
            else "not shown"
        )
        lines.append(
            f"{method} minus {BASELINE}: "
            + "; ".join(
                f"{task} {_points(row['difference'])} [{_points(row['low'])}, "
                f"{_points(row['high'])}], Holm "
                f"{_p(row['p_holm'])}, TOST {_p(row['p_equivalence_holm'])}, {row['outcome']}"
                + (f" ({_could_have(row)})" if row["outcome"] == "undecided" else "")
                for task, row in mine.items()
            )
            + "."
        )
    return "; ".join(f"{method}: {answer}" for method, answer in answers.items()) + ".", lines


def _no_benefit(margin: float) -> str:
    return f"No additional benefit (equal within {_margin(margin)})."


def _margin(margin: float) -> str:
    return f"{100 * margin:g} point{'s' * (margin != 0.01)}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _p(value: float) -> str:
    if np.isnan(value):
        return "p –"
    return (
        "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"
    )
