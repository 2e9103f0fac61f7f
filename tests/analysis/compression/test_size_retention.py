"""Retention against size and contrasts of kinds of students: against values worked by hand."""

import numpy as np
import pandas as pd
import pytest

from kd_utils.analysis.compression import contrasts, retained
from kd_utils.analysis.compression.students import Students, start_of
from kd_utils.config.notebook_files import notebook_defaults
from kd_utils.config.trial import TrialConfig

SIZES = {
    "parameters": 1200, "non_embedding": 1000, "flops_per_token": 2400.0, "bytes": 4800,
    "state_bytes_per_token": 64,
}  # fmt: skip
N = 400  # rows of each of two tasks


def record(seed, ratio, **config):
    config = TrialConfig(**notebook_defaults("03_train_student") | {"seed": seed} | config)
    name = "-".join(map(str, [config.distill_type, seed, ratio, *config.initial_settings.values()]))
    student = {key: value / ratio for key, value in SIZES.items()}
    values = config.model_dump() | {"trial": name.replace(".", "_")}
    return {"config": values, "sizes": {"student": student, "teacher": SIZES}}


def predictions(records, accuracy, teacher=0.9, seed=0):
    """Answers of given accuracies: GSM8K (chance 0) and SST-2 (chance 1/2)."""
    random, tables = np.random.default_rng(seed), []
    tasks = ["gsm8k"] * N + ["sst2"] * N
    known = random.random(2 * N) < teacher
    for number, made in enumerate(records):
        right = random.random(2 * N) < accuracy[number]
        tables.append(
            pd.DataFrame(
                {
                    "trial": made["config"]["trial"],
                    "example_id": [f"e{n:04}" for n in range(2 * N)],
                    "task": tasks,
                    "correct": right,
                    "teacher_correct": known,
                }
            )
        )
    return pd.concat(tables)


CUT = {"student_init": "pruned", "student": "teacher", "keep_mlp": "64"}


def test_a_kind_of_student_is_named_by_what_made_it():
    assert start_of({"student_init": "pretrained"}) == "pretrained"
    assert start_of(record(0, 2, **CUT)["config"]) == "pruned minitron"
    assert start_of(record(0, 2, **CUT, importance="random")["config"]) == "pruned random"
    assert start_of(record(0, 2, **CUT, rounds=3, epochs=6)["config"]) == "pruned minitron rounds=3"
    assert start_of(record(0, 2, student_init="random", keep_mlp="64")["config"]) == "random"
    svd = record(0, 2, student_init="svd", student_basis="channels")["config"]
    assert start_of(svd) == "svd channels"
    tied = record(0, 2, student_init="svd", student_output="tied")["config"]
    assert start_of(tied) == "svd weights tied"


def test_retention_is_the_ratio_of_means_over_tasks():
    records = [record(seed, 2, **CUT) for seed in range(3)]
    answered = predictions(records, [0.8, 0.8, 0.8])
    students = Students.of(records, answered)
    assert students.chance == pytest.approx(0.25) and students.tasks.tolist().count("sst2") == N
    [row] = retained.retained(students).to_dict("records")
    by_task = answered.groupby(["trial", "task"])[["correct", "teacher_correct"]].mean()
    student, teacher = by_task.mean()
    assert row["accuracy"] == pytest.approx(student) and row["teacher"] == pytest.approx(teacher)
    assert row["raw"] == pytest.approx(student / teacher)
    assert row["above_chance"] == pytest.approx((student - 0.25) / (teacher - 0.25))
    assert row["above_chance"] < row["raw"]
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    assert row["raw_low"] < row["raw"] < row["raw_high"] and row["ratio"] == 2 and row["n"] == 3
    assert row["shape"] == "mlp=64" and row["parameters"] == 600


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Students whose accuracies vary from seed to seed, and a teacher, measured again and again."""
    held, widths, false_alarms, raw = [], [], 0, 0.75 / 0.9
    for seed in range(24):
        levels = np.random.default_rng(seed).normal(0.75, 0.05, 10)
        records = [record(s, 2, **CUT) for s in range(5)]
        records += [record(s, 2, **CUT, importance="random") for s in range(5)]
        students = Students.of(records, predictions(records, levels, seed=seed))
        rows = retained.retained(students)
        held += ((rows["raw_low"] <= raw) & (raw <= rows["raw_high"])).tolist()
        widths += (rows["raw_high"] - rows["raw_low"]).tolist()
        # The two kinds are alike, so a difference would be a false alarm.
        table = contrasts.contrasts(students)
        false_alarms += table["outcome"].isin(["better", "worse"]).sum()
    assert np.mean(held) >= 0.9 and false_alarms <= 4  # of 24; 1.2 are expected
    # sd / sqrt(5) of the seeds alone, by t(4): an interval that is much wider says nothing.
    alone = 2 * 2.776 * 0.05 / np.sqrt(5) / 0.9
    assert 0.7 * alone < np.mean(widths) < 1.6 * alone


def test_rows_are_drawn_once_for_both_models():
    """A student that answers exactly as the teacher does keeps all, in every draw."""
    records = [record(seed, 2, **CUT) for seed in range(2)]
    answered = predictions(records, [0.5, 0.5])
    answered["correct"] = answered["teacher_correct"]
    [row] = retained.retained(Students.of(records, answered)).to_dict("records")
    numbers = [row[name + end] for name in ("raw", "above_chance") for end in ("", "_low", "_high")]
    assert numbers == pytest.approx([1.0] * 6)


def test_a_teacher_at_chance_has_nothing_to_retain():
    records = [record(seed, 2, **CUT) for seed in range(2)]
    [row] = retained.retained(
        Students.of(records, predictions(records, [0.3, 0.3], teacher=0.25))
    ).to_dict("records")
    assert np.isnan(row["above_chance"]) and np.isfinite(row["raw"])


@pytest.mark.parametrize(
    "ratio, low, high, word",
    [
        (2.0, 0.955, 0.985, "inside"),
        (2.1, 0.80, 0.94, "below"),
        (4.4, 0.96, 0.99, "above"),
        (10.0, 0.85, 0.95, "not shown"),
        (25.0, 0.5, 0.6, "no figure"),
        (48.0, 0.61, 0.79, "inside"),
        (2.0, np.nan, np.nan, "not tested"),
    ],
)
def test_the_verdict_rests_on_the_interval(ratio, low, high, word):
    assert retained.verdict(low, high, retained.band_of(ratio)) == word


def test_contrasts_are_within_seeds_and_at_one_shape():
    records = [
        *(record(seed, 2, **CUT) for seed in range(5)),
        *(record(seed, 2, **CUT, distill_type="task_only") for seed in range(5)),
        *(
            record(seed, 2, **CUT, importance="random", student_seed=draw)
            for seed in range(5)
            for draw in range(2)
        ),
        *(record(seed, 4, **(CUT | {"keep_mlp": "32"}), importance="random") for seed in range(5)),
    ]
    levels = [0.9] * 5 + [0.6] * 5 + [0.9] * 10 + [0.2] * 5
    students = Students.of(records, predictions(records, levels))
    table = contrasts.contrasts(students)
    assert table["shape"].unique().tolist() == ["mlp=64"]  # only one kind has the other shape
    helps = table[table["question"].str.contains("teacher")].iloc[0]
    assert helps["difference"] == pytest.approx(0.3, abs=0.05) and helps["outcome"] == "better"
    assert helps["p"] <= helps["p_holm"] < 0.05
    assert helps["seeds"] == 5 and helps["baseline"] == "pruned minitron + task_only"
    which = table[table["question"].str.contains("units")].iloc[0]
    assert which["outcome"] == "not shown" and which["low"] < 0 < which["high"]


def test_how_a_student_was_made_is_no_setting():
    random = {"student": "teacher", "student_init": "random", "keep_mlp": "64"}
    records = [
        record(seed, 2, **way) | {"swept": {"seed": seed, **way}}
        for way in (CUT, random)
        for seed in range(3)
    ]
    table = contrasts.contrasts(Students.of(records, predictions(records, [0.9] * 3 + [0.3] * 3)))
    assert table["baseline"].tolist() == ["random + black_box"]
    assert table["setting"].tolist() == ["student=teacher"]


def test_a_chain_is_compared_with_every_kind_of_its_size():
    direct = [
        *(record(seed, 2, **CUT, epochs=n) | {"swept": {"epochs": n}} for n in (4, 8) for seed in range(5)),
        *(record(seed, 4, **(CUT | {"keep_mlp": "32"})) for seed in range(5)),
    ]  # fmt: skip
    for number, made in enumerate(direct):
        made["config"]["trial"] = f"direct-{number}"
    students = Students.of(direct, predictions(direct, [0.6] * 5 + [0.9] * 5 + [0.2] * 5))
    taught = [record(seed, 2, **CUT) for seed in range(1, 6)]  # seed 5 has no partner
    answered = predictions(taught, [0.9] * 5, teacher=0.7)
    table = contrasts.with_a_chain(Students.of(taught, answered), students)
    assert table["setting"].tolist() == ["epochs=4", "epochs=8"]
    assert table["seeds"].tolist() == [4, 4] and table["shape"].unique().tolist() == ["mlp=64"]
    assert table["outcome"].tolist() == ["better", "not shown"]
    assert table["method"].unique().tolist() == ["chain, pruned minitron + black_box"]
    assert table["baseline"].unique().tolist() == ["pruned minitron + black_box"]
    assert table["difference"].iloc[0] == pytest.approx(0.3, abs=0.05)
    others = answered.assign(example_id=answered["example_id"] + "x")
    with pytest.raises(ValueError, match="did not answer the same validation rows"):
        contrasts.with_a_chain(Students.of(taught, others), students)


def test_several_draws_of_a_seed_are_one_trial():
    """Five draws for each of two seeds know no more of seeds than two trials do."""
    records = [
        record(seed, 2, **CUT, importance="random", student_seed=draw)
        for seed in range(2)
        for draw in range(5)
    ]
    answered = predictions(records, [0.5] * 5 + [0.7] * 5)
    [row] = retained.retained(Students.of(records, answered)).to_dict("records")
    assert (row["n"], row["seeds"]) == (10, 2)
    assert row["accuracy_high"] - row["accuracy_low"] > 0.5  # t of one degree of freedom


def test_logits_alone_are_compared_with_those_beside_answers():
    records = [
        record(seed, 2, **CUT, alpha=alpha) | {"swept": {"alpha": alpha}}
        for alpha in (0.0, 1.0)
        for seed in range(5)
    ]
    for number, made in enumerate(records):
        made["config"]["trial"] = f"trial-{number}"
    table = contrasts.contrasts(Students.of(records, predictions(records, [0.6] * 5 + [0.9] * 5)))
    [row] = table.to_dict("records")
    assert row["question"] == "Do logits alone do as well?" and row["outcome"] == "worse"
    assert row["method"] == "pruned minitron + black_box alpha=0" and row["setting"] == ""


def test_shapes_of_one_size_are_compared():
    keep = {"student_init": "pruned", "student": "teacher"}
    shapes = {"keep_layers": "3"}, {"keep_mlp": "64"}, {"keep_mlp": "32"}
    records = [
        record(seed, ratio, **keep, **shape)
        for shape, ratio in zip(shapes, (2, 2.02, 4), strict=True)
        for seed in range(5)
    ]
    students = Students.of(records, predictions(records, [0.9] * 5 + [0.6] * 5 + [0.2] * 5))
    [row] = contrasts.contrasts(students).to_dict("records")
    assert row["question"] == contrasts.SHAPES and row["shape"] == "layers=3, mlp=64"
    assert row["method"].endswith("layers=3") and row["outcome"] == "better"


def test_an_assistant_of_each_seed_is_one_kind_of_teacher():
    records = [
        record(seed, 2, **CUT)
        | {"swept": {"more_teachers": f"chain-{seed}=0.5", "student": f"run/black_box_seed{seed}"}}
        for seed in (0, 1, 11)
    ]
    table = Students.of(records, predictions(records, [0.5] * 3)).table
    wanted = "more_teachers=chain-SEED=0.5, student=run/black_box_seedSEED"
    assert table["setting"].unique().tolist() == [wanted]


def test_one_seed_tests_nothing():
    records = [record(0, 2, **CUT), record(0, 2, **CUT, distill_type="task_only")]
    table = contrasts.contrasts(Students.of(records, predictions(records, [0.9, 0.1])))
    assert table["outcome"].tolist() == ["not tested"]


def test_students_of_an_earlier_round_do_not_count():
    rounds = [record(0, r, **CUT, rounds=2, round=r, epochs=4) for r in (1, 2)]
    students = Students.of(rounds, predictions(rounds, [0.5, 0.5]))
    assert students.table["ratio"].tolist() == [2.0] and len(students.correct) == 1


def test_older_records_are_refused_with_the_remedy():
    records = [record(0, 2, **CUT)]
    answered = predictions(records, [0.5])
    for made, table in (
        ([records[0] | {"sizes": {}}], answered),
        (records, answered.drop(columns="teacher_correct")),
    ):
        with pytest.raises(ValueError, match="run the sweep again, or set run_dir to another run"):
            Students.of(made, table)


def test_bits_retention():
    assert retained.bits_retention(2.0, 1.0, 0.5) == pytest.approx(2 / 3)
    assert retained.bits_retention(2.0, 0.5, 0.5) == 1


def test_other_swept_parameters_are_settings_and_no_seeds():
    records = [
        record(seed, 2, **CUT, temperature=t) | {"swept": {"seed": seed, "temperature": t}}
        for t in (1.0, 4.0)
        for seed in range(2)
    ]
    for made in records:
        made["config"]["trial"] += str(made["config"]["temperature"])[0]
    found = retained.retained(Students.of(records, predictions(records, [0.9, 0.9, 0.5, 0.5])))
    assert found["n"].tolist() == [2, 2]
    assert found["setting"].tolist() == ["temperature=1", "temperature=4"]


def test_shapes_are_what_they_are_and_not_how_they_were_asked_for():
    records = [record(0, 2, **CUT), record(1, 2, **(CUT | {"keep_mlp": "0.5"}))]
    assert (
        retained.retained(Students.of(records, predictions(records, [0.9, 0.8])))["n"].item() == 2
    )


def test_trials_of_another_teacher_or_other_rows_are_refused():
    records = [record(seed, 2, **CUT) | {"cache": {"content_hash": "a"}} for seed in range(2)]
    answered = predictions(records, [0.5, 0.6])
    assert len(Students.of(records, answered, cache="a").table) == 2
    with pytest.raises(ValueError, match="from another cache .* set name, teacher and tokenizer"):
        Students.of(records, answered, cache="b")
    with pytest.raises(ValueError, match="did not answer the same rows"):
        Students.of(records, answered.iloc[:-1])
