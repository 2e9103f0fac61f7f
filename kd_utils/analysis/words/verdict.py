"""The research questions answered in words, by rule: the same numbers give the same sentences.

A difference that is not significant is never called equality. Every answer says how many pairs it
rests on, and each null result says which difference so many pairs could have found.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from kd_utils.analysis import questions, stats, tables
from kd_utils.analysis.words import formatting
from kd_utils.analysis.words.formatting import Row

QUESTION_TEXTS = {
    "teacher": "Do the teacher's logits help at all, compared with the same training without a "
    "teacher?",
    "hard_answers": "Are the teacher's logits worth more than its hard answers?",
    "references": "Do the logits add something, over the best of the references without them? "
    "Better than the best is better than every one, so gains need no correction (an "
    "intersection-union test); losses and equality are Holm's.",
    "controls": "Negative controls: is training with no knowledge of the teacher's distribution "
    "better than training on its answers?",
    "white_box": "Do white-box signals help beyond logits?",
    "white_box_references": "Do white-box signals add something, over the best of the same "
    "references? Each method has the comparison with its strongest reference.",
    "which": "Which helps more, attention maps or hidden states?",
    "combining": "Is combining both signals better than each signal alone?",
    "task": "Does the gain over logits, in points of accuracy, depend on the task (an "
    "interaction)?",
    "spread": "Do white-box signals lower the spread over seeds?",
    "hypothesis": "Hypothesis: similar on sentiment, better on reasoning (MMLU) and mathematics "
    "(GSM8K).",
}

SIMILAR_ON, BETTER_ON = ("sst2",), ("mmlu", "gsm8k")

#: What the numbers are over, and what they do not cover.
SCOPE = (
    "A seed varies the order of the data, the projector's initial weights and, where a model has "
    "it, dropout. p tests the seeds' differences on these validation rows by sign flips; rows p "
    "also covers other validation rows, and better or worse needs both. Both are corrected by "
    "Holm; the 95 % intervals, over seeds and rows, are not. Compared trials share one teacher and "
    "one initial student, so the intervals do not cover other teachers or students."
)

NOT_SHOWN, NOT_TESTED = "Not shown.", "Not tested."

#: The answers to the questions that have one comparison, by its outcome.
SINGLE = {
    "teacher": {
        "better": "Yes.",
        "worse": "No: the logits lower the accuracy.",
        "equivalent": "No additional benefit ({within}).",
    },
    "hard_answers": {
        "better": "Yes.",
        "worse": "No: hard answers are worth more.",
        "equivalent": "No ({within}).",
    },
    "which": {
        "better": "Attention maps.",
        "worse": "Hidden states.",
        "equivalent": "Neither: {within}.",
    },
}


def verdicts(
    table: pd.DataFrame, interaction: pd.DataFrame | None, margin: float = 0.01
) -> pd.DataFrame:
    """Every question with its answer.

    Args:
        table: the rows of `comparisons.compare`.
        interaction: the rows of `comparisons.interactions`; None: that question, and the one of
            the spread over seeds, are not asked.
        margin: the one that `compare` was called with, a fraction.

    Returns:
        question (key of `QUESTION_TEXTS`), setting, answer (a few words), evidence (sentences with
        the numbers).
    """
    primary = table[table["metric"] == questions.primary(table["metric"])]
    by_task = table[table["metric"].isin([*SIMILAR_ON, *BETTER_ON])]
    asked: list[tuple[str, pd.DataFrame, Callable]] = [
        (question, primary[primary["question"] == question], _by_outcome)
        for question in questions.QUESTIONS
    ]
    if interaction is not None:
        white_box = primary[primary["question"] == "white_box"]
        asked += [("task", interaction, _by_interaction), ("spread", white_box, _by_spread)]
    asked.append(("hypothesis", by_task[by_task["question"] == "white_box"], _by_hypothesis))
    rows = [
        (question, setting, *answer(family.to_dict("records"), margin))
        for question, chosen, answer in asked
        for setting, family in tables.beside_each_setting(chosen).groupby("setting", sort=False)
    ]
    return pd.DataFrame(rows, columns=["question", "setting", "answer", "evidence"])


def verdict_text(found: pd.DataFrame, coverage: str, scope: str = SCOPE) -> str:
    """The rows of `verdicts` as lines to print, after the sentence of `tables.coverage` and what
    the numbers are over.
    """
    scope = scope if len(found) else "There is no pair of trials to compare."
    lines = [*formatting.wrapped(coverage), *formatting.wrapped(scope)]
    for question, rows in found.groupby("question", sort=False):
        lines += ["", *formatting.wrapped(QUESTION_TEXTS[question])]
        for row in rows.itertuples():
            setting = f"[{row.setting}] " if row.setting else ""
            lines += formatting.wrapped(setting + row.answer, "  ")
            for evidence in row.evidence:
                lines += formatting.wrapped(f"- {evidence}", "    ")
    return "\n".join(lines)


def _by_outcome(family: list[Row], margin: float) -> tuple[str, list[str]]:
    """The answer to a question whose comparisons have outcomes, with their sentences."""
    question = family[0]["question"]
    told = family if question != "white_box_references" else map(strongest, _by_method(family))
    lines = [formatting.sentence(row, margin) for row in told]
    if all(row["outcome"] == "not tested" for row in family):
        return NOT_TESTED, lines
    answer = SEVERAL.get(question, _answer_single)
    return answer(family, f"equal within {formatting.margin_text(margin)}"), lines


def _answer_single(family: list[Row], within: str) -> str:
    answer = SINGLE[family[0]["question"]].get(family[0]["outcome"])
    return answer.format(within=within) if answer else _not_shown(family)


def _answer_white_box(family: list[Row], within: str) -> str:
    better, worse, equal = _by_word(family, "method")
    also_worse = f" Worse: {', '.join(worse)}." if worse else ""
    if better:
        return f"Yes: {', '.join(better)}." + also_worse.replace("Worse", "But worse")
    if {*worse, *equal} != set(questions.WHITE_BOX):
        return _not_shown(family) + also_worse
    if not worse:
        return f"No additional benefit ({within})."
    return f"No. Worse: {', '.join(worse)}" + (f"; equal: {', '.join(equal)}." if equal else ".")


def _answer_combining(family: list[Row], within: str) -> str:
    better, worse, equal = _by_word(family, "baseline")
    if worse:
        return f"No: worse than {', '.join(worse)}."
    if len(better) == 2:
        return "Yes: better than either alone."
    if len(equal) == 2:
        return f"No additional benefit ({within})."
    if better:
        return f"Not shown: better than {better[0]} only."
    return _not_shown(family)


def _answer_references(family: list[Row], within: str) -> str:
    asked = [row["baseline"] for row in family]
    missing = [name for name in questions.REFERENCES if name not in asked]
    partly = f" Not fully asked: this run has no {', '.join(missing)}." if missing else ""
    return _adds(family, within, missing) + partly


def _answer_white_box_references(family: list[Row], within: str) -> str:
    answers = {rows[0]["method"]: _answer_references(rows, within) for rows in _by_method(family)}
    return " ".join(f"[{method}] {answer}" for method, answer in answers.items())


def _adds(family: list[Row], within: str, missing: list[str]) -> str:
    better, worse, equal = _by_word(family, "baseline")
    against = [f"worse than {', '.join(worse)}"] * bool(worse)
    against += [f"{within} to {', '.join(equal)}"] * bool(equal)
    if against:
        return f"Does not add: {'; '.join(against)}."
    joint = joint_row(family)
    if joint["outcome"] == "better":
        return f"{'Better' if missing else 'Adds: better'} than {', '.join(better)}."
    return f"{_not_shown(family)} The strongest reference is {joint['baseline']}."


def joint_row(family: list[Row]) -> Row:
    """A joint question's comparisons of one method in one setting as one: that with the strongest
    baseline, whose outcome is better if all are, worse or equivalent if any is, and undecided
    otherwise.
    """
    outcomes = {row["outcome"] for row in family}
    known = [word for word in ("worse", "equivalent") if word in outcomes]
    outcome = outcomes.pop() if len(outcomes) == 1 else (known or ["undecided"])[0]
    return strongest(family) | {"outcome": outcome}


def strongest(family: list[Row]) -> Row:
    """The comparison with the strongest baseline."""
    return min(family, key=lambda row: np.nan_to_num(row["difference"], nan=np.inf))


def _by_method(family: list[Row]) -> list[list[Row]]:
    methods = dict.fromkeys(row["method"] for row in family)
    return [[row for row in family if row["method"] == method] for method in methods]


def _answer_controls(family: list[Row], within: str) -> str:
    better, _, _ = _by_word(family, "method")
    if better:
        return f"Yes, a false alarm: {', '.join(better)}."
    return _not_shown(family)


#: The answers to the questions that have several comparisons.
SEVERAL: dict[str, Callable[[list[Row], str], str]] = {
    "references": _answer_references,
    "controls": _answer_controls,
    "white_box": _answer_white_box,
    "white_box_references": _answer_white_box_references,
    "combining": _answer_combining,
}


def _by_word(family: list[Row], key: str) -> list[list[str]]:
    return [
        [row[key] for row in family if row["outcome"] == outcome]
        for outcome in ("better", "worse", "equivalent")
    ]


def _not_shown(family: list[Row]) -> str:
    """Nothing was shown that would hold on other rows; what these rows show is named."""
    on_these_rows = [
        f"{row['method']} is {row['outcome'].split()[0]} than {row['baseline']}"
        for row in family
        if row["outcome"].endswith("on these rows")
    ]
    beyond = f"Not shown beyond these validation rows, where {', '.join(on_these_rows)}."
    return beyond if on_these_rows else NOT_SHOWN


def _by_interaction(rows: list[Row], margin: float) -> tuple[str, list[str]]:
    lines = [formatting.interaction_sentence(row) for row in rows]
    on_these_rows = [row for row in rows if row["p_holm"] < stats.ALPHA]
    found = [row["method"] for row in on_these_rows if row["p_rows_holm"] < stats.ALPHA]
    if all(np.isnan(row["p"]) for row in rows):
        return NOT_TESTED, lines
    if found:
        return f"Yes: {', '.join(found)}.", lines
    if on_these_rows:
        methods = ", ".join(row["method"] for row in on_these_rows)
        return f"Not shown beyond these validation rows (on these rows: {methods}).", lines
    return "Not shown, which is not the same as independence.", lines


def _by_spread(rows: list[Row], margin: float) -> tuple[str, list[str]]:
    lines = [formatting.spread_sentence(row) for row in rows]
    if all(np.isnan(row["p_spread"]) for row in rows):
        return NOT_TESTED, lines
    found = [row for row in rows if row["p_spread_holm"] < stats.ALPHA]
    lower = ", ".join(row["method"] for row in found if row["sd_ratio_high"] < 1)
    higher = ", ".join(row["method"] for row in found if row["sd_ratio_low"] > 1)
    answers = [f"Yes: {lower}."] * bool(lower) + [f"Higher: {higher}."] * bool(higher)
    return " ".join(answers) or NOT_SHOWN, lines


def _by_hypothesis(by_task: list[Row], margin: float) -> tuple[str, list[str]]:
    answers, lines = [], []
    for method in dict.fromkeys(row["method"] for row in by_task):
        rows = {row["metric"]: row for row in by_task if row["method"] == method}
        if all(row["outcome"] == "not tested" for row in rows.values()):
            answers.append(f"{method}: not tested")
            lines.append(formatting.sentence(next(iter(rows.values())), margin))
        else:
            answers.append(f"{method}: {_supports_hypothesis(rows, margin)}")
            tasks = "; ".join(formatting.task_sentence(row) for row in rows.values())
            lines.append(f"{method} minus {questions.BASELINE}: {tasks}.")
    return "; ".join(answers) + ".", lines


def _supports_hypothesis(rows: dict[str, Row], margin: float) -> str:
    """Supported, contradicted or not shown, from a method's comparison on each task."""
    outcomes = {task: row["outcome"] for task, row in rows.items()}
    similar = all(task in rows and rows[task]["equal"] for task in SIMILAR_ON)
    if similar and all(outcomes.get(task) == "better" for task in BETTER_ON):
        return "supported"
    against = [
        f"{task} differs by more than {formatting.margin_text(margin)}"
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
