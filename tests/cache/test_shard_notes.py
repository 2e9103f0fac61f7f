"""The sums over training rows in a cache: by-product of one pass, whole or written again."""

from functools import partial

import pandas as pd
import pytest
from tiny import example_rows, tiny_llama, tiny_of_family

from kd_utils.cache.manifest import UNIT_SUMS, CacheError, check_files
from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.cache.verification import verify
from kd_utils.cache.writer import assemble_cache, write_shards
from kd_utils.models.importance.calibration import sums_over
from kd_utils.models.importance.sums import SUMS
from kd_utils.teacher.extraction import TeacherSignals, signal_function, stored_lm_head

ROWS = example_rows([5, 9, 3, 12, 7, 7, 4, 10])
HELD_OUT = [
    type(row)(f"h{row.example_id}", row.tokens, row.answer_start)
    for row in example_rows([6, 8], seed=1)
]
HEADER = {
    "signals": "white_box",
    "heads": 4,
    "dtypes": {"hidden": "float16", "attention": "float16"},
    "hidden_size": 32,
    "temperatures": [],
    "code": {},
}


def write(folder, model, run=None, signals="white_box"):
    run = run or signal_function(model, signals=signals)
    shards = partial(write_shards, folder, signals_of=run, batch_tokens=24, new_sums=run.new_sums)
    examples = {"train": ROWS, "validation": HELD_OUT}
    return assemble_cache(folder, examples, shards, stored_lm_head(model), HEADER, shard_examples=3)


def counting(model, calls, stop_at=0):
    run = signal_function(model, signals="white_box")

    def counted(batch, sums):
        calls.append(([row.example_id for row in batch], sums))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return run(batch, sums)

    return TeacherSignals(model, counted)


def test_the_sums_are_those_of_the_training_rows_from_the_one_pass(tmp_path):
    model, calls = tiny_llama(), []
    write(tmp_path / "c", model, counting(model, calls))
    assert sorted(name for names, _ in calls for name in names) == sorted(
        row.example_id for row in [*ROWS, *HELD_OUT]
    )
    assert {sums is None for names, sums in calls if names[0].startswith("h")} == {True}
    found = TeacherCache(tmp_path / "c").unit_sums()
    pd.testing.assert_frame_equal(found, sums_over(model, ROWS), rtol=1e-4)
    checks = verify(tmp_path / "c").set_index("check")["result"]
    assert checks["importance"] == f"of {len(found) - 1:,} units, from 8 training rows, all finite"


def test_a_teacher_of_another_family_is_cached_without_sums(tmp_path):
    model = tiny_of_family("gpt_neox", num_attention_heads=4, vocab_size=97)
    manifest = write(tmp_path / "c", model)
    assert UNIT_SUMS not in manifest["checksums"]
    cache = TeacherCache(tmp_path / "c")
    assert cache.unit_sums() is None
    assert "importance" not in verify(tmp_path / "c")["check"].tolist()


@pytest.mark.parametrize("damage", ["", "note without sums", "damaged sums"])
def test_a_killed_run_goes_on_to_the_same_sums(tmp_path, damage):
    model = tiny_llama()
    whole = write(tmp_path / "whole", model)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "killed", model, counting(model, [], stop_at=4))
    notes = tmp_path / ".killed.shards"
    [first, *_] = sorted(notes.glob("train-*.sums"))
    if damage == "note without sums":
        first.unlink()
    elif damage:
        first.write_bytes(first.read_bytes()[:-9] + b"x" * 9)
    calls = []
    again = write(tmp_path / "killed", model, counting(model, calls))
    assert again["content_hash"] == whole["content_hash"]
    seen = {name for names, _ in calls for name in names}
    assert ("row2" in seen) == bool(damage)  # of the first shard, which has the shortest rows
    assert not notes.exists()


def test_a_damaged_shard_is_written_again_and_the_sums_are_kept(tmp_path):
    model, calls = tiny_llama(), []
    whole = write(tmp_path / "c", model)
    shard = tmp_path / "c" / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-9] + b"x" * 9)
    again = write(tmp_path / "c", model, counting(model, calls))
    assert again["content_hash"] == whole["content_hash"]
    assert len({name for names, _ in calls for name in names}) == 3


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("x")])
def test_damaged_sums_are_told_and_counted_again(tmp_path, damage):
    model, calls = tiny_llama(), []
    whole = write(tmp_path / "c", model)
    damage(tmp_path / "c" / UNIT_SUMS)
    with pytest.raises(CacheError, match=f"{UNIT_SUMS} is (missing|damaged)"):
        check_files(tmp_path / "c")
    again = write(tmp_path / "c", model, counting(model, calls))
    assert again["content_hash"] == whole["content_hash"]
    assert {name[:3] for names, _ in calls for name in names} == {"row"}


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda sums: sums.assign(sum_0=float("nan")), "values that are not finite"),
        (lambda sums: sums.assign(**{SUMS[3]: sums[SUMS[3]] + 1}), "9 of 8 rows"),
    ],
)
def test_sums_that_cannot_be_are_refused(tmp_path, change, why, monkeypatch):
    write(tmp_path / "c", tiny_llama())
    cache = TeacherCache(tmp_path / "c")
    changed = change(cache.unit_sums())
    monkeypatch.setattr(TeacherCache, "unit_sums", lambda self: changed)
    with pytest.raises(CacheError, match=f"{UNIT_SUMS} has ({why}): delete the cache's folder"):
        verify(tmp_path / "c")


def test_a_record_says_which_rows_the_teacher_answers_right(tmp_path):
    model = tiny_llama()
    examples, run = (
        {"train": ROWS, "validation": HELD_OUT},
        signal_function(model, signals="white_box"),
    )
    shards = partial(write_shards, tmp_path / "c", signals_of=run, batch_tokens=24)
    names = [row.example_id for row in HELD_OUT]
    asked = pd.DataFrame({"example_id": names, "correct": [True, False], "prediction": ["a", "b"]})
    head = stored_lm_head(model)
    options = {"shard_examples": 3, "predictions": asked}
    assemble_cache(tmp_path / "c", examples, shards, head, HEADER, **options)
    cache = TeacherCache(tmp_path / "c")
    students = pd.DataFrame({"example_id": names[::-1], "correct": [True, True]})
    assert cache.with_teacher(students)["teacher_correct"].tolist() == [False, True]
    with pytest.raises(CacheError, match="lacks the teacher's answer to 1 validation rows: run 02"):
        cache.with_teacher(pd.DataFrame({"example_id": ["another", names[0]]}))
    write(tmp_path / "older", model)
    assert TeacherCache(tmp_path / "older").with_teacher(students) is students
