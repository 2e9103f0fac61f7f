"""What a task is: where its rows come from, how a row reads, and how an answer is scored."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kd_utils.config.fields import shown

#: Behind a task's name: its accuracy when answers are read in the flexible way.
FLEXIBLE = "_flexible"

#: Stands for the content of a prompt when the template of prompts is made.
MARK = "\ue000"

#: A row of the hub's dataset: the task's columns with plain Python values.
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a generated answer is read and compared.

    Attributes:
        stop_strings: texts that end it, beside the end tokens of tokenizer and model.
        final: the final answer in a worked answer of the dataset; "" if there is none.
        strict, flexible: the answer in a generated text, in the form that the task asks for and
            wherever it is; "[invalid]" if there is none.
        normalise: the form in which answers are compared.
    """

    stop_strings: tuple[str, ...]
    final: Callable[[str], str]
    strict: Callable[[str], str]
    flexible: Callable[[str], str]
    normalise: Callable[[str], str]

    def score(self, text: str, gold: str) -> dict[str, Any]:
        """The strict `prediction`, and whether it and the flexible one are right (bool)."""
        strict, gold = self.strict(text), self.normalise(gold)
        return {
            "prediction": strict,
            "correct": self.normalise(strict) == gold,
            "correct_flexible": self.normalise(self.flexible(text)) == gold,
        }


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that the project knows about a task.

    A task with choices predicts the one with the largest summed log-likelihood, the first of equal
    ones; without choices, the answer is generated.

    Attributes:
        name: its name in parameters, folders and tables.
        hub: dataset on the Hugging Face hub, and the configuration of it.
        columns: columns of the dataset that are read; an `example_id` hashes their values.
        texts: those of them that hold text.
        splits: the dataset's split for "train", "validation" and "shots", the worked examples of
            few-shot evaluation. Training and validation may share a split, which is then cut.
        chance: expected accuracy of a blind guess, a fraction.
        guessed: accuracy that needs no skill, if above `chance`. A teacher must exceed it to be
            said to know something.
        prompt: the question as it is put to a model, without worked examples.
        gold: number of the right choice, or the final answer as the dataset writes it.
        labels: the choices as continuations with a leading space, if all rows have the same.
        choices_of: the choices of a row, if they differ from row to row.
        answer_of: the right continuation of a generated answer, with its leading space.
        generation: how a generated answer is read; None for a task with choices.
        problem: what else is wrong with a row of the dataset; "" for nothing.
        subject: the subject, of which worked examples are taken; "" if there is none.
        description: text before the first worked example.
        content: the part of a prompt without worked examples that makes two questions the same.
        blank: a row with `MARK` as each content, if `MARK` in every column does not make a prompt.
    """

    name: str
    hub: tuple[str, str]
    columns: tuple[str, ...]
    texts: tuple[str, ...]
    splits: dict[str, str]
    prompt: Callable[[Row], str]
    gold: Callable[[Row], str]
    chance: float
    guessed: float = 0.0
    labels: tuple[str, ...] = ()
    choices_of: Callable[[Row], Sequence[str]] | None = None
    answer_of: Callable[[Row], str] | None = None
    generation: Generation | None = None
    problem: Callable[[Row], str] = lambda row: ""
    subject: Callable[[Row], str] = lambda row: ""
    description: Callable[[Row], str] = lambda row: ""
    content: Callable[[str], str] = lambda prompt: prompt
    blank: Row | None = None

    def choices(self, row: Row) -> list[str]:
        """The continuations to choose from; none if the answer is generated."""
        return list(self.choices_of(row) if self.choices_of else self.labels)

    def answer(self, row: Row) -> str:
        """The right continuation of the prompt; "" if gold is no choice's number."""
        numbered = {str(number): choice for number, choice in enumerate(self.choices(row))}
        return self.answer_of(row) if self.answer_of else numbered.get(self.gold(row), "")

    def normalise(self, answer: str) -> str:
        """The form in which gold answers are compared."""
        return self.generation.normalise(answer) if self.generation else answer

    def content_key(self, prompt: str) -> str:
        """Hash by which two examples count as the same content, in whichever split they are.

        It covers the question as it is asked (a question with other choices is another one) and
        ignores white space and letter case.
        """
        text = " ".join(self.content(prompt).split()).casefold()
        return hashlib.sha256(f"{self.name}\n{text}".encode()).hexdigest()

    def question(self, prompt: str) -> str:
        """The text that is the question's own in a prompt without worked examples.

        Raises:
            ValueError: the prompt is not one of this task.
        """
        parts = self._template.fullmatch(self.content(prompt))
        if not parts:
            raise ValueError(
                f"not a prompt of {self.name}: {prompt[:80]!r}: run 01_prepare_data again"
            )
        return " ".join(parts.groups())

    @cached_property
    def _template(self) -> re.Pattern[str]:
        """What all prompts share, with a group for each content."""
        row = self.blank or dict.fromkeys(self.columns, MARK)
        return re.compile("(.*?)".join(map(re.escape, self.prompt(row).split(MARK))), re.DOTALL)

    def row_problem(self, row: Row) -> str:
        """What is wrong with a row of the dataset, and what is expected; "" for nothing."""
        for column in self.texts:
            if not isinstance(row[column], str):
                return f"{column} = {row[column]!r}, expected text"
        return self.problem(row) or self.prepared_problem(
            self.choices(row), self.answer(row), self.gold(row)
        )

    def prepared_problem(self, choices: list[str], answer: str, gold: str) -> str:
        """What is wrong with values of a prepared row, and what is expected; "" for nothing."""
        expected = choices if self.choices_of else list(self.labels)
        if choices != expected:
            return f"choices = {shown(choices)}, expected {expected} of {self.name}"
        if self.generation:
            fits = gold and self.generation.final(answer) == gold
            found = f"answer = {shown(answer[-60:])}, expected an answer that ends in"
            return "" if fits else f"{found} a final answer, its gold, {shown(gold)}"
        if gold not in map(str, range(len(choices))):
            hint = " (this split has no labels)" if gold == "-1" else ""
            return (
                f"gold = {shown(gold)}, expected a choice's number, 0 to {len(choices) - 1}{hint}"
            )
        if answer != (right := choices[int(gold)]):
            return f"answer = {shown(answer)}, expected {right!r}, since gold is {gold}"
        return ""
