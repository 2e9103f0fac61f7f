"""Which layers of teacher and student are compared: pairs of numbers, counted from 1."""

import random

from kd_utils.config.fields import NAMED


def layer_pairs(
    choice: str, count: int, teacher_layers: int, student_layers: int, seed: int
) -> list[tuple[int, int]]:
    """(teacher's layer, student's layer), of layers 1 to L.

    Args:
        choice: "last"; "uniform": `count` evenly spaced layers of both sides, up to the last
            (TinyBERT's uniform mapping, Jiao et al. 2020); its controls "reversed" and "random":
            the same layers in reversed or random order; or pairs like "16:11 32:22".
        count: the number of pairs for "uniform", "reversed" and "random".
        teacher_layers, student_layers: the number of layers of each side.
        seed: of "random".

    Raises:
        ValueError: more pairs, or a higher number, than a side has layers.
    """
    if choice == "last":
        return [(teacher_layers, student_layers)]
    if choice in NAMED:
        teacher_spaced = spaced(count, teacher_layers)
        student_spaced = spaced(count, student_layers)
        if choice == "reversed":
            teacher_spaced.reverse()
        if choice == "random":
            random.Random(f"{seed}/layers").shuffle(teacher_spaced)
        pairs = list(zip(teacher_spaced, student_spaced))
    else:
        written = (pair.split(":") for pair in choice.split())
        pairs = [(int(teacher), int(student)) for teacher, student in written]
    for teacher, student in pairs:
        if teacher > teacher_layers or student > student_layers:
            raise ValueError(
                f"layers {teacher}:{student}: the teacher has {teacher_layers} layers, the student "
                f"{student_layers}: lower the numbers in hidden_layers or attention_layers"
            )
    return pairs


def teacher_layers(choice: str, count: int, total: int) -> list[int]:
    """The teacher's layers that a cache must hold for this choice; the student's do not matter."""
    student = total if choice in NAMED else max(int(pair.split(":")[1]) for pair in choice.split())
    return sorted({teacher for teacher, _ in layer_pairs(choice, count, total, student, 0)})


def spaced(count: int, total: int) -> list[int]:
    """`count` of layers 1 to `total`, evenly spaced up to the last: spaced(3, 32) = 11 21 32."""
    if count > total:
        raise ValueError(
            f"paired_layers = {count}, but a model has {total} layers: choose {total} or fewer"
        )
    return [round(k * total / count) for k in range(1, count + 1)]
