"""The research questions answered in words, by rule: the same numbers always give the same sentence.

A difference that is not significant is never called equality, every answer says on how many pairs it rests, and beside
each null result stands the smallest difference that so many pairs could have found.
"""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd

from . import stats
from .comparisons import BASELINE, PRIMARY, WHITE_BOX

QUESTION_TEXTS = {
    "teacher": "Do the teacher's logits help at all, beside the same training without a teacher?",
    "white_box": "Do white-box signals help beyond logits?",
    "which": "Which helps more, attention maps or hidden states?",
    "combining": "Does combining help, beyond the better of the two?",
    "task": "Does the gain over logits depend on the task (an interaction)?",
    "spread": "Do white-box signals lower the spread over seeds?",
    "hypothesis": "Hypothesis: similar on sentiment, better on reasoning (MMLU) and mathematics (GSM8K).",
}
SIMILAR_ON, BETTER_ON = ("sst2",), ("mmlu", "gsm8k")
#: What a verdict about one teacher and one initial student does not speak of.
SCOPE = ("Intervals and tests are over seeds (order of the data, dropout, projector) and validation examples. All "
         "trials share one teacher and the student's initial weights, so another teacher or student is not spoken of.")


def verdicts(table: pd.DataFrame, interaction: pd.DataFrame, margin: float = 0.01) -> pd.DataFrame:
    """Every question with its answer.

    Args:
        table: `comparisons.compare`'s rows; interaction: `comparisons.interactions`'s.
        margin: the one that they were made with, a fraction.

    Returns:
        question (key of `QUESTION_TEXTS`), setting, answer (a few words), evidence (sentences with the numbers).
    """
    rows: list[tuple[str, str, str, list[str]]] = []
    for setting in dict.fromkeys([*table["setting"], *interaction["setting"]]):
        mine, inter = table[table["setting"] == setting], interaction[interaction["setting"] == setting]
        primary = mine[mine["metric"] == PRIMARY]
        for question, answer in ANSWERS.items():
            family = primary[primary["question"] == question].to_dict("records")
            if family:
                rows.append((question, setting, answer(family, margin), [sentence(row, margin) for row in family]))
        if len(inter):
            rows.append(("task", setting, *_answer_task(inter.to_dict("records"))))
        family = primary[primary["question"] == "white_box"].to_dict("records")
        if family:
            rows.append(("spread", setting, *_answer_spread(family)))
            by_task = mine[mine["question"] == "white_box"]
            rows.append(("hypothesis", setting, *_answer_hypothesis(by_task)))
    return pd.DataFrame(rows, columns=["question", "setting", "answer", "evidence"])


def verdict_text(found: pd.DataFrame, coverage: str) -> str:
    """The verdicts as lines to print, after how many trials they rest on.

    Args:
        found: of `verdicts`.
        coverage: `tables.coverage`'s sentence: failed and missing trials by name.
    """
    lines = [*_wrapped(coverage), *_wrapped(SCOPE if len(found) else "There is no pair of trials to compare.")]
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
    return textwrap.wrap(text, 118, initial_indent=indent, subsequent_indent=more, break_on_hyphens=False)


def sentence(row: dict[str, Any], margin: float) -> str:
    """One comparison in words: what was found, on how many pairs, and what could have been found."""
    what = f"{row['method']} minus {row['baseline']}"
    pairs = f"{row['pairs']} of {row['planned']} pairs"
    if row["outcome"] == "not tested":
        return f"{what}: not tested, {pairs} are done and a test needs two."
    numbers = (f"{what}: {_points(row['difference'])} points [{_points(row['low'])}, {_points(row['high'])}], "
               f"p = {_p(row['p'])}, Holm {_p(row['p_holm'])}, g = {row['g']:.2f}, {pairs}")
    if row["outcome"] in ("better", "worse"):
        over_examples = "" if row["low"] * row["high"] > 0 else (
            "; on these validation examples, for the interval over examples holds 0")
        return f"{numbers}: {row['outcome']}{over_examples}."
    if row["outcome"] == "equivalent":
        return f"{numbers}: equal within {100 * margin:g} points (TOST p = {_p(row['p_equivalence_holm'])})."
    return f"{numbers}: neither a difference nor equality is shown{_could_have(row)}."


def _could_have(row: dict[str, Any]) -> str:
    if np.isfinite(row["detectable"]):
        return f"; {row['pairs']} pairs find {100 * row['detectable']:.1f} points with power {stats.POWER}"
    size = round(row["smallest_p"] / stats.smallest_p(row["pairs"])) if row["smallest_p"] < 1 else 1
    needed = next(n for n in range(2, 99) if stats.smallest_p(n) * size <= stats.ALPHA)
    return f"; no difference, however large, could be significant with {row['pairs']} pairs: {needed} are needed"


def _names(family: list[dict[str, Any]], outcome: str) -> str:
    return ", ".join(row["method"] for row in family if row["outcome"] == outcome)


def _answer_teacher(family: list[dict[str, Any]], margin: float) -> str:
    return {"better": "Yes.", "worse": "No: they make it worse.", "equivalent": _no_benefit(margin)}.get(
        family[0]["outcome"], "Not shown.")


def _answer_white_box(family: list[dict[str, Any]], margin: float) -> str:
    better, worse = _names(family, "better"), _names(family, "worse")
    if better:
        return f"Yes: {better}." + (f" But {worse}: worse." if worse else "")
    if worse:
        return f"No: worse with {worse}."
    everything = all(row["outcome"] == "equivalent" for row in family) and len(family) == len(WHITE_BOX)
    return _no_benefit(margin) if everything else "Not shown."


def _answer_which(family: list[dict[str, Any]], margin: float) -> str:
    return {"better": "Attention maps.", "worse": "Hidden states.",
            "equivalent": f"Neither: equal within {100 * margin:g} points."}.get(family[0]["outcome"], "Not shown.")


def _answer_combining(family: list[dict[str, Any]], margin: float) -> str:
    outcomes = [row["outcome"] for row in family]
    if "worse" in outcomes:
        return "No: worse than " + ", ".join(row["baseline"] for row in family if row["outcome"] == "worse") + "."
    if len(family) == 2 and all(outcome == "better" for outcome in outcomes):
        return "Yes: better than either alone."
    if len(family) == 2 and all(outcome == "equivalent" for outcome in outcomes):
        return _no_benefit(margin)
    only = [row["baseline"] for row in family if row["outcome"] == "better"]
    return "Not shown" + (f": better than {only[0]}, but not than both." if only else ".")


ANSWERS = {"teacher": _answer_teacher, "white_box": _answer_white_box, "which": _answer_which,
           "combining": _answer_combining}


def _answer_task(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    found = [row["method"] for row in rows if row["p_holm"] < stats.ALPHA]
    known = {"setting", "method", "baseline", "planned", "pairs", "p", "p_holm", "smallest_p"}
    lines = []
    for row in rows:
        by_task = ", ".join(f"{key} {_points(value)}" for key, value in row.items() if key not in known)
        lines.append(f"{row['method']} minus {row['baseline']}: {by_task} points; interaction p = {_p(row['p'])}, Holm "
                     f"{_p(row['p_holm'])}, {row['pairs']} of {row['planned']} pairs.")
    return (f"Yes: {', '.join(found)}." if found else "Not shown, which is not the same as independence."), lines


def _answer_spread(family: list[dict[str, Any]]) -> tuple[str, list[str]]:
    shown = [row for row in family if row["p_spread_holm"] < stats.ALPHA]
    lower = ", ".join(row["method"] for row in shown if row["sd_ratio"] < 1)
    higher = ", ".join(row["method"] for row in shown if row["sd_ratio"] > 1)
    answer = " ".join(filter(None, [lower and f"Yes: {lower}.", higher and f"Higher: {higher}."])) or "Not shown."
    lines = [f"{row['method']}: sd {100 * row['sd']:.1f} against {100 * row['baseline_sd']:.1f} points, ratio "
             f"{row['sd_ratio']:.2f} [{row['sd_ratio_low']:.2f}, {row['sd_ratio_high']:.2f}], Brown-Forsythe "
             f"p = {_p(row['p_spread'])}, Holm {_p(row['p_spread_holm'])}."
             if np.isfinite(row["sd_ratio"]) else f"{row['method']}: not tested, {row['pairs']} pairs or no spread."
             for row in family]
    return answer, lines


def _answer_hypothesis(by_task: pd.DataFrame) -> tuple[str, list[str]]:
    parts, lines, answers = {*SIMILAR_ON, *BETTER_ON}, [], {}
    rows = by_task[by_task["metric"].isin(parts)]
    for method, mine in rows.groupby("method", sort=False):
        seen = dict(zip(mine["metric"], mine["outcome"]))
        against = [f"{task} {seen[task]}" for task in SIMILAR_ON if seen.get(task) in ("better", "worse")]
        against += [f"{task} {seen[task]}" for task in BETTER_ON if seen.get(task) in ("worse", "equivalent")]
        holds = (all(seen.get(task) == "equivalent" for task in SIMILAR_ON)
                 and all(seen.get(task) == "better" for task in BETTER_ON))
        answers[method] = "supported" if holds else f"contradicted ({', '.join(against)})" if against else "not shown"
        lines.append(f"{method} minus {BASELINE}: " + "; ".join(
            f"{row['metric']} {_points(row['difference'])} [{_points(row['low'])}, {_points(row['high'])}], Holm "
            f"{_p(row['p_holm'])}, TOST {_p(row['p_equivalence_holm'])}, {row['outcome']}"
            + (_could_have(row).replace("; ", ", ", 1) if row["outcome"] == "undecided" else "")
            for row in mine.to_dict("records")) + ".")
    return "; ".join(f"{method}: {answer}" for method, answer in answers.items()) + ".", lines


def _no_benefit(margin: float) -> str:
    return f"No additional benefit (equal within {100 * margin:g} points)."


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _p(value: float) -> str:
    if np.isnan(value):
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
