import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from tiny import tiny_tokenizer, write_task_files

from kd_utils.config.stages import DataConfig
from kd_utils.data.drawing import prepare
from kd_utils.data.leakage import SHOTS, few_shot_overlap, few_shot_rows, require_unseen_shots
from kd_utils.data.prepared_data import load_prepared, read_manifest, save_prepared, why_stale
from kd_utils.data.task_rows import COLUMNS, content_keys
from kd_utils.records import provenance
from kd_utils.store.files import sha256_file
from kd_utils.store.sealed import RecordError, read_sealed, write_sealed
from kd_utils.tokens.encoding import encode_example, tokenizer_fingerprint

TOKENIZER = tiny_tokenizer(begin=True)


@pytest.fixture
def folder(tmp_path):
    return with_shots(write_task_files(tmp_path / "data"))


def with_shots(folder):
    """Five rows in front of each `train`: the few-shot rows, which are never drawn. And one row
    more of each task, to hold out.
    """
    spare = {"question": ["Which is spare?"], "subject": ["astronomy"], "answer": [0]}
    for name, row in [
        ("sst2/train", {"sentence": ["a spare film"], "label": [1]}),
        ("mmlu/test", spare | {"choices": [["Io", "Sun", "Moon", "Mars"]]}),
        ("gsm8k/train", {"question": ["9 pens. How many?"], "answer": ["That is 9.\n#### 9"]}),
    ]:
        path = folder / f"{name}.parquet"
        pd.concat([pd.read_parquet(path), pd.DataFrame(row)]).to_parquet(path, index=False)
    for task, shots in [
        ("sst2", {"sentence": [f"shot {i}" for i in range(SHOTS)], "label": [0] * SHOTS}),
        ("gsm8k", {"question": [f"Shot {i}?" for i in range(SHOTS)], "answer": ["#### 1"] * SHOTS}),
    ]:
        path = folder / task / "train.parquet"
        pd.concat([pd.DataFrame(shots), pd.read_parquet(path)]).to_parquet(path, index=False)
    return folder


def config(folder, **changes):
    values = dict(
        name="test",
        artifacts_dir="artifacts",
        build="none",
        data_dir=str(folder),
        tokenizer="a/hub-model",
        max_length=512,
        data_seed=0,
        held_out_rows=1,
    )
    rows = {"train": dict(sst2=2, mmlu=2, gsm8k=2), "validation": dict(sst2=3, mmlu=3, gsm8k=1)}
    for key in changes.keys() & {f"{task}_{split}" for split in rows for task in rows[split]}:
        task, split = key.split("_")
        rows[split][task] = changes.pop(key)
    for split, counts in rows.items():
        values[f"{split}_rows"] = " ".join(f"{task}:{n}" for task, n in counts.items() if n)
    return DataConfig(**{**values, **changes})


def contents(table):
    return content_keys(table).tolist()


def test_rows_are_as_many_as_asked_for_and_disjoint(folder):
    prepared = prepare(config(folder), TOKENIZER)
    assert prepared.train["task"].value_counts().to_dict() == {"sst2": 2, "mmlu": 2, "gsm8k": 2}
    assert prepared.validation["task"].value_counts().to_dict() == {
        "sst2": 3,
        "mmlu": 3,
        "gsm8k": 1,
    }
    assert prepared.held_out["task"].value_counts().to_dict() == {"sst2": 1, "mmlu": 1, "gsm8k": 1}
    assert set(prepared.train.columns) == set(COLUMNS) - {"row"} | {"labelled"}
    assert set(prepared.held_out.columns) == set(COLUMNS) - {"row"}
    together = pd.concat(prepared.tables.values())
    assert content_keys(together).is_unique and together["example_id"].is_unique


def test_a_name_in_labelled_that_is_no_task_is_refused(folder):
    with pytest.raises(ValueError, match="unknown task 'sst': choose one of sst2, mmlu, gsm8k"):
        prepare(config(folder, labelled="sst:1"), TOKENIZER)


def test_held_out_rows_follow_the_training_rows(folder):
    fewer = prepare(config(folder, sst2_train=1, held_out_rows=1), TOKENIZER)
    more = prepare(config(folder, sst2_train=2, held_out_rows=1), TOKENIZER)
    of_sst2 = [table.query("task == 'sst2'") for table in (fewer.train, fewer.held_out, more.train)]
    assert contents(pd.concat(of_sst2[:2])) == contents(of_sst2[2])
    with pytest.raises(
        ValueError,
        match=r"held_out_rows asks for gsm8k:3, but there are 2 \(train has 9 rows, of which 0 are "
        "duplicates or in validation, 2 are in training, 5 are few-shot rows and 0 longer than .*: "
        "lower held_out_rows, or gsm8k in train_rows$",
    ):
        prepare(
            config(folder, held_out_rows=3, sst2_train=1, mmlu_train=1, mmlu_validation=1),
            TOKENIZER,
        )


def test_fewer_labels_are_some_of_those_of_more(folder):
    labelled = []
    for text in ("sst2=0 mmlu=0 gsm8k=0", 0.3, "0.6", "sst2=2", 1):
        prepared = prepare(config(folder, sst2_train=3, gsm8k_train=3, labelled=text), TOKENIZER)
        labelled.append({*prepared.train.query("labelled")["example_id"]})
        assert len(prepared.train) == 8
    assert [len(ids) for ids in labelled] == [0, 3, 5, 7, 8]
    assert all(fewer < more for fewer, more in zip(labelled, labelled[1:]))
    [mmlu] = (
        prepare(config(folder, labelled="mmlu=1"), TOKENIZER)
        .labels.query("task == 'mmlu'")
        .to_dict("records")
    )
    assert mmlu == {"task": "mmlu", "train_rows": 2, "labelled": 1, "held_out": 1, "labels": 2}


def test_labels_are_part_of_the_hash_and_come_back(folder, tmp_path):
    hashes = set()
    for text in ("1", "0.5"):
        prepared = prepare(config(folder, labelled=text), TOKENIZER)
        loaded = load_prepared(save_prepared(prepared, tmp_path / "prepared"))
        assert loaded.train["labelled"].tolist() == prepared.train["labelled"].tolist()
        hashes.add(loaded.data_hash)
    assert len(hashes) == 2


def test_content_of_validation_is_dropped_from_training_and_counted(folder):
    # "not dull" stands in train, "NOT  dull" in validation: one content.
    counts = prepare(config(folder, sst2_train=3), TOKENIZER).counts.set_index(["task", "split"])
    assert counts.loc[
        ("sst2", "train"), ["available", "duplicates", "shots", "taken"]
    ].tolist() == [10, 1, 5, 3]
    assert counts.loc[("mmlu", "train"), "duplicates"] == 0
    with pytest.raises(
        ValueError,
        match=r"train_rows asks for sst2:5, but there are 4 \(train has 10 rows, of which 1 are dup"
        ".*, 5 are few-shot rows",
    ):
        prepare(config(folder, sst2_train=5), TOKENIZER)
    with pytest.raises(ValueError, match="for mmlu:4, but there are 3 .*lower mmlu in train_rows"):
        prepare(config(folder, mmlu_train=4), TOKENIZER)


def test_duplicates_within_a_split_are_dropped(folder):
    path = folder / "gsm8k/train.parquet"
    table = pd.read_parquet(path)
    pd.concat([table, table.iloc[:2]]).to_parquet(path)
    counts = prepare(config(folder, gsm8k_train=3), TOKENIZER).counts.set_index(["task", "split"])
    assert counts.loc[("gsm8k", "train"), ["available", "duplicates", "taken"]].tolist() == [
        11,
        2,
        3,
    ]


def test_few_shot_rows_are_never_drawn_wherever_their_content_stands(folder):
    path = folder / "mmlu" / "dev.parquet"
    dev = pd.read_parquet(path)
    dev.loc[0, "question"] = "WHICH  is a star?"  # as in `test`
    dev.to_parquet(path)
    for seed in range(4):
        prepared = prepare(
            config(
                folder, data_seed=seed, sst2_train=3, gsm8k_train=3, mmlu_train=2, mmlu_validation=2
            ),
            TOKENIZER,
        )
        shots = few_shot_rows(str(folder), ["sst2", "mmlu", "gsm8k"])
        require_unseen_shots(few_shot_overlap(shots, prepared.tables))
    counts = prepared.counts.set_index(["task", "split"])
    assert counts["shots"].to_dict() == {
        ("sst2", "train"): 5,
        ("mmlu", "train"): 1,
        ("gsm8k", "train"): 5,
        ("sst2", "held_out"): 5,
        ("mmlu", "held_out"): 1,
        ("gsm8k", "held_out"): 5,
        ("sst2", "validation"): 0,
        ("mmlu", "validation"): 1,
        ("gsm8k", "validation"): 0,
    }
    with pytest.raises(ValueError, match="for mmlu:4, but there are 3 .*1 are few-shot rows"):
        prepare(config(folder, mmlu_train=4, mmlu_validation=2), TOKENIZER)


def test_the_draw_follows_the_seed_and_not_the_counts(folder):
    drawn = {seed: prepare(config(folder, data_seed=seed), TOKENIZER) for seed in range(8)}
    assert len({prepared.data_hash for prepared in drawn.values()}) > 4
    assert prepare(config(folder), TOKENIZER).data_hash == drawn[0].data_hash
    fewer = prepare(
        config(folder, sst2_train=1, sst2_validation=1, mmlu_train=1, mmlu_validation=1), TOKENIZER
    )
    for split in ("train", "validation"):
        for task in ("sst2", "mmlu"):
            [first, *_] = getattr(drawn[0], split).query("task == @task")["example_id"]
            [only] = getattr(fewer, split).query("task == @task")["example_id"]
            assert only == first


def test_counts_of_tokens(folder):
    prepared = prepare(config(folder), TOKENIZER)
    lengths = [
        tuple(map(len, encode_example(TOKENIZER, row.prompt, row.answer)))
        for row in prepared.train.itertuples()
        if row.task == "gsm8k"
    ]
    line = prepared.counts.set_index(["task", "split"]).loc[("gsm8k", "train")]
    assert line["max_tokens"] == max(map(sum, lengths))
    assert line["mean_tokens"] == pytest.approx(sum(map(sum, lengths)) / 2, abs=0.06)
    assert line["mean_answer_tokens"] == pytest.approx(
        sum(answer for _, answer in lengths) / 2, abs=0.06
    )


def test_too_long_is_dropped_and_counted_never_cut(folder):
    prepared = prepare(config(folder, gsm8k_train=3), TOKENIZER)
    whole = pd.concat([prepared.train, prepared.held_out]).query("task == 'gsm8k'")
    lengths = sorted(
        sum(map(len, encode_example(TOKENIZER, row.prompt, row.answer)))
        for row in whole.itertuples()
    )
    only_gsm8k = dict(
        sst2_train=0, sst2_validation=1, mmlu_train=0, mmlu_validation=0, gsm8k_validation=0
    )
    shortest = only_gsm8k | {"gsm8k_train": 1}
    shorter = prepare(config(folder, max_length=lengths[1], **shortest), TOKENIZER)
    found = shorter.counts.query("task == 'gsm8k'")
    # A row that is too long counts once, with the split that it was drawn for.
    assert found["max_tokens"].max() == lengths[1] and found["too_long"].sum() <= 2
    assert all(row.answer.endswith(row.gold) for row in shorter.train.itertuples())
    all_but_one = prepare(config(folder, max_length=lengths[3] - 1, **only_gsm8k), TOKENIZER)
    assert len(all_but_one.train) == 2
    with pytest.raises(
        ValueError, match="for gsm8k:4, but there are 3 .* 1 longer than max_length"
    ):
        prepare(
            config(folder, max_length=lengths[3] - 1, **{**only_gsm8k, "gsm8k_train": 4}), TOKENIZER
        )
    with_shots(write_task_files(folder))
    pd.DataFrame({"question": ["1?"], "answer": ["#### 1"]}).to_parquet(
        folder / "gsm8k/test.parquet"
    )
    only_gsm8k |= {"sst2_validation": 0, "gsm8k_validation": 1}
    with pytest.raises(
        ValueError,
        match=f"none of its 4 train rows fits max_length = 20 .*longest has {lengths[3]}.*, "
        f"the shortest {lengths[0]}.: set max_length to at least {lengths[0]}",
    ):
        prepare(config(folder, max_length=20, **only_gsm8k), TOKENIZER)


def test_round_trip(folder, tmp_path):
    prepared = prepare(config(folder), TOKENIZER)
    place = tmp_path / "artifacts" / "data" / "test"
    save_prepared(prepared, place)
    save_prepared(prepared, place)  # over an earlier one
    assert sorted(path.name for path in place.parent.iterdir()) == ["test"]
    loaded = load_prepared(place)
    pd.testing.assert_frame_equal(loaded.train, prepared.train, check_dtype=False)
    pd.testing.assert_frame_equal(loaded.counts, prepared.counts, check_dtype=False)
    assert loaded.data_hash == prepared.data_hash
    assert loaded.tokenizer_fingerprint == tokenizer_fingerprint(TOKENIZER)
    assert loaded.config_fingerprint == config(folder).fingerprint()


def test_a_single_task_without_choices_goes_round_too(folder, tmp_path):
    none = {f"{task}_{split}": 0 for task in ("sst2", "mmlu") for split in ("train", "validation")}
    prepared = prepare(config(folder, **none), TOKENIZER)
    loaded = load_prepared(save_prepared(prepared, tmp_path / "prepared"))
    assert loaded.data_hash == prepared.data_hash and loaded.train["choices"].tolist() == [[], []]


def resealed(place, **changes):
    """Prepared prepared_data whose manifest agrees with its files, whatever they are: the seal is
    not what finds them wrong.
    """
    manifest = read_sealed(place / "manifest.json", "checksums") | changes
    manifest["checksums"] = {
        path.name: sha256_file(path) for path in sorted(place.glob("*.parquet"))
    }
    write_sealed(place / "manifest.json", manifest, "checksums")
    return place


def test_the_hash_is_of_the_content_and_not_of_the_file(folder, tmp_path):
    place = save_prepared(prepare(config(folder), TOKENIZER), tmp_path / "prepared")
    before = load_prepared(place).data_hash
    table = pd.read_parquet(place / "train.parquet")
    table.to_parquet(place / "train.parquet", compression="zstd", index=True)
    with pytest.raises(
        ValueError, match="prepared/train.parquet is damaged or from another folder: manifest.json"
    ):
        load_prepared(place)
    assert load_prepared(resealed(place)).data_hash == before
    table.iloc[::-1].to_parquet(place / "train.parquet", index=False)
    with pytest.raises(
        ValueError, match="another data_hash than the tables: run 01_prepare_data again"
    ):
        load_prepared(resealed(place))


def test_what_a_seal_does_not_find_is_found_in_the_rows(folder, tmp_path):
    prepared = prepare(config(folder), TOKENIZER)

    def cell(column, value):
        return lambda table: table.assign(**{column: [value, *table[column][1:]]})

    for change, message in [
        (
            lambda table: table.drop(columns="gold"),
            "train.parquet has no column gold .it has example_id, task",
        ),
        (lambda table: table.iloc[:0], "train.parquet has no rows"),
        (
            lambda table: table.assign(gold=1),
            "train.parquet, row 0: gold = 1, expected text",
        ),
        (
            lambda table: table.assign(choices="A"),
            "row 0: choices = 'A', expected a list of texts",
        ),
        (cell("prompt", None), "train.parquet, row 0: prompt = None, expected text"),
        (cell("prompt", " \n"), "train.parquet, row 0: prompt is empty, expected a question"),
        (
            cell("task", "qa"),
            "train.parquet, row 0: task = 'qa', expected one of sst2, mmlu, gsm8k",
        ),
        (
            cell("choices", [" no", None]),
            "train.parquet, row 0: choices = .*None., expected a list of texts",
        ),
        (
            cell("choices", [" no"]),
            r"train.parquet, row 0: choices = \[' no'\], expected \[' negative', ' positive'\]",
        ),
        (lambda table: table.assign(labelled=1), "row 0: labelled = 1, expected true or false"),
        (
            lambda table: table.drop(columns="labelled"),
            "train.parquet has no column labelled",
        ),
        (cell("gold", "2"), "train.parquet, row 0: gold = '2', expected a choice's number, 0 to 1"),
        (
            cell("answer", " yes\nno"),
            r"train.parquet, row 0: answer = ' yes\\nno', expected ' (posi|nega)tive', since",
        ),
        (
            cell("example_id", prepared.train["example_id"][1]),
            "train.parquet, row 1: example_id '.*' is already used by train.parquet, row 0",
        ),
        (
            cell("example_id", prepared.validation["example_id"][0]),
            "validation.parquet, row 0: example_id '.*' is already used by train.parquet, row 0",
        ),
        (
            lambda table: pd.concat(
                [table, prepared.validation.assign(example_id=list("abcdefg"), labelled=True)]
            ),
            "prepared/train.parquet: 7 contents are in validation.parquet too, expected none",
        ),
    ]:
        place = save_prepared(prepared, tmp_path / "prepared")
        change(prepared.train).to_parquet(place / "train.parquet", index=False)
        with pytest.raises(ValueError, match=message) as caught:
            load_prepared(resealed(place))
        assert (
            "01_prepare_data again" in str(caught.value)
            and len(str(caught.value).splitlines()) == 1
        )


def test_damage_is_found(folder, tmp_path):
    prepared = prepare(config(folder), TOKENIZER)
    other = save_prepared(prepare(config(folder, data_seed=1), TOKENIZER), tmp_path / "other")

    def counts(path):
        path.write_text(path.read_text().replace('"available": 9', '"available": 8'))

    with pytest.raises(RecordError, match="manifest.json is missing: run 01_prepare_data again"):
        load_prepared(tmp_path / "nowhere")
    for name, change, message in [
        (
            "train.parquet",
            lambda path: path.write_bytes(b"PAR1 no"),
            "prepared/train.parquet is damaged or from another folder",
        ),
        (
            "train.parquet",
            lambda path: path.unlink(),
            "train.parquet is missing: run 01_prepare_data again",
        ),
        (
            "manifest.json",
            lambda path: path.write_text("{"),
            "manifest.json is damaged: it is not a sealed JSON file",
        ),
        (
            "manifest.json",
            lambda path: path.write_text(json.dumps({"format": 1})),
            "manifest.json was changed after",
        ),
        (
            "manifest.json",
            counts,
            "manifest.json was changed after it was written, or .*: run 01_prepare_data again",
        ),
        (
            "manifest.json",
            lambda path: write_sealed(path, {"format": 1}, "checksums"),
            "not a manifest of format 4",
        ),
        (
            "manifest.json",
            lambda path: write_sealed(path, {"format": 4, "name": "x"}, "checksums"),
            "lacks config_fingerprint, counts",
        ),
        (
            "train.parquet",
            lambda path: shutil.copy(other / path.name, path),
            "train.parquet is damaged or from another folder",
        ),
        (
            "manifest.json",
            lambda path: shutil.copy(other / path.name, path),
            "manifest.json was copied here from the data 'other'",
        ),
    ]:
        place = save_prepared(prepared, tmp_path / "prepared")
        change(place / name)
        with pytest.raises(RecordError, match=message):
            load_prepared(place)
    shutil.rmtree(place)
    with pytest.raises(
        ValueError, match="was copied here from the data 'other': run 01_prepare_data again"
    ):
        load_prepared(shutil.copytree(other, place))


def test_why_prepared_data_is_stale(folder, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    TOKENIZER.save_pretrained(tokenizer)
    now = config(folder, tokenizer=str(tokenizer))
    place = save_prepared(prepare(now, TOKENIZER), tmp_path / "prepared")
    assert why_stale(place, now) == ""
    assert (
        why_stale(
            place,
            config(folder, tokenizer=str(tokenizer), name="renamed", artifacts_dir="elsewhere"),
        )
        == ""
    )
    other = config(folder, tokenizer=str(tokenizer), max_length=99, data_seed=2)
    assert why_stale(place, other) == (
        "config changed (data_seed was 0, is 2, max_length was 512, is 99)"
    )
    assert "manifest.json is missing" in why_stale(tmp_path / "nowhere", now)
    whole = (place / "train.parquet").read_bytes()
    (place / "train.parquet").write_bytes(whole[:-1] + b"x")
    assert "train.parquet is damaged" in why_stale(place, now)
    (place / "train.parquet").unlink()
    assert "train.parquet is missing" in why_stale(place, now)
    (place / "train.parquet").write_bytes(whole)
    table = pd.read_parquet(folder / "mmlu" / "dev.parquet")
    table.iloc[:-1].to_parquet(folder / "mmlu" / "dev.parquet")
    assert why_stale(place, now) == "source changed (mmlu/dev.parquet)"
    (folder / "gsm8k" / "test.parquet").unlink()
    (tokenizer / "tokenizer.json").write_text("{}")
    assert (
        why_stale(place, now)
        == "source changed (gsm8k/test.parquet, mmlu/dev.parquet, tokenizer/tokenizer.json)"
    )


def test_other_code_makes_prepared_data_stale_and_so_does_its_builder(
    folder, tmp_path, monkeypatch
):
    place = save_prepared(prepare(config(folder), TOKENIZER), tmp_path / "prepared")
    assert (
        "kd_utils/data/prepared_data.py" in read_manifest(place)["made_from"]["code"]
        and "kd_utils/demos/toy.py" not in read_manifest(place)["made_from"]["code"]
    )
    changed = {
        **provenance.code_of("01_prepare_data", {"data.prepared_data", "data.drawing"}),
        "kd_utils/data/tasks/mmlu.py": "other",
    }
    monkeypatch.setattr(provenance, "code_of", lambda stem, start: changed)
    assert why_stale(place, config(folder)) == "code changed (kd_utils/data/tasks/mmlu.py)"
    monkeypatch.undo()
    toy = config(folder, build="toy")
    place = save_prepared(prepare(toy, TOKENIZER), tmp_path / "prepared")
    assert {
        "kd_utils/demos/toy.py",
        "kd_utils/demos/toy_models.py",
        "kd_utils/data/prepared_data.py",
    } <= read_manifest(place)["made_from"]["code"].keys()


def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(folder, tmp_path):
    prepared = prepare(config(folder), TOKENIZER)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (
        f".prepared.partial-{dead.pid}",
        f".prepared.partial-{dead.pid}.old-{dead.pid}",
        f".prepared.partial-{os.getppid()}",
        f".other.partial-{dead.pid}",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.parquet").write_bytes(b"half")
    save_prepared(prepared, tmp_path / "prepared")
    assert sorted(path.name for path in tmp_path.glob(".*")) == [
        f".other.partial-{dead.pid}",
        f".prepared.partial-{os.getppid()}",
    ]


def test_a_failed_save_leaves_the_old_data(folder, tmp_path, monkeypatch):
    place = save_prepared(prepare(config(folder), TOKENIZER), tmp_path / "prepared")
    before = load_prepared(place).data_hash
    other = prepare(config(folder, data_seed=1), TOKENIZER)
    monkeypatch.setattr(
        pd.DataFrame, "to_parquet", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save_prepared(other, place)
    assert load_prepared(place).data_hash == before


def test_real_data(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2")
    prepared = prepare(
        config(
            shared / "data",
            sst2_train=300,
            sst2_validation=100,
            mmlu_train=100,
            mmlu_validation=100,
            gsm8k_train=100,
            gsm8k_validation=50,
            max_length=256,
        ),
        tokenizer,
    )
    assert len(prepared.train) == 500 and len(prepared.validation) == 250
    counts = prepared.counts.set_index(["task", "split"])
    shots = few_shot_rows(str(shared / "data"), ["sst2", "mmlu", "gsm8k"])
    require_unseen_shots(few_shot_overlap(shots, prepared.tables))
    assert (
        counts.loc[("mmlu", "validation"), "shots"] > 0
    )  # `dev` questions that stand in `test` too
    # The file's 14,042 questions hold 105 contents twice, in one subject or two.
    assert counts.loc[("mmlu", "validation"), ["available", "duplicates"]].tolist() == [14042, 105]
    assert (counts["max_tokens"] <= 256).all() and counts["too_long"].sum() > 0
