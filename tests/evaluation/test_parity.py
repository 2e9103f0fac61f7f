"""What `make parity` does, in small: lm-evaluation-harness and `evaluate` on the same model and
rows.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from tiny import tiny_model, tiny_tokenizer

from kd_utils.data import tasks
from kd_utils.demos import toy, toy_models
from kd_utils.evaluation.scoring import evaluate_folder
from kd_utils.models.loading import save_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import lm_eval_parity as parity  # noqa: E402  (no package: a script of its own)

HARNESS = ROOT / ".venv-lm-eval" / "bin"
#: Golds of the GSM8K rows: numbers that the models made here write at times, so that there are
#: right answers.
GOLDS = ("5", "5", "1224")
SETTINGS = ((1, "left"), (4, "right"), (4, "left"))
NAMES = ("begin", "no-begin")


@pytest.fixture(scope="module")
def harness():
    if not (HARNESS / "python").exists():
        message = "needs lm-evaluation-harness in .venv-lm-eval: run `make lm-eval`"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return HARNESS / "python"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The toy's rows; one real MMLU subject among its own, for which the harness has a task
    file.
    """
    folder = tmp_path_factory.mktemp("data")
    for name, rows in toy.generate(1).items():
        if name == "gsm8k/test":
            rows = [row | {"answer": f"#### {GOLDS[place % 3]}"} for place, row in enumerate(rows)]
        if name.startswith("mmlu"):
            real = {"world_cities": "high_school_geography"}
            rows = [row | {"subject": real.get(row["subject"], row["subject"])} for row in rows]
        (folder / name).parent.mkdir(exist_ok=True)
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet", index=False)
    return folder


def toy_tokenizer(begin):
    """The toy's word-level tokenizer, which adds no special token, or the same with `<s>` put
    before every text.
    """
    from tokenizers import processors

    words = [
        str(value)
        for rows in toy.generate(1).values()
        for row in rows[:200]
        for value in row.values()
    ]
    tokenizer = toy_models.build_tokenizer([*words, *parity.PHRASES, *toy_models.PHRASES])
    if begin:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    assert (tokenizer.encode("a")[0] == tokenizer.bos_token_id) == begin
    return tokenizer


@pytest.fixture(scope="module")
def cases(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [
        parity.Case(
            name,
            parity.make_model(toy_tokenizer(name == "begin"), folder / name, seed=20),
            data,
            {"sst2": 12, "mmlu": 3, "gsm8k": 12},
            max_new_tokens=40,
        )
        for name in NAMES
    ]


@pytest.fixture(scope="module")
def compared(harness, cases):
    """All runs of both models through both sides, once for all tests: what failed, and what the
    harness said.
    """
    said = []
    with pytest.MonkeyPatch.context() as patch:
        run = parity.run_lm_eval
        patch.setattr(parity, "run_lm_eval", lambda *given: said.extend(run(*given)) or said)
        failed = parity.check(cases, harness, kd_utils_settings=SETTINGS)
    return failed, said


def said_of(said, name, task, shots):
    """The harness's records of one run, one by one (its first setting)."""
    return said[
        (NAMES.index(name) * len(parity.RUNS) + parity.RUNS.index((task, shots)))
        * len(parity.LM_EVAL_SETTINGS)
    ]


def kd_utils_of(case, model, tmp_path, task="sst2"):
    job = {
        "data": case.data,
        "task": task,
        "limit": case.limits[task],
        "shots": 0,
        "batch_size": 4,
        "max_new_tokens": case.max_new_tokens,
    }
    return parity.kd_utils_records(model, job, tmp_path)


def test_every_prediction_is_the_harnesss_and_none_of_it_is_trivial(compared):
    failed, said = compared
    assert failed == []
    for name in NAMES:
        rows = [len(said_of(said, name, *run)) for run in parity.RUNS]
        assert rows == [12, 9, 9, 12, 12]
        assert {record["prediction"] for record in said_of(said, name, "sst2", 0)} == {0, 1}
    generated = [
        record
        for name in NAMES
        for shots in (0, 5)
        for record in said_of(said, name, "gsm8k", shots)
    ]
    for key in ("correct", "correct_flexible"):
        assert {record[key] for record in generated} == {True, False}, key
    for key in ("prediction", "flexible"):
        assert {"[invalid]", "5", "1,224"} <= {record[key] for record in generated}, key
    assert any(record["flexible"] != record["prediction"] != "[invalid]" for record in generated)


def test_a_tokenizer_that_adds_no_begin_token_where_the_other_side_does_is_reported(
    compared, cases, tmp_path
):
    said, case = compared[1], cases[0]
    model = parity.padded_on(case.model, "left", tmp_path / "model")
    whole = json.loads((model / "tokenizer.json").read_text())
    assert whole["post_processor"]["type"] == "TemplateProcessing"
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").write_text(json.dumps(whole | {"post_processor": None}))
    for task in ("sst2", "gsm8k"):
        lm_eval = said_of(said, "begin", task, 0)
        assert not parity.compare(lm_eval, kd_utils_of(case, case.model, tmp_path, task))["differ"]
        result = parity.compare(lm_eval, kd_utils_of(case, model, tmp_path, task))
        assert len(result["differ"]) >= 3
    assert "generated: lm-eval" in str(result["differ"])


def test_another_prompt_is_reported(compared, cases, tmp_path, monkeypatch):
    task = tasks.TASKS["sst2"]
    changed = dataclasses.replace(
        task, prompt=lambda row: task.prompt(row).replace("Answer:", "Answer: ")
    )
    monkeypatch.setitem(tasks.TASKS, "sst2", changed)
    result = parity.compare(
        said_of(compared[1], "begin", "sst2", 0), kd_utils_of(cases[0], cases[0].model, tmp_path)
    )
    assert len(result["differ"]) == result["rows"] == 12
    assert result["differ"][0].startswith("prompt: lm-eval '")


def test_a_difference_on_the_harnesss_side_fails_the_run(compared, cases, monkeypatch, capsys):
    altered = copy.deepcopy(compared[1][:2])
    altered[1][3]["loglikelihoods"][0] += 3e-4
    monkeypatch.setattr(parity, "run_lm_eval", lambda *given: altered)
    failed = parity.check(cases[:1], "", runs=(("sst2", 0),), kd_utils_settings=((4, "left"),))
    assert (
        len(failed) == 1
        and "begin, sst2 0-shot, batch 4, padding left: 1 of 12 rows differ; row 3" in failed[0]
    )
    assert "3.0e-04" in capsys.readouterr().out
    monkeypatch.setattr(parity, "check", lambda *given: failed)
    where = [
        "--lm-eval-python",
        sys.executable,
        "--model",
        str(cases[0].model),
        "--data",
        str(cases[0].data),
    ]
    assert parity.main(where) == 1
    assert f"DIFFERENT: {failed[0]}" in capsys.readouterr().out
    failed.clear()
    assert parity.main(where) == 0


@pytest.mark.parametrize(
    "changed, why",
    [
        (
            {"loglikelihoods": [-1.0, -2.0002]},
            "loglikelihoods: lm-eval [-1.0, -2.0], kd_utils [-1.0, -2.0002]",
        ),
        ({"loglikelihoods": [-1.0, float("nan")]}, "loglikelihoods"),
        ({"prediction": 1}, "prediction: lm-eval 0, kd_utils 1"),
        ({"correct": False}, "correct: lm-eval True, kd_utils False"),
        ({"row": 8}, "only lm-eval has it"),
    ],
)
def test_compare_sees_each_kind_of_difference(changed, why):
    record = {
        "row": 7,
        "prompt": "a",
        "loglikelihoods": [-1.0, -2.0],
        "prediction": 0,
        "correct": True,
    }
    assert parity.compare([record], [record]) == {"rows": 1, "worst": 0.0, "differ": {}}
    near = record | {"loglikelihoods": [-1.00005, -2.0]}
    assert not parity.compare([record], [near])["differ"]
    assert parity.compare([record], [record | changed])["differ"][7].startswith(why)


def test_rows_for_which_the_harness_contradicts_itself_are_held_to_what_it_says_one_by_one():
    alone = [{"row": 1, "generated": "a"}, {"row": 2, "generated": "b"}]
    assert (
        parity.without_own_differences(alone, [alone[0], {"row": 2, "generated": "b c"}])
        == alone[:1]
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --lm-eval-python"),
        (["--lm-eval-python", sys.executable, "--model", "nowhere"], "no model in nowhere"),
        (["--lm-eval-python", sys.executable, "--data", "somewhere"], "--data goes with --model"),
    ],
)
def test_wrong_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parity.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_missing_data_is_named(cases, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parity.main(
            [
                "--lm-eval-python",
                sys.executable,
                "--model",
                str(cases[0].model),
                "--data",
                str(tmp_path),
            ]
        )
    assert f"no file {tmp_path}/sst2/validation.parquet" in capsys.readouterr().err


def test_a_saved_students_folder_goes_straight_into_lm_eval(harness, data, tmp_path):
    """As a user would call it, on rows of a folder; the README's example is this command."""
    tokenizer = tiny_tokenizer(begin=True)
    save_model(tiny_model(tokenizer), tokenizer, tmp_path / "student")
    (tmp_path / "sst2_here.yaml").write_text(f"""task: sst2_here
dataset_path: parquet
dataset_kwargs:
  data_files:
    train: {data}/sst2/train.parquet
    validation: {data}/sst2/validation.parquet
output_type: multiple_choice
training_split: train
validation_split: validation
doc_to_text: "{{{{sentence}}}}\\nQuestion: Is this sentence positive or negative?\\nAnswer:"
doc_to_target: label
doc_to_choice: ["negative", "positive"]
metric_list: [{{metric: acc}}]
""")
    command = [
        harness.parent / "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tmp_path / 'student'}",
        "--tasks",
        "sst2_here",
        "--include_path",
        tmp_path,
        "--limit",
        "20",
        "--batch_size",
        "8",
        "--device",
        "cpu",
        "--output_path",
        tmp_path / "out",
    ]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [written] = (tmp_path / "out").rglob("results_*.json")
    table = evaluate_folder(
        tmp_path / "student", "sst2", "validation", tmp_path / "o.parquet", data_dir=data, limit=20
    )
    assert (
        json.loads(written.read_text())["results"]["sst2_here"]["acc,none"]
        == table["correct"].mean()
    )
