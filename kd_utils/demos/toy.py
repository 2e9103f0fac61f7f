"""The toy benchmark's rows: three generated tasks in the hub's schemas, from one seed.

They need what the real tasks (SST-2, MMLU, GSM8K) need: sentiment under negation and contrast,
facts recalled among distractors, arithmetic worked step by step.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kd_utils.data.tasks.base import Row

#: Rows of each file. As with the real data, MMLU's training and validation rows both come from
#: `test`.
ROWS = {
    "sst2/train": 900,
    "sst2/validation": 1000,
    "mmlu/test": 1900,
    "gsm8k/train": 900,
    "gsm8k/test": 1000,
}

DEV_ROWS_PER_SUBJECT = 5

# What sentences are made of.
ASPECTS = "film cast plot script story music ending humour dialogue acting".split()
PRAISE = (
    "fine warm clever funny moving fresh charming sharp gripping superb lively tender vivid witty "
    "bold bright elegant graceful honest inventive joyful lovely rich subtle touching"
).split()
BLAME = (
    "dull tedious clumsy stale hollow bland crude messy dreary awful boring cheap cold feeble flat "
    "grim lame lazy muddled noisy pompous shallow silly sloppy weak"
).split()
NEGATIONS = ("not", "never", "hardly", "anything but", "far from")
INTENSIFIERS = ("", "", "very ", "so ", "really ")
CONTRASTS = ("{other} , but {main}", "although {other} , {main}", "{main} , although {other}")

# Words for what comes and what goes.
GAINS = "buys finds gets wins earns borrows receives collects makes picks grabs inherits".split()
LOSSES = "loses sells lends spends drops breaks donates wastes forgets burns hides mails".split()

#: subject -> the four choices, things, ways to ask; a world decides which choice is right for which
#: thing. All questions of a subject have the same choices in one order, as in MMLU's own
#: `moral_scenarios`.
KNOWLEDGE = {
    "world_cities": (
        "Norland Vestria Oromar Kaldia".split(),
        "Ardun Bresk Corvin Delmar Estok Fenwick Garlan Hostin Irkut Jorvik Kelmat Lonsk Mirbel "
        "Nortov Ostrel Pelgar Quorin Rastok Selvan Turnik Ulmora Varget Wexley Yorvan Zelnik "
        "Aldmark Borsa Calven Dunmor Elbrin Farsk Gilden Harnov Istria Junkar Korvat Lethmar "
        "Morvik Nessan Olvera".split(),
        "in which country is {}?",
        "to which country does {} belong?",
        "{} is a city of which country?",
        "where does one find {}?",
        "which country do the people of {} live in?",
    ),
    "animal_diets": (
        "berries moss beetles clams".split(),
        "lork mimble zarn pogget tiffin grell hoodle snib wallup crindle fosk drabble plim yattle "
        "quib nurgle bostle trinket vamp skoot jibber oddle murk feld ango brill cham dorrit emble "
        "frisk gorm hask ilk jaddle krim lumble mossop nack orrin pesk".split(),
        "what does a {} eat?",
        "which food does a {} live on?",
        "a {} eats which food?",
        "what is the food of a {}?",
        "on which food is a {} raised?",
    ),
    "famous_inventors": (
        "Abner Brisa Cosmo Dorit".split(),
        "clock kite lamp plough compass loom pump lens wheel bell anchor lever pulley saw ladder "
        "kiln sail drum flute hinge needle rope scale spade razor basket button candle crane dial "
        "engine fork gear hammer ink jar key lock mirror net".split(),
        "who invented the {}?",
        "who was it that made the {}?",
        "to whom do we owe the {}?",
        "the {} is by whom?",
        "whose work is the {}?",
    ),
}
#: What stands before a thing; each makes another question.
QUALIFIERS = {
    "world_cities": ("", "old ", "rich ", "small ", "proud ", "distant "),
    "animal_diets": ("", "wild ", "young ", "small ", "tame ", "hungry "),
    "famous_inventors": ("", "first ", "best ", "simple ", "modern ", "useful "),
}


#: Share of the things and of the words of praise, blame, gain and loss that a world's tasks use;
#: the rest are those of its pretraining text.
IN_TASKS = 0.6


@dataclass(frozen=True)
class World:
    """What there is to know: each thing's right choice, by subject, and which words mean what."""

    facts: dict[str, dict[str, int]]
    praise: list[str]
    blame: list[str]
    gains: list[str]
    losses: list[str]


def draw_worlds(rng: random.Random) -> tuple[World, World]:
    """The world of the tasks, and another one for pretraining text.

    They have the same language, and no thing and no word in common: what a model has learned in the
    other one is to read and to reason, but nothing of what is to be known in this one.
    """
    lists = [*(things for _, things, *_ in KNOWLEDGE.values()), PRAISE, BLAME, GAINS, LOSSES]
    here, there = zip(*(_divided(rng, words) for words in lists))
    return _world(here), _world(there)


def _divided(rng: random.Random, words: list[str]) -> tuple[list[str], list[str]]:
    drawn, kept = rng.sample(words, len(words)), round(IN_TASKS * len(words))
    return drawn[:kept], drawn[kept:]


def _world(lists: Sequence[list[str]]) -> World:
    """Things by subject, then the other words; drawn in random order, so that facts are random."""
    things, words = lists[: len(KNOWLEDGE)], lists[len(KNOWLEDGE) :]
    facts = {
        subject: {thing: i % 4 for i, thing in enumerate(known)}
        for subject, known in zip(KNOWLEDGE, things)
    }
    return World(facts, *words)


def sst2_rows(rng: random.Random, world: World, count: int) -> list[Row]:
    """Distinct sentences, half of them positive; the label is that of the main clause.

    In a contrast the subordinate clause says the opposite, so counting good and bad words does not
    help.
    """
    rows: dict[str, Row] = {}
    while len(rows) < count:
        label = len(rows) % 2
        main_aspect, other_aspect = rng.sample(ASPECTS, 2)
        main = _clause(rng, world, main_aspect, label)
        form = rng.choice(("{main}", "{main}", "{main} and {other}", *CONTRASTS))
        other = ""
        if "{other}" in form:
            other = _clause(rng, world, other_aspect, 1 - label if form in CONTRASTS else label)
        sentence = form.format(main=main, other=other)
        rows.setdefault(sentence, {"sentence": sentence, "label": label})
    return _shuffled(rng, rows)


def _clause(rng: random.Random, world: World, aspect: str, value: int) -> str:
    """A clause about `aspect`, good (1) or bad (0); one in four negates the opposite word."""
    words = (world.blame, world.praise)
    if rng.random() < 0.25:
        return f"the {aspect} is {rng.choice(NEGATIONS)} {rng.choice(words[1 - value])}"
    return f"the {aspect} is {rng.choice(INTENSIFIERS)}{rng.choice(words[value])}"


def mmlu_rows(rng: random.Random, world: World, count: int) -> list[Row]:
    """Distinct questions, subjects balanced.

    Raises:
        ValueError: the world has fewer questions.
    """
    asked = {
        subject: [
            {
                "question": _capitalised(phrase.format(qualifier + thing)),
                "subject": subject,
                "choices": KNOWLEDGE[subject][0],
                "answer": answer,
            }
            for thing, answer in sorted(facts.items())
            for phrase in KNOWLEDGE[subject][2:]
            for qualifier in QUALIFIERS[subject]
        ]
        for subject, facts in sorted(world.facts.items())
    }
    known = sum(map(len, asked.values()))
    if count > known:
        raise ValueError(f"the toy world has {known} questions, not {count}: ask for fewer")
    shares = [count // len(asked) + (i < count % len(asked)) for i in range(len(asked))]
    rows = [row for rows, share in zip(asked.values(), shares) for row in rng.sample(rows, share)]
    rng.shuffle(rows)
    return rows


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


LARGEST = 10


def gsm8k_rows(rng: random.Random, world: World, count: int) -> list[Row]:
    """Distinct word problems of one and of two steps; every number lies between 1 and 10."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        question, answer = _problem(rng, world, steps=1 + len(rows) % 2)
        rows.setdefault(question, {"question": question, "answer": answer})
    return _shuffled(rng, rows)


def _problem(rng: random.Random, world: World, steps: int) -> tuple[str, str]:
    name = rng.choice("Ann Ben Cara Dan Eve Finn Gina Hugo".split())
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
        verb = rng.choice(world.gains if change > 0 else world.losses)
        story += f" {name} {verb} {abs(change)}."
        worked.append(f"{total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}")
        total += change
    question = f"{story} How many {thing} does {name} have now?"
    return question, "\n".join([*worked, f"#### {total}"])


#: The rows of each task, from random numbers, a world and a count.
TASKS = {"sst2": sst2_rows, "mmlu": mmlu_rows, "gsm8k": gsm8k_rows}


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """All rows, keyed "task/split", in the hub's schemas; a task's splits share no question.

    Args:
        seed: fixes the facts and every row; each task has its own stream of random numbers.
    """
    world, _ = draw_worlds(random.Random(f"{seed}/world"))
    sst2 = sst2_rows(
        random.Random(f"{seed}/sst2"), world, ROWS["sst2/train"] + ROWS["sst2/validation"]
    )
    gsm8k = gsm8k_rows(
        random.Random(f"{seed}/gsm8k"), world, ROWS["gsm8k/train"] + ROWS["gsm8k/test"]
    )
    shots = DEV_ROWS_PER_SUBJECT * len(world.facts)
    mmlu = mmlu_rows(random.Random(f"{seed}/mmlu"), world, ROWS["mmlu/test"] + shots)
    dev = [
        row
        for subject in sorted(world.facts)
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
