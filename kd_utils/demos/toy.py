"""The toy benchmark's rows: three generated tasks in the hub's schemas, from one seed.

They need what the real tasks (SST-2, MMLU, GSM8K) need: sentiment under negation and contrast,
facts recalled among distractors, arithmetic worked step by step.
"""

import random

from kd_utils.data.tasks.base import Row

#: Rows of each file. As with the real data, MMLU's training and validation rows both come from
#: `test`.
ROWS = {
    "sst2/train": 900,
    "sst2/validation": 200,
    "mmlu/test": 870,
    "gsm8k/train": 800,
    "gsm8k/test": 200,
}

DEV_ROWS_PER_SUBJECT = 5

# What sentences are made of.
ASPECTS = "film cast plot script story music ending humour dialogue acting".split()
ADJECTIVES = {
    1: "fine warm clever funny moving fresh charming sharp gripping superb".split(),
    0: "dull tedious clumsy stale hollow bland crude messy dreary awful".split(),
}
NEGATIONS = ("not", "never", "hardly", "anything but", "far from")
INTENSIFIERS = ("", "", "very ", "so ", "really ")
CONTRASTS = ("{other} , but {main}", "although {other} , {main}", "{main} , although {other}")


def sst2_rows(rng: random.Random, count: int) -> list[Row]:
    """Distinct sentences, half of them positive; the label is that of the main clause.

    In a contrast the subordinate clause says the opposite, so counting good and bad words does not
    help.
    """
    rows: dict[str, Row] = {}
    while len(rows) < count:
        label = len(rows) % 2
        main_aspect, other_aspect = rng.sample(ASPECTS, 2)
        main = _clause(rng, main_aspect, label)
        form = rng.choice(("{main}", "{main}", "{main} and {other}", *CONTRASTS))
        other = ""
        if "{other}" in form:
            other = _clause(rng, other_aspect, 1 - label if form in CONTRASTS else label)
        sentence = form.format(main=main, other=other)
        rows.setdefault(sentence, {"sentence": sentence, "label": label})
    return _shuffled(rng, rows)


def _clause(rng: random.Random, aspect: str, value: int) -> str:
    """A clause about `aspect`, good (1) or bad (0); one in four negates the opposite word."""
    if rng.random() < 0.25:
        return f"the {aspect} is {rng.choice(NEGATIONS)} {rng.choice(ADJECTIVES[1 - value])}"
    return f"the {aspect} is {rng.choice(INTENSIFIERS)}{rng.choice(ADJECTIVES[value])}"


#: subject -> things, values, ways to ask; the seed decides which value belongs to which thing.
WORLD = {
    "world_capitals": (
        ("Norland", "Vestria", "Oromar", "Kaldia", "Sulmira", "Tarvos"),
        ("Ardun", "Bresk", "Corvin", "Delmar", "Estok", "Fenwick"),
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "The capital of {} is which city?",
        "From which city is {} ruled?",
        "In which city do the rulers of {} live?",
    ),
    "animal_diets": (
        ("lork", "mimble", "zarn", "pogget", "tiffin", "grell"),
        ("berries", "moss", "beetles", "clams", "acorns", "reeds"),
        "What does a {} eat?",
        "Which food does a {} live on?",
        "A {} eats which food?",
        "What is the food of a {}?",
        "On which food is a {} raised?",
    ),
    "famous_inventors": (
        ("Abner", "Brisa", "Cosmo", "Dorit", "Elvar", "Fabia"),
        ("clock", "kite", "lamp", "plough", "compass", "loom"),
        "What did {} invent?",
        "Which thing did {} invent?",
        "The inventor {} made which thing?",
        "For which thing is {} known?",
        "To {} we owe which thing?",
    ),
}


def draw_facts(rng: random.Random) -> dict[str, dict[str, str]]:
    """The closed world: for each subject, the one value of each thing."""
    return {
        subject: dict(zip(things, rng.sample(values, len(things)), strict=True))
        for subject, (things, values, *_) in WORLD.items()
    }


def mmlu_rows(rng: random.Random, facts: dict[str, dict[str, str]], count: int) -> list[Row]:
    """Distinct questions, subjects and answer letters balanced.

    Rows with the same question and the same set of choices, in any order, count as one.
    """
    subjects = sorted(facts)
    rows: dict[tuple[str, frozenset[str]], Row] = {}
    while len(rows) < count:
        subject = subjects[len(rows) % len(subjects)]
        gold = len(rows) // len(subjects) % 4
        thing, value = rng.choice(sorted(facts[subject].items()))
        question = rng.choice(WORLD[subject][2:]).format(thing)
        choices = rng.sample(sorted(set(facts[subject].values()) - {value}), 3)
        choices.insert(gold, value)
        row = {"question": question, "subject": subject, "choices": choices, "answer": gold}
        rows.setdefault((question, frozenset(choices)), row)
    return _shuffled(rng, rows)


GAINS = ("buys {} more", "finds {} more", "gets {} from {friend}")
LOSSES = ("loses {}", "sells {}", "gives {} to {friend}")
LARGEST = 10


def gsm8k_rows(rng: random.Random, count: int) -> list[Row]:
    """Distinct word problems of one and of two steps; every number lies between 1 and 10."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        question, answer = _problem(rng, steps=1 + len(rows) % 2)
        rows.setdefault(question, {"question": question, "answer": answer})
    return _shuffled(rng, rows)


def _problem(rng: random.Random, steps: int) -> tuple[str, str]:
    name, friend = rng.sample("Ann Ben Cara Dan Eve Finn Gina Hugo".split(), 2)
    thing = rng.choice("apples pears coins cards shells books stamps eggs".split())
    worked = []
    if rng.random() < 0.25:
        boxes, content = rng.choice(
            [(a, b) for a in range(2, 5) for b in range(2, 6) if a * b <= LARGEST]
        )
        total = boxes * content
        story = f"{name} has {boxes} boxes of {content} {thing}."
        worked.append(f"{boxes} * {content} = {total}")
    else:
        total = rng.randint(1, LARGEST)
        story = f"{name} has {total} {thing}."
    while len(worked) < steps:
        change = rng.choice([n for n in range(-6, 7) if n and 1 <= total + n <= LARGEST])
        verb = rng.choice(GAINS if change > 0 else LOSSES).format(abs(change), friend=friend)
        story += f" {name} {verb}."
        worked.append(f"{total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}")
        total += change
    question = f"{story} How many {thing} does {name} have now?"
    return question, "\n".join([*worked, f"#### {total}"])


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """All rows, keyed "task/split", in the hub's schemas; a task's splits share no question.

    Args:
        seed: fixes the facts and every row; each task has its own stream of random numbers.
    """
    facts = draw_facts(random.Random(f"{seed}/facts"))
    sst2 = sst2_rows(random.Random(f"{seed}/sst2"), ROWS["sst2/train"] + ROWS["sst2/validation"])
    gsm8k = gsm8k_rows(random.Random(f"{seed}/gsm8k"), ROWS["gsm8k/train"] + ROWS["gsm8k/test"])
    shots = DEV_ROWS_PER_SUBJECT * len(facts)
    mmlu = mmlu_rows(random.Random(f"{seed}/mmlu"), facts, ROWS["mmlu/test"] + shots)
    dev = [
        row
        for subject in sorted(facts)
        for row in [row for row in mmlu if row["subject"] == subject][:DEV_ROWS_PER_SUBJECT]
    ]
    return {
        "sst2/train": [{**row, "idx": i} for i, row in enumerate(sst2[: ROWS["sst2/train"]])],
        "sst2/validation": [{**row, "idx": i} for i, row in enumerate(sst2[ROWS["sst2/train"] :])],
        "mmlu/dev": dev,
        "mmlu/test": [row for row in mmlu if row not in dev],
        "gsm8k/train": gsm8k[: ROWS["gsm8k/train"]],
        "gsm8k/test": gsm8k[ROWS["gsm8k/train"] :],
    }


def _shuffled(rng: random.Random, by_content: dict) -> list[Row]:
    rows = list(by_content.values())
    rng.shuffle(rows)
    return rows
