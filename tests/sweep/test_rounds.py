"""Rounds of cuts in a sweep: trials that start from each other's students, and what makes them stale."""

import shutil

import pytest
from serial_executor import Serial
from small_project import small_project

from kd_utils.models.cut.sizes import sizes_of
from kd_utils.models.loading import load_causal_lm
from kd_utils.records.trial_record import read_record
from kd_utils.sweep.sweep import Sweep

pytestmark = pytest.mark.notebook


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """`swept(**changes)`: a sweep of three rounds, without 01, 02 and 04, and what it ran."""
    project = small_project(
        tmp_path,
        train_rows="sst2:12",
        validation_rows="sst2:4",
        labelled="1",
        epochs=3,
        evaluations=1,
        batch_size=6,
        student="teacher",
        student_init="pruned",
        keep_mlp="24",
        rounds=3,
        distill_type="black_box",
    )
    project.cache()
    monkeypatch.setattr("kd_utils.sweep.sweep.execute_stage", lambda *_: None)
    monkeypatch.setattr(Sweep, "why_to_run", lambda *_, **__: "")

    def sweep(breaks=(), **changes):
        run = Sweep(project.parameters | changes, {"seed": [0]}, tmp_path / "run")
        executor = Serial(breaks)
        done = all(state.state == "done" for state in run.states(run.chosen).values())
        if not done:
            run._run_missing(executor)
        return executor.ran, {t: s.state for t, s in run.states(run.trials).items()}, run

    return sweep


FIRST, SECOND, THIRD = (f"black_box_seed0_round={n}" for n in (1, 2, 3))


def test_each_round_starts_from_the_student_before_and_one_that_changed_is_stale(swept, tmp_path):
    ran, states, run = swept()
    assert ran == [FIRST, SECOND, THIRD] and set(states.values()) == {"done"}
    records = [read_record(tmp_path / "run" / "trials" / name) for name in ran]
    assert [record["cache"] for record in records] == [records[0]["cache"]] * 3  # one teacher
    assert [record["epochs"][-1]["epoch"] for record in records] == [1, 1, 1]
    folders = [
        load_causal_lm(str(tmp_path / "artifacts/students" / run_label(run) / n)) for n in ran
    ]
    assert [sizes_of(model.config).mlp for model in folders] == [60, 38, 24]
    sizes = [record["sizes"]["student"]["parameters"] for record in records]
    assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == 3
    assert swept()[0] == []

    # The first round's student is another now: the later ones are not what would be made.
    changed = tmp_path / "artifacts/students" / run_label(run) / FIRST / "generation_config.json"
    changed.write_text(changed.read_text() + " ")
    assert swept()[0] == [SECOND, THIRD]


def test_a_student_that_is_gone_is_trained_again_if_a_later_round_needs_it(swept, tmp_path):
    _, _, run = swept(breaks=(THIRD,))
    students = tmp_path / "artifacts/students" / run_label(run)
    shutil.rmtree(students / SECOND)
    why = run.states(run.trials)[SECOND]
    assert why == ("broken", f"its student is missing, from which {THIRD} starts")
    ran, states, _ = swept()
    assert ran == [SECOND, THIRD] and set(states.values()) == {"done"}
    shutil.rmtree(students)  # nobody needs them now
    assert swept()[0] == []
    shutil.rmtree(tmp_path / "run" / "trials" / FIRST)
    lost = {name: state.state for name, state in run.states(run.trials).items()}
    assert lost == {FIRST: "broken", SECOND: "stale", THIRD: "stale"}


def test_a_size_that_is_not_possible_is_refused_before_the_teacher_runs(
    swept, tmp_path, monkeypatch
):
    """And before the first of three rounds, which alone could have it."""
    stages = []
    monkeypatch.setattr(Sweep, "why_to_run", lambda *_, **__: "asked for")
    monkeypatch.setattr("kd_utils.sweep.sweep.execute_stage", lambda stem, *_: stages.append(stem))
    with pytest.raises(ValueError, match="black_box_seed0_round=1: keep_heads = 3: .* set it to 4"):
        swept(keep_heads="3")
    assert stages == ["01_prepare_data"]
    assert not list((tmp_path / "run").glob("trials/*"))


def test_a_round_whose_predecessor_failed_is_not_run(swept, capsys):
    ran, states, _ = swept(breaks=(SECOND,))
    assert ran == [FIRST, SECOND]
    assert states == {FIRST: "done", SECOND: "failed", THIRD: "missing"}
    assert f"FAILED: it starts from {SECOND}, which is failed: broken" in capsys.readouterr().err
    ran, states, _ = swept()
    assert ran == [SECOND, THIRD] and set(states.values()) == {"done"}


def run_label(run):
    from kd_utils.config.project_paths import run_label

    return run_label(run.place)
