"""The teacher's answers to the training rows."""

import pandas as pd
import pytest
from small_project import small_project

from kd_utils.cache.manifest import CacheError
from kd_utils.cache.teacher_cache import TeacherCache, read_answers
from kd_utils.config.parameter_files import notebook_config
from kd_utils.data.prepared_data import load_prepared
from kd_utils.evaluation.replies import Reply
from kd_utils.models.loading import load_causal_lm
from kd_utils.teacher import answers
from kd_utils.teacher.preparation import tuning_rows
from kd_utils.tokens.encoding import encode_table


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return small_project(
        tmp_path_factory.mktemp("project"),
        train_rows="sst2:16 gsm8k:10",
        validation_rows="sst2:4 gsm8k:2",
        labelled="sst2=4 gsm8k=10",
        max_length=120,
        max_new_tokens=6,
    )


def asked(project, **changes):
    config = notebook_config("02_cache_teacher", project.parameters | changes)
    model, prepared = load_causal_lm(config.teacher).eval(), load_prepared(config.data_path)
    both = project.tokenizer, project.tokenizer
    return answers.ask_teacher(config, model, *both, prepared), prepared


def test_answers_are_those_of_evaluation_at_any_batch_size(project):
    table, prepared = asked(project)
    assert table["example_id"].tolist() == prepared.train["example_id"].tolist()
    for size in (1, 5):
        pd.testing.assert_frame_equal(asked(project, eval_batch_size=size)[0], table)
    choices = prepared.train["choices"].map(len) > 0
    assert set(table["answer"][choices]) <= {" negative", " positive"}
    assert table["whole"][choices].all()
    assert not table["whole"][~choices].all()  # random weights seldom stop in six tokens


def test_a_text_starts_with_one_space_and_must_fit(project, monkeypatch):
    texts = iter(["\n Four. \n\n", "", " ", "12 " * 300, *["4"] * 6])

    def said(model, tokenizer, table, **options):
        return [Reply([0.0, 1.0]) if len(c) else Reply(None, next(texts)) for c in table["choices"]]

    monkeypatch.setattr(answers, "replies", said)
    table, prepared = asked(project)
    written = table[prepared.train["task"] == "gsm8k"]
    assert written["answer"].tolist()[:3] == [" Four.", "", ""]
    assert written["fits"].tolist() == [True, False, False, False, *[True] * 6]


def test_a_finished_cache_is_not_answered_again(project):
    folder, _ = project.cache()
    table = TeacherCache(folder).answers()

    def never():
        raise AssertionError("asked again")

    pd.testing.assert_frame_equal(answers.answers_in(folder, never), table)
    (folder / "answers.parquet").write_bytes(b"damaged")
    with pytest.raises(CacheError, match="answers.parquet is damaged or from another folder"):
        read_answers(folder)
    assert answers.answers_in(folder, lambda: table) is table


def test_what_fine_tuning_may_read(project):
    prepared = load_prepared(notebook_config("02_cache_teacher", project.parameters).data_path)
    rows = encode_table(project.tokenizer, prepared.train)
    counts = {}
    for labels in ("all", "labelled"):
        config = notebook_config("02_cache_teacher", {"teacher_labels": labels})
        counts[labels] = len(tuning_rows(config, prepared.train, rows))
    assert counts == {"all": 26, "labelled": 14}
    none = prepared.train.assign(labelled=False)
    with pytest.raises(ValueError, match="teacher_labels = 'labelled', but no training row has"):
        tuning_rows(config, none, rows)
    unchanged = notebook_config(
        "02_cache_teacher", {"teacher_labels": "labelled", "teacher_epochs": 0}
    )
    assert tuning_rows(unchanged, none, rows) == []
