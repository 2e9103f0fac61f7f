"""The README's first table: from a record's tables, by rule."""

import pandas as pd

from kd_utils.__main__ import main
from kd_utils.analysis import questions, rest
from kd_utils.analysis.words import findings, seeds


def write(folder, compared=(), means=(), moves=(), done=3, planned=3):
    """A record: (question, method, baseline, outcome) or with a metric; (method, mean, sd)."""
    folder.mkdir(parents=True)
    rows = [
        {"question": question, "metric": (*more, "macro")[0], "setting": "", "method": method}
        | {"baseline": baseline, "outcome": outcome, "difference": 0.02, "detectable": 0.031}
        | {"difference_sd": 0.02}
        for question, method, baseline, outcome, *more in compared
    ]
    columns = "question metric setting method baseline outcome difference detectable difference_sd"
    pd.DataFrame(rows, columns=columns.split()).to_csv(folder / "comparisons.csv", index=False)
    analysis = [
        {"metric": metric, "setting": "", "distill_type": method, "n": 3, "mean": mean, "sd": sd}
        for metric, method, mean, sd in [
            *(("validation_accuracy/macro", *numbers) for numbers in means),
            *moves,
        ]
    ]
    columns = "metric setting distill_type n mean sd".split()
    pd.DataFrame(analysis, columns=columns).to_csv(folder / "analysis.csv", index=False)
    status = ["done"] * done + ["missing"] * (planned - done)
    pd.DataFrame({"status": status}).to_csv(folder / "results_summary.csv", index=False)
    return folder


def line(folder):
    cells = findings.markdown([folder]).splitlines()[2].strip("| ").split(" | ")
    return dict(zip(findings.COLUMNS, cells, strict=True))


ALL = [("references", "black_box", reference, "better") for reference in questions.REFERENCES]


def test_a_record_that_shows_much(tmp_path):
    compared = [
        ("teacher", "black_box", "task_only", "better"),
        ("hard_answers", "black_box", "teacher_answers", "undecided"),
        *ALL,
        ("controls", "shuffled", "teacher_answers", "undecided"),
        *(
            ("white_box", method, "black_box", outcome)
            for method, outcome in zip("abc", ("equivalent", "worse", "better on these rows"))
        ),
        ("which", "attention", "hidden_state", "better"),
    ]
    means = [("task_only", 0.708, 0.017), ("black_box", 0.842, 0.0131)]
    moves = [(metric, "black_box", 0.001, 0.0) for metric in (rest.LAST_TENTH, rest.TWICE)]
    assert line(write(tmp_path / "2026-12-01-toy", compared, means, moves)) == {
        "experiment": "[toy]",
        "trials": "3",
        "`task_only`": "70.8 ± 1.7",
        "`black_box`": "84.2 ± 1.3",
        "shown": "logits +2.0, over best +2.0, 1/3 signals worse",
        "equal": "1/3 signals",
        "not shown": "over hard 3.1, 1/3 signals 3.1",
        "at rest": "yes",
        "+": "seen",
        "−": "quiet",
    }


def test_a_record_that_shows_nothing(tmp_path):
    compared = [("teacher", "black_box", "task_only", "not tested")]
    record = write(tmp_path / "2026-12-01-toy-2", compared, [("task_only", 0.5, None)], (), 1)
    found = line(record)
    assert found["trials"] == "1 of 3" and found["`task_only`"] == "50.0"
    assert found["`black_box`"] == "–" and found["not shown"] == "logits not tested"
    assert [found[key] for key in ("at rest", "+", "−")] == ["?", "?", "–"]


def test_one_reference_that_is_not_beaten_is_enough(tmp_path):
    some = [(*ALL[0][:3], "equivalent"), *ALL[1:]]
    assert line(write(tmp_path / "2026-12-01-toy", some))["equal"] == "over best"


def test_moves_and_false_alarms_are_told(tmp_path):
    compared = [("controls", "shuffled", "teacher_answers", "better")]
    moves = [(rest.LAST_TENTH, "black_box", 0.02, 0.0)]
    found = line(write(tmp_path / "2026-12-01-toy", compared, (), moves))
    assert (found["at rest"], found["−"]) == ("no", "FALSE ALARM")
    measured = (rest.LAST_TENTH, rest.TWICE)
    moves += [(metric, "attention", 0.0, 0.0) for metric in measured]
    assert line(write(tmp_path / "2026-12-02-toy", compared, (), moves))["at rest"] == (
        "but black_box"
    )


def test_the_mean_is_that_of_the_tasks_that_the_verdict_rests_on(tmp_path):
    compared = [
        ("teacher", "black_box", "task_only", "undecided"),
        ("teacher", "black_box", "task_only", "better", "informed"),
    ]
    moves = [("validation_accuracy/informed", "black_box", 0.9, 0.01)]
    found = line(write(tmp_path / "2026-12-01-smol", compared, [("black_box", 0.3, 0.1)], moves))
    assert found["`black_box`"] == "90.0 ± 1.0" and found["shown"] == "logits +2.0"


def test_the_newest_record_of_each_experiment(tmp_path):
    for name in ("2026-11-22-toy-2", "2026-11-22-toy", "2026-11-21-toy-9", "2026-11-20-toy-cross"):
        write(tmp_path / name)
    (tmp_path / "2026-11-23-toy").mkdir()  # not analysed
    write(tmp_path / "toy")  # no record that is kept
    one_seed = [("teacher", "black_box", "task_only", "not tested")]
    write(tmp_path / "2026-11-23-smol", one_seed)
    write(tmp_path / "2026-11-24-toy", one_seed)  # one seed hides no older record that was tested
    write(tmp_path / "2026-11-23-smol-cross", [*one_seed, ("which", "a", "b", "undecided")])
    names = [path.name for path in findings.newest(tmp_path)]
    assert names == ["2026-11-23-smol-cross", "2026-11-22-toy-2", "2026-11-20-toy-cross"]


def test_the_command_prints_it_and_a_folder_without_tables_is_one_line(tmp_path, capsys):
    record = write(tmp_path / "2026-12-01-toy")
    assert main(["findings", str(record)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("| experiment | ") and shown.endswith(f"[toy]: {record}/\n")
    (record / "analysis.csv").unlink()
    assert main(["findings", str(record)]) == 2
    assert "has no analysis.csv: give a folder" in capsys.readouterr().err


def test_seeds_for_three_points_are_those_of_the_earlier_spread(tmp_path):
    reach = pd.DataFrame({"question": ["teacher", "white_box"], "family": [1, 3]})
    empty = write(tmp_path / "2026-12-02-toy", [("teacher", "black_box", "task_only", "better")])
    record = write(tmp_path / "2026-12-01-toy", [("white_box", "a", "black_box", "undecided")])
    [said] = seeds.needed(reach, [empty, record])
    assert said == (
        "finding 3 points needs 9 seeds (question white_box, paired sd 2.0 points in "
        f"{tmp_path}/2026-12-01-toy)"
    )
    assert not list(seeds.needed(reach, [])) and not list(seeds.needed(reach.iloc[:0], [record]))
