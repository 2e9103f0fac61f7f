"""The toy's rows are right and disjoint, its tokenizer loses nothing, its folders load and build
once.
"""

import itertools
import os
import random
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest

from kd_utils.demos import toy, toy_models

FULL_PRETRAINING = dict(toy_models.PRETRAINING_ROWS)
OPERATION = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@pytest.fixture(scope="module", autouse=True)
def short_pretraining():
    """Folders are built seven times here; how long models are pretrained changes nothing that is
    looked at.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_models, "PRETRAINING_ROWS", {"sst2": 40, "mmlu": 60, "gsm8k": 40})
        patch.setitem(toy_models.PRETRAINING, "epochs", 1)
        yield


@pytest.fixture(scope="module")
def tables():
    return toy.generate(1)


@pytest.fixture(scope="module")
def worlds():
    """The world of the seed's tasks, and that of its pretraining text."""
    return toy.draw_worlds(random.Random("1/world"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "built"
    toy_models.build(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def prompts_and_answers(tables):
    """The prompts of lm-evaluation-harness, written out here a second time."""
    for row in tables["sst2/train"] + tables["sst2/validation"]:
        prompt = f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
        yield prompt, (" negative", " positive")[row["label"]]
    for row in tables["mmlu/dev"] + tables["mmlu/test"]:
        choices = "".join(
            f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"], strict=True)
        )
        subject = row["subject"].replace("_", " ")
        yield (
            (
                f"The following are multiple choice questions (with answers) about {subject}.\n\n"
                f"{row['question'].strip()}\n{choices}Answer:"
            ),
            f" {'ABCD'[row['answer']]}",
        )
    for row in tables["gsm8k/train"] + tables["gsm8k/test"]:
        yield f"Question: {row['question']}\nAnswer:", f" {row['answer']}"


# --- rows ---


def test_same_seed_same_rows_and_another_seed_others(tables):
    assert toy.generate(1) == tables
    other = toy.generate(2)
    assert all(other[name] != tables[name] for name in tables)


def test_row_counts_and_schemas(tables):
    assert {name: len(rows) for name, rows in tables.items() if name != "mmlu/dev"} == toy.ROWS
    assert Counter(row["subject"] for row in tables["mmlu/dev"]) == dict.fromkeys(
        toy.KNOWLEDGE, toy.DEV_ROWS_PER_SUBJECT
    )
    keys = {
        "sst2": ["sentence", "label", "idx"],
        "mmlu": ["question", "subject", "choices", "answer"],
        "gsm8k": ["question", "answer"],
    }
    for name, rows in tables.items():
        assert all(list(row) == keys[name.split("/")[0]] for row in rows), name


def test_no_question_repeats_in_or_between_splits(tables):
    for task, content in (
        ("sst2", lambda row: row["sentence"]),
        ("gsm8k", lambda row: row["question"]),
        ("mmlu", lambda row: (row["question"], frozenset(row["choices"]))),
    ):
        seen = [
            content(row) for name, rows in tables.items() if name.startswith(task) for row in rows
        ]
        assert len(seen) == len(set(seen)), task


def test_labels_and_letters_are_balanced(tables):
    labels = Counter(
        row["label"] for name in ("sst2/train", "sst2/validation") for row in tables[name]
    )
    assert labels[0] == labels[1]
    for subject in toy.KNOWLEDGE:
        letters = Counter(row["answer"] for row in tables["mmlu/test"] if row["subject"] == subject)
        assert set(letters) == {0, 1, 2, 3}
        assert max(letters.values()) < 1.5 * min(letters.values())


def main_clause(sentence):
    """English grammar, not the generator's: `but` hands over to what follows, `although`
    subordinates its clause.
    """
    if " , but " in sentence:
        return sentence.split(" , but ")[1]
    if sentence.startswith("although "):
        return sentence.split(" , ")[1]
    return sentence.split(" , although ")[0]


def polarity(clause):
    words = clause.split()
    good = sum(word in toy.PRAISE for word in words) - sum(word in toy.BLAME for word in words)
    assert abs(good) == 1, clause
    return int(
        (good > 0) != bool(re.search(r"\b(not|never|hardly|anything but|far from)\b", clause))
    )


def test_sentiment_is_that_of_the_main_clause(tables):
    rows = tables["sst2/train"] + tables["sst2/validation"]
    for row in rows:
        for clause in main_clause(row["sentence"]).split(" and "):
            assert polarity(clause) == row["label"], row


def test_sentiment_needs_composition(tables):
    """Counting good and bad words must not be enough, nor reading the last clause."""
    rows = tables["sst2/train"] + tables["sst2/validation"]

    def counted(sentence):
        words = sentence.split()
        score = sum(word in toy.PRAISE for word in words) - sum(word in toy.BLAME for word in words)
        return 0.5 if score == 0 else float(score > 0)

    counting = sum(1 - abs(row["label"] - counted(row["sentence"])) for row in rows) / len(rows)
    last = sum(
        polarity(re.split(r" , (?:but |although )?| and ", row["sentence"])[-1]) == row["label"]
        for row in rows
    )
    assert counting < 0.75
    assert last / len(rows) < 0.9


def thing_of(row):
    """The thing that a question names, read from its words."""
    words = re.findall(r"\w+", row["question"])
    [thing] = set(words) & set(toy.KNOWLEDGE[row["subject"]][1])
    return thing


def test_facts_agree_everywhere_and_every_row_has_one_right_choice(tables, worlds):
    for row in tables["mmlu/test"] + tables["mmlu/dev"]:
        assert row["answer"] == worlds[0].facts[row["subject"]][thing_of(row)]
        assert len(set(row["choices"])) == 4


def test_each_fact_is_asked_often_in_any_large_part_of_test(tables, worlds):
    """Training and validation rows are both drawn from `test`: what validation asks, training must
    have told.
    """
    asked = Counter((row["subject"], thing_of(row)) for row in tables["mmlu/test"][:700])
    assert len(asked) == sum(map(len, worlds[0].facts.values())) and min(asked.values()) >= 3


def test_more_questions_than_the_world_has_are_refused(worlds):
    with pytest.raises(ValueError, match="has 2160 questions, not 2161"):
        toy.mmlu_rows(random.Random(0), worlds[0], 2161)
    rows = toy.mmlu_rows(random.Random(0), worlds[0], 2160)
    assert len({row["question"] for row in rows}) == 2160


def solve(question):
    """The number that the question asks for, read from its sentences alone."""
    total = None
    for sentence in question.split(". "):
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        if re.search(r" has \d", sentence):
            total = numbers[0] * numbers[1] if " boxes of " in sentence else numbers[0]
        elif set(sentence.split()) & set(toy.GAINS):
            total += numbers[0]
        elif set(sentence.split()) & set(toy.LOSSES):
            total -= numbers[0]
        else:
            assert sentence.startswith("How many") and not numbers, sentence
    return total


def test_arithmetic_is_right_step_by_step_and_as_read_from_the_question(tables):
    steps = Counter()
    for row in tables["gsm8k/train"] + tables["gsm8k/test"]:
        *worked, final = row["answer"].split("\n")
        for line in worked:
            a, sign, b, result = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", line).groups()
            assert OPERATION[sign](int(a), int(b)) == int(result)
        for line, following in itertools.pairwise(worked):
            assert following.split()[0] == line.split()[-1]
        assert final == f"#### {solve(row['question'])}" == f"#### {worked[-1].split()[-1]}"
        steps[len(worked)] += 1
    assert steps[1] == steps[2]


# --- what teacher and student have read before ---


@pytest.fixture
def pretraining(tables, monkeypatch):
    monkeypatch.setattr(toy_models, "PRETRAINING_ROWS", FULL_PRETRAINING)
    return toy_models.pretraining_text(tables, seed=1)


def test_two_worlds_share_no_thing_and_no_word(worlds):
    for one, other in zip(*(world.facts.values() for world in worlds)):
        assert one and other and not one.keys() & other.keys()
    for words in ("praise", "blame", "gains", "losses"):
        one, other = (set(getattr(world, words)) for world in worlds)
        assert one and other and not one & other
    known = [*toy.PRAISE, *toy.BLAME, *toy.GAINS, *toy.LOSSES]
    known += [thing for _, things, *_ in toy.KNOWLEDGE.values() for thing in things]
    assert len(known) == len(set(known)) == sum(map(size, worlds))


def size(world):
    words = world.praise + world.blame + world.gains + world.losses
    return len(words) + sum(map(len, world.facts.values()))


def test_pretraining_tells_nothing_of_the_world_of_the_tasks(tables, worlds, pretraining):
    """A student must not come with what it is to be taught: no question, no thing, no word."""
    assert len(pretraining) > 0.9 * sum(FULL_PRETRAINING.values())
    asked = {prompt for prompt, _ in prompts_and_answers(tables)}
    assert not asked & {prompt for prompt, _ in pretraining}
    world = worlds[0]
    unknown = {*world.praise, *world.blame, *world.gains, *world.losses}
    unknown |= {thing for facts in world.facts.values() for thing in facts}
    told = {word for pair in pretraining for word in re.findall(r"\w+", "".join(pair))}
    assert not unknown & told and len(told) > 100


def test_pretraining_depends_on_the_seed_alone(tables, folder, tokenizer):
    """One thread or two, and whatever random state the caller has: the same weights, and the state
    is left alone.
    """
    import torch

    text = toy_models.pretraining_text(tables, seed=1)
    weights, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.manual_seed(count)
        torch.set_num_threads(count)
        before = torch.get_rng_state()
        model = toy_models.build_model(tokenizer, toy_models.STUDENT, seed=1)
        start = model.lm_head.weight.detach().clone()
        toy_models.pretrain(model, tokenizer, text, seed=1)
        assert torch.get_num_threads() == count and torch.equal(torch.get_rng_state(), before)
        weights.append(model.lm_head.weight.detach())
        assert not torch.equal(weights[-1], start)
    torch.set_num_threads(threads)
    assert torch.equal(*weights)


# --- tokenizer ---


def test_tokenizer_loses_nothing_and_a_prompt_is_a_prefix(tables, tokenizer):
    for prompt, answer in prompts_and_answers(tables):
        whole, part = tokenizer(prompt + answer).input_ids, tokenizer(prompt).input_ids
        assert tokenizer.decode(whole) == prompt + answer
        assert whole[: len(part)] == part and len(whole) > len(part)


def test_tokenizer_takes_every_word_of_the_toy_whole(tables, tokenizer):
    assert len(tokenizer) < 1000
    assert (
        max(
            len(tokenizer(prompt + answer).input_ids)
            for prompt, answer in prompts_and_answers(tables)
        )
        <= 60
    )
    for answer in (" negative", " positive", " A", " B", " C", " D"):
        assert len(tokenizer(answer).input_ids) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\n",
        "Zoë paid 1,234.50 € — or ¥? 你好\t🙂\r\n",
        "  unseen  words\u00a0",
        "\x00",
    ],
)
def test_tokenizer_takes_any_text(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)


def test_tokenizer_names_its_special_tokens_and_adds_none(tokenizer):
    assert (
        tokenizer.convert_tokens_to_ids(toy_models.SPECIAL_TOKENS)
        == [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
        == [0, 1, 2]
    )
    assert not set(tokenizer("Answer: A").input_ids) & {0, 1, 2}


# --- folders ---


def test_files_hold_the_rows(folder, tables):
    for name, rows in tables.items():
        assert pq.read_table(folder / "data" / f"{name}.parquet").to_pylist() == rows


def test_models_load_and_differ_in_all_but_the_head_count(folder, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / name) for name in ("teacher", "student")
    )
    for name in ("teacher", "student"):
        assert AutoTokenizer.from_pretrained(folder / name).get_vocab() == tokenizer.get_vocab()
    assert teacher.config.vocab_size == student.config.vocab_size == len(tokenizer)
    assert teacher.config.num_attention_heads == student.config.num_attention_heads
    for size in ("hidden_size", "num_hidden_layers", "head_dim"):
        assert getattr(teacher.config, size) > getattr(student.config, size)
    ids = tokenizer("the film is not dull", return_tensors="pt")
    assert teacher(**ids).logits.isfinite().all() and student(**ids).logits.isfinite().all()


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_second_build_is_byte_identical(folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    toy_models.build(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    toy_models.build(tmp_path / folder.name)
    assert contents(tmp_path / folder.name) == contents(folder)


def test_another_seed_replaces_what_is_there_and_leaves_no_rest(tmp_path):
    toy_models.build(tmp_path / "toy", seed=1)
    one = contents(tmp_path / "toy")
    toy_models.build(tmp_path / "toy", seed=2)
    assert contents(tmp_path / "toy") != one
    assert os.listdir(tmp_path) == ["toy"]


def test_a_killed_build_leaves_nothing_half_done(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy_models, "build_model", killed)
        toy_models.build(tmp_path / "toy")
    assert not (tmp_path / "toy").exists()
    toy_models.build(tmp_path / "toy")
    assert (tmp_path / "toy" / "toy.json").is_file() and os.listdir(tmp_path) == ["toy"]


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no toy build wrote"):
        toy_models.build(tmp_path)
    assert contents(tmp_path) == {(tmp_path / "thesis.txt").relative_to(tmp_path): b"mine"}
