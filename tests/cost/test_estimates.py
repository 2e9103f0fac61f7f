"""Sizes of models without their weights, the lengths that are expected, and what is printed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import example_rows, tiny_llama

from kd_utils.config import project_paths, stages
from kd_utils.config.parameter_files import notebook_config
from kd_utils.cost import cards, estimates, experiment, memory, rows, shapes, work
from kd_utils.models import signal_kinds

PROBE = work.Probe(rate=1e11, operation=0.0, overlaps=False)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(project_paths, "ROOT", tmp_path)
    monkeypatch.setattr(shapes, "project_path", lambda path: tmp_path / path)
    return tmp_path


def test_a_models_sizes_need_no_weights(root):
    model = tiny_llama(tie_word_embeddings=True)
    model.config.save_pretrained(root / "model")
    assert shapes.Shape.of(shapes.local_model("model")) == shapes.Shape.of(model)
    assert shapes.Shape.of(model).weights == model.num_parameters()
    assert next(shapes.local_model("model").parameters()).is_meta
    assert shapes.Shape.of(shapes.local_model("model", layers=1)).layers == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "nobody/nothing is not on this machine"),
        ("artifacts/none", "artifacts/none is not on this machine"),
        ("a/b/c/d", "a/b/c/d is not on this machine"),
        ("odd", "odd cannot be sized: .*"),
    ],
)
def test_a_model_that_cannot_be_sized_is_told_in_one_line(root, name, message):
    (root / "odd").mkdir()
    (root / "odd" / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(ValueError, match=message) as told:
        shapes.local_model(name)
    assert "\n" not in str(told.value)


def test_neither_probe_nor_sizing_draws_a_random_number(root):
    tiny_llama().config.save_pretrained(root / "model")
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    estimates.Machine.here(torch.device("cpu"), "float32")
    shapes.local_model("model", layers=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_a_probe_adds_up_on_a_cpu_and_overlaps_on_a_gpu():
    cpu, gpu = (work.Probe(100.0, 2.0 / work.OPERATION_FACTOR, on_gpu) for on_gpu in (False, True))
    assert cpu.seconds(400.0, 3, 0.5) == pytest.approx(8 + 6)
    assert gpu.seconds(400.0, 3, 0.5) == pytest.approx(8)


def test_expected_rows_have_the_real_mix_or_the_means_of_the_prepared_data(monkeypatch, root):
    asked = {"train_rows": "sst2:100 gsm8k:20", "validation_rows": "mmlu:10", "max_length": 300}
    config = notebook_config("01_prepare_data", {**asked, "build": "none"})
    found, source = rows.expected_rows(config)
    assert "Llama-2" in source
    assert [len(found["train"].by_task[task]) for task in ("sst2", "gsm8k")] == [100, 20]
    assert found["train"].longest == 300 and found["validation"].longest_question == 0
    assert found["train"].longest_question > 50
    line = {"split": "train", "task": "sst2", "taken": 50, "mean_tokens": 12.0, "max_tokens": 30}
    counts = [{**line, "mean_answer_tokens": 2.0}]
    monkeypatch.setattr(rows.prepared_data, "read_manifest", lambda folder: {"counts": counts})
    found, source = rows.expected_rows(config)
    assert "prepared" in source and found["train"].longest == 30
    assert found["train"].tokens / 50 == pytest.approx(12, rel=0.02)


def trial(**values):
    config = notebook_config("03_train_student", {"distill_type": "combined", **values})
    student, teacher = (shapes.Shape.of(tiny_llama(width=w)) for w in (32, 48))
    split = rows.Rows({"gsm8k": [(30, 10)] * 20, "sst2": [(40, 2)] * 20})
    sides = estimates.compared(config, student.layers, [teacher.sizes])
    found = estimates.trial(
        config, student, sides, {"train": split, "validation": split}, False, PROBE
    )
    return found, student, teacher


def test_a_trial_costs_what_its_parts_cost():
    cost, student, teacher = trial(epochs=2)
    trained = student.weights + student.width * teacher.width
    assert cost.state == 12 * trained and cost.saved == 4 * student.weights
    assert cost.memory > 16 * trained
    assert trial(epochs=1)[0].state == 0 and trial(save_student=False)[0].saved == 0
    one, eight = (trial(micro_batch_size=n, eval_batch_size=1)[0].memory for n in (1, 8))
    assert one < eight <= cost.memory
    untrained = trial(distill_type="untrained")[0]
    assert untrained.epoch == untrained.state == 0 and untrained.memory < cost.memory
    work_of = [trial(distill_type=name)[0].epoch for name in ("task_only", "black_box", "combined")]
    assert work_of == sorted(work_of) and work_of[0] > 0


def test_two_teachers_cost_their_terms_twice_and_the_student_once():
    config = notebook_config("03_train_student", {"distill_type": "black_box"})
    shape = shapes.Shape.of(tiny_llama())
    split = rows.Rows({"sst2": [(20, 2)] * 8})
    splits = {"train": split, "validation": split}
    alone, one, two = (
        estimates.trial(config, shape, sides, splits, False, PROBE).epoch
        for sides in ([], *(estimates.compared(config, 2, [shape.sizes] * n) for n in (1, 2)))
    )
    assert two - one == pytest.approx(one - alone)


def test_a_disk_without_room_is_told_in_one_line(monkeypatch):
    config = notebook_config("03_train_student", {})
    monkeypatch.setattr(estimates.disk, "free", lambda place: 3e9)
    [line] = estimates.short_of_disk(5.4e9, config, "the cache")
    assert line.startswith("WARNING: the cache needs about 5.4 GB, but the disk of artifacts/ has")
    assert not [*estimates.short_of_disk(2e9, config, "the cache")]


def test_numbers_read_well():
    assert [estimates.size(n) for n in (13.2e9, 5.36e9, 87e6, 2e5)] == [
        "13 GB",
        "5.4 GB",
        "87 MB",
        "0.2 MB",
    ]
    assert [estimates.duration(s) for s in (0.2, 40, 700, 12600)] == [
        "1 s",
        "40 s",
        "12 min",
        "3.5 h",
    ]


def test_a_dry_run_estimates_from_configs_alone(root):
    tiny_llama(width=48).config.save_pretrained(root / "teacher")
    tiny_llama().config.save_pretrained(root / "student")
    places = {"teacher": "teacher", "student": "student", "device": "cpu"}
    data, cache = (notebook_config(stem, places) for stem in (stages.PREPARE, stages.CACHE))
    trials = [
        notebook_config(stages.TRAIN, {**places, "distill_type": method, "seed": seed})
        for method in ("black_box", "combined")
        for seed in (0, 1)
    ]
    last = {"hidden": [2], "attention": [2]}
    planned = experiment.Experiment(data, cache, False, trials, lambda config, model: last)
    first, of_02, of_03, title, table = planned.lines()
    assert "2,290 rows" in first and "fine-tuning" in of_02 and "4 trials" in of_03
    assert "combined" in title and table.count("16384") == len(cards.CARDS)
    (root / "student" / "config.json").unlink()
    [line] = planned.lines()
    assert line == "cost: not known: student is not on this machine"


def test_a_smaller_card_takes_smaller_settings():
    large = shapes.Shape(int(1e9), int(9e8), 20, 2048, 5632, 32, 32000, 2048, 256)
    terms = memory.Compared(("kd",), 2048, 32, 32000)
    table = cards.what_fits(
        large,
        large,
        signal_kinds.columns_of("white_box", {}, 20, "float16"),
        [terms],
        max_length=512,
        answer=300,
        question=200,
        max_new_tokens=256,
    ).set_index("card")
    training = table["training: micro_batch_size"]
    assert training["16 GB"] == "does not fit" and training["80 GB"] == "8"
    for column in table.columns:
        sizes = [0 if value == "does not fit" else int(value) for value in table[column]]
        assert sizes == sorted(sizes)


def test_rows_are_those_of_the_examples():
    import pandas as pd

    split = rows.Rows.of(
        pd.DataFrame({"task": ["sst2", "gsm8k", "sst2"]}), example_rows([9, 12, 6])
    )
    assert split.by_task == {"sst2": [(9, 3), (6, 2)], "gsm8k": [(12, 4)]}
    assert (split.tokens, split.longest, split.longest_answer) == (27, 12, 4)
    assert split.longest_question == 8
