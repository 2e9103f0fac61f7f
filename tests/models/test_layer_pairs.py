"""Which layers are paired, by each choice, and what is refused."""

import pytest

from kd_utils.config.fields import check_layers
from kd_utils.models.layer_pairs import layer_pairs, spaced, teacher_layers
from kd_utils.models.signal_kinds import column


def test_pairs_by_choice():
    assert layer_pairs("last", 3, 32, 22, 0) == [(32, 22)]
    assert layer_pairs("uniform", 3, 32, 22, 0) == [(11, 7), (21, 15), (32, 22)]
    assert layer_pairs("reversed", 3, 32, 22, 0) == [(32, 7), (21, 15), (11, 22)]
    assert layer_pairs("16:11 32:22", 3, 32, 22, 0) == [(16, 11), (32, 22)]
    drawn = {tuple(layer_pairs("random", 4, 32, 22, seed)) for seed in range(20)}
    assert len(drawn) > 5 and layer_pairs("random", 4, 32, 22, 1) == layer_pairs(
        "random", 4, 32, 22, 1
    )
    for pairs in drawn:
        assert sorted(teacher for teacher, _ in pairs) == [8, 16, 24, 32]
        assert [student for _, student in pairs] == spaced(4, 22)


def test_one_cache_serves_a_choice_and_its_controls():
    for choice in ("uniform", "reversed", "random"):
        assert teacher_layers(choice, 3, 32) == [11, 21, 32]
    assert teacher_layers("last", 3, 32) == [32] and teacher_layers("16:40 8:1 16:2", 3, 32) == [
        8,
        16,
    ]
    assert column("hidden", 32, 32) == "hidden" and column("attention", 8, 32) == "attention_8"


@pytest.mark.parametrize(
    "choice", ["first", "", "0:1", "1:0", "1-2", "1:2,3:4", "1:2  3:4", "1:2 ", "01:2", "1:2\n"]
)
def test_choices_that_are_none(choice):
    with pytest.raises(
        ValueError, match="last, uniform, reversed, random, or pairs TEACHER:STUDENT"
    ):
        check_layers(choice)


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match="layers 33:1: the teacher has 32 layers, the student 22"):
        layer_pairs("33:1", 1, 32, 22, 0)
    with pytest.raises(
        ValueError, match="layers 1:23: .* 22: lower the numbers in hidden_layers or"
    ):
        layer_pairs("1:23", 1, 32, 22, 0)
    with pytest.raises(
        ValueError, match="paired_layers = 9, but a model has 4 layers: choose 4 or fewer"
    ):
        layer_pairs("uniform", 9, 12, 4, 0)
