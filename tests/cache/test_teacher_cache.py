"""The cache by round trip, by interruption and by damage."""

import json
import os
import shutil
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import example_rows, tiny_llama

from kd_utils.cache.manifest import (
    CacheError,
    cache_code,
    cache_folder,
    check_files,
    find_cache,
    key_digest,
)
from kd_utils.cache.teacher_cache import TeacherCache, as_table
from kd_utils.cache.writer import assemble_cache, token_batches, write_shards
from kd_utils.models.signals import forward_signals
from kd_utils.speed import meters
from kd_utils.teacher.extraction import signal_function, stored_lm_head

LENGTHS = [5, 9, 3, 12, 7, 7, 4, 10]
HEADER = {
    "signals": "white_box",
    "heads": 4,
    "dtypes": {"hidden": "float16", "attention": "float16"},
    "hidden_size": 32,
    "data_hash": "d",
    "base_teacher": "m",
    "temperatures": [],
    "code": cache_code(),
}


def write(folder, model, *, shard_examples=3, run=None, header=HEADER):
    run = run or signal_function(model, signals="white_box")
    examples = {"train": example_rows(LENGTHS), "validation": example_rows([6, 8], seed=1)}
    for row in examples["validation"]:
        row.example_id = "v" + row.example_id
    shards = partial(write_shards, folder, signals_of=run, batch_tokens=24)
    lm_head = stored_lm_head(model)
    return assemble_cache(folder, examples, shards, lm_head, header, shard_examples=shard_examples)


def write_named(artifacts, name, key, model, day="2026-01-01"):
    """A cache whose folder's name says what its manifest says, as 02 makes them."""
    folder = artifacts / "cache" / f"{name}-{day}-{key_digest(key)}"
    write(folder, model, header={**HEADER, "name": name, "key": key})
    return folder


@pytest.fixture
def cache(tmp_path):
    model = tiny_llama()
    write(tmp_path / "toy-2026-01-01-00000000", model)
    return TeacherCache(tmp_path / "toy-2026-01-01-00000000"), model


def test_round_trip_gives_what_the_teacher_says(cache):
    cache, model = cache
    for row in example_rows(LENGTHS):
        stored = cache[row.example_id]
        with torch.no_grad():
            ids = torch.from_numpy(row.tokens).long()[None]
            signals = forward_signals(model, ids, map_layers=[2])
        assert (
            stored.tokens.tolist() == row.tokens.tolist()
            and stored.answer_start == row.answer_start
        )
        np.testing.assert_allclose(stored.signals["hidden"], signals.hidden[0].numpy(), atol=2e-3)
        rows, columns = np.tril_indices(len(row.tokens))
        maps = signals.attentions[2].map()[0].numpy()[:, rows, columns]
        np.testing.assert_allclose(stored.signals["attention"], maps, atol=1e-3)


def test_logits_come_back_from_hidden_state_and_head(cache):
    cache, model = cache
    stored = cache["row3"]
    with torch.no_grad():
        logits = model(torch.tensor(stored.tokens).long()[None]).logits[0]
    rebuilt = torch.from_numpy(stored.signals["hidden"].astype(np.float32)) @ cache.lm_head().T
    assert torch.equal(cache.lm_head(), model.lm_head.weight)
    torch.testing.assert_close(rebuilt, logits, atol=5e-3, rtol=5e-3)


def test_rows_are_keyed_and_ragged(cache):
    cache, _ = cache
    assert len(cache) == 10 and "row0" in cache.lengths
    assert {i: cache.lengths[i] for i in ("row0", "row3", "vrow1")} == {
        "row0": 5,
        "row3": 12,
        "vrow1": 8,
    }
    assert cache["row3"].signals["attention"].shape == (4, 12 * 13 // 2)
    assert sorted(cache.splits["validation"]) == ["vrow0", "vrow1"]
    with pytest.raises(CacheError, match="no row for example row99"):
        cache["row99"]


def test_top_k_cache_holds_the_exact_rest(tmp_path):
    model, rows = tiny_llama(), example_rows([5, 8])
    run = signal_function(model, signals="top_k", top_k=6, temperatures=[1.0, 2.0])
    header = {
        **HEADER,
        "signals": "top_k",
        "top_k": 6,
        "dtypes": {"top_logits": "float32", "top_ids": "int32", "log_mass": "float32"},
    }
    shards = partial(write_shards, tmp_path / "c", signals_of=run, batch_tokens=99)
    assemble_cache(tmp_path / "c", {"train": rows}, shards, None, header, shard_examples=9)
    stored = TeacherCache(tmp_path / "c")["row1"]
    with torch.no_grad():
        logits = model(torch.from_numpy(rows[1].tokens).long()[None]).logits[0]
    top = torch.from_numpy(stored.signals["top_logits"].copy())
    torch.testing.assert_close(top, logits.topk(6).values, atol=1e-4, rtol=1e-4)
    mass = torch.stack([logits.logsumexp(-1), (logits / 2).logsumexp(-1)], -1)
    torch.testing.assert_close(
        torch.from_numpy(stored.signals["log_mass"].copy()), mass, atol=1e-4, rtol=1e-4
    )
    assert "hidden" not in stored.signals and TeacherCache(tmp_path / "c").lm_head() is None


def find_half(folder):
    """What a finished run must not leave behind."""
    return sorted(path.name for path in folder.rglob(".*"))


def test_a_killed_run_goes_on_and_ends_in_the_same_content(tmp_path):
    model = tiny_llama()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    manifest = write(whole, model)
    run, calls = signal_function(model, signals="white_box"), []

    def dies_at_third(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(batch)

    with pytest.raises(KeyboardInterrupt):
        write(killed, model, run=dies_at_third)
    assert not (killed / "manifest.json").exists() and not list(killed.glob("*.partial*"))
    finished = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.parquet")}
    assert finished and find_half(tmp_path) == [".killed.shards"]
    (killed / ".train-00002.parquet.partial-99999").write_bytes(
        b"half"
    )  # of a process that had no time to clean up
    assert write(killed, model)["content_hash"] == manifest["content_hash"]
    assert not find_half(tmp_path)
    assert {name: (killed / name).stat().st_mtime_ns for name in finished} == finished


def test_a_whole_cache_is_not_computed_again_and_a_damaged_shard_is(cache):
    cache, model = cache

    def never(batch):
        raise AssertionError("the teacher ran again")

    before = write(cache.folder, model, run=never)
    shard = cache.folder / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-9] + b"x" * 9)
    with pytest.raises(CacheError, match="train-00001.parquet is damaged"):
        check_files(cache.folder)
    assert write(cache.folder, model)["content_hash"] == before["content_hash"]
    check_files(cache.folder)


def killed_after(folder, model, shards):
    run, seen = signal_function(model, signals="white_box"), set()

    def dies(batch):
        seen.update(row.example_id for row in batch)
        if len(seen) > 3 * shards:
            raise KeyboardInterrupt
        return run(batch)

    with pytest.raises(KeyboardInterrupt):
        write(folder, model, run=dies)
    return sorted(folder.glob("*.parquet"))


def test_a_shard_that_was_damaged_before_the_run_goes_on_is_written_again(tmp_path):
    """Without a manifest nothing else would tell: the damaged bytes would get a checksum of their
    own.
    """
    model = tiny_llama()
    manifest = write(tmp_path / "whole", model)
    shard, *_ = killed_after(tmp_path / "killed", model, shards=2)
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert write(tmp_path / "killed", model)["content_hash"] == manifest["content_hash"]


def test_a_shard_of_another_cache_is_not_taken_over_by_a_run_that_goes_on(tmp_path):
    model, other = tiny_llama(), tiny_llama(seed=1)  # the same examples, another teacher
    manifest = write(tmp_path / "whole", model)
    foreign = killed_after(tmp_path / "other", other, shards=2)
    folder, notes = tmp_path / "killed", tmp_path / ".killed.shards"
    killed_after(folder, model, shards=2)
    for shard in foreign:
        shutil.copy(shard, folder)
    assert write(folder, model)["content_hash"] == manifest["content_hash"]
    shutil.rmtree(folder)
    shutil.copytree(
        tmp_path / "other", folder
    )  # with its notes: they say that it was made for something else
    shutil.copytree(tmp_path / ".other.shards", notes)
    written = write(folder, model, header={**HEADER, "key": {"teacher": "model"}})
    files = [shard["file"] for shard in manifest["shards"]]
    assert all(written["checksums"][file] == manifest["checksums"][file] for file in files)


def test_a_second_run_on_one_cache_is_refused_and_names_the_first(tmp_path):
    model, folder, refused = tiny_llama(), tmp_path / "toy", []
    run = signal_function(model, signals="white_box")

    def meanwhile(batch):
        with pytest.raises(
            ValueError,
            match=r"^toy is in use by a caching run \(process \d+ on .*: wait for it, or",
        ):
            write(folder, model)
        refused.append(batch)
        return run(batch)

    write(folder, model, run=meanwhile)
    assert refused and not find_half(tmp_path)
    write(folder, model)


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda f: (f / "manifest.json").unlink(),
            r"manifest.json is missing: run 02 again \(whole files are kept\)",
        ),
        (
            lambda f: (f / "manifest.json").write_text("{"),
            "manifest.json is damaged: it is not a sealed JSON file: run 02",
        ),
        (
            lambda f: (f / "manifest.json").write_text(
                (f / "manifest.json").read_text().replace('"heads": 4', '"heads": 5')
            ),
            "was changed after",
        ),
        (lambda f: (f / "lm_head.safetensors").unlink(), "lm_head.safetensors is missing"),
        (lambda f: (f / "train-00000.parquet").write_bytes(b""), "train-00000.parquet is damaged"),
    ],
)
def test_damage_is_found_and_named(cache, damage, message):
    damage(cache[0].folder)
    with pytest.raises(CacheError, match=message):
        check_files(cache[0].folder)


def test_every_flipped_byte_is_found(cache):
    folder, rng = cache[0].folder, np.random.default_rng(0)
    files = [
        folder / "train-00000.parquet",
        folder / "lm_head.safetensors",
        folder / "manifest.json",
    ]
    for number in range(60):
        file = files[number % 3]
        data = bytearray(file.read_bytes())
        place = rng.integers(len(data))
        data[place] ^= 1 << rng.integers(8)
        original = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(CacheError):
            check_files(folder)
        file.write_bytes(original)
    check_files(folder)


def test_find_cache_takes_the_newest_finished_one_of_that_name(tmp_path):
    model = tiny_llama()
    write_named(tmp_path, "toy", {"data": "a"}, model)
    newest = write_named(tmp_path, "toy", {"data": "b"}, model, day="2026-01-02")
    write_named(tmp_path, "toy-big", {"data": "c"}, model, day="2026-01-03")
    (tmp_path / "cache" / "toy-2026-01-04-33333333").mkdir()
    assert find_cache(tmp_path, "toy") == newest
    with pytest.raises(CacheError, match="run notebook 02"):
        find_cache(tmp_path, "other")


def test_a_cache_asked_for_again_is_the_newest(tmp_path):
    model = tiny_llama()
    for data in "aba":
        folder = write_named(tmp_path, "toy", {"data": data}, model)
        assert find_cache(tmp_path, "toy") == folder


def test_a_folder_that_was_renamed_or_filled_with_another_cache_is_refused_by_name(tmp_path):
    model = tiny_llama()
    mine, other = (write_named(tmp_path, "toy", {"data": data}, model) for data in "ab")
    experiment = write_named(tmp_path, "other", {"data": "a"}, model)
    for foreign in (other, experiment):
        renamed = shutil.copytree(foreign, mine, dirs_exist_ok=True)
        ahead = time.time() + 3600  # a copy has its original's time, and the newest is taken
        os.utime(mine / "manifest.json", (ahead, ahead))
        whose = f"{foreign.name[:-20]}-DATE-{foreign.name[-8:]}"
        with pytest.raises(
            CacheError,
            match=f"{mine.name}/manifest.json belongs to the cache {whose} .* run 02 again",
        ):
            find_cache(tmp_path, "toy")
        with pytest.raises(CacheError, match="copied here, or the folder was renamed"):
            check_files(renamed)
        assert (
            write_named(tmp_path, "toy", {"data": "a"}, model) == mine
        )  # 02 again: nothing of it is taken over
        check_files(mine)


def test_the_folder_is_that_of_an_earlier_run_of_the_same_key(tmp_path):
    first = cache_folder(tmp_path, "toy", {"data": "a"})
    earlier = first.with_name(f"toy-2020-01-01-{first.name[-8:]}")
    earlier.mkdir(parents=True)
    assert cache_folder(tmp_path, "toy", {"data": "a"}) == earlier
    assert cache_folder(tmp_path, "toy", {"data": "b"}) != earlier


def test_token_batches_keep_the_budget_and_the_order():
    rows = example_rows([3, 4, 4, 8, 30])
    batches = list(token_batches(rows, 12))
    assert [len(batch) for batch in batches] == [3, 1, 1]
    assert [row.example_id for batch in batches for row in batch] == [
        row.example_id for row in rows
    ]


def test_one_row_is_one_row_group(cache):
    shard = cache[0].folder / "train-00000.parquet"
    assert pq.ParquetFile(shard).num_row_groups == 3


def test_memory_budget_bounds_what_is_kept(cache):
    small = TeacherCache(cache[0].folder, memory_bytes=3000)
    for example_id in small.lengths:
        small[example_id]
    assert 0 < len(small._kept) < len(small)
    np.testing.assert_array_equal(
        small["row3"].signals["hidden"], cache[0]["row3"].signals["hidden"]
    )


def test_manifest_says_where_it_comes_from(cache):
    manifest = json.loads((cache[0].folder / "manifest.json").read_text())
    assert manifest["rows"] == {"train": 8, "validation": 2} and manifest["format"] == 5
    assert {"file", "split", "rows", "tokens", "bytes"} == set(manifest["shards"][0])
    shutil.rmtree(cache[0].folder)


def test_a_row_that_was_written_is_let_go():
    [row] = example_rows([4])
    row.signals["hidden"] = np.zeros((1000, 512), np.float16)  # 1 MB

    def make_many():
        for _ in range(200):
            as_table(row)

    assert meters.peak_mb(make_many) < 50


def test_only_what_is_wanted_is_read(cache):
    opened = TeacherCache(cache[0].folder)
    opened.read_only({"hidden"})
    row = opened["row3"]
    assert "attention" not in row.signals
    np.testing.assert_array_equal(row.signals["hidden"], cache[0]["row3"].signals["hidden"])


def test_rows_that_are_let_go_make_room_for_others(cache):
    hidden = cache[0]["row3"].signals["hidden"].nbytes
    opened = TeacherCache(cache[0].folder, memory_bytes=sum(_sizes(cache[0]["row3"])))
    assert opened["row3"] is opened["row3"]
    opened.read_only({"hidden"})
    assert opened["row3"] is opened["row3"] and opened["row3"].signals["hidden"].nbytes == hidden


def _sizes(row):
    return [value.nbytes for value in (row.tokens, row.ends, *row.signals.values())]


def test_stored_bytes_add_up_to_the_shards(cache):
    cache, _ = cache
    stored = cache.stored_bytes()
    assert set(stored) == {"hidden", "attention", "other"} and min(stored.values()) > 0
    assert sum(stored.values()) == sum(shard["bytes"] for shard in cache.manifest["shards"])


def test_a_clock_that_was_ahead_does_not_decide_which_cache_is_the_newest(tmp_path):
    model = tiny_llama()
    first = write_named(tmp_path, "toy", {"teacher": "a"}, model)
    ahead = time.time() + 7200
    os.utime(first / "manifest.json", (ahead, ahead))
    second = write_named(tmp_path, "toy", {"teacher": "b"}, model)
    assert find_cache(tmp_path, "toy") == second
    assert write_named(tmp_path, "toy", {"teacher": "a"}, model) == first
    assert find_cache(tmp_path, "toy") == first, "asked for last"


def test_a_killed_run_keeps_no_shard_of_other_answers(tmp_path):
    """The teacher may answer a row anew, and then its tokens are others under the same id."""
    model, rows = tiny_llama(), example_rows([5, 6, 9, 12])
    run = signal_function(model, signals="white_box")

    def killed_after_writing(examples, most=9):
        """The rows of the shards that were missing; `most` of them are written."""
        missing = []

        def write_some(shards):
            missing.extend([row.example_id for row in shard.rows] for shard in shards)
            write_shards(tmp_path / "c", shards[:most], run, batch_tokens=24)
            raise KeyboardInterrupt

        about = stored_lm_head(model), HEADER
        with pytest.raises(KeyboardInterrupt):
            assemble_cache(
                tmp_path / "c", {"train": examples}, write_some, *about, shard_examples=2
            )
        return missing

    assert killed_after_writing(rows, most=1) == [["row0", "row1"], ["row2", "row3"]]
    assert killed_after_writing(rows) == [["row2", "row3"]]
    other = replace(rows[0], tokens=np.append(rows[0].tokens[:-1], 3).astype(np.int32))
    assert killed_after_writing([other, *rows[1:]]) == [["row0", "row1"]]
