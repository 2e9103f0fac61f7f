"""GSM8K: word problems of grade-school mathematics with worked answers (Cobbe et al. 2021).

Prompt, stop strings and both ways to read an answer are those of lm-evaluation-harness's `gsm8k`.
"""

import re

from kd_utils.data.tasks.base import Generation, Task


def final_number(answer: str) -> str:
    """The number that a worked answer ends in, behind `#### `, as it is written; or ""."""
    last = answer.rsplit("#### ", 1)[-1]
    return last if re.fullmatch("-?[0-9.,]+", last) else ""


def extract_strict(text: str) -> str:
    """The number behind the first `#### `, or "[invalid]"."""
    found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    return found[0].strip() if found else "[invalid]"


def extract_flexible(text: str) -> str:
    """The last thing that looks like a number, or "[invalid]"."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return next(group for group in found[-1] if group).strip() if found else "[invalid]"


def normalise_number(text: str) -> str:
    """No commas, no dollar signs, no text up to `#### `, no final full stop; lower case."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text.lower()


TASK = Task(
    name="gsm8k",
    hub=("openai/gsm8k", "main"),
    columns=("question", "answer"),
    texts=("question", "answer"),
    splits={"train": "train", "validation": "test", "shots": "train"},
    chance=0.0,
    guessed=0.027,  # always giving the commonest training answer gets this much of `test` right
    prompt=lambda row: f"Question: {row['question']}\nAnswer:",
    gold=lambda row: final_number(row["answer"]),
    answer_of=lambda row: f" {row['answer']}",
    generation=Generation(
        stop_strings=("Question:", "</s>", "<|im_end|>"),
        final=final_number,
        strict=extract_strict,
        flexible=extract_flexible,
        normalise=normalise_number,
    ),
)
