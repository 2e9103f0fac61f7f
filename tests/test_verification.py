"""What `verify` finds in a cache whose files are intact, and what training refuses."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from test_cache import HEADER
from tiny import example_rows, tiny_llama

from kd_utils.cache import CachedExample, CacheError
from kd_utils.cache_writer import write_cache
from kd_utils.signals import encode_map
from kd_utils.teacher import signal_function, stored_lm_head
from kd_utils.verification import _check_row, open_verified, verify

MODEL = tiny_llama()
RUN = signal_function(MODEL, signals="white_box")


def make(folder, spoil=lambda row: {}):
    def run(batch):
        return [dataclasses.replace(row, **spoil(row)) for row in RUN(batch)]

    write_cache(folder, {"train": example_rows([5, 9, 4])}, run, stored_lm_head(MODEL), HEADER, shard_examples=2,
                batch_tokens=30)
    return folder


def table(*ids):
    return {"train": pd.DataFrame({"example_id": ids})}


ALL = table("row0", "row1", "row2")


def test_a_good_cache_passes_and_opens(tmp_path):
    report = verify(make(tmp_path / "c"), table("row0", "row1", "row2"), RUN).set_index("check")["result"]
    assert report["rows, train"] == "3 of 3" and "shapes right, all finite" in report["values"]
    assert report["recomputed"].startswith("3 rows, equal within")
    cache = open_verified(tmp_path / "c", data_hash="d", tokenizer_fingerprint="t", teacher="m")
    assert len(cache) == 3


def test_what_is_not_verified_does_not_open(tmp_path):
    verify(make(tmp_path / "c"))  # a look without the data and the teacher vouches for too little
    with pytest.raises(CacheError, match="has not been verified"):
        open_verified(tmp_path / "c", data_hash="d", tokenizer_fingerprint="t", teacher="m")


@pytest.mark.parametrize("given, message", [({"data_hash": "other"}, "made for other data"),
                                            ({"tokenizer_fingerprint": "other"}, "another tokenizer"),
                                            ({"teacher": "other"}, "made from teacher m, not other")])
def test_other_data_or_tokenizer_is_refused(tmp_path, given, message):
    verify(make(tmp_path / "c"), ALL, RUN)
    with pytest.raises(CacheError, match=message):
        open_verified(tmp_path / "c", **{"data_hash": "d", "tokenizer_fingerprint": "t", "teacher": "m", **given})


def test_damage_after_verifying_is_refused(tmp_path):
    verify(make(tmp_path / "c"), ALL, RUN)
    shard = tmp_path / "c" / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(CacheError, match="damaged"):
        open_verified(tmp_path / "c", data_hash="d", tokenizer_fingerprint="t", teacher="m")


def spoiled_attention(row):
    attention = row.attention.copy()
    attention[1, 2] += 0.1
    return {"attention": attention}


@pytest.mark.parametrize("spoil, message", [
    (lambda row: {"hidden": np.full_like(row.hidden, np.nan)}, "not finite"),
    (lambda row: {"hidden": row.hidden[:, :-1]}, r"hidden has shape \(4, 31\), expected \(4, 32\)"),
    (spoiled_attention, "attention row sums to"),
    (lambda row: {"answer_start": len(row.tokens)}, "answer starts at"),
])
def test_wrong_content_is_found(tmp_path, spoil, message):
    with pytest.raises(CacheError, match=message):
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
    with pytest.raises(CacheError, match="the teacher is not the one that was cached"):
        verify(tmp_path / "c", ALL, other)
    with pytest.raises(CacheError, match="has not been verified"):  # what failed is not vouched for any more
        open_verified(tmp_path / "c", data_hash="d", tokenizer_fingerprint="t", teacher="m")


@pytest.mark.parametrize("length", [7, 1024])
def test_a_flat_map_in_uint8_passes_at_any_length_and_a_wrong_one_does_not(length):
    manifest = {"signals": "white_box", "hidden_size": 4, "heads": 2}
    flat = torch.ones(length, length).tril()
    packed = encode_map((flat / flat.sum(-1, keepdim=True)).expand(2, -1, -1), torch.uint8).numpy()
    row = CachedExample("a", np.ones(length, np.int32), 1, np.zeros((length, 4), np.float16), packed)
    _check_row(manifest, row)
    row.attention = packed.copy()
    row.attention[1, -length:] = 255
    with pytest.raises(CacheError, match="an attention row sums to"):
        _check_row(manifest, row)
