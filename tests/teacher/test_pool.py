"""The pool of teachers through real Ray: the same cache, whatever dies or fails on the way."""

import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import example_rows, tiny_model, tiny_tokenizer

from kd_utils.cache.writer import assemble_cache, write_shards
from kd_utils.cluster.session import QUIET
from kd_utils.config.parameter_files import notebook_config
from kd_utils.models.loading import load_causal_lm, save_model
from kd_utils.teacher import pool
from kd_utils.teacher.pool import (
    TeacherSignals,
    load_signal_function,
    pool_size,
    shard_writer,
    write_shards_in_pool,
)

EXAMPLES = {
    "train": example_rows([5, 9, 3, 12, 7, 7, 4, 10]),
    "validation": [
        replace(row, example_id=f"v{row.example_id}") for row in example_rows([6, 8], seed=1)
    ],
}
HOW = {"signals": "white_box"}
LIMIT = 16  # batch_tokens: two batches or more in a shard


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = tiny_tokenizer(begin=False)
    save_model(tiny_model(tokenizer), tokenizer, folder)
    return str(folder)


@pytest.fixture(scope="module")
def load(teacher):
    return partial(load_signal_function, teacher, "", "cpu", torch.float32, HOW)


@pytest.fixture(scope="module")
def expected(load, tmp_path_factory):
    """The content hash of the single process's cache."""
    folder = tmp_path_factory.mktemp("single")
    run = load()
    options = {"batch_tokens": LIMIT, "new_sums": run.new_sums}
    return assemble(folder, partial(write_shards, folder, signals_of=run, **options))


@pytest.fixture(scope="module")
def ray():
    os.environ.update(QUIET)
    import ray

    ray.cloudpickle.register_pickle_by_value(
        sys.modules[__name__]
    )  # workers do not find the tests' folder
    scratch = tempfile.mkdtemp(prefix="kd-")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        _temp_dir=scratch,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)


def assemble(folder, write):
    return assemble_cache(folder, EXAMPLES, write, None, HOW, shard_examples=3)["content_hash"]


def in_pool(folder, load):
    return partial(
        write_shards_in_pool, folder, load=load, workers=2, on_gpu=False, batch_tokens=LIMIT
    )


def dies_once(load, folder, mark):
    """The teacher, whose process is killed in the middle of a shard, once; `mark` tells what that
    left behind.
    """
    run = load()

    def signals(batch, sums):
        while batch[0].example_id == "row1" and not mark.exists():  # in its shard's second batch
            if asides := [path.name for path in folder.glob(".train-00001*.partial-*")]:
                mark.write_text(asides[0])
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)
        return run(batch, sums)

    return TeacherSignals(run.model, signals)


def runs_out_of_disk(load):
    run = load()

    def signals(batch, sums):
        if any(
            row.example_id == "vrow1" for row in batch
        ):  # of the last shard: others are whole by then
            raise OSError(28, "No space left on device")
        return run(batch, sums)

    return TeacherSignals(run.model, signals)


def test_a_pool_makes_the_same_cache(ray, teacher, expected, tmp_path):
    config = notebook_config(
        "02_cache_teacher",
        {"teacher": teacher, "workers": 2, "batch_tokens": LIMIT, "device": "cpu"},
    )
    steps = []
    write = shard_writer(
        config,
        tmp_path,
        load_causal_lm(teacher).eval(),
        teacher,
        HOW,
        progress=lambda shards: (steps.append(shard.file) or shard for shard in shards),
    )
    assert assemble(tmp_path, write) == expected
    assert len(steps) == 4 and sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*steps, "importance.parquet", "manifest.json"]
    )


def test_what_a_killed_worker_was_writing_is_written_again(ray, load, expected, tmp_path, capfd):
    folder, mark = tmp_path / "cache", tmp_path / "mark"
    assert assemble(folder, in_pool(folder, partial(dies_once, load, folder, mark))) == expected
    assert mark.read_text().startswith(".train-00001.parquet.partial-") and not list(
        folder.glob(".*")
    )
    assert capfd.readouterr() == ("", ""), (
        "Ray tells of dead workers, with addresses that belong into no record"
    )


def test_an_error_is_one_line_and_whole_shards_stay(ray, load, expected, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        assemble(tmp_path, in_pool(tmp_path, partial(runs_out_of_disk, load)))
    assert str(caught.value).startswith(
        "validation-00000.parquet: OSError: [Errno 28] No space left on device (complete shards"
    )
    assert "\n" not in str(caught.value)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert kept and not {"manifest.json", "validation-00000.parquet"} & kept.keys()
    here = partial(write_shards, tmp_path, signals_of=load(), batch_tokens=LIMIT)
    assert assemble(tmp_path, here) == expected
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept


def test_a_missing_teacher_is_one_line(ray, tmp_path):
    missing = partial(load_signal_function, "artifacts/none", "", "cpu", torch.float32, HOW)
    with pytest.raises(
        RuntimeError,
        match="FileNotFoundError: no model folder artifacts/none.*run 02 again to resume",
    ):
        assemble(tmp_path, in_pool(tmp_path, missing))
    assert not list(tmp_path.glob("*")), "an empty folder goes away with its lock"


def test_more_workers_than_there_are_cores_are_refused(ray, load, tmp_path):
    with pytest.raises(
        ValueError, match="9 workers need one CPU each, but Ray has 2: set workers to 2, or to 1"
    ):
        write_shards_in_pool(tmp_path, [], load, workers=9, on_gpu=False, batch_tokens=LIMIT)


@pytest.mark.parametrize(
    ("workers", "device", "gpus", "size"),
    [
        (0, "cpu", 0, 1),
        (0, "cpu", 4, 1),
        (3, "cpu", 0, 3),
        (0, "cuda", 1, 1),
        (0, "cuda", 4, 4),
        (0, "cuda:1", 4, 1),
        (1, "cuda", 4, 1),
        (2, "cuda", 4, 2),
    ],
)
@pytest.mark.parametrize("address", [None, "local"])
def test_one_worker_for_each_gpu_where_there_are_several(
    monkeypatch, workers, device, gpus, size, address
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(pool, "ray_running", None)  # nobody starts Ray to find that out
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert pool_size(workers, torch.device(device)) == size
    monkeypatch.setenv("RAY_ADDRESS", "none")  # a sweep without Ray
    assert pool_size(workers, torch.device(device)) == (workers or 1)
