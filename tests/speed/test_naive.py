"""The naive baseline computes the same as the code that is used: otherwise their speeds would not
compare.
"""

import pytest
import torch
from tiny import example_rows, tiny_llama

from kd_utils.config.parameter_files import notebook_config
from kd_utils.distill.batches import collate
from kd_utils.distill.training import weighted_sum
from kd_utils.speed import naive, step, workload

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
SHAPE = {
    "teacher": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, **SIZES},
    "student": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **SIZES},
}


def bench_of(folder, attention_dtype, lengths):
    """A bench whose student has weights large enough that its maps are not flat, and its rows."""
    teacher, rows = tiny_llama(width=48, layers=3), example_rows(lengths)
    workload.write_sample(
        folder / "cache", rows, teacher, batch_tokens=100, attention_dtype=attention_dtype
    )
    config = notebook_config("05_measure_speed", {"naive_length": 496})
    bench = step.StepBench(SHAPE, rows, folder / "cache", config, torch.device("cpu"))
    bench.student = tiny_llama(seed=1)
    bench.parameters = [*bench.student.parameters(), *bench.projector.parameters()]
    bench.optimizer = torch.optim.SGD(bench.parameters, lr=1e-3)
    examples = bench.examples(list(range(len(rows))), step.METHODS["combined"])
    path = folder / "naive.parquet"
    naive.write_rows(path, examples, teacher.lm_head.weight.detach(), length=20)
    return bench, examples, path


@pytest.mark.parametrize("attention_dtype", ["float16", "uint8"])
def test_the_naive_loss_and_its_gradient_are_those_of_the_cached_design(tmp_path, attention_dtype):
    bench, examples, path = bench_of(tmp_path, attention_dtype, [9, 5, 14])
    cached = bench.loss_terms(collate(examples), tuple(step.WEIGHTS))
    batch = naive.read_batch(path, [0, 1, 2])
    assert batch["maps"].shape == (3, 4, 20, 20) and batch["logits"].shape == (3, 20, 97)
    results = []
    for terms in (cached, naive.loss_terms(bench, batch)):
        gradients = torch.autograd.grad(weighted_sum(terms, step.WEIGHTS), bench.parameters)
        results.append((terms, gradients))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def test_both_designs_are_compared_and_a_difference_is_an_error(tmp_path):
    bench, examples, path = bench_of(tmp_path, "float16", [9, 5, 14])
    table = naive.beside_cached(bench, path, examples[:2])
    assert list(table.columns) == ["cached", "naive"]
    assert table.index.tolist() == ["task", "kd", "hidden", "attention"]
    with pytest.raises(AssertionError, match="values are different"):
        naive.beside_cached(bench, path, examples[1:])


def test_both_designs_take_the_same_step(tmp_path):
    trained = []
    for side in ("cached", "naive"):
        (tmp_path / side).mkdir()
        bench, _, path = bench_of(tmp_path / side, "float16", [9, 5])
        reading_seconds = []
        if side == "naive":
            naive.step(bench, path, 2, reading_seconds)
            assert len(reading_seconds) == 1 and reading_seconds[0] > 0
        else:
            bench.epoch(step.METHODS["combined"], [[0, 1]])
        trained.append([p.detach() for p in bench.parameters])
    torch.testing.assert_close(*trained, atol=1e-6, rtol=1e-4)


def test_rows_are_read_in_the_order_asked_for(tmp_path):
    _, examples, path = bench_of(tmp_path, "float16", [4, 7])
    batch = naive.read_batch(path, [1, 0])
    assert batch["mask"].sum(1).tolist() == [7, 4]
    assert batch["labels"][1].tolist() == [-100] * 3 + [int(examples[0].tokens[3])] + [-100] * 16
