"""MMLU: questions about 57 subjects with four choices, answered by letter (Hendrycks et al. 2021).

Prompt and choices are those of lm-evaluation-harness's `mmlu`. A first line names the subject; it
is no part of a question's content. The dataset's own `dev` and `validation` have too few rows, so
training and validation rows are both taken from `test`.
"""

from kd_utils.data.tasks.base import MARK, Row, Task


def prompt(row: Row) -> str:
    """The question, a line for each choice, and `Answer:`."""
    options = [f"{letter}. {text}\n" for letter, text in zip("ABCD", row["choices"], strict=True)]
    return f"{row['question'].strip()}\n{''.join(options)}Answer:"


def problem(row: Row) -> str:
    """What is wrong with the choices; "" for nothing."""
    texts = row["choices"]
    four = isinstance(texts, list) and [type(text) for text in texts] == [str] * 4
    return "" if four else f"choices = {texts!r}, expected a list of 4 texts"


TASK = Task(
    name="mmlu",
    hub=("cais/mmlu", "all"),
    columns=("question", "subject", "choices", "answer"),
    texts=("question", "subject"),
    splits={"train": "test", "validation": "test", "shots": "dev"},
    chance=1 / 4,
    labels=(" A", " B", " C", " D"),
    prompt=prompt,
    gold=lambda row: str(row["answer"]),
    problem=problem,
    subject=lambda row: row["subject"],
    description=lambda row: (
        "The following are multiple choice questions (with answers) about "
        f"{row['subject'].replace('_', ' ')}.\n\n"
    ),
    content=lambda prompt: prompt.split("\n\n", 1)[-1],
    blank={"question": MARK, "choices": [MARK] * 4},
)
