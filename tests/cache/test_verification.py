"""What `verify` finds in a cache whose files are intact, and what training refuses."""

import dataclasses
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from test_teacher_cache import HEADER, write_named
from tiny import example_rows, tiny_llama, tiny_model, tiny_tokenizer

from kd_utils.cache.manifest import CacheError
from kd_utils.cache.verification import (
    check_row,
    open_verified,
    verify,
    what_changed,
    why_not_verified,
)
from kd_utils.cache.writer import assemble_cache, write_shards
from kd_utils.models.attention_maps import encode_map
from kd_utils.models.loading import model_fingerprint, save_model
from kd_utils.teacher.extraction import signal_function, stored_lm_head
from kd_utils.tokens.encoding import Example, tokenizer_files

MODEL = tiny_llama()
RUN = signal_function(MODEL, signals="white_box")


def spoiled(row, **changes):
    """Changes of signals by their name, of anything else as a field."""
    fields = {name: changes.pop(name) for name in ("answer_start", "ends") if name in changes}
    return dataclasses.replace(row, **fields, signals={**row.signals, **changes})


def make(folder, spoil=lambda row: {}, **header):
    def run(batch):
        return [spoiled(row, **spoil(row)) for row in RUN(batch)]

    write = partial(write_shards, folder, signals_of=run, batch_tokens=30)
    header, examples = {**HEADER, **header}, {"train": example_rows([5, 9, 4])}
    assemble_cache(folder, examples, write, stored_lm_head(MODEL), header, shard_examples=2)
    return folder


def table(*ids):
    return {"train": pd.DataFrame({"example_id": ids})}


ALL = table("row0", "row1", "row2")


def test_a_good_cache_passes_and_opens(tmp_path):
    report = verify(make(tmp_path / "c"), table("row0", "row1", "row2"), RUN).set_index("check")[
        "result"
    ]
    assert report["rows, train"] == "3 of 3" and "shapes right, all finite" in report["values"]
    assert report["recomputed"].startswith("3 rows, equal within")
    cache = open_verified(tmp_path / "c", data_hash="d", teacher="m")
    assert len(cache) == 3


def test_what_is_not_verified_does_not_open(tmp_path):
    verify(make(tmp_path / "c"))  # a look without the data and the teacher vouches for too little
    with pytest.raises(CacheError, match="has not been verified"):
        open_verified(tmp_path / "c", data_hash="d", teacher="m")


def test_why_a_cache_is_not_verified_is_what_training_would_say(tmp_path):
    folder = make(tmp_path / "c")
    assert "c has not been verified" in why_not_verified(folder, every_byte=False)
    verify(folder, ALL, RUN)
    shards = sorted(folder.glob("*.parquet"))
    for path in (*shards, folder / "lm_head.safetensors"):
        whole = path.read_bytes()
        for every_byte in (True, False):
            assert why_not_verified(folder, every_byte=every_byte) == ""
        path.write_bytes(whole[:-9] + b"x" * 9)
        assert f"{path.name} is damaged" in why_not_verified(folder, every_byte=True)
        assert why_not_verified(folder, every_byte=False) == ""
        path.unlink()
        assert f"{path.name} is missing" in why_not_verified(folder, every_byte=False)
        path.write_bytes(whole)
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    assert f"{shards[0].name} has " in why_not_verified(folder, every_byte=False)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"data_hash": "other"}, "data changed"),
        ({"teacher": "other"}, r"teacher changed \(name was 'm', is 'other'\)"),
    ],
)
def test_other_data_or_another_teacher_is_refused(tmp_path, given, message):
    verify(make(tmp_path / "c"), ALL, RUN)
    with pytest.raises(CacheError, match=message):
        open_verified(tmp_path / "c", **{"data_hash": "d", "teacher": "m", **given})


def test_every_reason_is_given_at_once(tmp_path):
    code = {**HEADER["code"], "kd_utils/losses.py": "other"}
    verify(make(tmp_path / "c", code=code), ALL, RUN)
    with pytest.raises(
        CacheError,
        match=r"c is stale: data changed \(.*\); teacher changed \(name was 'm', is 'n'\); "
        r"code changed \(kd_utils/losses.py\): run 02 again",
    ):
        open_verified(tmp_path / "c", data_hash="e", teacher="n")


def test_other_code_is_refused_by_name(tmp_path):
    verify(make(tmp_path / "c", code={**HEADER["code"], "kd_utils/losses.py": "other"}), ALL, RUN)
    with pytest.raises(
        CacheError, match=r"c is stale: code changed \(kd_utils/losses.py\): run 02 again"
    ):
        open_verified(tmp_path / "c", data_hash="d", teacher="m")


def test_other_weights_under_the_teachers_name_are_refused(tmp_path):
    tokenizer, base = tiny_tokenizer(begin=False), tmp_path / "teacher"
    save_model(tiny_model(tokenizer), tokenizer, base)
    verify(
        make(
            tmp_path / "c",
            base_teacher=str(base),
            base_fingerprint=model_fingerprint(str(base)),
            tokenizer_files=tokenizer_files(base),
        ),
        ALL,
        RUN,
    )
    about = dict(data_hash="d", teacher=str(base))
    open_verified(tmp_path / "c", **about)
    kept = (base / "tokenizer.json").read_bytes()
    (base / "tokenizer.json").write_bytes(kept + b" ")
    with pytest.raises(
        CacheError, match=r"c is stale: teacher changed \(tokenizer/tokenizer.json\): run 02 again"
    ):
        open_verified(tmp_path / "c", **about)
    (base / "tokenizer.json").write_bytes(kept)
    save_model(tiny_model(tokenizer, seed=1), tokenizer, base)
    with pytest.raises(CacheError, match=r"c is stale: teacher changed \(weights\): run 02 again"):
        open_verified(tmp_path / "c", **about)
    shutil.rmtree(base)  # a node that does not have the teacher trains all the same
    open_verified(tmp_path / "c", **about)


def test_what_changed_is_said_by_name(tmp_path):
    key = {"data": "a", "teacher": "w", "base_teacher": "m", "signals": "white_box", "code": "1"}

    def header(key, **code):
        return {"name": "toy", "key": key, "code": {**HEADER["code"], **code}}

    assert what_changed(tmp_path, header(key)) == ""
    earlier = write_named(tmp_path, "toy", key, MODEL)
    assert what_changed(tmp_path, header(key)) == ""
    now = header(key | {"data": "b", "teacher": "v", "code": "2"}, **{"kd_utils/losses.py": "2"})
    assert what_changed(tmp_path, now) == (
        f"{earlier.name} is stale: inputs changed (data was 'a', is 'b', teacher was 'w', is 'v'); "
        "code changed (kd_utils/losses.py); a new cache is made"
    )
    last = write_named(tmp_path, "toy", {"data": "c"}, MODEL)  # of another config, asked for last
    assert what_changed(tmp_path, header(key)) == "", "it need not be made: it is there"
    (last / "manifest.json").write_text("{")
    assert what_changed(tmp_path, now) == f"{last.name} cannot be used; a new cache is made"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "has not been verified"),
        (
            lambda path: path.write_text("{"),
            "c/verified.json is damaged: it is not a sealed JSON file.*run 02 again",
        ),
        (
            lambda path: path.write_text(path.read_text().replace("within", "WITHIN")),
            "c/verified.json was changed",
        ),
        (
            lambda path: shutil.copy(path.parents[1] / "other" / path.name, path),
            "c/verified.json is from another cache",
        ),
    ],
)
def test_damaged_words_are_not_taken(tmp_path, damage, message):
    verify(make(tmp_path / "c"), ALL, RUN)
    verify(make(tmp_path / "other", hidden_size=32, name="other"), ALL, RUN)
    damage(tmp_path / "c" / "verified.json")
    with pytest.raises(CacheError, match=message):
        open_verified(tmp_path / "c", data_hash="d", teacher="m")
    if "not been" not in message:  # nothing was promised, so nothing is broken
        with pytest.raises(CacheError, match=message):
            verify(tmp_path / "c")


def test_damage_after_verifying_is_refused(tmp_path):
    verify(make(tmp_path / "c"), ALL, RUN)
    shard = tmp_path / "c" / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(CacheError, match="damaged"):
        open_verified(tmp_path / "c", data_hash="d", teacher="m")


def spoiled_attention(row):
    attention = row.signals["attention"].copy()
    attention[1, 2] += 0.1
    return {"attention": attention}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda row: {"hidden": np.full_like(row.signals["hidden"], np.nan)}, "not finite"),
        (
            lambda row: {"hidden": row.signals["hidden"][:, :-1]},
            r"hidden has shape \(4, 31\), expected \(4, 32\)",
        ),
        (spoiled_attention, r"an attention row's sum differs from 1 by 0\.\d{4}"),
        (lambda row: {"answer_start": len(row.tokens)}, "answer starts at"),
        (lambda row: {"ends": np.arange(len(row.tokens) - 1)}, "tokens end are not in order"),
        (
            lambda row: {"ends": np.arange(len(row.tokens))[::-1].copy()},
            "tokens end are not in order",
        ),
    ],
)
def test_wrong_content_is_found(tmp_path, spoil, message):
    with pytest.raises(CacheError, match=f"{message}.* run 02 again$"):
        verify(make(tmp_path / "c", spoil))
    assert not (tmp_path / "c" / "verified.json").exists()


def test_rows_must_cover_the_data(tmp_path):
    with pytest.raises(CacheError, match="covers 3 of 4 train rows and 0"):
        verify(make(tmp_path / "c"), table("row0", "row1", "row2", "row3"))
    with pytest.raises(CacheError, match="covers 2 of 2 train rows and 1 that are not in the data"):
        verify(tmp_path / "c", table("row0", "row1"))


def test_another_teacher_is_found_by_recomputing(tmp_path):
    other = signal_function(tiny_llama(seed=1), signals="white_box")
    verify(make(tmp_path / "c"), ALL, RUN)
    with pytest.raises(CacheError, match="the teacher changed after it was cached"):
        verify(tmp_path / "c", ALL, other)
    with pytest.raises(
        CacheError, match="has not been verified"
    ):  # what failed is not vouched for any more
        open_verified(tmp_path / "c", data_hash="d", teacher="m")


def test_a_teacher_that_now_gives_nan_is_found_by_recomputing(tmp_path):
    def broken(batch):
        [row] = RUN(batch)
        row.signals["hidden"] = np.full_like(row.signals["hidden"], np.nan)
        return [row]

    with pytest.raises(CacheError, match="the teacher changed after it was cached"):
        verify(make(tmp_path / "c"), ALL, broken)


@pytest.mark.parametrize("length", [7, 1024])
def test_a_flat_map_in_uint8_passes_at_any_length_and_a_wrong_one_does_not(length):
    manifest = {"hidden_size": 4, "heads": 2, "dtypes": {"hidden": "float16", "attention": "uint8"}}
    flat = torch.ones(length, length).tril()
    packed = encode_map((flat / flat.sum(-1, keepdim=True)).expand(2, -1, -1), torch.uint8).numpy()
    row = Example(
        "a",
        np.ones(length, np.int32),
        1,
        signals={"hidden": np.zeros((length, 4), np.float16), "attention": packed},
    )
    check_row(manifest, row)
    row.signals["attention"] = packed.copy()
    row.signals["attention"][1, -length:] = 255
    with pytest.raises(CacheError, match="an attention row's sum differs from 1 by"):
        check_row(manifest, row)


def test_advice_for_values_that_are_not_finite_is_not_what_is_done_already():
    """`signals` is top_k where the largest logits are stored."""
    tokens, logits = np.ones(3, np.int32), np.full((3, 2), np.inf, np.float32)
    for kind, dtype, remedy in (
        ("top_logits", "float32", "set precision to 'float32', or choose another teacher,"),
        ("hidden", "float16", "set signals to 'top_k'"),
        ("hidden_1", "float16", "set hidden_layers to other layers"),
    ):
        manifest = {"hidden_size": 2, "top_k": 2, "dtypes": {kind: dtype}}
        row = Example("a", tokens, 1, signals={kind: logits.astype(dtype)})
        with pytest.raises(CacheError, match=f"overflowed {dtype}; {remedy} and run 02 again$"):
            check_row(manifest, row)
