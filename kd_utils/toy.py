"""The toy benchmark: three generated task families, their tokenizer, a teacher and a student, from one seed.

Rows have the hub's schemas (SST-2, MMLU, GSM8K) and ask for what the real ones ask for: sentiment under negation
and contrast, facts recalled among distractors, arithmetic worked step by step. What is written are ordinary Parquet
files and ordinary `transformers` folders, so no other code knows that it is a toy.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any, Iterable

Row = dict[str, Any]

#: Rows of each file. As with the real data, MMLU's training and validation rows both come from `test`.
ROWS = {"sst2/train": 900, "sst2/validation": 200, "mmlu/test": 1400, "gsm8k/train": 800, "gsm8k/test": 200}
DEV_ROWS_PER_SUBJECT = 5
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]

#: Teacher and student differ in width, depth and head size (the projector is needed) and share the head count, so
#: that attention maps compare head by head.
TEACHER = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4)
STUDENT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)

#: The fixed wording of the three prompts, which `tasks` forms. Each phrase is one token: it does not differ between the
#: examples of a task, and a third of all tokens is saved.
PHRASES = ("The following are multiple choice questions (with answers) about",
           "\nQuestion: Is this sentence positive or negative?\nAnswer:", "Question:",
           "\nA.", "\nB.", "\nC.", "\nD.", "\nAnswer:")
ANSWER_WORDS = " A B C D positive negative"

# --- sentiment -------------------------------------------------------------------------------------------------

ASPECTS = ("film", "cast", "plot", "script", "story", "music", "ending", "humour", "dialogue", "acting")
ADJECTIVES = {
    1: ("fine", "warm", "clever", "funny", "moving", "fresh", "charming", "sharp", "gripping", "superb"),
    0: ("dull", "tedious", "clumsy", "stale", "hollow", "bland", "crude", "messy", "dreary", "awful"),
}
NEGATIONS = ("not", "never", "hardly", "anything but", "far from")
INTENSIFIERS = ("", "", "very ", "so ", "really ")


def sst2_rows(rng: random.Random, count: int) -> list[Row]:
    """Distinct sentences, half of them positive. The label is that of the main clause, after negation.

    In a contrast the subordinate clause says the opposite, so that counting good and bad words does not help.
    """
    rows = {}
    while len(rows) < count:
        label = len(rows) % 2
        sentence = _sentence(rng, label)
        rows.setdefault(sentence, {"sentence": sentence, "label": label})
    return _shuffled(rng, rows.values())


def _sentence(rng: random.Random, label: int) -> str:
    main_aspect, other_aspect = rng.sample(ASPECTS, 2)
    main = _clause(rng, main_aspect, label)
    form = rng.choice(("single", "single", "and", "but", "although", "late although"))
    if form == "single":
        return main
    if form == "and":
        return f"{main} and {_clause(rng, other_aspect, label)}"
    other = _clause(rng, other_aspect, 1 - label)
    return {"but": f"{other} , but {main}", "although": f"although {other} , {main}",
            "late although": f"{main} , although {other}"}[form]


def _clause(rng: random.Random, aspect: str, value: int) -> str:
    """A clause about `aspect` that is good (1) or bad (0); every fourth one says so by negating the opposite."""
    if rng.random() < 0.25:
        return f"the {aspect} is {rng.choice(NEGATIONS)} {rng.choice(ADJECTIVES[1 - value])}"
    return f"the {aspect} is {rng.choice(INTENSIFIERS)}{rng.choice(ADJECTIVES[value])}"


# --- facts -----------------------------------------------------------------------------------------------------

#: subject -> (things, values, ways to ask). Which value belongs to which thing is drawn from the seed.
WORLD = {
    "world_capitals": (
        ("Norland", "Vestria", "Oromar", "Kaldia", "Sulmira", "Tarvos", "Belnia"),
        ("Ardun", "Bresk", "Corvin", "Delmar", "Estok", "Fenwick", "Galdor"),
        ("What is the capital of {}?", "Which city is the capital of {}?", "The capital of {} is which city?",
         "From which city is {} ruled?")),
    "animal_diets": (
        ("lork", "mimble", "zarn", "pogget", "tiffin", "grell", "snorv"),
        ("berries", "moss", "beetles", "clams", "acorns", "reeds", "honey"),
        ("What does a {} eat?", "Which food does a {} live on?", "A {} eats which food?", "What is the food of a {}?")),
    "famous_inventors": (
        ("Abner", "Brisa", "Cosmo", "Dorit", "Elvar", "Fabia", "Gustav"),
        ("clock", "kite", "lamp", "plough", "compass", "loom", "telescope"),
        ("What did {} invent?", "Which thing did {} invent?", "The inventor {} made which thing?",
         "For which thing is {} known?")),
}


def draw_facts(rng: random.Random) -> dict[str, dict[str, str]]:
    """The closed world: for each subject, the one value of each thing."""
    return {subject: dict(zip(things, rng.sample(values, len(things)), strict=True))
            for subject, (things, values, _) in WORLD.items()}


def mmlu_rows(rng: random.Random, facts: dict[str, dict[str, str]], count: int) -> list[Row]:
    """Distinct questions, subjects and answer letters balanced.

    Two rows that ask the same of the same set of choices count as one, in whichever order the choices stand.
    """
    subjects, rows = sorted(facts), {}
    while len(rows) < count:
        subject = subjects[len(rows) % len(subjects)]
        gold = len(rows) // len(subjects) % 4
        thing, value = rng.choice(sorted(facts[subject].items()))
        question = rng.choice(WORLD[subject][2]).format(thing)
        choices = rng.sample(sorted(set(facts[subject].values()) - {value}), 3)
        choices.insert(gold, value)
        row = {"question": question, "subject": subject, "choices": choices, "answer": gold}
        rows.setdefault((question, frozenset(choices)), row)
    return _shuffled(rng, rows.values())


# --- arithmetic ------------------------------------------------------------------------------------------------

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gina", "Hugo")
OBJECTS = ("apples", "pears", "coins", "cards", "shells", "books", "stamps", "eggs")
GAINS = ("buys {} more", "finds {} more", "gets {} from {friend}")
LOSSES = ("loses {}", "sells {}", "gives {} to {friend}")
LARGEST = 10


def gsm8k_rows(rng: random.Random, count: int) -> list[Row]:
    """Distinct word problems of one and of two steps; every number lies between 1 and 10."""
    rows = {}
    while len(rows) < count:
        question, answer = _problem(rng, steps=1 + len(rows) % 2)
        rows.setdefault(question, {"question": question, "answer": answer})
    return _shuffled(rng, rows.values())


def _problem(rng: random.Random, steps: int) -> tuple[str, str]:
    name, friend = rng.sample(NAMES, 2)
    thing = rng.choice(OBJECTS)
    worked = []
    if rng.random() < 0.25:
        boxes, each = rng.choice([(a, b) for a in range(2, 5) for b in range(2, 6) if a * b <= LARGEST])
        total = boxes * each
        story = f"{name} has {boxes} boxes of {each} {thing}."
        worked.append(f"{boxes} * {each} = {total}")
    else:
        total = rng.randint(1, LARGEST)
        story = f"{name} has {total} {thing}."
    while len(worked) < steps:
        options = [n for n in range(-6, 7) if n and 1 <= total + n <= LARGEST]
        change = rng.choice(options)
        verb = rng.choice(GAINS if change > 0 else LOSSES).format(abs(change), friend=friend)
        story += f" {name} {verb}."
        worked.append(f"{total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}")
        total += change
    question = f"{story} How many {thing} does {name} have now?"
    return question, "\n".join([*worked, f"#### {total}"])


# --- all of it -------------------------------------------------------------------------------------------------


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """All rows, keyed "task/split" and in the hub's schemas; no question is in two splits of a task.

    Args:
        seed: fixes the facts and every row. Each family has its own stream, so that one may change alone.
    """
    facts = draw_facts(random.Random(f"{seed}/facts"))
    sst2 = sst2_rows(random.Random(f"{seed}/sst2"), ROWS["sst2/train"] + ROWS["sst2/validation"])
    gsm8k = gsm8k_rows(random.Random(f"{seed}/gsm8k"), ROWS["gsm8k/train"] + ROWS["gsm8k/test"])
    shots = DEV_ROWS_PER_SUBJECT * len(facts)
    mmlu = mmlu_rows(random.Random(f"{seed}/mmlu"), facts, ROWS["mmlu/test"] + shots)
    dev = [row for subject in sorted(facts)
           for row in itertools.islice((r for r in mmlu if r["subject"] == subject), DEV_ROWS_PER_SUBJECT)]
    tables = {
        "sst2/train": sst2[:ROWS["sst2/train"]], "sst2/validation": sst2[ROWS["sst2/train"]:],
        "mmlu/dev": dev, "mmlu/test": [row for row in mmlu if row not in dev],
        "gsm8k/train": gsm8k[:ROWS["gsm8k/train"]], "gsm8k/test": gsm8k[ROWS["gsm8k/train"]:],
    }
    for split in ("sst2/train", "sst2/validation"):
        tables[split] = [{**row, "idx": idx} for idx, row in enumerate(tables[split])]
    return tables


def build_tokenizer(texts: Iterable[str]) -> Any:
    """A lossless word-level tokenizer: one token for each word of `texts`, bytes for whatever else may come.

    A word takes the space before it, as in GPT-2, so a prompt's tokens stay a prefix once " answer" is appended.

    Returns:
        A `PreTrainedTokenizerFast` with bos, eos and pad tokens; it adds none of them by itself.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    phrases = "|".join(re.escape(phrase) for phrase in PHRASES)
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(phrases + r"| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\n+|\s"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL_TOKENS, *alphabet, *sorted(words - set(alphabet))]
    # With no merges and `ignore_merges`, BPE takes a word whole where the vocabulary has it, and else byte by byte.
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   clean_up_tokenization_spaces=False, padding_side="right")


def build_model(tokenizer: Any, sizes: dict[str, int], seed: int) -> Any:
    """A `LlamaForCausalLM` of `sizes` with random weights; the caller's random state is left as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.06,
                         tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def build(folder: Path, seed: int = 1) -> None:
    """Write the toy benchmark to `folder`: data/{sst2,mmlu,gsm8k}/SPLIT.parquet, tokenizer, teacher, student.

    Nothing is done where `folder` already holds what this code writes for `seed`. Otherwise it is built aside and
    renamed into place, so that a build that is killed leaves nothing half done.

    Raises:
        FileExistsError: `folder` holds something that no build wrote.
    """
    folder = Path(folder)
    stamp = {"seed": seed, "code": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}
    found = _stamp(folder)
    if found == stamp:
        return
    if found is None and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds files that no toy build wrote: move them, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    _write(aside, seed)
    (aside / "toy.json").write_text(json.dumps(stamp) + "\n")
    _move_into_place(aside, folder, stamp)


def _write(folder: Path, seed: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = generate(seed)
    for name, rows in tables.items():
        path = folder / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    tokenizer = build_tokenizer([*PHRASES, ANSWER_WORDS, *_texts(tables)])
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, sizes in (("teacher", TEACHER), ("student", STUDENT)):
        build_model(tokenizer, sizes, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _texts(tables: dict[str, list[Row]]) -> Iterable[str]:
    for row in itertools.chain.from_iterable(tables.values()):
        if "sentence" in row:
            yield row["sentence"]
        elif "choices" in row:
            subject = row["subject"].replace("_", " ")
            yield "\n".join([f" {subject}.\n\n{row['question']}", *(f"A. {choice}" for choice in row["choices"])])
        else:
            yield f"Question: {row['question']}\nAnswer: {row['answer']}"


def _stamp(folder: Path) -> dict[str, Any] | None:
    path = folder / "toy.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _move_into_place(aside: Path, folder: Path, stamp: dict[str, Any]) -> None:
    if _stamp(folder) is not None:
        old = folder.parent / f".{folder.name}.old-{os.getpid()}"
        folder.rename(old)
        shutil.rmtree(old)
    try:
        aside.rename(folder)
    except OSError:
        # Another process was faster: its build is as good as this one if it has the same stamp.
        if _stamp(folder) != stamp:
            raise
        shutil.rmtree(aside)


def _shuffled(rng: random.Random, rows: Iterable[Row]) -> list[Row]:
    rows = list(rows)
    rng.shuffle(rows)
    return rows
