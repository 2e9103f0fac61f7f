"""The yardsticks: bytes as they are on disk, entropy, floors."""

import numpy as np
import pytest
from tiny import tiny_llama

from kd_utils.cache.writer import write_cache
from kd_utils.config.parameter_files import load_parameters, notebook_config
from kd_utils.speed import floors, measuring
from kd_utils.teacher.extraction import signal_function, stored_lm_head


def test_entropy_is_that_of_the_byte_planes():
    assert floors.entropy_bits([np.zeros(8, np.float16)]) == 0
    assert floors.entropy_bits([np.arange(256, dtype=np.uint8)]) == pytest.approx(8)
    assert floors.entropy_bits(
        [np.arange(4, dtype=np.uint16), np.arange(4, dtype=np.uint16) + 256]
    ) == pytest.approx(3)


def test_cache_bytes_of_the_sample_itself_are_its_files(tmp_path):
    teacher, rows = tiny_llama(vocab=50), measuring.random_rows(28, 50)
    teacher.config.max_position_embeddings = 512
    write_cache(
        tmp_path,
        {"train": rows},
        signal_function(teacher, signals="white_box"),
        stored_lm_head(teacher),
        floors.header(teacher, "float16"),
        shard_examples=9,
        batch_tokens=2000,
    )
    sizes = floors.cache_bytes(tmp_path, 28, 512)
    on_disk = sum(
        path.stat().st_size for path in tmp_path.iterdir() if path.name != "manifest.json"
    )
    assert sizes["bytes"] * 1e9 == pytest.approx(on_disk, rel=1e-6)
    assert sizes["naive"] * 1e9 == 2 * 28 * 512 * (50 + 32 + 4 * 512)
    assert sizes["entropy"] < sizes["bytes"]


def test_floors_say_what_is_missed():
    table = floors.against_floors(
        {"data_wait_share": 0.06, "speedup_vs_naive": 16.0, "other": 1.0},
        {"data_wait_share": 0.0, "speedup_vs_naive": 40.0},
    )
    assert table["met"].tolist() == [False, True] and table["margin"].tolist() == [
        pytest.approx(0.5),
        2.0,
    ]
    assert table["limit"].tolist() == [0.0, 40.0]


def test_the_bench_file_is_for_a_gpu_and_builds():
    config = notebook_config(
        "05_measure_speed", load_parameters("papermill_params/bench-llama2.yaml")
    )
    assert config.shapes == "llama2" and config.sweep_trials == 0
