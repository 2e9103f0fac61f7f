"""Trials made by hand: their names, where they are looked for, and what may stand in one table."""

import json

import pytest
from stubs import MADE, PREDICTIONS, metrics_of

from kd_utils.analysis import comparisons, tables
from kd_utils.config import project_paths
from kd_utils.config.parameter_files import notebook_config
from kd_utils.config.stages import TRAIN
from kd_utils.records import run_folder, trial_record
from kd_utils.records.by_hand import find_run, found_trials, named_apart


def config_of(method="black_box", seed=0, **changes):
    return notebook_config(TRAIN, {"distill_type": method, "seed": seed, **changes})


@pytest.fixture
def explore(tmp_path, monkeypatch):
    """`runs/explore`, where 03 writes by hand."""
    monkeypatch.setattr(project_paths, "ROOT", tmp_path)
    return tmp_path / "runs" / "explore"


clock = iter(range(10**6))


def record(explore, method="black_box", seed=0, made=None, accuracy=0.5, **changes):
    """Record a trial as 03 does by hand; its name. Each trial is a second newer than the last."""
    config = named_apart(config_of(method, seed, **changes))
    seconds = next(clock)
    metrics = metrics_of(
        method,
        seed,
        accuracy=accuracy,
        config=config.model_dump(),
        config_hash=config.fingerprint(),
        student={"name": config.student, "fingerprint": MADE["students"]["tiny"]},
        started=f"2026-01-01T00:{seconds // 60:02d}:{seconds % 60:02d}+00:00",
        **(made or {}),
    )
    trial_record.write_record(config.record_folder, metrics, PREDICTIONS)
    assert config.record_folder.is_relative_to(explore)
    return config.trial_name


def states(folder, experiment="toy"):
    return {about["trial"]: state for about, state in found_trials(folder, experiment)}


def test_another_value_of_a_parameter_never_takes_the_place_of_an_earlier_record(explore):
    assert record(explore) == "black_box_seed0"
    assert record(explore, temperature=4.0) == "black_box_seed0_temperature=4.0"
    assert record(explore, temperature=8.0) == "black_box_seed0_temperature=8.0"
    assert record(explore, epochs=9, temperature=8.0) == "black_box_seed0_epochs=9_temperature=8.0"
    # The same trials again, by their own names.
    assert record(explore) == "black_box_seed0"
    assert record(explore, temperature=4.0) == "black_box_seed0_temperature=4.0"
    # What black box does not use makes no other trial.
    assert record(explore, gamma_attention=5.0) == "black_box_seed0"
    # Another experiment may differ in nothing but its data.
    assert record(explore, name="other") == "black_box_seed0_name=other"
    assert len(list((explore / "trials").glob("*_seed*"))) == 5


def test_a_name_that_is_taken_too_or_too_long_gets_a_digest(explore):
    record(explore)
    record(explore, temperature=4.0)
    (explore / "trials" / "black_box_seed0" / "metrics.json").unlink()
    record(explore, epochs=2)  # now the plain name is another trial's
    third = record(explore, epochs=2, temperature=4.0)
    assert third.startswith("black_box_seed0_") and "=" not in third
    long = record(explore, student="s" * 90, tokenizer="t" * 90)
    assert len(long) < 30
    assert (
        len(list((explore / "trials").glob("*_seed*"))) == 5 - 1
    )  # one has lost its metrics: replaced


def test_a_given_name_that_is_another_trials_is_not_taken_from_it(explore):
    assert record(explore, trial="mine") == "mine"
    assert record(explore, trial="mine", temperature=4.0) == "mine_temperature=4.0"
    assert record(explore, trial="mine", method="attention").startswith("mine_")
    assert record(explore, trial="mine") == "mine" and states(explore)["mine"].state == "done"
    long = [record(explore, trial="m" * 200), record(explore, trial="m" * 200, epochs=2)]
    assert len(set(long)) == 2 and max(map(len, long)) == 200


def test_a_name_that_another_kernel_took_meanwhile_is_given_up(explore):
    """Two kernels make their configs before either of them writes."""
    first, second = named_apart(config_of()), named_apart(config_of(temperature=4.0))
    assert first.trial_name == second.trial_name == "black_box_seed0"
    record(explore)
    assert named_apart(first).trial_name == "black_box_seed0"
    assert named_apart(second).trial_name == "black_box_seed0_temperature=4.0"


def test_a_damaged_record_is_replaced(explore):
    record(explore)
    (explore / "trials" / "black_box_seed0" / "metrics.json").write_text("{}")
    assert named_apart(config_of(temperature=4.0)).trial == ""


def test_a_trial_by_hand_never_goes_into_a_sweeps_folder(explore, monkeypatch):
    """As when somebody opens a trial's record and runs it again."""
    name = record(explore)
    (explore / "sweep.json").write_text("{}")
    for trial in ("", name):
        with pytest.raises(
            ValueError, match="^run_dir = 'runs/explore' has the records of a sweep"
        ):
            named_apart(config_of(trial=trial))
    monkeypatch.setenv("KD_PROGRESS", "epochs.jsonl")  # a sweep runs it
    assert named_apart(config_of(trial=name)).trial == name


def test_parameters_that_differ_are_settings_and_only_like_is_compared(explore):
    for seed in (0, 1):
        record(explore, "task_only", seed)
        record(explore, "black_box", seed)
        record(explore, "attention", seed, epochs=9, accuracy=0.9)
        record(explore, "attention", seed, temperature=4.0, accuracy=0.9)
    results = run_folder.collect(explore, "toy")
    assert (results["status"] == "done").all() and len(results) == 8
    swept = {name for name in results if name.startswith("config/")} - {
        "config/distill_type",
        "config/seed",
    }
    assert swept == {"config/epochs", "config/temperature"}
    # task_only has no temperature, and so stands beside each of them.
    assert (
        results.loc[results["config/distill_type"] == "task_only", "config/temperature"]
        .isna()
        .all()
    )
    found = comparisons.compare_metrics(results, ["validation_accuracy"], ["white_box", "teacher"])
    assert found["question"].tolist() == ["teacher"], "no attention trial has a like black box"
    record(explore, "black_box", 0, temperature=4.0)
    results = run_folder.collect(explore, "toy")
    found = comparisons.compare_metrics(results, ["validation_accuracy"], ["white_box"])
    assert found[["setting", "pairs"]].values.tolist() == [["temperature=4, epochs=8", 1]]


@pytest.mark.parametrize(
    "made, why",
    [
        ({"cache": {"name": "c", "content_hash": "0" * 64}}, "teacher cache changed (toy)"),
        ({"code": {"kd_utils/losses.py": "1" * 12}}, "code changed (kd_utils/losses.py)"),
        ({"tokenizer": "0" * 16}, "student changed (tokenizer)"),
        ({"initial": "0" * 64}, "student changed (the initial student)"),
        ({"precision": "torch.bfloat16"}, "precision was 'torch.float32', is 'torch.bfloat16'"),
        (
            {"versions": {"torch": "1.0"}},
            "versions changed (numpy, python, tokenizers, torch was",
        ),
    ],
)
def test_what_was_made_from_something_else_than_the_newest_trial_is_named(explore, made, why):
    old = record(explore, "black_box", 0)
    new = record(explore, "attention", 0, made=made)
    found = states(explore)
    assert found[new] == ("done", "") and found[old].state == "stale"
    assert why in found[old].why
    assert tables.coverage(run_folder.collect(explore, "toy")).startswith("1 of 2 trials are done")


def test_one_students_weights_are_the_same_also_where_the_newest_trial_has_another(explore):
    """Swept students: of each the newest trial decides."""

    def one(method, initial, **changes):
        return record(explore, method, made={"initial": initial * 64}, **changes)

    old = one("black_box", "0", student="big")
    like, new = one("attention", "1", student="big"), one("attention", "2")
    found = states(explore)
    assert found[like].state == found[new].state == "done"
    assert found[old] == ("stale", "student changed (the initial student)")


def test_another_experiment_in_the_folder_is_named_and_left_out(explore):
    own, other = record(explore, "attention"), record(explore, name="smol")
    found = states(explore)
    assert found[own].state == "done"
    assert found[other] == ("stale", "it is of experiment 'smol', this table is of 'toy'")
    # Without a trial of that name the newest one counts.
    assert states(explore, "llama2")[other].state == "done"


def test_of_two_records_of_one_trial_the_newer_counts(explore):
    first = record(explore, trial="first")
    second = record(explore, trial="second")
    assert states(explore) == {
        first: ("repeated", "second is the same trial, and newer"),
        second: ("done", ""),
    }
    tables.planned_trials(run_folder.collect(explore))


def test_a_damaged_record_is_named_beside_the_others(explore):
    whole, broken = record(explore), record(explore, "attention")
    (explore / "trials" / broken / "metrics.json").write_text("{}")
    assert states(explore)[broken].state == "broken" and states(explore)[whole].state == "done"
    assert found_trials(explore / "nothing") == []
    path = explore / "trials" / record(explore, trial="seedless")
    metrics = trial_record.read_record(path)
    del metrics["config"]["seed"], metrics["checksums"]
    trial_record.write_record(path, metrics, PREDICTIONS)
    why = "seedless/metrics.json: config.seed: Field required"
    assert states(explore)[path.name] == ("broken", why)
    results = run_folder.collect(explore)
    assert comparisons.compare_metrics(results, ["validation_accuracy"]).empty
    assert len(run_folder.predictions(explore)) == len(PREDICTIONS)


def make_run(runs, name: str, experiment: str = "", started: str = "2026-01-01") -> None:
    folder = runs / name / "trials" / "black_box_seed0"
    folder.mkdir(parents=True)
    metrics = {"config": {"name": experiment}, "started": started} if experiment else {}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_find_run_prefers_the_sweeps_own_folder_then_the_latest_record(tmp_path):
    (tmp_path / "toy" / "trials" / ".black_box_seed0.partial-1").mkdir(parents=True)
    (tmp_path / "toy" / "trials" / ".black_box_seed0.partial-1" / "metrics.json").write_text("{}")
    for name in ("2025-01-02-toy", "2024-12-31-toy", "2025-09-09-smol", "not-a-toy"):
        make_run(tmp_path, name)
    assert find_run("toy", runs=tmp_path).name == "2025-01-02-toy"  # toy/ has no whole trial yet
    make_run(tmp_path, "2025-01-02-toy-10")
    make_run(tmp_path, "2025-01-02-toy-9")
    make_run(tmp_path, "2025-03-03-toy-without-teacher")
    assert find_run("toy", runs=tmp_path).name == "2025-01-02-toy-10"
    make_run(tmp_path, "toy")
    assert find_run("toy", runs=tmp_path).name == "toy"
    assert find_run("toy", str(tmp_path / "not-a-toy"), tmp_path).name == "not-a-toy"
    with pytest.raises(
        FileNotFoundError, match="no run of 'llama2'.*2025-09-09-smol.*run the sweep"
    ):
        find_run("llama2", runs=tmp_path)
    with pytest.raises(FileNotFoundError, match="no run folder nowhere.*2025-09-09-smol"):
        find_run("toy", "nowhere", tmp_path)


def test_find_run_reads_what_was_made_last_here_before_any_kept_record(tmp_path):
    make_run(tmp_path, "2026-01-01-toy")
    make_run(tmp_path, "explore", "smol")
    assert find_run("toy", runs=tmp_path).name == "2026-01-01-toy", "explore holds another one"
    make_run(tmp_path / "x", "explore", "toy")
    (tmp_path / "x" / "explore" / "trials" / "black_box_seed0").rename(
        tmp_path / "explore" / "trials" / "attention_seed0"
    )
    assert find_run("toy", runs=tmp_path).name == "explore"
    make_run(tmp_path, "toy", "toy", started="2026-02-01T10:00:00+00:00")
    assert find_run("toy", runs=tmp_path).name == "toy"
    later = {"config": {"name": "toy"}, "started": "2026-02-01T12:30:00+02:00"}
    (tmp_path / "explore" / "trials" / "attention_seed0" / "metrics.json").write_text(
        json.dumps(later)
    )
    assert find_run("toy", runs=tmp_path).name == "explore", "half an hour later in UTC"
