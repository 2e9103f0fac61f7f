"""Rows without a label: their own answers reach no cache, batch or loss, and weigh nothing where a
method has no answer for them.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from small_project import small_project
from test_training import cached
from tiny import tiny_llama

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.config.parameter_files import notebook_config
from kd_utils.config.trial import METHODS
from kd_utils.data.answers import answered_tables
from kd_utils.data.prepared_data import load_prepared, save_prepared
from kd_utils.distill import batches, teacher_terms, training
from kd_utils.distill.meter import Meter
from kd_utils.evaluation.replies import Reply
from kd_utils.models import loading, signals
from kd_utils.models.output_head import output_head
from kd_utils.teacher import answers
from kd_utils.tokens import encoding, vocabulary

SECRET = "ZEBRA"  # in no other text
CPU = torch.device("cpu")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Seven labels for 28 rows; the teacher, whose weights are random, counts to four."""
    asked = answers.replies

    def said(*arguments, **options):
        found = asked(*arguments, **options)
        return [reply if reply.loglikelihoods else Reply(None, " Four.\n#### 4") for reply in found]

    monkeypatch.setattr(answers, "replies", said)
    rows = {"train_rows": "sst2:16 gsm8k:12", "validation_rows": "sst2:4 gsm8k:2"}
    sizes = {"batch_size": 4, "micro_batch_size": 2, "max_length": 200, "max_new_tokens": 4}
    return small_project(tmp_path, **rows, **sizes, labelled="0.25")


def own_answers(project, change):
    """Prepare the data anew, with other answers and gold of the rows without a label."""
    config = notebook_config("01_prepare_data", project.parameters)
    prepared = load_prepared(config.data_path)
    train = [
        row if row["labelled"] else row | change(row) for row in prepared.train.to_dict("records")
    ]
    prepared = replace(prepared, train=pd.DataFrame(train))
    save_prepared(prepared, config.data_path)
    return prepared


def other_label(row, said):
    """Not what the teacher answers, and a number of its own."""
    if not row["choices"]:
        return {"answer": f" {SECRET}\n#### 987", "gold": "987"}
    gold = next(i for i, choice in enumerate(row["choices"]) if choice != said[row["example_id"]])
    return {"answer": row["choices"][gold], "gold": str(gold)}


def trial(project, **values):
    """What 03 makes of a method: the losses of an epoch, and its batches."""
    config = notebook_config("03_train_student", {**project.parameters, "epochs": 1, **values})
    prepared, tokenizer = load_prepared(config.data_path), loading.load_tokenizer(config.tokenizer)
    pieces = vocabulary.Vocabulary.of(tokenizer)
    caches = teacher_terms.open_caches(config, prepared.data_hash)
    tables = answered_tables(prepared, *(cache.answers() for cache in caches))
    encoded = encoding.encode_splits(tokenizer, tables, pieces)
    model = loading.load_causal_lm(config.student)
    teachers = teacher_terms.all_teacher_terms(caches, model, pieces, config, CPU)
    data = batches.TrialData(prepared, encoded, caches, config, CPU)
    needed, losses, seen = teacher_terms.layers_needed(teachers), [], []
    optimizer = torch.optim.SGD([*model.parameters(), *teachers.parameters()], lr=0.1)
    for parts in data.steps(range(data.total_steps)):
        for batch in parts:
            taken = signals.forward_signals(model, batch.input_ids, **needed)
            terms = training.loss_terms(
                taken,
                output_head(model),
                batch=batch,
                terms=tuple(config.weights),
                teachers=teachers,
            )
            training.weighted_sum(terms, config.weights).backward()
            losses.append({name: value.item() for name, value in terms.items()})
            seen.append(batch)
        optimizer.step()
        optimizer.zero_grad()
    return losses, seen


TRIALS = [
    *({"distill_type": name} for name in METHODS if name != "untrained"),
    {"distill_type": "combined", "answers": "gold"},
    {"distill_type": "black_box", "answers": "gold", "distill_tokens": "answer"},
]


def test_no_cache_batch_or_loss_has_an_own_answer_of_a_row_without_a_label(project):
    """The one that must never fail."""
    folder, _ = project.cache()
    said = TeacherCache(folder).answers().set_index("example_id")["answer"]
    prepared = own_answers(project, lambda row: other_label(row, said))
    folder, _ = project.cache()
    cache, decode = TeacherCache(folder), project.tokenizer.decode
    hidden = prepared.train[~prepared.train["labelled"]].set_index("example_id")
    assert len(hidden) == 21 and (hidden["answer"] != said[hidden.index]).all()

    table = cache.answers().set_index("example_id")["answer"]
    assert table.equals(said) and (table[hidden.index] != hidden["answer"]).all()
    for example_id, own in hidden["answer"].items():
        row = cache[example_id]
        text = decode(row.tokens[row.answer_start : -1])
        assert text == said[example_id] != own and SECRET not in decode(row.tokens)
    for file in folder.iterdir():
        assert SECRET.encode() not in file.read_bytes()

    first = {}
    for values in TRIALS:
        losses, seen = trial(project, **values)
        first[str(values)] = losses
        for batch in seen:
            for ids in [*batch.input_ids, batch.targets]:
                assert SECRET not in decode(ids) and "987" not in decode(ids)
    # Whatever the own answers are, no bit of a loss changes.
    own_answers(
        project,
        lambda row: (
            {"answer": row["choices"][0], "gold": "0"}
            if row["choices"]
            else {"answer": " 1+1=2\n#### 2", "gold": "2"}
        ),
    )
    project.cache()
    for values in TRIALS:
        assert trial(project, **values)[0] == first[str(values)], values


def test_all_methods_meet_the_same_rows_and_count_those_with_an_answer_only(project):
    project.cache()
    seen = {str(values): trial(project, **values)[1] for values in TRIALS}
    rows_of = [[batch.input_ids.tolist() for batch in found] for found in seen.values()]
    assert all(found == rows_of[0] for found in rows_of[1:])
    counts = {name: sum(len(batch.targets) for batch in found) for name, found in seen.items()}
    labels_only = counts[str({"distill_type": "task_only"})]
    assert 0 < labels_only < counts[str({"distill_type": "teacher_answers"})]
    for values in TRIALS[1:]:
        alone = values.get("answers") == "gold"
        assert (counts[str(values)] == labels_only) == alone


def test_with_all_labels_the_answers_change_nothing(project):
    project.parameters["labelled"] = "1"
    config = notebook_config("01_prepare_data", project.parameters)
    prepared = load_prepared(config.data_path)
    save_prepared(replace(prepared, train=prepared.train.assign(labelled=True)), config.data_path)
    folder, _ = project.cache()
    assert len(TeacherCache(folder).answers()) == 28  # the teacher answers them all the same
    plain, _ = trial(project, distill_type="task_only")
    assert trial(project, distill_type="teacher_answers")[0] == plain
    by_answers = [
        trial(project, distill_type="combined", answers=a)[0] for a in ("gold", "teacher")
    ]
    assert by_answers[0] == by_answers[1]


def test_training_on_nothing_is_told(project):
    own_answers(project, lambda row: {})
    config = notebook_config("01_prepare_data", project.parameters)
    prepared = load_prepared(config.data_path)
    save_prepared(replace(prepared, train=prepared.train.assign(labelled=False)), config.data_path)
    project.cache()
    with pytest.raises(ValueError, match="no training row has a label, and task_only learns from"):
        trial(project, distill_type="task_only")
    losses, _ = trial(project, distill_type="black_box", answers="gold")
    assert {terms["task"] for terms in losses} == {0.0}


# --- by hand ---


def task_loss(student, batch):
    taken = signals.forward_signals(student, batch.input_ids)
    return training.loss_terms(taken, output_head(student), batch=batch, terms=("task",))["task"]


def test_a_row_without_an_answer_weighs_nothing():
    student, rows = tiny_llama(seed=1), cached([9, 7, 12])
    mixed = [rows[0], replace(rows[1], has_answer=False), rows[2]]
    batch = batches.collate(mixed)
    assert batch.whole["answers"] == 7 and len(batch.targets) == 7
    alone = batches.collate([rows[0], rows[2]])
    torch.testing.assert_close(task_loss(student, batch), task_loss(student, alone))
    parts = batches.split_batch(mixed, 1)
    assert [len(part.targets) for part in parts] == [3, 0, 4]
    total = sum(task_loss(student, part) for part in parts)
    torch.testing.assert_close(total, task_loss(student, batch))
    # What is compared with the teacher is all there.
    assert batch.teachers[0].whole == batches.collate(rows).teachers[0].whole


def test_a_batch_without_any_answer_is_0_and_counts_in_no_mean():
    student = tiny_llama(seed=1)
    batch = batches.collate([replace(row, has_answer=False) for row in cached([9, 7])])
    loss = task_loss(student, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    config = notebook_config("03_train_student", {"epochs": 1})
    measure = Meter(config, [range(2)], pd.Timestamp.now("UTC").to_pydatetime())
    next(measure.stretches())
    other = batches.collate(cached([9, 7]))
    for each, value in ((batch, 0.0), (other, 3.0)):
        terms = {"task": torch.tensor(value), "kd": torch.tensor(1.0)}
        measure.add(each, terms["task"] + terms["kd"], terms, parts=1)
    measure.stop_training()
    row = measure.end_stretch({})
    assert row["train_loss/task"] == 3.0 and row["train_loss/kd"] == 1.0
    assert row["train_loss"] == 2.5
