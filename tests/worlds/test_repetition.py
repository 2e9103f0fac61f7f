"""How often outcomes repeat: counted from the tables that runs have."""

import pandas as pd
import pytest
from stubs import whole_run

from kd_utils.__main__ import main
from kd_utils.records import provenance
from kd_utils.worlds import repetition


def run_with(folder, *outcomes):
    """A run whose two comparisons have these outcomes and differences in points."""
    whole_run(folder)
    rows = [
        {
            "question": question,
            "metric": metric,
            "setting": None,
            "method": "black_box",
            "baseline": baseline,
            "pairs": 7,
            "difference": points / 100,
            "difference_sd": 0.01,
            "low": 0.0,
            "high": 1.0,
            "outcome": outcome if metric == "macro" else "worse",
        }
        for metric in ("macro", "sst2")
        for (question, baseline), (outcome, points) in zip(
            (("teacher", "task_only"), ("hard_answers", "teacher_answers")), outcomes
        )
    ]
    pd.DataFrame(rows).to_csv(folder / "comparisons.csv", index=False)
    return folder


def test_outcomes_of_the_primary_metric_are_counted(tmp_path, capsys):
    first = run_with(tmp_path / "a", ("better", 5), ("undecided", 0.5))
    second = run_with(tmp_path / "b", ("better", 7), ("equivalent", -0.5))
    table = repetition.outcomes([first, second])
    assert len(table) == 4 and table[["commit", "threads"]].drop_duplicates().shape == (1, 2)
    assert table["commit"][0] == provenance.environment()["git_commit"]
    found = repetition.repeated(table).set_index("question")
    assert found.loc["teacher", ["runs", "better", "undecided"]].tolist() == [2, 2, 0]
    assert found.loc["hard_answers", ["equivalent", "undecided"]].tolist() == [1, 1]
    assert found.loc["teacher", ["lowest", "highest", "sd"]].tolist() == [5, 7, 1]
    assert main(["repeats", str(first), str(second), "--out", str(tmp_path / "t.csv")]) == 0
    assert "black_box minus task_only" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "t.csv")) == 4


def test_a_run_that_was_not_analysed_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no comparisons.csv: finish its sweep first"):
        repetition.outcomes([whole_run(tmp_path / "a")])
