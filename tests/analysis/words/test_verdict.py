"""Verdicts: every answer by its rule, nulls never called equality, missing trials in the text."""

import numpy as np
import pandas as pd
import pytest

from kd_utils.analysis.words import formatting, verdict

WHITE_BOX = [("hidden_state", "black_box"), ("attention", "black_box"), ("combined", "black_box")]


def row(
    question: str,
    method: str,
    baseline: str,
    outcome: str,
    metric: str = "macro",
    setting: str = "",
    **values,
) -> dict:
    difference = {"better": 0.03, "worse": -0.03}.get(outcome.split()[0], 0.002)
    numbers = {
        "planned": 7,
        "pairs": 7,
        "family": 3,
        "difference": difference,
        "low": difference - 0.01,
        "high": difference + 0.01,
        "p": 0.016 if difference != 0.002 else 0.4,
        "p_holm": 0.047,
        "p_rows_holm": 0.03,
        "p_equivalence_holm": 0.01,
        "equal": outcome == "equivalent",
        "g": 0.5,
        "detectable_seeds": 0.05,
        "detectable_rows": 0.06,
        "smallest_p": 0.047,
        "sd": 0.02,
        "baseline_sd": 0.03,
        "sd_ratio": 0.67,
        "sd_ratio_low": 0.3,
        "sd_ratio_high": 1.6,
        "p_spread": 0.3,
        "p_spread_holm": 0.9,
    }
    return {
        "question": question,
        "metric": metric,
        "setting": setting,
        "method": method,
        "baseline": baseline,
        "outcome": outcome,
        **numbers,
        **values,
    }


def answers(*given: dict, interaction: list[float] = (), rows: float = 0.01) -> dict[str, str]:
    table = pd.DataFrame(given)
    inter = pd.DataFrame(
        [
            {
                "setting": "",
                "method": method,
                "baseline": baseline,
                "planned": 7,
                "pairs": 7,
                "sst2": 0.01,
                "mmlu": 0.0,
                "p": p / 3,
                "p_holm": p,
                "p_rows": rows_p,
                "p_rows_holm": rows_p,
                "smallest_p": 0.047,
            }
            for (method, baseline), p, rows_p in zip(WHITE_BOX, interaction, [0.01, rows, 0.01])
        ],
        columns=[
            "setting",
            "method",
            "baseline",
            "planned",
            "pairs",
            "sst2",
            "mmlu",
            "p",
            "p_holm",
            "p_rows",
            "p_rows_holm",
            "smallest_p",
        ],
    )
    return verdict.verdicts(table, inter).set_index("question")["answer"].to_dict()


@pytest.mark.parametrize(
    "outcomes, answer",
    [
        (("better", "undecided", "better"), "Yes: hidden_state, combined."),
        (("better", "worse", "undecided"), "Yes: hidden_state. But worse: attention."),
        (
            ("undecided", "worse", "undecided"),
            "Not shown. Worse: attention.",
        ),  # the others may yet help
        (("worse", "worse", "equivalent"), "No. Worse: hidden_state, attention; equal: combined."),
        (("worse", "worse", "worse"), "No. Worse: hidden_state, attention, combined."),
        (
            ("better on these rows", "undecided", "worse on these rows"),
            "Not shown beyond these validation rows, where hidden_state is better than black_box, "
            "combined is worse than black_box.",
        ),
        (
            ("equivalent", "equivalent", "equivalent"),
            "No additional benefit (equal within 1 point).",
        ),
        (("equivalent", "equivalent", "undecided"), "Not shown."),
        (("undecided", "undecided", "undecided"), "Not shown."),
        (("not tested", "undecided", "undecided"), "Not shown."),
        (("not tested", "not tested", "not tested"), "Not tested."),
    ],
)
def test_do_white_box_signals_help(outcomes, answer):
    rows = [row("white_box", *pair, outcome) for pair, outcome in zip(WHITE_BOX, outcomes)]
    assert answers(*rows)["white_box"] == answer


def test_two_of_three_equal_methods_are_no_proof_that_nothing_helps():
    rows = [row("white_box", *pair, "equivalent") for pair in WHITE_BOX[:2]]
    assert answers(*rows)["white_box"] == "Not shown."


@pytest.mark.parametrize(
    "outcome, answer",
    [
        ("better", "Attention maps."),
        ("worse", "Hidden states."),
        ("equivalent", "Neither: equal within 1 point."),
        ("undecided", "Not shown."),
        ("not tested", "Not tested."),
        (
            "better on these rows",
            "Not shown beyond these validation rows, where attention is better than hidden_state.",
        ),
    ],
)
def test_which_helps_more(outcome, answer):
    assert answers(row("which", "attention", "hidden_state", outcome))["which"] == answer


@pytest.mark.parametrize(
    "outcomes, answer",
    [
        (("better", "better"), "Yes: better than either alone."),
        (("better", "undecided"), "Not shown: better than hidden_state only."),
        (("worse", "better"), "No: worse than hidden_state."),
        (("equivalent", "equivalent"), "No additional benefit (equal within 1 point)."),
        (("undecided", "equivalent"), "Not shown."),
    ],
)
def test_does_combining_help(outcomes, answer):
    rows = [
        row("combining", "combined", baseline, outcome)
        for baseline, outcome in zip(("hidden_state", "attention"), outcomes)
    ]
    assert answers(*rows)["combining"] == answer


@pytest.mark.parametrize(
    "outcome, answer",
    [
        ("better", "Yes."),
        ("worse", "No: the logits lower the accuracy."),
        ("undecided", "Not shown."),
    ],
)
def test_does_the_teacher_help_at_all(outcome, answer):
    assert answers(row("teacher", "black_box", "task_only", outcome))["teacher"] == answer


REFERENCES = ("task_only", "teacher_answers", "label_smoothing", "shuffled")


@pytest.mark.parametrize(
    "outcomes, answer",
    [
        (
            ("better",) * 4,
            "Adds: better than task_only, teacher_answers, label_smoothing, shuffled.",
        ),
        (
            ("better", "equivalent", "better", "worse"),
            "Does not add: worse than shuffled; equal within 1 point to teacher_answers.",
        ),
        (
            ("better", "better", "undecided", "better"),
            "Not shown. The strongest reference is label_smoothing.",
        ),
        (
            ("better", "better"),
            "Better than task_only, teacher_answers. Not fully asked: this run has no "
            "label_smoothing, shuffled.",
        ),
        (
            ("better", "undecided"),
            "Not shown. The strongest reference is teacher_answers. Not fully asked: this run has "
            "no label_smoothing, shuffled.",
        ),
        (("not tested",) * 4, "Not tested."),
    ],
)
def test_do_the_logits_add_something_over_the_best_reference(outcomes, answer):
    rows = [
        row("references", "black_box", reference, outcome)
        for reference, outcome in zip(REFERENCES, outcomes)
    ]
    assert answers(*rows)["references"] == answer


def test_what_a_white_box_signal_adds_is_said_of_each_method():
    outcomes = {"hidden_state": ["better"] * 4, "attention": ["better"] * 3 + ["equivalent"]}
    rows = [
        row("white_box_references", method, reference, outcome)
        for method, of_method in outcomes.items()
        for reference, outcome in zip(REFERENCES, of_method)
    ]
    assert answers(*rows)["white_box_references"] == (
        "[hidden_state] Adds: better than task_only, teacher_answers, label_smoothing, shuffled. "
        "[attention] Does not add: equal within 1 point to shuffled."
    )


@pytest.mark.parametrize(
    "outcome, answer",
    [("better", "Yes."), ("equivalent", "No (equal within 1 point)."), ("undecided", "Not shown.")],
)
def test_are_logits_worth_more_than_hard_answers(outcome, answer):
    assert answers(row("hard_answers", "black_box", "teacher_answers", outcome)) == {
        "hard_answers": answer
    }


def test_a_gain_of_a_negative_control_is_a_false_alarm():
    pairs = [("shuffled", "teacher_answers"), ("label_smoothing", "teacher_answers")]
    rows = [row("controls", *pair, outcome) for pair, outcome in zip(pairs, ("better", "worse"))]
    assert answers(*rows)["controls"] == "Yes, a false alarm: shuffled."
    assert answers(row("controls", *pairs[0], "worse"))["controls"] == "Not shown."


def test_does_it_depend_on_the_task():
    rows = [row("white_box", *pair, "undecided") for pair in WHITE_BOX]
    assert answers(*rows, interaction=[0.9, 0.047, 0.3])["task"] == "Yes: attention."
    assert (
        answers(*rows, interaction=[0.9, 0.06, 0.3])["task"]
        == "Not shown, which is not the same as independence."
    )
    assert answers(*rows, interaction=[0.9, 0.047, 0.3], rows=0.2)["task"] == (
        "Not shown beyond these validation rows (on these rows: attention)."
    )
    assert answers(*rows, interaction=[np.nan] * 3)["task"] == "Not tested."


def test_is_the_spread_lower():
    rows = [row("white_box", *pair, "undecided") for pair in WHITE_BOX]
    assert answers(*rows)["spread"] == "Not shown."
    rows[1] |= {"p_spread_holm": 0.01, "sd_ratio_high": 0.9}
    rows[2] |= {"p_spread_holm": 0.01, "sd_ratio": 3.0, "sd_ratio_low": 1.2, "sd_ratio_high": 5.0}
    assert answers(*rows)["spread"] == "Yes: attention. Higher: combined."
    rows[1] |= {"sd_ratio_high": 1.1}  # the test's p alone does not do
    assert answers(*rows)["spread"] == "Higher: combined."
    assert (
        answers(*(each | {"p_spread": np.nan, "pairs": 2} for each in rows))["spread"]
        == "Not tested."
    )


@pytest.mark.parametrize(
    "sst2, mmlu, gsm8k, answer",
    [
        ("equivalent", "better", "better", "supported"),
        ("equivalent", "better", "undecided", "not shown"),
        (
            "undecided",
            "better",
            "better",
            "not shown",
        ),  # not significant on sentiment is not similar on sentiment
        ("better", "better", "better", "contradicted (sst2 differs by more than 1 point)"),
        ("better on these rows", "better", "better", "not shown"),
        ("equivalent", "worse", "equivalent", "contradicted (mmlu worse, gsm8k equivalent)"),
    ],
)
def test_the_hypothesis(sst2, mmlu, gsm8k, answer):
    rows = [
        row("white_box", "attention", "black_box", outcome, metric)
        for metric, outcome in {
            "macro": "undecided",
            "sst2": sst2,
            "mmlu": mmlu,
            "gsm8k": gsm8k,
        }.items()
    ]
    assert answers(*rows)["hypothesis"] == f"attention: {answer}."


def test_better_by_less_than_the_margin_is_still_similar():
    rows = [
        row("white_box", "attention", "black_box", "better", metric)
        for metric in ("macro", "mmlu", "gsm8k")
    ]
    small = row(
        "white_box",
        "attention",
        "black_box",
        "better",
        "sst2",
        difference=0.003,
        low=0.002,
        high=0.004,
        equal=True,
    )
    assert answers(*rows, small)["hypothesis"] == "attention: supported."
    assert formatting.sentence(small, 0.01).endswith("better (and equal within 1 point).")


def test_a_null_result_says_what_could_have_been_found_and_is_no_equality():
    null = formatting.sentence(row("white_box", "attention", "black_box", "undecided"), 0.01)
    assert (
        "neither a difference nor equality is shown; 7 pairs detect a difference of 5.0 points on these "
        "rows, 6.0 over other rows too, with power 0.8." in null
    )
    assert "7 of 7 pairs" in null and "+0.2 points [-0.8, +1.2]" in null
    few = row("white_box", "attention", "black_box", "undecided", pairs=4, detectable_seeds=np.inf)
    assert (
        "no difference, however large, could be significant with 4 pairs: 7 are needed."
        in formatting.sentence(few, 0.01)
    )
    two = row(
        "white_box",
        "attention",
        "black_box",
        "undecided",
        pairs=2,
        detectable_seeds=np.inf,
        g=np.nan,
    )
    assert "g = " not in formatting.sentence(two, 0.01)
    assert "could be significant with 2 pairs: 7 are needed" in formatting.sentence(two, 0.01)
    none = row("white_box", "attention", "black_box", "not tested", pairs=1)
    assert formatting.sentence(none, 0.01) == (
        "attention minus black_box: not tested, 1 of 7 pairs are done and a test needs two."
    )


def test_a_finding_says_when_other_examples_might_not_show_it():
    sure = formatting.sentence(row("white_box", "attention", "black_box", "better"), 0.01)
    assert sure.endswith("7 of 7 pairs: better.")
    unsure = formatting.sentence(
        row("white_box", "attention", "black_box", "better on these rows"), 0.01
    )
    assert unsure.endswith("better on these rows; other validation rows might not show it.")


def test_the_text_begins_with_what_is_missing_and_its_scope():
    table = pd.DataFrame([row("white_box", *pair, "undecided") for pair in WHITE_BOX])
    found = verdict.verdicts(table, pd.DataFrame(columns=["setting"]))
    text = verdict.verdict_text(found, "27 of 28 trials are done; 1 failed: attention_seed3.")
    assert text.startswith(
        "27 of 28 trials are done; 1 failed: attention_seed3.\nA seed varies the order of the data"
    )
    assert (
        "Do white-box signals help beyond logits?\n  Not shown.\n    - hidden_state minus black_box"
        in text
    )
    assert max(map(len, text.splitlines())) <= 118
    empty = verdict.verdict_text(found.iloc[:0], "1 of 1 trials are done.")
    assert empty == "1 of 1 trials are done.\nThere is no pair of trials to compare."


def test_a_method_with_fewer_swept_keys_stands_beside_every_full_setting():
    rows = [
        row("combining", "combined", baseline, "better", setting=setting)
        for setting in ("gamma_hidden=1, gamma_attention=1", "gamma_hidden=1, gamma_attention=9")
        for baseline in ("hidden_state", "attention")
    ]
    rows += [
        row("white_box", "hidden_state", "black_box", "equivalent", setting="gamma_hidden=1"),
        *(
            row("white_box", "attention", "black_box", "equivalent", setting=f"gamma_attention={a}")
            for a in (1, 9)
        ),
        *(
            row(
                "white_box",
                "combined",
                "black_box",
                "equivalent",
                setting=f"gamma_hidden=1, gamma_attention={a}",
            )
            for a in (1, 9)
        ),
    ]
    found = verdict.verdicts(pd.DataFrame(rows), pd.DataFrame(columns=["setting"])).set_index(
        "question"
    )
    assert (
        found.loc["white_box", "answer"].tolist()
        == ["No additional benefit (equal within 1 point)."] * 2
    )
    assert found.loc["combining", "answer"].tolist() == ["Yes: better than either alone."] * 2


def test_settings_are_answered_one_by_one():
    rows = [
        row("white_box", *pair, outcome, setting=setting)
        for setting, outcome in {"temperature=1": "better", "temperature=4": "undecided"}.items()
        for pair in WHITE_BOX
    ]
    for each, setting in zip(rows, ["temperature=1"] * 3 + ["temperature=4"] * 3):
        each["setting"] = setting
    found = verdict.verdicts(pd.DataFrame(rows), pd.DataFrame(columns=["setting"]))
    assert found[found["question"] == "white_box"].set_index("setting")["answer"].to_dict() == {
        "temperature=1": "Yes: hidden_state, attention, combined.",
        "temperature=4": "Not shown.",
    }
    assert "  [temperature=4] Not shown." in verdict.verdict_text(found, "")
