import dataclasses
from pathlib import Path

import pandas as pd
import pytest
from tiny import write_task_files

from kd_utils.data import tasks
from kd_utils.data.task_rows import COLUMNS, load_task
from kd_utils.data.tasks import TASKS, find_task, register, task_order
from kd_utils.records.provenance import code_of


@pytest.fixture
def folder(tmp_path):
    return write_task_files(tmp_path / "data")


def rewrite(folder, name, **columns):
    path = folder / f"{name}.parquet"
    pd.read_parquet(path).assign(**columns).to_parquet(path, index=False)


# The texts below are what lm-evaluation-harness 0.4.13 put to a model for these rows.
def test_sst2_prompt(folder):
    table = load_task("sst2", "train", data_dir=folder)
    assert tuple(table.columns) == COLUMNS
    first = table.iloc[0]
    assert (
        first["prompt"] == "a dull film \nQuestion: Is this sentence positive or negative?\nAnswer:"
    )
    assert (first["answer"], first["choices"], first["gold"]) == (
        " negative",
        [" negative", " positive"],
        "0",
    )
    assert (first["row"], first["task"], first["subject"]) == (0, "sst2", "")


def test_mmlu_prompt_names_the_subject_and_strips_only_the_question(folder):
    table = load_task("mmlu", "test", data_dir=folder)
    assert table["prompt"][0] == (
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        "Which is a star?\nA. Mars\nB. Sun\nC. Moon\nD. Io\nAnswer:"
    )
    assert "about abstract algebra.\n\n" in table["prompt"][2]
    assert (table["answer"][0], table["choices"][0], table["gold"][0]) == (
        " B",
        [" A", " B", " C", " D"],
        "1",
    )


def test_gsm8k_prompt_and_gold(folder):
    table = load_task("gsm8k", "train", data_dir=folder)
    assert table["prompt"][0] == "Question: Tom has 2 apples and buys 3. How many?\nAnswer:"
    assert table["answer"][0] == " 2+3=<<2+3=5>>5 apples.\n#### 5"
    assert table["gold"].tolist() == ["5", "1,200", "9"]
    assert table["choices"][0] == []


def test_mmlu_shots_are_the_first_dev_rows_of_the_subject(folder):
    table = load_task("mmlu", "test", data_dir=folder, num_fewshot=2)
    assert table["prompt"][2] == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "dev What is 1+1?\nA. 2\nB. 1\nC. 3\nD. 4\nAnswer: A\n\n"
        "dev What is 1+2?\nA. 3\nB. 1\nC. 2\nD. 4\nAnswer: A\n\n"
        "What is 1+1?\nA. 2\nB. 1\nC. 3\nD. 4\nAnswer:"
    )


def test_gsm8k_shots_are_the_first_train_rows(folder):
    table = load_task("gsm8k", "test", data_dir=folder, num_fewshot=1)
    assert table["prompt"][0] == (
        "Question: Tom has 2 apples and buys 3. How many?\nAnswer: 2+3=<<2+3=5>>5 apples.\n"
        "#### 5\n\nQuestion: Sam has 7 pens, loses 4. Left?\nAnswer:"
    )


def test_sst2_shots_and_a_row_is_never_its_own_shot(folder):
    table = load_task("sst2", "train", data_dir=folder, num_fewshot=1)
    assert (
        table["prompt"][0].startswith("not dull\n") and table["prompt"][0].count("a dull film") == 1
    )
    assert table["prompt"][1].startswith("a dull film \n")


def test_limit_takes_the_first_rows_and_of_mmlu_those_of_each_subject(folder):
    assert load_task("sst2", "train", data_dir=folder, limit=2)["row"].tolist() == [0, 1]
    table = load_task("mmlu", "test", data_dir=folder, limit=1)
    assert table["row"].tolist() == [0, 2]
    assert table["subject"].tolist() == ["astronomy", "abstract_algebra"]


def test_example_id_covers_content_and_split_but_not_shots(folder):
    plain = load_task("sst2", "train", data_dir=folder)["example_id"]
    assert plain.is_unique
    assert plain.equals(load_task("sst2", "train", data_dir=folder, num_fewshot=2)["example_id"])
    validation = load_task("sst2", "validation", data_dir=folder)["example_id"]
    rewrite(folder, "sst2/validation", sentence=["a dull film ", "y", "z"], label=[0, 1, 1])
    assert load_task("sst2", "validation", data_dir=folder)["example_id"][0] not in {
        plain[0],
        validation[0],
    }


def test_content_key_ignores_space_case_and_subject_line():
    sst2, mmlu = find_task("sst2").content_key, find_task("mmlu").content_key
    assert sst2("Not  dull \nQ") == sst2("not dull\nq")
    assert sst2("not dull") != sst2("dull") and sst2("Q") != mmlu("Q")
    assert mmlu("about a.\n\nWhich?\nA. 1") == mmlu("about b.\n\nWhich?\nA. 1")


@pytest.mark.parametrize(
    "name, columns, message",
    [
        (
            "sst2/train",
            {"label": [0, 1, 2, 1]},
            "row 2: gold = '2', expected a choice's number, 0 to 1",
        ),
        (
            "sst2/train",
            {"label": [0, -1, 0, 1]},
            "row 1: gold = '-1'.*this split has no labels",
        ),
        (
            "sst2/train",
            {"label": [0.0, 1.0, 0.0, 1.0]},
            "row 0: gold = '0.0', expected a choice's number, 0 to 1",
        ),
        (
            "sst2/train",
            {"sentence": ["a", None, "c", "d"]},
            "row 1: sentence = None, expected text",
        ),
        (
            "mmlu/test",
            {"choices": [["a", "b", "c"]] * 5},
            r"row 0: choices = .*expected a list of 4 texts",
        ),
        ("mmlu/test", {"answer": [4] * 5}, "row 0: gold = '4', expected a choice's number, 0 to 3"),
        (
            "gsm8k/train",
            {"answer": ["#### 5", "twelve", "#### 1"]},
            "row 1: answer = ' twelve', expected an answer that ends in a final answer, "
            "its gold, ''",
        ),
    ],
)
def test_values_are_checked(folder, name, columns, message):
    rewrite(folder, name, **columns)
    with pytest.raises(ValueError, match=message) as caught:
        load_task(*name.split("/"), data_dir=folder)
    assert "\n" not in str(caught.value)


def test_unknown_task_and_impossible_counts(folder):
    with pytest.raises(ValueError, match="unknown task 'sst': choose one of sst2, mmlu, gsm8k"):
        load_task("sst", "train", data_dir=folder)
    with pytest.raises(ValueError, match="limit = 0"):
        load_task("sst2", "train", data_dir=folder, limit=0)
    with pytest.raises(
        ValueError, match="num_fewshot = 5, but dev has 2 other rows of subject 'astronomy'"
    ):
        load_task("mmlu", "test", data_dir=folder, num_fewshot=5)


def test_missing_folder_file_and_column(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no data folder .*nowhere"):
        load_task("sst2", "train", data_dir=tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError,
        match=r"test.parquet \(parquet files there: train.parquet, validation.par",
    ):
        load_task("sst2", "test", data_dir=folder)
    path = folder / "sst2/train.parquet"
    pd.read_parquet(path).rename(columns={"label": "labels"}).to_parquet(path)
    with pytest.raises(ValueError, match=r"no column label \(it has sentence, labels\)"):
        load_task("sst2", "train", data_dir=folder)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="not a complete parquet file"):
        load_task("sst2", "train", data_dir=folder)


def test_empty_split(folder):
    path = folder / "gsm8k/train.parquet"
    pd.read_parquet(path).iloc[:0].to_parquet(path)
    with pytest.raises(ValueError, match="gsm8k/train.parquet is empty"):
        load_task("gsm8k", "train", data_dir=folder)


def test_the_hubs_files_are_read_as_a_folders(folder, tmp_path, monkeypatch):
    asked = []

    def served(name, files, **about):
        asked.append((name, files, about["kind"]))
        return tmp_path / "snapshot"

    monkeypatch.setattr("kd_utils.data.hub.hub_folder", served)
    (tmp_path / "snapshot/main").mkdir(parents=True)
    whole = pd.read_parquet(folder / "gsm8k/train.parquet")
    for number, part in enumerate((whole[:2], whole[2:])):  # in the order of the shards
        part.to_parquet(
            tmp_path / f"snapshot/main/train-0000{number}-of-00002.parquet", index=False
        )
    pd.testing.assert_frame_equal(
        load_task("gsm8k", "train"), load_task("gsm8k", "train", data_dir=folder)
    )
    assert asked == [("openai/gsm8k", ["main/train-*.parquet"], "dataset")]
    with pytest.raises(
        FileNotFoundError,
        match="hub's openai/gsm8k has no main/test-.*choose another split than test",
    ):
        load_task("gsm8k", "test")
    (tmp_path / "snapshot/main/train-00001-of-00002.parquet").write_text("<html>")
    with pytest.raises(
        ValueError, match="train-00001-of-00002.parquet is not a complete parquet file"
    ):
        load_task("gsm8k", "train")


def test_a_hub_out_of_reach_is_one_line():
    with pytest.raises(
        ConnectionError,
        match="cannot get the dataset openai/gsm8k from the hub: HF_HUB_OFFLINE .*"
        "set data_dir to a folder with gsm8k/test.parquet",
    ) as caught:
        load_task("gsm8k", "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, split, rows",
    [("sst2", "validation", 872), ("mmlu", "test", 14042), ("gsm8k", "test", 1319)],
)
def test_real_data_is_read_whole(shared, name, split, rows):
    table = load_task(name, split, data_dir=shared / "data")
    assert table["row"].tolist() == list(range(rows))
    right = [
        choices[int(gold)] if choices else gold
        for choices, gold in zip(table["choices"], table["gold"])
    ]
    assert all(answer.endswith(end) for answer, end in zip(table["answer"], right))


@pytest.mark.parametrize("name", ["macro", "a b", "a=1", "", "../x", "mine_flexible"])
def test_a_name_that_means_something_else_is_refused(name):
    task = dataclasses.replace(find_task("sst2"), name=name)
    with pytest.raises(ValueError, match=f"task name '{name}'"):
        register(task)
    assert list(TASKS) == ["sst2", "mmlu", "gsm8k"]


def test_unknown_tasks_come_behind_the_known_ones():
    assert task_order(["b", "gsm8k", "a", "sst2", "b"]) == ["sst2", "gsm8k", "a", "b"]


def test_a_file_of_the_folder_is_a_task_and_part_of_what_a_trial_is_made_from():
    files = {path.name for path in Path(tasks.__file__).parent.glob("[!_]*.py")} - {"base.py"}
    assert files == {f"{name}.py" for name in TASKS}
    assert {f"kd_utils/data/tasks/{name}" for name in files} <= code_of("03_train_student").keys()
