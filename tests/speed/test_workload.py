"""Rows have the lengths of the real data, multiply-adds are counted right, and so is a cache's size:
bytes as they are on disk, and entropy.
"""

import numpy as np
import pytest
from tiny import tiny_llama

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config.parameter_files import notebook_config
from kd_utils.cost import work
from kd_utils.speed import step, workload


def test_the_length_mix_is_that_of_the_real_rows(shared):
    from kd_utils.data.drawing import prepare
    from kd_utils.models.loading import load_tokenizer
    from kd_utils.tokens.encoding import encode_example

    tokenizer = load_tokenizer(str(shared / "tokenizers/llama2"))
    few = {
        "train_rows": "sst2:1000 mmlu:200 gsm8k:200",
        "validation_rows": "sst2:1 mmlu:1 gsm8k:1",
        "max_length": 512,
        "data_dir": str(shared / "data"),
        "build": "none",
    }
    train = prepare(notebook_config("01_prepare_data", few), tokenizer).train
    made = workload.random_rows(1400, 100)
    for task, rows in train.groupby("task"):
        real = [
            tuple(map(len, encode_example(tokenizer, *pair)))
            for pair in zip(rows["prompt"], rows["answer"], strict=True)
        ]
        drawn = [row for row in made if row.example_id.startswith(task)]
        assert len(drawn) == len(real)
        assert np.mean([len(row.tokens) for row in drawn]) == pytest.approx(
            np.mean([p + a for p, a in real]), rel=0.08
        )
        answers = [len(row.tokens) - row.answer_start for row in drawn]
        assert np.mean(answers) == pytest.approx(np.mean([a for _, a in real]), rel=0.08)


def test_random_rows_are_of_one_mix_at_every_size():
    few, many = (workload.random_rows(count, 50, seed=seed) for count, seed in ((70, 0), (700, 1)))
    assert len(few) == 70 and len(many) == 700 and len({row.example_id for row in many}) == 700
    assert sum(len(row.tokens) for row in many) == pytest.approx(
        10 * sum(len(row.tokens) for row in few), rel=0.02
    )
    assert all(0 < row.answer_start < len(row.tokens) and row.tokens.max() < 50 for row in few)


def test_small_has_tinyllamas_proportions():
    for pair in (workload.SHAPES["small"], workload.SHAPES["llama2"]):
        student, teacher = pair["student"], pair["teacher"]
        assert (
            teacher["hidden_size"] == 2 * student["hidden_size"]
            and student["num_attention_heads"] == 32
        )
        whole = (
            work.forward_multiply_adds(student, [1])
            + student["hidden_size"] * student["vocab_size"]
        )
        assert student["hidden_size"] * student["vocab_size"] / whole == pytest.approx(
            0.06, abs=0.005
        )


def test_multiply_adds_by_hand():
    shape = dict(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=10,
    )
    layer = (
        4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6
    )  # queries; keys and values of one head; output; feed-forward
    assert work.forward_multiply_adds(shape, [3]) == 2 * (3 * layer + 2 * 4 * 6)
    task = work.multiply_adds(shape, shape, [(3, 1)], ("task",))
    assert task == 3 * (2 * (3 * layer + 2 * 4 * 6) + 40)
    assert work.multiply_adds(shape, shape, [(3, 1)], ("task", "kd")) - task == 3 * (3 * 40 + 40)
    assert (
        work.multiply_adds(shape, shape, [(3, 1)], ("task", "hidden", "attention")) - task
        == 3 * 16 * 3 + 3 * 4 * 6
    )
    padded = work.multiply_adds(shape, shape, [(3, 1)], ("task", "kd"), padded_to=8)
    assert padded == 3 * (2 * (8 * layer + 2 * 4 * 64) + 40 * 8)


def test_parts_of_a_step_by_hand():
    sizes = dict(hidden_size=4, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    student = dict(**sizes, intermediate_size=6, vocab_size=10)
    teacher = dict(**sizes | {"hidden_size": 8}, intermediate_size=12, vocab_size=10)
    body, head, teachers_head, projector = 2 * (16 + 2 * 8 + 16 + 72), 40, 80, 32
    assert workload.matrices(student) == {"body": body, "head": head}
    sides, terms = (student, teacher, [(3, 1), (2, 1)]), ("task", "kd", "hidden", "attention")
    parts = workload.part_multiply_adds(*sides, terms)
    tokens, predicted, pairs = 5, 2, 6 + 3
    forward = 5 * body + 2 * 2 * 4 * pairs + predicted * head + tokens * projector
    assert sum(parts[part] for part in ("body", "task", "hidden")) == forward
    assert parts["backward"] == 2 * forward and parts["attention"] == 3 * 4 * pairs
    assert parts["kd"] == tokens * (3 * head + teachers_head)
    assert work.multiply_adds(*sides, terms) == sum(parts.values())
    moved = workload.part_bytes(*sides, steps=7)
    trained = body + 2 * head + projector  # with the embeddings
    assert moved["clip and step"] == 7 * 40 * trained
    assert moved["backward"] == 7 * 4 * (body + head + projector + trained)
    assert moved["hidden"] == 7 * 4 * projector + 2 * 8 * tokens
    assert moved["attention"] == 2 * 2 * pairs


def test_a_limit_is_the_larger_of_its_two_times():
    pair = workload.SHAPES["tiny"]
    lengths = [(30, 2)] * 8
    table = workload.step_limits(pair, lengths, 1, rate=1e9, bandwidth=1e9)
    assert set(table.index) == {*step.METHODS["combined"], "body", "backward", "clip and step"}
    assert (table["limit"] == table[["multiply-adds", "bytes"]].max(axis=1)).all()
    assert table.loc["clip and step", "multiply-adds"] == 0 < table.loc["clip and step", "bytes"]
    teacher, student = pair.values()
    total = work.multiply_adds(student, teacher, lengths, step.METHODS["combined"])
    assert table["multiply-adds"].sum() == pytest.approx(total / 1e9)
    slow = workload.step_limits(pair, lengths, 1, rate=1e9, bandwidth=1e3)
    assert (slow["limit"] == slow["bytes"]).all()


def test_entropy_is_that_of_the_byte_planes():
    assert workload.entropy_bits([np.zeros(8, np.float16)]) == 0
    assert workload.entropy_bits([np.arange(256, dtype=np.uint8)]) == pytest.approx(8)
    low = np.arange(4, dtype=np.uint16)
    assert workload.entropy_bits([low, low + 256]) == pytest.approx(3)


@pytest.mark.parametrize("attention_dtype", ["float16", "uint8"])
def test_cache_bytes_of_the_sample_itself_are_its_files(tmp_path, attention_dtype):
    teacher, rows = tiny_llama(vocab=50), workload.random_rows(28, 50)
    teacher.config.max_position_embeddings = 512
    workload.write_sample(
        tmp_path, rows, teacher, batch_tokens=2000, attention_dtype=attention_dtype
    )
    assert TeacherCache(tmp_path)[rows[0].example_id].signals["attention"].dtype == attention_dtype
    sizes = workload.cache_gigabytes(tmp_path, 28, 512)
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
    workload.bare_forward(teacher, sorted(rows, key=lambda row: len(row.tokens)), 600)
    assert sum(count for count, _ in seen) == 7
    assert all(count * length <= 600 for count, length in seen)
