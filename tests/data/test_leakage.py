import random

import pandas as pd
import pytest
from tiny import write_task_files

from kd_utils.data import leakage
from kd_utils.data.leakage import near_overlap, question_words
from kd_utils.data.task_rows import load_task
from kd_utils.data.tasks import TASKS

STORY = "Tom has two red apples and his old aunt buys him seven more at the market on Monday"


def table(task, *contents, gold="0"):
    """Prompts as `tasks` writes them, around the given contents (of MMLU: question, then the four
    choices).
    """
    rows = []
    for content in contents:
        question, *choices = (
            content if isinstance(content, tuple) else (content, "w", "x", "y", "z")
        )
        row = {TASKS[task].columns[0]: question, "choices": choices}
        head = (
            "The following are multiple choice questions (with answers) about law.\n\n"
            if task == "mmlu"
            else ""
        )
        rows.append(
            {
                "example_id": f"{task}:{len(rows)}",
                "task": task,
                "prompt": head + TASKS[task].prompt(row),
                "choices": list(TASKS[task].labels),
                "gold": gold,
            }
        )
    return pd.DataFrame(rows, columns=["example_id", "task", "prompt", "choices", "gold"])


def shares(task, train, validation):
    return near_overlap(table(task, *train), table(task, *validation))["shared"].tolist()


def summary(train, validation):
    return leakage.overlap_by_task(train, validation, near_overlap(train, validation)).set_index(
        "task"
    )


# --- what is compared ---


def test_only_the_question_itself_is_read(tmp_path):
    """Against the raw rows: whatever `tasks` writes around them is gone, and nothing of them is."""
    folder = write_task_files(tmp_path)
    for task, split in (("sst2", "train"), ("mmlu", "test"), ("gsm8k", "train")):
        raw = pd.read_parquet(folder / task / f"{split}.parquet")
        contents = raw.get("sentence", raw.get("question"))
        if task == "mmlu":
            contents = contents + " " + raw["choices"].str.join(" ")
        plain = (
            contents.str.lower().str.replace(r"[^a-z0-9\s]", "", regex=True).str.split().tolist()
        )
        assert [
            question_words(task, prompt)
            for prompt in load_task(task, split, data_dir=folder)["prompt"]
        ] == plain


def test_words_are_normalised():
    for one, other in [
        ("Not DULL!", "not dull"),
        ("It's  a «joy» —\n really…", "its a joy really"),
        ("ﬁne\u00a0cafe\u0301", "fine café"),
        ("１００ straße", "100 STRASSE"),
        ("a_b", "ab"),
    ]:
        prompts = table("sst2", one, other)["prompt"]
        assert question_words("sst2", prompts[0]) == question_words("sst2", prompts[1]), one
    assert question_words("sst2", table("sst2", "naïve")["prompt"][0]) == [
        "naïve"
    ]  # accents are letters


def test_what_is_no_prompt_is_refused():
    with pytest.raises(
        ValueError, match="not a prompt of gsm8k: 'How many.'.*run 01_prepare_data again"
    ):
        question_words("gsm8k", "How many?")
    with pytest.raises(ValueError, match="unknown task 'boolq'"):
        question_words("boolq", "Yes?")


def test_words_that_all_prompts_have_do_not_count():
    assert shares("sst2", ["a dull film"], ["a joy to watch"]) == [0]
    assert shares("gsm8k", ["One and one?"], ["Two and two?"]) == [0]
    # Subject's line, letters and `Answer:` would make 13 equal words in a row here.
    assert shares("mmlu", [("Why?", "a", "b", "c", "d")], [("Who?", "a", "b", "c", "d")]) == [0]


# --- near overlap ---


def test_a_copy_is_found_whatever_its_case_and_punctuation():
    found = near_overlap(
        table("gsm8k", "Another one.", STORY),
        table("gsm8k", STORY.upper().replace(" ", ", ") + "?!"),
    )
    assert found.loc[0, ["words", "shared", "nearest"]].tolist() == [18, 1.0, "gsm8k:1"]


def test_the_share_by_hand(monkeypatch):
    words = [f"w{i}" for i in range(20)]
    # 20 words have 8 runs of 13. Training has words 0 to 14, so 3 runs, two of them once more, and
    # words 6 to 18 elsewhere, one run more. That is half, and half is leaked.
    train = [
        " ".join(words[:15]) + " other end",
        "other start " + " ".join(words[6:19]),
        " ".join(words[:14]),
    ]
    found = near_overlap(table("gsm8k", *train), table("gsm8k", " ".join(words)))
    assert found["shared"].tolist() == [4 / 8] and found["nearest"].tolist() == ["gsm8k:0"]
    assert summary(table("gsm8k", *train), table("gsm8k", " ".join(words)))["leaked"].tolist() == [
        1
    ]
    monkeypatch.setattr(leakage, "NGRAM", 16)
    assert shares("gsm8k", train, [" ".join(words)]) == [0]
    monkeypatch.undo()
    # 12 equal words are one too few.
    assert shares(
        "gsm8k", [" ".join([*words[:12], "else", *words[13:]])], [" ".join(words[:19])]
    ) == [0]


def test_shares_are_those_of_a_plain_search(monkeypatch):
    """Against the definition, with strings: random texts of few different words, so that runs meet
    by chance.
    """
    draw = random.Random(0)
    train, validation = (
        [" ".join(draw.choices("ab", k=draw.randint(1, 24))) for _ in range(60)] for _ in range(2)
    )
    expected = []
    for words in map(str.split, validation):
        size = min(len(words), 9)
        runs = {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
        seen = [
            run
            for run in runs
            if (run in train if size < 8 else any(f" {run} " in f" {t} " for t in train))
        ]
        expected.append(len(seen) / len(runs))
    monkeypatch.setattr(leakage, "NGRAM", 9)
    assert shares("sst2", train, validation) == expected
    assert len(set(expected)) > 5


def test_permuted_words_are_no_leak():
    assert shares("gsm8k", [" ".join(reversed(STORY.split()))], [STORY]) == [0]


def test_a_question_of_8_to_12_words_is_looked_for_whole():
    eight = "this warm film has a very fine cast"
    assert shares("sst2", [f"although {eight} it bores"], [eight]) == [1]
    assert shares("sst2", ["although this warm film has a very fine plot"], [eight]) == [0]


def test_a_question_of_under_8_words_is_no_leak_inside_a_longer_text():
    assert shares("sst2", ["although a good film , it is long"], ["a good film"]) == [0]
    assert shares("sst2", ["A good film !"], ["a good film"]) == [1]
    assert shares("sst2", ["a film"], ["a good film"]) == [0]
    assert shares("sst2", ["...", "ok"], ["?!"]) == [1]  # no words at all, and again none


def test_tasks_do_not_meet_and_order_is_kept():
    train = pd.concat([table("gsm8k", STORY), table("sst2", "a joy")], ignore_index=True)
    validation = pd.concat(
        [table("sst2", STORY), table("gsm8k", "New?", STORY), table("sst2", "a joy")]
    )
    validation.index = [7, 3, 5, 1]
    found = near_overlap(train, validation)
    assert found["shared"].tolist() == [0, 0, 1, 1] and found.index.tolist() == [7, 3, 5, 1]
    assert found["example_id"].tolist() == validation["example_id"].tolist()


def test_empty_tables():
    none = table("sst2")
    assert near_overlap(none, none).empty and summary(none, none).empty
    assert near_overlap(none, table("sst2", "a joy"))["shared"].tolist() == [0]
    assert near_overlap(table("sst2", "a joy"), none).columns.tolist() == [
        "task",
        "example_id",
        "words",
        "shared",
        "nearest",
    ]
    assert leakage.nearest_pairs(none, none, near_overlap(none, none)).empty
    assert leakage.label_balance(none, none).empty and leakage.baselines(none, none).empty
    leakage.require_no_leak(summary(none, none).reset_index())


# --- by task, and the gate ---


def test_exact_and_near_are_counted_by_task():
    train = pd.concat([table("gsm8k", STORY, "Cool?"), table("sst2", "a joy")], ignore_index=True)
    validation = pd.concat(
        [table("gsm8k", STORY, f"{STORY} .", "Cool", "New?"), table("sst2", "a bore")],
        ignore_index=True,
    )
    found = summary(train, validation)
    # "Cool" and "Cool?" are the same words and not the same content.
    assert found.loc["gsm8k"].tolist() == [4, 2, 1, 3, 3, 0.75]
    assert found.loc["sst2"].tolist() == [1, 1, 0, 0, 0, 0.0]


def test_the_nearest_pairs_are_shown_side_by_side():
    train = pd.concat(
        [table("sst2", "a joy"), table("gsm8k", "Elsewhere?", f"{STORY} and then some")],
        ignore_index=True,
    )
    validation = pd.concat(
        [table("sst2", "a bore"), table("gsm8k", f"{STORY} or so it is said", STORY)],
        ignore_index=True,
    )
    pairs = leakage.nearest_pairs(train, validation, near_overlap(train, validation))
    assert pairs["task"].tolist() == ["gsm8k"] and pairs["shared"].tolist() == [1]
    assert pairs.loc[0, "validation"] == f"Question: {STORY}\nAnswer:"
    assert pairs.loc[0, "training"] == f"Question: {STORY} and then some\nAnswer:"


def test_a_planted_leak_stops():
    train = table("gsm8k", *(f"Number {i}?" for i in range(10)), STORY)
    clean = [f"Other {i}?" for i in range(99)]
    one = summary(train, table("gsm8k", *clean, f"{STORY} too")).reset_index()
    assert one["leaked"].tolist() == [1]
    leakage.require_no_leak(one)  # 1 of 100 is allowed
    many = summary(train, table("gsm8k", *clean, *(f"{STORY} {i}" for i in range(3)))).reset_index()
    with pytest.raises(
        ValueError,
        match="gsm8k: training has half or more of 3 of 102 validation questions, above 2%: "
        "lower gsm8k in train_rows or validation_rows, or set another data_seed",
    ):
        leakage.require_no_leak(many)
    exact = summary(train, table("gsm8k", *clean, STORY)).reset_index()
    with pytest.raises(
        ValueError,
        match="gsm8k: the content of 1 of 100 validation rows is in training too: run 01",
    ):
        leakage.require_no_leak(exact)


# --- few-shot rows ---


def test_shots_are_the_first_rows_and_of_mmlu_those_of_each_subject(tmp_path, monkeypatch):
    folder = write_task_files(tmp_path)
    monkeypatch.setattr(leakage, "SHOTS", 2)
    shots = leakage.few_shot_rows(str(folder), TASKS)
    assert shots["task"].value_counts().to_dict() == {"mmlu": 4, "sst2": 2, "gsm8k": 2}
    for task, split in (("sst2", "validation"), ("mmlu", "test"), ("gsm8k", "test")):
        asked = load_task(task, split, data_dir=folder, num_fewshot=2)["prompt"][0]
        of_subject = shots[(shots["task"] == task) & shots["subject"].isin(["", "astronomy"])]
        assert all(prompt.split("\n\n")[-1] in asked for prompt in of_subject["prompt"])
    assert leakage.few_shot_rows(str(folder), ["mmlu"])["task"].unique().tolist() == ["mmlu"]


def test_shots_among_the_rows_are_counted_and_refused():
    shots = pd.concat([table("sst2", "a joy", "a bore"), table("gsm8k", "One?")], ignore_index=True)
    apart = {"train": table("sst2", "a film"), "validation": table("sst2", "a plot")}
    found = leakage.few_shot_overlap(shots, apart)
    assert found.to_dict("list") == {
        "task": ["sst2", "gsm8k"],
        "shots": [2, 1],
        "in_train": [0, 0],
        "in_validation": [0, 0],
    }
    leakage.require_unseen_shots(found)
    for split, counts in (("train", (1, 0)), ("validation", (0, 1))):
        # Told by content, not by id.
        tables = {**apart, split: table("sst2", "fine", "A  JOY")}
        found = leakage.few_shot_overlap(shots, tables)
        assert tuple(found.loc[0, ["in_train", "in_validation"]]) == counts
        with pytest.raises(
            ValueError,
            match=r"sst2: few-shot rows .*\({} in train, {} in validation\): run 01".format(
                *counts
            ),
        ):
            leakage.require_unseen_shots(found)


# --- labels and baselines ---


def labelled(task, *golds):
    return table(task, *(f"Row {i}" for i in range(len(golds)))).assign(gold=list(golds))


def test_label_balance_by_hand():
    train = pd.concat(
        [labelled("sst2", "1", "1", "1", "0"), labelled("mmlu", "0", "1"), labelled("gsm8k", "12")]
    )
    validation = pd.concat([labelled("sst2", "0", "1"), labelled("gsm8k", "7")])
    found = leakage.label_balance(train, validation).set_index(["task", "label"])
    assert found.loc[("sst2", "positive")].tolist() == [0.75, 0.5]
    assert found.loc[("sst2", "negative")].tolist() == [0.25, 0.5]
    assert found.loc["mmlu", "train"].to_dict() == {"A": 0.5, "B": 0.5, "C": 0.0, "D": 0.0}
    assert found.loc["mmlu", "validation"].isna().all()  # a task left out of validation
    assert set(found.index.get_level_values("task")) == {"sst2", "mmlu"}


def test_baselines_by_hand():
    train = pd.concat(
        [
            labelled("sst2", "1", "1", "0"),
            labelled("mmlu", "2", "2", "3"),
            labelled("gsm8k", "1,200", "7", "1200"),
        ]
    )
    validation = pd.concat(
        [
            labelled("sst2", "0", "0", "0", "1"),
            labelled("mmlu", "2", "0"),
            labelled("gsm8k", "1200", "7", "8", "$1,200"),
        ]
    )
    found = leakage.baselines(train, validation).set_index("task")
    assert found["commonest"].to_dict() == {
        "sst2": "positive",
        "mmlu": "C",
        "gsm8k": "1200",
        "all": "",
    }
    # Training's commonest label, not validation's own: that would have been right in 3 of 4 of
    # SST-2.
    assert found["majority"].to_dict() == {"sst2": 0.25, "mmlu": 0.5, "gsm8k": 0.5, "all": 0.4}
    assert found["random"].to_dict() == {
        "sst2": 0.5,
        "mmlu": 0.25,
        "gsm8k": 0.0,
        "all": pytest.approx(0.25),
    }
    assert found["rows"].to_dict() == {"sst2": 4, "mmlu": 2, "gsm8k": 4, "all": 10}


def test_baselines_of_a_task_without_training_rows():
    found = leakage.baselines(
        labelled("sst2", "1"), pd.concat([labelled("sst2", "1"), labelled("mmlu", "2")])
    )
    found = found.set_index("task")
    assert (
        found.loc["sst2", "majority"] == 1 and found.loc[["mmlu", "all"], "majority"].isna().all()
    )
    assert found.loc["mmlu", "random"] == 0.25


# --- real data ---


def test_mmlu_cut_in_two_as_the_notebook_says(shared):
    """`llama2`'s 1,000 and 1,000 rows: what 01 says of them."""
    from transformers import AutoTokenizer

    from kd_utils.config.stages import DataConfig
    from kd_utils.data.drawing import prepare

    config = DataConfig(
        name="real",
        artifacts_dir="artifacts",
        build="none",
        data_dir=str(shared / "data"),
        tokenizer="none",
        max_length=512,
        data_seed=0,
        train_rows="mmlu:1000",
        validation_rows="mmlu:1000",
    )
    prepared = prepare(config, AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2"))
    overlap = near_overlap(prepared.train, prepared.validation)
    found = leakage.overlap_by_task(prepared.train, prepared.validation, overlap)
    leakage.require_no_leak(found)
    assert (
        found.loc[0, "exact"] == 0
        and found.loc[0, "any_shared"] > 40
        and found.loc[0, "leaked_share"] < 0.01
    )
    # The worst is one passage with two questions.
    [pair] = leakage.nearest_pairs(prepared.train, prepared.validation, overlap).itertuples()
    assert (
        pair.shared > 0.5
        and pair.validation[:300] == pair.training[:300]
        and pair.validation != pair.training
    )
