"""Sizes of models without their weights, the lengths that are expected, and what is printed."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import example_rows, tiny_llama

from kd_utils.config import project_paths, stages
from kd_utils.config.parameter_files import notebook_config
from kd_utils.cost import cards, estimates, experiment, rows, shapes, work
from kd_utils.data import prepared_data
from kd_utils.models import signal_kinds
from kd_utils.models.initial.ways import WAYS

MACHINE = work.Machine(half=False, memory=16e9, rate=1e11, operation=0.0, overlaps=False)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(project_paths, "ROOT", tmp_path)
    monkeypatch.setattr(shapes, "project_path", lambda path: tmp_path / path)
    return tmp_path


def test_a_models_sizes_need_no_weights(root):
    model = tiny_llama(tie_word_embeddings=True)
    model.config.save_pretrained(root / "model")
    assert shapes.shape_of(shapes.local_model("model")) == shapes.shape_of(model)
    assert shapes.shape_of(model)["weights"] == model.num_parameters()
    assert next(shapes.local_model("model").parameters()).is_meta
    made = partial(WAYS["layers"].config, student_layers=1)
    assert shapes.shape_of(shapes.local_model("model", made=made))["num_hidden_layers"] == 1


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
    work.Machine.here(torch.device("cpu"), "float32")
    shapes.local_model("model", made=partial(WAYS["layers"].config, student_layers=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_a_probe_adds_up_on_a_cpu_and_overlaps_on_a_gpu():
    rates = {"half": False, "memory": 1.0, "rate": 100.0, "operation": 2 / work.OPERATION_FACTOR}
    cpu, gpu = (work.Machine(**rates, overlaps=on_gpu) for on_gpu in (False, True))
    assert cpu.seconds(400.0, 3, 0.5) == pytest.approx(8 + 6)
    assert gpu.seconds(400.0, 3, 0.5) == pytest.approx(8)


def test_expected_rows_have_the_real_mix_or_the_means_of_the_prepared_data(monkeypatch, root):
    asked = {"train_rows": "sst2:100 gsm8k:20", "validation_rows": "mmlu:10", "max_length": 300}
    config = notebook_config("01_prepare_data", {**asked, "build": "none"})
    found, source = rows.expected_rows(config)
    assert "Llama-2" in source
    assert len(found.train) == 120 and len(found.validation) == 10
    assert max(found.tokens) == 300 and found.question == rows.LONGEST_QUESTION
    assert len(found.held_out) == 600 and found.written == 20
    line = {"split": "train", "task": "sst2", "taken": 50, "mean_tokens": 12.0, "max_tokens": 30}
    counts = [{**line, "mean_answer_tokens": 2.0}]
    monkeypatch.setattr(rows.prepared_data, "read_manifest", lambda folder: {"counts": counts})
    found, source = rows.expected_rows(config)
    assert "prepared" in source and max(found.tokens) == 30
    assert sum(found.tokens) / 50 == pytest.approx(12, rel=0.02)
    assert all(0 < answer <= tokens for tokens, answer in found.train)


def trial(**values):
    config = notebook_config("03_train_student", {"distill_type": "combined", **values})
    student, teacher = (shapes.shape_of(tiny_llama(width=w)) for w in (32, 48))
    split = [(30, 10)] * 20 + [(40, 2)] * 20
    found = rows.Rows(split, [], split, question=20)
    return estimates.trial_cost(config, student, [teacher], found, MACHINE), student, teacher


def test_a_trial_costs_what_its_parts_cost():
    cost, student, teacher = trial(epochs=2)
    weights = student["weights"]
    assert cost.running == 2 * 12 * weights and cost.disk == 4 * weights
    assert cost.memory > 16 * (weights + student["hidden_size"] * teacher["hidden_size"])
    assert trial(save_student=False)[0].disk == 0
    averaged = trial(epochs=2, average_last=0.1)[0]
    assert averaged.running == 2 * 16 * weights
    assert averaged.memory == cost.memory + 4 * weights
    one, eight = (trial(micro_batch_size=n, eval_batch_size=1)[0].memory for n in (1, 8))
    assert one < eight <= cost.memory
    untrained = trial(distill_type="untrained")[0]
    assert untrained.seconds == untrained.running == 0 and untrained.memory < cost.memory
    work_of = [
        trial(distill_type=name)[0].seconds for name in ("task_only", "black_box", "combined")
    ]
    assert work_of == sorted(work_of) and work_of[0] > 0


def test_two_teachers_cost_their_terms_twice_and_the_student_once():
    config = notebook_config("03_train_student", {"distill_type": "black_box"})
    shape = shapes.shape_of(tiny_llama())
    found = rows.Rows([(20, 2)] * 8, [], [(20, 2)] * 8, question=0)
    alone, one, two = (
        estimates.trial_cost(config, shape, [shape] * n, found, MACHINE).seconds for n in range(3)
    )
    assert two - one == pytest.approx(one - alone)


def test_a_disk_without_room_is_told_in_one_line(monkeypatch):
    config = notebook_config("03_train_student", {})
    monkeypatch.setattr(estimates.disk, "free", lambda place: 3e9)
    cost = estimates.Cost(seconds=90, memory=4e9, disk=1e9, running=1.5e9)
    [line] = cost.lines("the trial", MACHINE, config.artifacts)
    assert "2 min" in line and "4.0 GB of 16 GB" in line and "1.5 GB while" in line
    [_, line] = cost.lines("the trial", MACHINE, config.artifacts, before=2.9e9)
    assert line.startswith("WARNING: about 5.4 GB are needed, but the disk of artifacts/ has 3.0")


def test_numbers_read_well():
    assert [estimates.size(n) for n in (13.2e9, 5.36e9, 87e6, 2e5)] == [
        "13 GB",
        "5.4 GB",
        "87 MB",
        "0.2 MB",
    ]
    assert [estimates.duration(s) for s in (0.2, 40, 700, 12600)] == [
        "0 s",
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
    planned = partial(experiment.experiment_lines, data, cache, trials, lambda config, model: last)
    first, of_02, of_03, title, table = planned(with_cache=True)
    assert "5,300 rows" in first and of_02.startswith("02") and "4 trials" in of_03
    assert "combined" in title and table.count("16384") == len(cards.CARDS)
    assert len([*planned(with_cache=False)]) == 4
    (root / "student" / "config.json").unlink()
    with pytest.raises(ValueError, match="student cannot be sized"):
        [*planned(with_cache=True)]


def test_a_smaller_card_takes_smaller_settings():
    sizes = (2048, 5632, 20, 32, 4, 64, 32000, int(1e9))
    large = dict(zip(shapes.shape_of(tiny_llama()), sizes, strict=True))
    cache = notebook_config(stages.CACHE, {"max_new_tokens": 256})
    config = notebook_config(stages.TRAIN, {"distill_type": "black_box", "max_new_tokens": 256})
    found = rows.Rows([(512, 300)], [], [(512, 300)], question=200)
    columns = signal_kinds.columns_of("white_box", {}, 20, "float16")
    parts = {
        "02": estimates.teacher_part(cache, large, columns, found),
        "03": estimates.trial_part(config, large, [large], found),
    }
    table = cards.what_fits(parts).set_index("card")
    training = table["03: micro_batch_size"]
    assert training["16 GB"] == "does not fit" and training["80 GB"] == "8"
    for column in table.columns:
        fitting = [0 if value == "does not fit" else int(value) for value in table[column]]
        assert fitting == sorted(fitting)


def test_answers_that_are_written_take_a_step_for_each_token():
    columns = signal_kinds.columns_of("white_box", {}, 3, "float16")
    teacher = shapes.shape_of(tiny_llama(width=48, layers=3))
    seconds = []
    for written, longest in ((0, 256), (16, 256), (16, 512)):
        config = notebook_config(stages.CACHE, {"max_new_tokens": longest, "eval_batch_size": 8})
        found = rows.Rows([(20, 2)] * 32, [], [(20, 2)] * 8, question=18, written=written)
        seconds.append(estimates.teacher_cost(config, teacher, columns, found, MACHINE).seconds)
    first, second, third = seconds
    assert first > 0 and third - second == pytest.approx(second - first)


def test_rows_are_those_of_the_examples():
    tables = {
        split: pd.DataFrame({"task": ["sst2", "gsm8k", "sst2"]}) for split in prepared_data.SPLITS
    }
    found = rows.counted_rows(
        tables, {split: example_rows([9, 12, 6]) for split in prepared_data.SPLITS}
    )
    assert found.train == found.held_out == found.validation == [(9, 3), (12, 4), (6, 2)]
    assert found.written == 1
    assert found.tokens == [9, 12, 6] * 3 and found.question == 8
