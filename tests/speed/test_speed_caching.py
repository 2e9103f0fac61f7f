"""Sizes of a cache: bytes as they are on disk, and entropy."""

import numpy as np
import pytest
from tiny import tiny_llama

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.speed import caching, workload


def test_entropy_is_that_of_the_byte_planes():
    assert caching.entropy_bits([np.zeros(8, np.float16)]) == 0
    assert caching.entropy_bits([np.arange(256, dtype=np.uint8)]) == pytest.approx(8)
    low = np.arange(4, dtype=np.uint16)
    assert caching.entropy_bits([low, low + 256]) == pytest.approx(3)


@pytest.mark.parametrize("attention_dtype", ["float16", "uint8"])
def test_cache_bytes_of_the_sample_itself_are_its_files(tmp_path, attention_dtype):
    teacher, rows = tiny_llama(vocab=50), workload.random_rows(28, 50)
    teacher.config.max_position_embeddings = 512
    caching.write_sample(
        tmp_path, rows, teacher, batch_tokens=2000, attention_dtype=attention_dtype
    )
    assert TeacherCache(tmp_path)[rows[0].example_id].signals["attention"].dtype == attention_dtype
    sizes = caching.cache_gigabytes(tmp_path, 28, 512)
    on_disk = sum(
        path.stat().st_size for path in tmp_path.iterdir() if path.name != "manifest.json"
    )
    assert sizes["bytes"] * 1e9 == pytest.approx(on_disk, rel=1e-6)
    assert sizes["naive"] * 1e9 == 2 * 28 * 512 * (50 + 32 + 4 * 512)
    assert sizes["entropy"] < sizes["bytes"]


def test_the_bare_forward_sees_every_row_once():
    teacher, rows = tiny_llama(), workload.random_rows(7, 97)
    teacher.config.max_position_embeddings = 512
    seen = []
    teacher.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    caching.bare_forward(teacher, sorted(rows, key=lambda row: len(row.tokens)), 600)
    assert sum(count for count, _ in seen) == 7
    assert all(count * length <= 600 for count, length in seen)
