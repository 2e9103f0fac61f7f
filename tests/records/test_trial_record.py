"""One trial's record: whole or not there, and found when damaged."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from stubs import PREDICTIONS, metrics_of

from kd_utils.config.trial import trial_name
from kd_utils.records import trial_record
from kd_utils.records.run_folder import trial_predictions
from kd_utils.store.sealed import RecordError, SealedFolder, write_sealed

PACKED_IDS = PREDICTIONS[["example_id"]].to_parquet(**trial_record.PACKED)
IDS = f"examples-{hashlib.sha256(PACKED_IDS).hexdigest()[:16]}.parquet"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_trial_names():
    assert trial_name("attention", 3) == "attention_seed3"
    assert (
        trial_name("attention", 3, temperature=4, alpha=0.5)
        == "attention_seed3_alpha=0.5_temperature=4"
    )
    assert trial_name("combined", 0, student="../a b") == "combined_seed0_student=..-a-b"


def test_report_row_writes_lines_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("KD_PROGRESS", raising=False)
    trial_record.report_row({"epoch": 1})
    monkeypatch.setenv("KD_PROGRESS", str(tmp_path / "p.jsonl"))
    trial_record.report_row({"epoch": 1, "loss": np.float32(0.5)})
    trial_record.report_row({"epoch": 2, "loss": float("nan")})
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"epoch": 1, "loss": 0.5},
        {"epoch": 2, "loss": None},
    ]
    assert "NaN" not in lines[1]


def test_a_record_reads_back_as_written(tmp_path):
    trial_record.write_record(tmp_path / "t", metrics_of(accuracy=np.float32(0.75)), PREDICTIONS)
    metrics = trial_record.read_record(tmp_path / "t")
    assert metrics["format"] == 1 and metrics["final"]["validation_accuracy"] == 0.75
    assert set(metrics["checksums"]) == {"predictions.parquet", "sha256"}
    read = trial_predictions(tmp_path / "t")
    assert list(read) == list(PREDICTIONS) and read["example_id"].tolist() == ["a", "b"]
    assert (
        read["loglikelihoods"][0].tolist() == [-1.5, -0.25]
        and read["generated"][1] == "It is 4.\n#### 4"
    )
    assert names_in(tmp_path) == [IDS, "t"]


def test_trials_of_the_same_rows_share_their_ids_and_others_do_not(tmp_path):
    for trial in "tu":
        trial_record.write_record(tmp_path / trial, metrics_of(), PREDICTIONS)
    other = PREDICTIONS.assign(example_id=["b", "a"])
    trial_record.write_record(tmp_path / "v", metrics_of(), other)
    assert len(list(tmp_path.glob("examples-*.parquet"))) == 2
    ids = [trial_predictions(tmp_path / trial)["example_id"].tolist() for trial in "uv"]
    assert ids == [["a", "b"], ["b", "a"]]
    assert list(pd.read_parquet(tmp_path / "u" / "predictions.parquet")) == list(PREDICTIONS)[1:]


def test_a_record_that_has_its_ids_itself_is_read_too(tmp_path):
    """As all were written before the ids were shared."""
    metrics = metrics_of() | {"format": 1}
    with SealedFolder(tmp_path / "t", "metrics.json").replaced(metrics) as aside:
        PREDICTIONS.to_parquet(aside / "predictions.parquet", index=False)
    assert "examples" not in trial_record.read_record(tmp_path / "t")
    assert trial_predictions(tmp_path / "t")["example_id"].tolist() == ["a", "b"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PAR1")])
def test_ids_that_are_lost_or_damaged_are_named_and_written_again(tmp_path, damage):
    trial_record.write_record(tmp_path / "t", metrics_of(), PREDICTIONS)
    damage(tmp_path / IDS)
    with pytest.raises(RecordError, match=f"^trials/{IDS}, the ids of the predictions, is lost or"):
        trial_record.read_record(tmp_path / "t")
    trial_record.write_record(tmp_path / "u", metrics_of(), PREDICTIONS)
    assert trial_record.read_record(tmp_path / "t")


@pytest.mark.parametrize("kind", [None, "choices"])
def test_a_task_without_choices_and_one_with_nothing_else_are_written(tmp_path, kind):
    scores = [None, None] if kind is None else [[-1.0], [-2.0, -3.0]]
    table = PREDICTIONS.assign(loglikelihoods=scores)
    trial_record.write_record(tmp_path / "t", metrics_of(), table)
    read = trial_predictions(tmp_path / "t")["loglikelihoods"]
    assert [value if value is None else value.tolist() for value in read] == scores


def test_predictions_are_kept_in_single_precision_and_packed(tmp_path):
    """As many with choices as the toy has."""
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "example_id": [f"{number:024x}" for number in range(2_200)],
            "task": "mmlu",
            "correct": draw.random(2_200) < 0.9,
            "loglikelihoods": list(-draw.gamma(2.0, size=(2_200, 3))),
        }
    )
    trial_record.write_record(tmp_path / "t", metrics_of(), table)
    read = trial_predictions(tmp_path / "t")
    expected = np.stack(table["loglikelihoods"]).astype(np.float32)
    assert np.array_equal(np.stack(read["loglikelihoods"]), expected)
    assert (tmp_path / "t" / "predictions.parquet").stat().st_size < 30_000


def test_a_new_record_replaces_the_old_one(tmp_path):
    trial_record.write_record(tmp_path / "t", metrics_of(accuracy=0.1), PREDICTIONS)
    trial_record.write_record(tmp_path / "t", metrics_of(accuracy=0.2), PREDICTIONS)
    assert trial_record.read_record(tmp_path / "t")["final"]["validation_accuracy"] == 0.2
    assert names_in(tmp_path) == [IDS, "t"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan")])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, bad):
    trial_record.write_record(tmp_path / "t", metrics_of(accuracy=0.1), PREDICTIONS)
    with pytest.raises(RecordError, match=r"epochs\[0\]: validation_accuracy is (nan|inf)"):
        trial_record.write_record(tmp_path / "t", metrics_of(accuracy=bad), PREDICTIONS)
    assert trial_record.read_record(tmp_path / "t")["final"]["validation_accuracy"] == 0.1
    assert names_in(tmp_path) == [IDS, "t"]


def test_an_incomplete_record_is_refused(tmp_path):
    metrics = metrics_of()
    del metrics["cache"]
    with pytest.raises(RecordError, match="the record of t has no cache"):
        trial_record.write_record(tmp_path / "t", metrics, PREDICTIONS)
    with pytest.raises(RecordError, match="the record of t has no predictions"):
        trial_record.write_record(tmp_path / "t", metrics_of(), PREDICTIONS[:0])
    assert not list(tmp_path.iterdir())


def test_what_only_newer_records_have_may_be_missing(tmp_path):
    metrics = metrics_of()
    for key in ("code", "student", "precision"):
        del metrics[key]
    trial_record.write_record(tmp_path / "t", metrics, PREDICTIONS)
    assert "code" not in trial_record.read_record(tmp_path / "t")


def test_a_failed_write_leaves_the_old_record_and_a_full_disk_is_named(tmp_path, monkeypatch):
    trial_record.write_record(tmp_path / "t", metrics_of(accuracy=0.1), PREDICTIONS)

    def full(table, *path, **options):
        if path:
            raise OSError(28, "No space left on device")
        return packed(table, **options)

    packed = pd.DataFrame.to_parquet
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(
        OSError, match=f"no space left on device while writing {tmp_path.name}/t: make room"
    ):
        trial_record.write_record(tmp_path / "t", metrics_of(accuracy=0.2), PREDICTIONS)
    assert trial_record.read_record(tmp_path / "t")["final"]["validation_accuracy"] == 0.1
    assert names_in(tmp_path) == [IDS, "t"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "t/metrics.json is not a record of format 1"),
        ({"config": None}, "t/metrics.json: config: "),
        (
            {"config": {"distill_type": "black_box", "seed": 0, "student": ["tiny"]}},
            "t/metrics.json: config.student",
        ),
        ({"config_hash": 7}, "t/metrics.json: config_hash: "),
        ({"examples": "../../x"}, "t/metrics.json: examples: "),
        ({"cache": {"name": "toy"}}, "t/metrics.json: cache.content_hash: Field required"),
        ({"student": "tiny"}, "t/metrics.json: student: "),
        ({"code": ["losses"]}, "t/metrics.json: code: "),
        ({"seconds": {"load": 1.0}}, "t/metrics.json: seconds.total: Field required"),
        ({"peak_memory_mb": "300"}, "t/metrics.json: peak_memory_mb: "),
        ({"epochs": []}, "t/metrics.json: epochs: "),
        (
            {"epochs": [{"epoch": 1, "validation_accuracy": "0.5"}]},
            r"t/metrics.json: epochs.0.validation_accuracy",
        ),
        (
            {"epochs": [{"epoch": 1}]},
            "t/metrics.json: its final metrics are not those of its last row",
        ),
        (
            {"final": {"epoch": 2}},
            "t/metrics.json: its final metrics are not those of its last row",
        ),
    ],
)
def test_a_sealed_record_of_another_shape_is_one_line(tmp_path, changes, message):
    trial_record.write_record(tmp_path / "t", metrics_of(), PREDICTIONS)
    metrics = trial_record.read_record(tmp_path / "t")
    write_sealed(tmp_path / "t" / "metrics.json", metrics | changes, "checksums")
    with pytest.raises(RecordError, match=message) as raised:
        trial_record.read_record(tmp_path / "t")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["metrics.json", "predictions.parquet"])
def test_a_damaged_or_missing_part_is_named(tmp_path, name):
    trial_record.write_record(tmp_path / "t", metrics_of(), PREDICTIONS)
    path = tmp_path / "t" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(RecordError, match=f"t/{name} (is|was)"):
        trial_record.read_record(tmp_path / "t")
    path.unlink()
    with pytest.raises(RecordError, match=f"t/{name} is missing"):
        trial_record.read_record(tmp_path / "t")
    path.mkdir()
    with pytest.raises(RecordError, match=rf"t/{name} cannot be read \(Is a directory\)"):
        trial_record.read_record(tmp_path / "t")
