"""The verdicts of `benchmarks/trl_gold.py`, and GOLD's merge written out beside our chain rule;
without TRL.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_utils.distill.terms.kd import outcome_kl, span_log_probs

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import trl_gold  # no package: a script of its own


def merged(logits, tokens):
    """GOLD's "bayesian" merge of a group: the last position's distribution times the earlier
    tokens' probabilities.
    """
    probs = logits.softmax(-1)
    return probs[-1] * probs[range(len(tokens) - 1), tokens[:-1]].prod()


@pytest.mark.parametrize("tokens", [[3], [3, 1], [3, 1, 4, 1]])
def test_golds_merge_at_the_last_token_is_the_chain_rule(tokens):
    logits = torch.randn(len(tokens), 7, generator=torch.Generator().manual_seed(0))
    [joint] = span_log_probs(
        torch.eye(len(tokens)),
        logits.T,
        torch.tensor(tokens),
        torch.zeros(len(tokens), dtype=torch.long),
        1,
        1.0,
    )
    torch.testing.assert_close(merged(logits, tokens)[tokens[-1]], joint.exp())


def test_golds_distance_is_not_0_where_both_give_the_text_one_probability():
    """One token on the teacher's side, two on the student's: GOLD's vectors have masses 1 and
    1/2.
    """
    student, teacher = (
        torch.tensor([[0.5, 0.5], [0.6, 0.4]]).log(),
        torch.tensor([[0.3, 0.7]]).log(),
    )
    ours, theirs = merged(student, [0, 0]), merged(teacher, [0])
    assert ours[0] == pytest.approx(theirs[0].item()) and ours.sum() == pytest.approx(0.5)
    assert outcome_kl(ours[:1, None].log(), theirs[:1, None].log(), 1.0).item() == pytest.approx(
        0, abs=1e-6
    )
    assert (ours.sort().values - theirs.sort().values).abs().sum() == pytest.approx(
        0.5
    )  # (0.2, 0.3) and (0.3, 0.7)


@pytest.mark.parametrize(
    "difference, must, said",
    [
        (0.0, True, "equal"),
        (trl_gold.TOLERANCE * 2, True, "NOT EQUAL, and must be"),
        (float("nan"), True, "NOT EQUAL, and must be"),
        (0.5, False, "why"),
        (None, False, "why"),
    ],
)
def test_only_what_must_be_equal_can_fail(difference, must, said):
    assert trl_gold.verdict(difference, must, "why") == said


@pytest.mark.parametrize(
    "student, teacher, must", trl_gold.CASES.values(), ids=list(trl_gold.CASES)
)
def test_the_cases_are_what_they_say(student, teacher, must):
    from kd_utils.tokens.alignment import align

    if student[-1] != teacher[-1]:
        with pytest.raises(ValueError, match="not one text"):
            align(np.array(teacher), np.array(student))
        return
    found = align(np.array(teacher), np.array(student))
    sides = trl_gold.tokens_of(found.student), trl_gold.tokens_of(found.teacher)
    assert [sum(side, []) for side in sides] == [
        list(range(len(ends))) for ends in (student, teacher)
    ]
