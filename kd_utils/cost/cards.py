"""What fits on which card, with which settings."""

from collections.abc import Sequence

import pandas as pd

from kd_utils.cost import disk, memory
from kd_utils.cost.shapes import Shape

CARDS = (16, 24, 40, 80)  # GB

#: Share of a card that torch can use, beside the driver's context and what lies between tensors.
USABLE = 0.95

MICRO_BATCHES, BATCH_TOKENS = (8, 4, 2, 1), (16384, 8192, 4096, 2048, 1024)

EVALUATED = (128, 64, 32, 16, 8)


def what_fits(
    teacher: Shape,
    student: Shape,
    columns: disk.Columns,
    teachers: Sequence[memory.Compared],
    *,
    max_length: int,
    answer: int,
    question: int,
    max_new_tokens: int,
    batch_size: int = 8,
) -> pd.DataFrame:
    """The largest settings with which each card can do each part, all in bfloat16.

    Args:
        columns: of the cache; teachers: what the student is compared with.
        max_length, answer, question: tokens of the longest row, of its answer, and of the longest
            prompt whose answer is generated (0: none is).
        max_new_tokens: longest generated answer.
        batch_size: examples of an optimiser step.

    Returns:
        A row per card: the largest `micro_batch_size` of training, `batch_tokens` of the teacher's
        pass and `eval_batch_size` of the teacher and of the student; "does not fit" where none of
        those that were tried does. The weights of training are in float32, with AdamW.
    """
    captured = sum(kind.captures == "map" for kind, *_ in columns.values())

    def training(examples: int) -> float:
        batch = memory.Batch(examples, max_length, answer)
        parts = memory.training(student, batch, teachers, half=True, waiting=6 * batch_size)
        return sum(parts.values())

    def passing(tokens: int) -> float:
        batch = memory.Batch(max(tokens // max_length, 1), max_length, 0)
        signals = disk.signal_bytes(columns, teacher, [max_length] * batch.examples)
        parts = memory.teacher_pass(teacher, batch, sum(signals.values()), size=2, layers=captured)
        return sum(parts.values())

    def teacher_evaluated(examples: int) -> float:
        sizes = (examples, max_length, question, max_new_tokens)
        return 2 * teacher.weights + memory.evaluation(teacher, *sizes, size=2)

    def student_evaluated(examples: int) -> float:  # beside the moments, in autocast
        sizes = (examples, max_length, question, max_new_tokens)
        held = 12 * student.weights + 2 * student.matrices
        return held + memory.evaluation(student, *sizes, size=2)

    parts = {
        "training: micro_batch_size": (training, [n for n in MICRO_BATCHES if n <= batch_size]),
        "teacher's pass: batch_tokens": (passing, BATCH_TOKENS),
        "02: eval_batch_size": (teacher_evaluated, EVALUATED),
        "03: eval_batch_size": (student_evaluated, EVALUATED),
    }
    return pd.DataFrame(
        [
            {"card": f"{card} GB"}
            | {
                name: next(
                    (f"{n}" for n in tried if held(n) <= USABLE * card * 1e9), "does not fit"
                )
                for name, (held, tried) in parts.items()
            }
            for card in CARDS
        ]
    )
