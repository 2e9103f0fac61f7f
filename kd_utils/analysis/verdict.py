"""The research questions answered in words, by rule: the same numbers always give the same
sentences.

A difference that is not significant is never called equality. Every answer says how many pairs it
rests on, and each null result says which difference so many pairs could have found.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis import stats
from kd_utils.analysis.comparisons import BASELINE, PRIMARY, WHITE_BOX, interaction_tasks
from kd_utils.analysis.tables import beside_each_setting

Row = dict[str, Any]

QUESTION_TEXTS = {
    "teacher": "Do the teacher's logits help at all, beside the same training without a teacher?",
    "white_box": "Do white-box signals help beyond logits?",
    "which": "Which helps more, attention maps or hidden states?",
    "combining": "Does combining help, beyond the better of the two?",
    "task": "Does the gain over logits, in points of accuracy, depend on the task (an interaction)?",
    "spread": "Do white-box signals lower the spread over seeds?",
    "hypothesis": "Hypothesis: similar on sentiment, better on reasoning (MMLU) and mathematics "
    "(GSM8K).",
}

SIMILAR_ON, BETTER_ON = ("sst2",), ("mmlu", "gsm8k")

#: What the numbers are over, and what they do not cover.
SCOPE = (
    "A seed varies the order of the data, the projector's initial weights, and dropout where a "
    "model has any. p flips the signs of the seeds' differences, on these validation rows; better "
    "and worse must also hold over other rows (rows p); both are corrected by Holm, the 95 % "
    "intervals, over seeds and rows, are not. All trials share one teacher and the student's "
    "initial weights, so another teacher or student is not spoken of."
)

NOT_SHOWN, NOT_TESTED = "Not shown.", "Not tested."


def verdicts(table: pd.DataFrame, interaction: pd.DataFrame, margin: float = 0.01) -> pd.DataFrame:
    """Every question with its answer.

    Args:
        table: the rows of `comparisons.compare`.
        interaction: the rows of `comparisons.interactions`.
        margin: the one that `compare` was called with, a fraction.

    Returns:
        question (key of `QUESTION_TEXTS`), setting, answer (a few words), evidence (sentences with
        the numbers).
    """
    primary = table[table["metric"] == PRIMARY]
    white_box = table[table["question"] == "white_box"]
    by_task = white_box[white_box["metric"].isin([*SIMILAR_ON, *BETTER_ON])]
    asked: list[tuple[str, pd.DataFrame, Callable[..., tuple[str, list[str]]]]] = [
        (question, primary[primary["question"] == question], partial(_by_outcome, answer))
        for question, answer in ANSWERS.items()
    ]
    asked += [
        ("task", interaction, _by_interaction),
        ("spread", white_box[white_box["metric"] == PRIMARY], _by_spread),
        ("hypothesis", by_task, _by_hypothesis),
    ]
    rows = [
        (question, setting, *answer(family.to_dict("records"), margin))
        for question, chosen, answer in asked
        for setting, family in beside_each_setting(chosen).groupby("setting", sort=False)
    ]
    return pd.DataFrame(rows, columns=["question", "setting", "answer", "evidence"])


def verdict_text(found: pd.DataFrame, coverage: str) -> str:
    """The verdicts as lines to print, after the number of trials that they rest on.

    Args:
        found: of `verdicts`.
        coverage: the sentence of `tables.coverage`.
    """
    scope = SCOPE if len(found) else "There is no pair of trials to compare."
    lines = [*_wrapped(coverage), *_wrapped(scope)]
    for question, rows in found.groupby("question", sort=False):
        lines += ["", *_wrapped(QUESTION_TEXTS[question])]
        for row in rows.itertuples():
            setting = f"[{row.setting}] " if row.setting else ""
            lines += _wrapped(setting + row.answer, "  ")
            for evidence in row.evidence:
                lines += _wrapped(f"- {evidence}", "    ")
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "") -> list[str]:
    following = indent + "  " * text.startswith("- ")
    return textwrap.wrap(
        text, 118, initial_indent=indent, subsequent_indent=following, break_on_hyphens=False
    )


def sentence(row: Row, margin: float) -> str:
    """One comparison in words: what was found, on how many pairs, and what could have been
    found.
    """
    if row["outcome"] == "not tested":
        return f"{_what(row)}: not tested, {_pairs(row)} are done and a test needs two."
    size = "" if np.isnan(row["g"]) else f", g = {row['g']:.2f}"
    numbers = (
        f"{_what(row)}: {_points(row['difference'])} points "
        f"[{_points(row['low'])}, {_points(row['high'])}], {_p(row['p'])}, "
        f"Holm {_p(row['p_holm'])}, rows {_p(row['p_rows_holm'])}{size}, {_pairs(row)}"
    )
    if row["outcome"] == "equivalent":
        return f"{numbers}: equal within {_margin(margin)} (TOST {_p(row['p_equivalence_holm'])})."
    if row["outcome"] == "undecided":
        return f"{numbers}: neither a difference nor equality is shown; {_could_have(row)}."
    within = f" (and equal within {_margin(margin)})" if row["equal"] else ""
    elsewhere = "; other validation rows might not show it" * _only_on_these_rows(row)
    return f"{numbers}: {row['outcome']}{within}{elsewhere}."


def _could_have(row: Row) -> str:
    """For a null result: the difference found with power 0.8, or how many pairs a finding would
    need.
    """
    if stats.smallest_p(row["pairs"]) * row["family"] > stats.ALPHA:
        needed = next(n for n in range(2, 99) if stats.smallest_p(n) * row["family"] <= stats.ALPHA)
        return (
            f"no difference, however large, could be significant with {row['pairs']} pairs: "
            f"{needed} are needed"
        )
    if not row["detectable"] > 0:
        return "no pair differs"
    return (
        f"{row['pairs']} pairs find {100 * row['detectable']:.1f} points with power {stats.POWER}"
    )


def _by_outcome(
    answer: Callable[[list[Row], str], str], family: list[Row], margin: float
) -> tuple[str, list[str]]:
    """The answer to a question whose comparisons have outcomes, with their sentences."""
    tested = any(row["outcome"] != "not tested" for row in family)
    within = f"equal within {_margin(margin)}"
    return answer(family, within) if tested else NOT_TESTED, [sentence(r, margin) for r in family]


def _answer_teacher(family: list[Row], within: str) -> str:
    known = {
        "better": "Yes.",
        "worse": "No: they make it worse.",
        "equivalent": f"No additional benefit ({within}).",
    }
    return known.get(family[0]["outcome"]) or _not_shown(family)


def _answer_which(family: list[Row], within: str) -> str:
    known = {
        "better": "Attention maps.",
        "worse": "Hidden states.",
        "equivalent": f"Neither: {within}.",
    }
    return known.get(family[0]["outcome"]) or _not_shown(family)


def _answer_white_box(family: list[Row], within: str) -> str:
    better, worse, equal = (
        [row["method"] for row in family if row["outcome"] == outcome]
        for outcome in ("better", "worse", "equivalent")
    )
    also_worse = f" Worse: {', '.join(worse)}." if worse else ""
    if better:
        return f"Yes: {', '.join(better)}." + also_worse.replace("Worse", "But worse")
    if {*worse, *equal} != set(WHITE_BOX):
        return _not_shown(family) + also_worse
    if not worse:
        return f"No additional benefit ({within})."
    return f"No: worse: {', '.join(worse)}" + (f"; equal: {', '.join(equal)}." if equal else ".")


def _answer_combining(family: list[Row], within: str) -> str:
    baselines = {
        outcome: [row["baseline"] for row in family if row["outcome"] == outcome]
        for outcome in ("better", "worse", "equivalent")
    }
    if baselines["worse"]:
        return f"No: worse than {', '.join(baselines['worse'])}."
    if len(baselines["better"]) == 2:
        return "Yes: better than either alone."
    if len(baselines["equivalent"]) == 2:
        return f"No additional benefit ({within})."
    if baselines["better"]:
        return f"Not shown: better than {baselines['better'][0]}, but not than both."
    return _not_shown(family)


ANSWERS = {
    "teacher": _answer_teacher,
    "white_box": _answer_white_box,
    "which": _answer_which,
    "combining": _answer_combining,
}


def _not_shown(family: list[Row]) -> str:
    """Nothing was shown that would hold on other rows; what these rows show is named."""
    here = [
        f"{row['method']} {row['outcome'].split()[0]} than {row['baseline']}"
        for row in family
        if _only_on_these_rows(row)
    ]
    if not here:
        return NOT_SHOWN
    return f"Not shown beyond these validation rows, where {', '.join(here)}."


def _by_interaction(rows: list[Row], margin: float) -> tuple[str, list[str]]:
    here = [row for row in rows if row["p_holm"] < stats.ALPHA]
    found = [row["method"] for row in here if row["p_rows_holm"] < stats.ALPHA]
    lines = []
    for row in rows:
        by_task = {task: row[task] for task in interaction_tasks(row)}
        if np.isnan(row["p"]):
            lines.append(f"{_what(row)}: not tested, {len(by_task)} tasks and {_pairs(row)}.")
            continue
        differences = ", ".join(f"{task} {_points(value)}" for task, value in by_task.items())
        few = "; so few pairs could show none" * (row["smallest_p"] > stats.ALPHA)
        lines.append(
            f"{_what(row)}: {differences} points; interaction {_p(row['p'])}, "
            f"Holm {_p(row['p_holm'])}, rows {_p(row['p_rows_holm'])}, {_pairs(row)}{few}."
        )
    if all(np.isnan(row["p"]) for row in rows):
        return NOT_TESTED, lines
    if found:
        return f"Yes: {', '.join(found)}.", lines
    if here:
        methods = ", ".join(row["method"] for row in here)
        return f"Not shown, beyond these validation rows: {methods}.", lines
    return "Not shown, which is not the same as independence.", lines


def _by_spread(family: list[Row], margin: float) -> tuple[str, list[str]]:
    found = [row for row in family if row["p_spread_holm"] < stats.ALPHA]
    lower = ", ".join(row["method"] for row in found if row["sd_ratio_high"] < 1)
    higher = ", ".join(row["method"] for row in found if row["sd_ratio_low"] > 1)
    lines = []
    for row in family:
        if np.isnan(row["p_spread"]):
            few = row["pairs"] < stats.FEWEST
            why = ", and a spread needs five." if few else " and no spread."
            lines.append(f"{row['method']}: not tested, {_pairs(row)}{why}")
            continue
        ratio = stats.detectable_ratio(row["pairs"], stats.ALPHA / row["family"])
        lines.append(
            f"{row['method']}: sd {100 * row['sd']:.1f} against {100 * row['baseline_sd']:.1f} "
            f"points, ratio {row['sd_ratio']:.2f} [{row['sd_ratio_low']:.2f}, "
            f"{row['sd_ratio_high']:.2f}], Brown-Forsythe {_p(row['p_spread'])}, "
            f"Holm {_p(row['p_spread_holm'])}; {row['pairs']} seeds find a ratio of {ratio:.1f} or "
            f"1/{ratio:.1f} with power {stats.POWER} (normal values)."
        )
    if all(np.isnan(row["p_spread"]) for row in family):
        return NOT_TESTED, lines
    answers = [f"Yes: {lower}."] * bool(lower) + [f"Higher: {higher}."] * bool(higher)
    return " ".join(answers) or NOT_SHOWN, lines


def _by_hypothesis(by_task: list[Row], margin: float) -> tuple[str, list[str]]:
    answers, lines = [], []
    for method in dict.fromkeys(row["method"] for row in by_task):
        rows = {row["metric"]: row for row in by_task if row["method"] == method}
        if all(row["outcome"] == "not tested" for row in rows.values()):
            answers.append(f"{method}: not tested")
            lines.append(sentence(next(iter(rows.values())), margin))
            continue
        answers.append(f"{method}: {_supports_hypothesis(rows, margin)}")
        tasks = [_task_sentence(task, row) for task, row in rows.items()]
        lines.append(f"{method} minus {BASELINE}: {'; '.join(tasks)}.")
    return "; ".join(answers) + ".", lines


def _supports_hypothesis(rows: dict[str, Row], margin: float) -> str:
    """Supported, contradicted or not shown, from a method's comparison on each task."""
    outcomes = {task: row["outcome"] for task, row in rows.items()}
    similar = all(task in rows and rows[task]["equal"] for task in SIMILAR_ON)
    if similar and all(outcomes.get(task) == "better" for task in BETTER_ON):
        return "supported"
    against = [
        f"{task} differs by more than {_margin(margin)}"
        for task in SIMILAR_ON
        if outcomes.get(task) in ("better", "worse")
        and (rows[task]["low"] > margin or rows[task]["high"] < -margin)
    ]
    against += [
        f"{task} {outcomes[task]}"
        for task in BETTER_ON
        if outcomes.get(task) in ("worse", "equivalent")
    ]
    return f"contradicted ({', '.join(against)})" if against else "not shown"


def _task_sentence(task: str, row: Row) -> str:
    could = f" ({_could_have(row)})" if row["outcome"] == "undecided" else ""
    return (
        f"{task} {_points(row['difference'])} [{_points(row['low'])}, {_points(row['high'])}], "
        f"Holm {_p(row['p_holm'])}, TOST {_p(row['p_equivalence_holm'])}, {row['outcome']}{could}"
    )


def _only_on_these_rows(row: Row) -> bool:
    return row["outcome"].endswith("on these rows")


def _what(row: Row) -> str:
    return f"{row['method']} minus {row['baseline']}"


def _pairs(row: Row) -> str:
    return f"{row['pairs']} of {row['planned']} pairs"


def _margin(margin: float) -> str:
    return f"{100 * margin:g} point{'s' * (margin != 0.01)}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _p(value: float) -> str:
    if np.isnan(value):
        return "p –"
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"
