"""Any bit of a cache or of prepared data flipped, any file cut, missing or another's: found before
use, and named.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from tiny import example_rows, tiny_llama, tiny_tokenizer, write_task_files

from kd_utils.__main__ import main
from kd_utils.cache.manifest import cache_code, find_cache, key_digest
from kd_utils.cache.verification import open_verified, verify
from kd_utils.cache.writer import assemble_cache, write_shards
from kd_utils.config.stages import DataConfig
from kd_utils.data.drawing import prepare
from kd_utils.data.prepared_data import load_prepared, save_prepared
from kd_utils.teacher.extraction import signal_function, stored_lm_head
from kd_utils.tokens.vocabulary import Vocabulary


def make_cache(artifacts: Path, seed: int) -> Path:
    """A cache of two shards; another seed is another teacher and other examples of the same
    lengths.
    """
    model, key = tiny_llama(seed=seed), {"data": str(seed)}
    run = signal_function(model, signals="white_box")
    examples = {
        "train": [
            replace(row, example_id=f"{row.example_id}of{seed}")
            for row in example_rows([5, 9, 3, 12], seed=seed)
        ]
    }
    header = {
        "name": "toy",
        "key": key,
        "signals": "white_box",
        "heads": 4,
        "hidden_size": 32,
        "temperatures": [],
        "dtypes": {"hidden": "float16", "attention": "float16"},
        "data_hash": str(seed),
        "base_teacher": "m",
        "teacher_accuracy": {"macro": 0.9523809523809523, "sst2": 1e-05},
        "code": cache_code(),
    }
    folder = artifacts / "cache" / f"toy-2026-01-01-{key_digest(key)}"
    assemble_cache(
        folder,
        examples,
        partial(write_shards, folder, signals_of=run, batch_tokens=64),
        stored_lm_head(model),
        header,
        shard_examples=2,
        vocabulary=Vocabulary([b"piece %d of %d" % (i, seed) for i in range(97)], ["piece"] * 97),
    )
    verify(
        folder,
        {"train": pd.DataFrame({"example_id": [row.example_id for row in examples["train"]]})},
        run,
    )
    return folder


def make_data(folder: Path, seed: int) -> Path:
    raw = write_task_files(folder.parent / "raw")
    config = DataConfig(
        name=folder.name,
        artifacts_dir="artifacts",
        build="none",
        data_dir=str(raw),
        max_length=512,
        tokenizer="a/hub-model",
        data_seed=seed,
        train_rows="mmlu:2",
        held_out_rows=1,
        validation_rows="sst2:2 mmlu:2 gsm8k:1",
    )
    return save_prepared(prepare(config, tiny_tokenizer(begin=False)), folder)


def open_cache(folder: Path) -> None:
    """As 03 does."""
    seed = folder.parents[1].name
    found = find_cache(folder.parents[1], "toy")
    cache = open_verified(found, data_hash=seed, teacher="m")
    cache.lm_head()
    cache.vocabulary()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> list[tuple[Path, Path, Callable[[Path], object]]]:
    """A cache and prepared data, each with another of its kind and with what opens it."""
    home = tmp_path_factory.mktemp("home")
    caches = [make_cache(home / str(seed), seed) for seed in (0, 1)]
    data = [make_data(home / str(seed) / "data" / "toy", seed) for seed in (0, 1)]
    return [(*caches, open_cache), (*data, load_prepared)]


def files(places) -> list[tuple[Path, Path, Callable[[], object]]]:
    """Each file, its counterpart in the other folder, and what opens the folder."""
    found = []
    for folder, other, opens in places:
        opens(folder)
        found += [
            (path, other / path.name, lambda folder=folder, opens=opens: opens(folder))
            for path in sorted(folder.iterdir())
        ]
    assert [path.name for path, _, _ in found] == [
        "lm_head.safetensors",
        "manifest.json",
        "train-00000.parquet",
        "train-00001.parquet",
        "verified.json",
        "vocabulary.parquet",
        "held_out.parquet",
        "manifest.json",
        "train.parquet",
        "validation.parquet",
    ]
    return found


def require_found(path: Path, data: bytes | None, opens: Callable[[], object], what: str) -> None:
    """Put `data` (None: nothing) into a file: opening must fail in one line that names it and says
    what to do.
    """
    whole = path.read_bytes()
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    try:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            opens()
            pytest.fail(f"{path.name}, {what}: not found")
    finally:
        path.write_bytes(whole)
    message = str(caught.value)
    # Without its manifest a folder is no cache, and without its verification none that was
    # verified.
    nameless = (
        data is None
        and path.name in ("manifest.json", "verified.json")
        and path.parent.parent.name == "cache"
    )
    assert nameless or path.name in message, f"{path.name}, {what}: {message}"
    assert len(message.splitlines()) == 1 and re.search("run (notebook )?0[12]", message), message


def says_the_same(path: Path, data: bytes) -> bool:
    """Whether JSON was only written another way: 1E-05 for 1e-05, no line break at its end."""
    if path.suffix == ".json":
        with suppress(ValueError):
            return json.loads(data) == json.loads(path.read_bytes())
    return False


def test_every_flipped_bit_is_found_before_use(places, times, tried):
    rng, all_files = random.Random(0), files(places)
    for number in range(times(200, 2000)):
        path, _, opens = all_files[number % len(all_files)]
        data = bytearray(path.read_bytes())
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        data[place] ^= 1 << bit
        if not says_the_same(path, bytes(data)):
            require_found(path, bytes(data), opens, f"byte {place}, bit {bit}")
    for _, _, opens in all_files:
        opens()
    tried("byte of cache or prepared data flipped", number + 1)


def test_a_number_written_another_way_is_the_same_and_another_number_is_found(places, tried):
    """0.95238095238095231 and 1E-05 are read as the very numbers that were written."""
    for path, _, opens in files(places):
        if path.name == "manifest.json" and "cache" in path.parts:
            whole = path.read_bytes()
            for old, same, other in (
                (b"0.9523809523809523", b"0.95238095238095231", b"0.9523809523809524"),
                (b"1e-05", b"1E-05", b"1e-06"),
                (b"{", b"{ ", b"{{"),
            ):
                assert old in whole
                path.write_bytes(whole.replace(old, same, 1))
                opens()
                path.write_bytes(whole)
                require_found(path, whole.replace(old, other, 1), opens, other.decode())
                tried("byte of cache or prepared data flipped", 1)


def test_a_cut_missing_or_foreign_file_is_found_before_use(places, times, tried):
    rng, count = random.Random(0), 0
    for path, counterpart, opens in files(places):
        size = path.stat().st_size
        for length in [0, 1, size - 2, *(rng.randrange(size) for _ in range(times(3, 100)))]:
            require_found(path, path.read_bytes()[:length], opens, f"cut to {length} of {size}")
            count += 1
        require_found(path, path.read_bytes() + b"\0", opens, "one byte more")
        require_found(path, None, opens, "missing")
        assert counterpart.read_bytes() != path.read_bytes()
        require_found(path, counterpart.read_bytes(), opens, "another's")
        count += 3
    tried("file of cache or prepared data truncated, missing or foreign", count)


def test_a_whole_folder_of_another_is_found_before_use(places, tmp_path, tried):
    (cache, other_cache, _), (data, _, _) = places
    copied = tmp_path / "0" / "cache" / cache.name
    shutil.copytree(other_cache, copied)
    with pytest.raises(
        ValueError,
        match=f"{cache.name}/manifest.json belongs to the cache toy-DATE-{other_cache.name[-8:]}",
    ):
        open_cache(copied)
    with pytest.raises(ValueError, match="other/manifest.json was copied here from the data 'toy'"):
        load_prepared(shutil.copytree(data, tmp_path / "other"))
    tried("file of cache or prepared data truncated, missing or foreign", 2)


def test_the_command_line_says_so_with_status_1(places, capsys, tried):
    cache, other, _ = places[0]
    assert main(["verify", str(cache)]) == 0
    count = 0
    for path in sorted(cache.iterdir()):
        whole = path.read_bytes()
        for change in (
            lambda: path.write_bytes(whole[:-2]),
            lambda: path.write_bytes(whole.replace(b"e", b"f", 1)),
            lambda: shutil.copy(other / path.name, path),
        ):
            change()
            capsys.readouterr()
            status = main(["verify", str(cache)])
            shown = capsys.readouterr()
            path.write_bytes(whole)
            assert (
                status == 1
                and shown.out == ""
                and shown.err.count("\n") == 1
                and path.name in shown.err
            ), shown
            count += 1
    tried("file of cache or prepared data truncated, missing or foreign", count)


def test_the_real_command_too(places):
    cache, _, _ = places[0]
    shard = cache / "train-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    done = subprocess.run(
        [sys.executable, "-m", "kd_utils", "verify", str(cache)], capture_output=True, text=True
    )
    shard.write_bytes(whole)
    assert (
        done.returncode == 1
        and done.stdout == ""
        and shard.name in done.stderr
        and "Traceback" not in done.stderr
    )
