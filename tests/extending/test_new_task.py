"""A new task is one file: ARC-easy, with choices of its own in every row, from rows to retention.

The task below is what a file in `kd_utils/data/tasks/` would hold, with `TASK` as its name; here it
is registered from outside the package. Nothing else changes.
"""

import pandas as pd
import pytest
from tiny import tiny_model, tiny_tokenizer

from kd_utils.analysis import comparisons, retention, tables
from kd_utils.analysis.words import formatting
from kd_utils.config.stages import DataConfig
from kd_utils.data import leakage
from kd_utils.data.drawing import prepare
from kd_utils.data.prepared_data import load_prepared, save_prepared, why_stale
from kd_utils.data.task_rows import load_task
from kd_utils.data.tasks import TASKS, find_task, register
from kd_utils.data.tasks.base import Row, Task
from kd_utils.evaluation import calibration
from kd_utils.evaluation.scoring import accuracies, evaluate, evaluate_folder
from kd_utils.tokens.encoding import encode_table

# --- the file --------------------------------------------------------------------------------


def problem(row: Row) -> str:
    """What is wrong with the choices; "" for nothing."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    if len(texts) != len(labels) or row["answerKey"] not in labels:
        return f"answerKey = {row['answerKey']!r}, expected a label of {len(texts)} texts"
    return ""


TASK = Task(
    name="arc_easy",
    hub=("allenai/ai2_arc", "ARC-Easy"),
    columns=("question", "choices", "answerKey"),
    texts=("question", "answerKey"),
    splits={"train": "train", "validation": "test", "shots": "train"},
    chance=1 / 4,  # a few rows have 3 or 5 choices
    prompt=lambda row: f"Question: {row['question']}\nAnswer:",
    choices_of=lambda row: [f" {text}" for text in row["choices"]["text"]],
    gold=lambda row: str(row["choices"]["label"].index(row["answerKey"])),
    problem=problem,
)

# --- end of the file ---------------------------------------------------------------------------

TOKENIZER = tiny_tokenizer(begin=True)
THINGS = ["star", "moon", "rock", "plant", "fish", "bird", "lake", "wind", "metal", "seed"]


def arc_rows(count: int, first: int) -> pd.DataFrame:
    """Rows as the hub has them, with 3 to 5 choices, lettered or numbered."""
    rows = []
    for number in range(first, first + count):
        size = 3 + number % 3
        labels = list("ABCDE" if number % 2 else "12345")[:size]
        texts = [THINGS[(number + place) % len(THINGS)] for place in range(size)]
        rows.append(
            {
                "id": f"Mercury_{number}",
                "question": f"Which of these is thing number {number} of the {texts[0]}?",
                "choices": {"text": texts, "label": labels},
                "answerKey": labels[number % size],
            }
        )
    return pd.DataFrame(rows)


@pytest.fixture
def folder(tmp_path):
    for split, rows in (("train", arc_rows(40, 0)), ("test", arc_rows(30, 100))):
        path = tmp_path / "data" / "arc_easy" / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(path, index=False)
    register(TASK)
    yield tmp_path / "data"
    del TASKS["arc_easy"]


def config(folder, **changes):
    values = dict(
        name="arc",
        artifacts_dir="artifacts",
        build="none",
        data_dir=str(folder),
        tokenizer="a/hub-model",
        max_length=200,
        data_seed=0,
        train_rows="arc_easy:30",
        held_out_rows=5,
        validation_rows="arc_easy:24",
    )
    return DataConfig(**{**values, **changes})


def test_from_rows_to_retention(folder, tmp_path):
    prepared = prepare(config(folder), TOKENIZER)
    place = save_prepared(prepared, tmp_path / "arc")
    loaded = load_prepared(place)
    assert loaded.data_hash == prepared.data_hash and why_stale(place, config(folder)) == ""
    train, validation = loaded.train, loaded.validation
    assert set(train["choices"].map(len)) == {3, 4, 5}
    first = validation.iloc[0]
    assert first["answer"] == first["choices"][int(first["gold"])]

    overlap = leakage.near_overlap(train, validation)
    leakage.require_no_leak(leakage.overlap_by_task(train, validation, overlap))
    shots = leakage.few_shot_rows(str(folder), ["arc_easy"])
    leakage.require_unseen_shots(leakage.few_shot_overlap(shots, loaded.tables))
    balance = leakage.label_balance(train, validation)
    assert balance["label"].tolist() == [f"choice {number}" for number in range(5)]
    assert balance["train"].sum() == pytest.approx(1)
    blind = leakage.baselines(train, validation).set_index("task")["random"]
    assert blind["arc_easy"] == pytest.approx((1 / validation["choices"].map(len)).mean())

    examples = encode_table(TOKENIZER, train)
    assert all(0 < row.answer_start < len(row.tokens) for row in examples)

    said = {
        seed: evaluate(tiny_model(TOKENIZER, seed=seed), TOKENIZER, validation, batch_size=8)
        for seed in range(4)
    }
    assert said[0]["loglikelihoods"].map(len).tolist() == validation["choices"].map(len).tolist()
    assert said[0]["generated"].isna().all()
    assert set(accuracies(said[0])) == {
        f"validation_accuracy{name}" for name in ("", "/macro", "/arc_easy")
    }
    [(name, error)] = calibration.calibration_errors(said[0]).items()
    assert name == "calibration_error/arc_easy" and 0 <= error <= 1

    results = pd.DataFrame(
        {
            "trial": f"{method}_seed{seed}",
            "config/distill_type": method,
            "config/seed": seed,
            "status": "done",
            **accuracies(said[seed + shift]),
        }
        for method, shift in (("task_only", 0), ("black_box", 2))
        for seed in range(2)
    )
    predictions = pd.concat(
        said[seed + shift].assign(trial=f"{method}_seed{seed}", distill_type=method)
        for method, shift in (("task_only", 0), ("black_box", 2))
        for seed in range(2)
    )
    assert tables.tasks_of(results) == ["arc_easy"]
    assert comparisons.Answers(results, predictions).metrics == ["macro", "micro", "arc_easy"]
    assert len(calibration.reliability_by_method(predictions))
    teacher = {"validation_accuracy/arc_easy": 0.75}
    kept = retention.retention(results, teacher)
    mean = results["validation_accuracy/arc_easy"][:2].mean()
    assert kept["retention"][0] == pytest.approx((mean - 0.25) / 0.5)
    [heading] = formatting.retention(kept).columns
    assert heading == "arc_easy (teacher 75.0, chance 25)"


def test_beside_the_others_it_comes_last_and_is_scored_from_the_command(folder, tmp_path):
    assert list(TASKS)[:3] == ["sst2", "mmlu", "gsm8k"] and list(TASKS)[-1] == "arc_easy"
    tiny_model(TOKENIZER).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    out = tmp_path / "out.parquet"
    evaluate_folder(tmp_path / "model", "arc_easy", "test", out, data_dir=folder, num_fewshot=2)
    written = pd.read_parquet(out)
    assert len(written) == 30 and written["loglikelihoods"].map(len).max() == 5
    assert written["prompt"][0].count("Answer:") == 3


def test_what_is_wrong_with_it_is_one_line(folder):
    path = folder / "arc_easy" / "test.parquet"
    arc_rows(30, 100).assign(answerKey="Z").to_parquet(path)
    with pytest.raises(ValueError, match="test.parquet, row 0: answerKey = 'Z', expected a label"):
        load_task("arc_easy", "test", data_dir=folder)
    with pytest.raises(ValueError, match="task name 'arc_easy' is taken"):
        register(TASK)
    with pytest.raises(ValueError, match="unknown task 'arc': choose one of sst2, .*arc_easy"):
        find_task("arc")
    with pytest.raises(ValueError, match="unknown task 'arc': choose one of sst2, mmlu, gsm8k"):
        prepare(config(folder, train_rows="arc:3"), TOKENIZER)
