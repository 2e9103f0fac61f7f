"""Caches, teachers, prepared data and the embedded toy, whose making is killed anywhere or finds
the disk full.

Run as a program, this file makes one of them in a folder, or kills the making of it at every step
(`kill_points`).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a program too: tiny.py

from disk import full_at_every_size, run_on_small_disk, run_with_file_limit
from kill_points import survives
from tiny import example_rows, tiny_llama, tiny_model, tiny_tokenizer, write_task_files

NAME = "tiny-2026-01-01"
Part = tuple[Callable[[], None], Callable[[], None], Callable[[], None]]  # begin, action, look


def cache(work: Path) -> Part:
    """A cache of two shards with its head, manifest and verification."""
    import pandas as pd

    from kd_utils.cache.manifest import CacheError, cache_code, key_digest
    from kd_utils.cache.verification import open_verified, verify
    from kd_utils.cache.writer import assemble_cache, write_shards
    from kd_utils.teacher.extraction import signal_function, stored_lm_head
    from kd_utils.tokens.vocabulary import Vocabulary

    model, key = tiny_llama(layers=1), {"data": "d"}
    run = signal_function(model, signals="white_box")
    header = {
        "name": "tiny",
        "key": key,
        "signals": "white_box",
        "heads": 4,
        "hidden_size": 32,
        "data_hash": "d",
        "dtypes": {"hidden": "float16", "attention": "float16"},
        "base_teacher": "m",
        "temperatures": [],
        "code": cache_code(),
    }
    folder = work / "cache" / f"{NAME}-{key_digest(key)}"
    examples = {
        "train": example_rows([5, 40]),
        "validation": [
            replace(row, example_id=f"v{row.example_id}") for row in example_rows([6], seed=1)
        ],
    }
    data = {
        split: pd.DataFrame({"example_id": [row.example_id for row in rows]})
        for split, rows in examples.items()
    }

    def action() -> None:
        assemble_cache(
            folder,
            examples,
            partial(write_shards, folder, signals_of=run, batch_tokens=64),
            stored_lm_head(model),
            header,
            shard_examples=2,
            vocabulary=Vocabulary([b"a", b"b"], ["piece", "piece"]),
            answers=pd.DataFrame({"example_id": ["row0", "row1"], "answer": ["a", "b"]}),
        )
        verify(folder, data, run)

    def look() -> None:
        try:  # what can be opened is whole
            opened = open_verified(folder, data_hash="d", teacher="m")
            assert len([opened[example_id] for example_id in opened.lengths]) == 3
            assert opened.answers()["answer"].tolist() == ["a", "b"]
        except CacheError as error:
            assert "run 02 again" in str(error)

    return lambda: None, action, look


def damaged_cache(work: Path) -> Part:
    """As `cache`, where a whole one stands that has a damaged shard: it is repaired."""
    begin, action, look = cache(work)

    def spoil() -> None:
        action()
        [shard] = work.glob("cache/*/train-00000.parquet")
        shard.write_bytes(shard.read_bytes()[:-1] + b"X")

    return spoil, action, look


def teacher(work: Path) -> Part:
    """A teacher, fine-tuned; an old one with a damaged file is there."""
    import pandas as pd

    from kd_utils.config.parameter_files import notebook_config
    from kd_utils.models.loading import load_causal_lm, save_model
    from kd_utils.teacher.preparation import prepare_teacher
    from kd_utils.tokens.encoding import encode_table

    tokenizer = tiny_tokenizer(begin=False)
    base = work.with_name("base")
    if not base.exists():
        save_model(tiny_model(tokenizer), tokenizer, base)
    config = notebook_config(
        "02_cache_teacher",
        {
            "name": "tiny",
            "artifacts_dir": str(work),
            "teacher": str(base),
            "teacher_epochs": 1,
            "teacher_batch_size": 2,
            "device": "cpu",
        },
    )
    rows = encode_table(
        tokenizer,
        pd.DataFrame(
            {"example_id": ["a", "b"], "prompt": ["Tom has 12", "buys 30"], "answer": [" 42", " 7"]}
        ),
    )
    load_causal_lm(str(base))  # what is imported late is imported before the forks

    def action() -> None:
        prepare_teacher(config, rows, "data")

    action()
    [weights] = work.glob("teachers/tiny-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"X")
    return from_here(work), action, lambda: None  # it is looked at by `prepare_teacher` alone


def prepared(work: Path) -> Part:
    """Prepared data over older data of another seed."""
    from kd_utils.config.stages import DataConfig
    from kd_utils.data.drawing import prepare
    from kd_utils.data.prepared_data import load_prepared, save_prepared

    raw, tokenizer = work.with_name("raw"), tiny_tokenizer(begin=False)
    write_task_files(raw)
    values = dict(
        name="tiny",
        artifacts_dir=str(work),
        build="none",
        data_dir=str(raw),
        tokenizer="a/hub-model",
        max_length=512,
        train_rows="mmlu:2",
        held_out_rows=1,
        validation_rows="sst2:2 mmlu:2 gsm8k:1",
    )
    old, new = (prepare(DataConfig(**values, data_seed=seed), tokenizer) for seed in (1, 0))
    assert old.data_hash != new.data_hash

    def look() -> None:
        try:
            assert load_prepared(work / "tiny").data_hash in (old.data_hash, new.data_hash)
        except (FileNotFoundError, ValueError) as error:
            assert "run 01_prepare_data" in str(error)

    return (
        partial(save_prepared, old, work / "tiny"),
        partial(save_prepared, new, work / "tiny"),
        look,
    )


def toy(work: Path) -> Part:
    """The embedded toy over one of another seed; its models are hardly trained."""
    from transformers.utils.logging import disable_progress_bar

    from kd_utils.demos import toy, toy_models

    toy_models.PRETRAINING_ROWS = dict.fromkeys(toy_models.PRETRAINING_ROWS, 20)
    toy_models.PRETRAINING["epochs"] = 1
    toy.ROWS = dict.fromkeys(toy.ROWS, 40)
    toy_models.TEACHER = toy_models.STUDENT = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4
    )
    disable_progress_bar()
    toy_models.build(work / "toy", seed=2)
    return from_here(work), partial(toy_models.build, work / "toy", seed=1), lambda: None


def from_here(work: Path) -> Callable[[], None]:
    """What puts into `work` what is there now."""
    begin = work.with_name("begin")
    work.rename(begin)
    return lambda: shutil.copytree(begin, work, dirs_exist_ok=True)


PARTS = {part.__name__: part for part in (cache, damaged_cache, teacher, prepared, toy)}


def main(how: str, name: str, folder: str, options: str = "{}") -> None:
    """`make NAME FOLDER` makes it, or says in one line why not; `kill` and `fill` print what the
    tests look at.
    """
    import torch

    torch.set_num_threads(1)
    work = Path(folder) / "work"
    begin, action, look = PARTS[name](work)
    if how == "kill":
        print(json.dumps(survives(work, begin, action, look, **json.loads(options))))
    elif how == "fill":
        print(json.dumps(full_at_every_size(work, begin, action, look, **json.loads(options))))
    else:
        try:
            action()
        except Exception as error:
            sys.exit(f"{type(error).__name__}: {error}")


def program(*arguments: Any) -> list[str]:
    return [sys.executable, __file__, *map(str, arguments)]


@pytest.mark.parametrize(
    "name, every, moments",
    [
        ("cache", True, 3),
        ("damaged_cache", False, 1),
        ("prepared", True, 3),
        ("teacher", False, 1),
        ("toy", False, 1),
    ],
)
def test_what_is_killed_ends_in_the_very_files_of_an_undisturbed_run(
    tmp_path, times, tried, name, every, moments
):
    options = {
        "every": bool(times(every, True)),
        "sample": 2,
        "moments": times(moments, 20 * moments),
    }
    done = subprocess.run(
        program("kill", name, tmp_path, json.dumps(options)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= (result["steps"] if options["every"] else 8)
    tried("kill -9 while caching, between writes", result["kills"])


@pytest.mark.parametrize("name", ["cache", "damaged_cache", "prepared", "teacher", "toy"])
def test_a_full_disk_is_named_and_leaves_nothing_half(tmp_path, times, tried, name):
    disk, options = tmp_path / "disk", {"most": times(12 if name == "cache" else 4, 60)}
    done = run_on_small_disk(program("fill", name, disk, json.dumps(options)), disk, 64 * 2**20)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) >= (8 if name == "cache" else 2)
    for error in errors:
        assert re.fullmatch(
            r"OSError: \[Errno 28\] no space left on device while writing \S+: make room and run the "
            r"same command again, finished files are kept",
            error,
        ), error
    tried("disk full while caching", len(errors))


def test_a_file_that_cannot_grow_is_named_too(tmp_path, tried):
    done = run_with_file_limit(program("make", "cache", tmp_path), 10_000)
    assert done.returncode == 1 and re.fullmatch(
        r"OSError: \[Errno 27\] file too large while writing \S+: make room and run .*\n",
        done.stderr,
    ), done.stderr
    assert not [
        path.name
        for path in tmp_path.rglob("*")
        if "partial" in path.name or path.name == "manifest.json"
    ]
    tried("disk full while caching", 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
