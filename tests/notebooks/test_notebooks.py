"""The notebooks, really executed: a small sweep through Ray and papermill, and 03 by papermill
alone.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from kd_utils.__main__ import main
from kd_utils.config.notebook_files import notebook_path
from kd_utils.config.project_paths import ROOT
from kd_utils.config.stages import NOTEBOOKS
from kd_utils.records.run_folder import trial_predictions
from kd_utils.records.trial_record import read_record
from kd_utils.speed.meters import GOALS

SMALL = {
    "train_rows": "sst2:24 mmlu:16 gsm8k:16",
    "labelled": 1,
    "held_out_rows": 6,
    "validation_rows": "sst2:9 mmlu:8 gsm8k:7",
    "teacher_epochs": 1,
    "shard_examples": 20,
    "epochs": 2,
    "batch_size": 8,
    "micro_batch_size": 3,
    "max_new_tokens": 8,
}
ATTENTION = "attention_seed0_gamma_attention=0.1"  # the default weight, in a grid that sweeps it
TRIALS = [
    ATTENTION,
    "attention_seed0_gamma_attention=10.0",
    "black_box_seed0",
    "task_only_seed0",
    "untrained_seed0",
]
TOY = "2026-11-29-toy"  # the kept record of the whole toy
WORLDS = "2026-11-29-toy-worlds"  # and of seven of its worlds
PAPERMILL = ROOT / "tests" / "papermill_cli.py"
GRID = "distill_type: [untrained, task_only, black_box, attention]\ngamma_attention: [0.1, 10.0]\nseed: [0]\n"


def run(home, command, *arguments, **env):
    what = ["-m", command] if isinstance(command, str) else [command]
    return subprocess.run(
        [sys.executable, *map(str, [*what, *arguments])],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "KD_ROOT": str(home), "OMP_NUM_THREADS": "1", **env},
    )


def evaluated(home, model, task, split, out, *more):
    """`python -m kd_utils evaluate`, in this process."""
    where = ("--data-dir", home / "artifacts/embedded/toy/data", "--out", out)
    what = ["evaluate", model, "--task", task, "--split", split, *where, *more]
    assert main(list(map(str, what))) == 0


def with_prompts(home, predictions):
    """Predictions of a trial with the prompts of the prepared data beside them."""
    prepared = pd.read_parquet(home / "artifacts/data/toy/validation.parquet")
    return predictions.merge(prepared[["example_id", "prompt"]], on="example_id")


@pytest.fixture(scope="module")
def home(tmp_path_factory, with_toy):
    """A project root of its own (KD_ROOT), with one finished sweep of five trials."""
    home = tmp_path_factory.mktemp("home")
    with_toy(home)
    (home / "small.yaml").write_text("\n".join(f"{key}: {value}" for key, value in SMALL.items()))
    (home / "grid.yaml").write_text(GRID)
    done = run(home, "kd_utils", "sweep", home / "small.yaml", "--grid", home / "grid.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (home / "stdout").write_text(done.stdout)
    return home


def test_the_sweep_leaves_whole_records_and_a_results_table(home):
    toy = home / "runs" / "toy"
    assert {
        "01_prepare_data.ipynb",
        "02_cache_teacher.ipynb",
        "04_analyse_results.ipynb",
        "results_summary.csv",
        "analysis.csv",
        "comparisons.csv",
        "verdict.txt",
        "sweep.json",
        "trials",
    } <= {path.name for path in toy.iterdir()}
    assert sorted(path.stem for path in (toy / "trials").glob("*.ipynb")) == TRIALS
    table = pd.read_csv(toy / "results_summary.csv")
    assert table["status"].tolist() == ["done"] * 5
    means = table.groupby("config/distill_type")["validation_accuracy"].agg(["mean", "std"])
    assert means["mean"].between(0, 1).all()
    assert sorted(means.index) == ["attention", "black_box", "task_only", "untrained"]
    assert {
        "validation_loss",
        "validation_loss/kd",
        "validation_accuracy/gsm8k",
        "config/seed",
        "weight/attention",
        "calibration_error/mmlu",
    } <= set(table.columns)
    assert table.set_index("trial")["config/gamma_attention"].dropna().to_dict() == {
        TRIALS[0]: 0.1,
        TRIALS[1]: 10.0,
    }
    check = run(home, "kd_utils", "check", toy)
    assert (check.returncode, check.stdout.strip()) == (0, "5 of 5 trials whole")
    shown = (home / "stdout").read_text()
    assert (toy / "verdict.txt").read_text() in shown and "runs/toy" in shown
    assert "Do white-box signals help beyond logits?\n  [gamma_attention=0.1] Not tested." in shown
    assert (
        "1 of 1 pairs are done and a test needs two" in shown and "5 of 5 trials are done." in shown
    )


def test_run_again_it_does_only_what_is_missing(home):
    toy = home / "runs" / "toy"
    dry = run(
        home, "kd_utils", "sweep", home / "small.yaml", "--grid", home / "grid.yaml", "--dry-run"
    )
    assert "5 of 5 trials are done, 0 to run" in dry.stdout
    (home / "changed.yaml").write_text((home / "small.yaml").read_text() + "\nbeta: 0.25\n")
    changed = run(
        home,
        "kd_utils",
        "sweep",
        home / "changed.yaml",
        "--grid",
        home / "grid.yaml",
        "--dry-run",
        "--run-dir",
        toy,
    )
    # Beta weighs the logits' term, which two of the five trials do not have.
    assert changed.stdout.count("stale") == 3 and "2 of 5 trials are done" in changed.stdout


def test_executed_notebooks_hold_figures_and_no_path_of_the_machine(home):
    for path in (home / "runs" / "toy").rglob("*.ipynb"):
        text = path.read_text()
        assert str(home) not in text and str(ROOT) not in text and "/ipykernel" not in text, (
            path.name
        )
        assert len(text) < 700_000, f"{path.name} is {len(text):,} bytes"
    analysis = (home / "runs" / "toy" / "04_analyse_results.ipynb").read_text()
    assert analysis.count('"image/png"') >= 4


def test_02_and_03_say_their_cost_and_what_fits_before_they_start(home):
    toy = home / "runs" / "toy"
    for path, number in (
        (toy / "02_cache_teacher.ipynb", "02"),
        (toy / "trials" / f"{ATTENTION}.ipynb", "03"),
    ):
        said = [
            output["text"]
            for cell in nbformat.read(path, as_version=4).cells
            for output in cell.get("outputs", [])
            if "memory at most about" in output.get("text", "")
        ]
        assert len(said) == 1 and re.search(r"disk \d.* free\)", said[0])
        assert "what fits on a card" in said[0] and f"{number}: eval_batch_size" in said[0]
        assert all(f"{card} GB  " in said[0] for card in (16, 24, 40, 80))


def test_trials_of_one_seed_are_paired(home):
    """Same batches in the same order: before the first step both methods have the same losses on
    the same batch.
    """
    pair = (ATTENTION, "black_box_seed0")
    records = [
        json.loads((home / "runs/toy/trials" / trial / "metrics.json").read_text())
        for trial in pair
    ]
    predictions = [trial_predictions(home / "runs/toy/trials" / trial) for trial in pair]
    assert predictions[0]["example_id"].tolist() == predictions[1]["example_id"].tolist()
    assert (
        records[0]["cache"] == records[1]["cache"]
        and records[0]["config"]["seed"] == records[1]["config"]["seed"]
    )
    assert set(records[0]["epochs"][0]) - set(records[1]["epochs"][0]) == {
        "train_loss/attention",
        "held_out_loss/attention",
        "grad_share/attention",
        "weight/attention",
    }
    # The attention term moves the student by a little, so the task losses stay close and yet
    # differ.
    one, other = (record["epochs"][-1]["train_loss/task"] for record in records)
    assert one == pytest.approx(other, rel=0.05) and one != other


def test_the_untrained_student_has_the_weights_that_every_trial_starts_from(home):
    folder = home / "runs/toy/trials"
    [row] = json.loads((folder / "untrained_seed0" / "metrics.json").read_text())["epochs"]
    assert row["epoch"] == 0 and "train_loss" not in row
    out = home / "untrained.parquet"
    evaluated(home, home / "artifacts/embedded/toy/student", "sst2", "validation", out)
    mine = trial_predictions(folder / "untrained_seed0").query("task == 'sst2'")
    both = with_prompts(home, mine).merge(pd.read_parquet(out), on="prompt")
    assert len(both) == len(mine) == 9
    for one, other in zip(both["loglikelihoods_x"], both["loglikelihoods_y"]):
        assert list(one) == pytest.approx(list(other), abs=1e-4)


@pytest.mark.parametrize("comparisons", [3, 0])
def test_04_reads_a_kept_record_and_leaves_it_alone(tmp_path, comparisons):
    """All methods at seven seeds; and one method's trials, which leave nothing to compare."""
    record = tmp_path / "runs" / TOY
    shutil.copytree(ROOT / "runs" / TOY, record)
    if not comparisons:
        (record / "sweep.json").unlink()
        for path in record.glob("trials/*"):
            if not path.name.startswith("task_only"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    out = tmp_path / "04.ipynb"
    done = run(
        tmp_path,
        PAPERMILL,
        notebook_path("04_analyse_results"),
        out,
        "-p",
        "name",
        "toy",
        "--no-progress-bar",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compared = pd.read_csv(tmp_path / "artifacts" / "analysis" / TOY / "comparisons.csv")
    white_box = compared[(compared["question"] == "white_box") & (compared["metric"] == "macro")]
    assert len(white_box) == comparisons and white_box["p_holm"].between(3 * 2 / 2**7, 1).all()
    assert (white_box["low"] < white_box["difference"]).all() and (white_box["pairs"] == 7).all()
    text = out.read_text()
    assert text.count('"image/png"') >= 5
    assert ("There is no pair of trials to compare." in text) == (not comparisons)
    assert {path: path.read_bytes() for path in before} == before


def test_12_reads_a_kept_record_and_leaves_it_alone(tmp_path):
    record = tmp_path / "runs" / WORLDS
    shutil.copytree(ROOT / "runs" / WORLDS, record)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    out = tmp_path / "12.ipynb"
    done = run(tmp_path, PAPERMILL, notebook_path("12_compare_worlds"), out, "--no-progress-bar")
    assert done.returncode == 0, done.stderr[-3000:]
    compared = tmp_path / "artifacts" / "analysis" / WORLDS / "comparisons.csv"
    kept = (record / "comparisons.csv").read_text().splitlines()
    asked = {line.split(",")[0] for line in kept}  # some questions are newer than the record
    found = compared.read_text().splitlines()
    assert [line for line in found if line.split(",")[0] in asked] == kept and len(kept) > 20
    assert out.read_text().count('"image/png": "iVBOR') == 2
    assert {path: path.read_bytes() for path in before} == before


def test_09_cuts_the_cached_teacher_and_distils_one_cut(home):
    out = home / "09.ipynb"
    small = ("-f", home / "small.yaml", "-p", "random_draws", "2")
    done = run(home, PAPERMILL, notebook_path("09_prune"), out, *small, "--no-progress-bar")
    assert done.returncode == 0, done.stderr[-3000:]
    [trial] = (
        path for path in (home / "runs" / "explore-cut" / "trials").iterdir() if path.is_dir()
    )
    record = read_record(trial)
    assert record["config"]["student_init"] == "pruned" and record["epochs"][-1]["epoch"] == 2
    sizes = record["sizes"]
    assert sizes["student"]["non_embedding"] < 0.8 * sizes["teacher"]["non_embedding"]
    text = out.read_text()
    assert text.count('"image/png": "iVBOR') == 5 and "unigram" in text
    answers = trial_predictions(trial)
    assert answers["teacher_correct"].dtype == bool and len(answers) == 24


def test_09_reads_a_run_of_cuts_against_their_size(home):
    (home / "cut.yaml").write_text((home / "small.yaml").read_text() + "\nstudent: teacher\n")
    (home / "cuts.yaml").write_text(
        "distill_type student_init: [[black_box, pruned], [task_only, pruned], [black_box, random],"
        " [black_box, svd]]\nkeep_mlp: [96]\nstudent_width: [48]\nseed: [0, 1]\n"
    )
    where = ("--grid", home / "cuts.yaml", "--run-dir", home / "runs" / "cuts")
    done = run(home, "kd_utils", "sweep", home / "cut.yaml", *where, "--executor", "local")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    given = ("-f", home / "small.yaml", "-p", "random_draws", "1", "-p", "run_dir", "runs/cuts")
    out = home / "09-cuts.ipynb"
    done = run(home, PAPERMILL, notebook_path("09_prune"), out, *given, "--no-progress-bar")
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(home / "runs" / "cuts" / "retention.csv", keep_default_na=False)
    assert sorted(table["start"]) == ["pruned minitron", "pruned minitron", "random", "svd weights"]
    assert set(table["n"]) == {2} and set(table["shape"]) == {"mlp=96", "width=48"}
    assert (table["tokens_per_second"].astype(float) > 0).all()
    compared = pd.read_csv(home / "runs" / "cuts" / "contrasts.csv")
    assert compared["baseline"].tolist() == ["pruned minitron + task_only", "random + black_box"]
    assert (compared["seeds"] == 2).all()
    in_text = pd.read_csv(home / "runs" / "cuts" / "text_retention.csv")
    assert len(in_text) == 4 and in_text["bits"].between(0.1, 20).all()
    assert (in_text["n"] == 2).all() and (in_text["low"] < in_text["high"]).all()
    check = run(home, "kd_utils", "check", home / "runs" / "cuts")
    assert check.returncode == 0, check.stdout


def test_07_reads_nothing_and_judges_the_published_claim(tmp_path):
    out = tmp_path / "07.ipynb"
    notebook = notebook_path("07_published_claim")
    done = run(tmp_path / "home", PAPERMILL, notebook, out, "--no-progress-bar")
    assert done.returncode == 0, done.stderr[-3000:]
    text = out.read_text()
    assert "not supported" in text and text.count('"image/png": "iVBOR') == 1
    assert not (tmp_path / "home").exists()


@pytest.fixture(scope="module")
def by_hand(home):
    """03 by papermill alone, with the parameter file that serves all notebooks."""
    out = home / "out.ipynb"
    done = run(
        home,
        PAPERMILL,
        notebook_path("03_train_student"),
        out,
        "-f",
        home / "small.yaml",
        "-p",
        "distill_type",
        "attention",
        "-p",
        "seed",
        "0",
        "--no-progress-bar",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "runs" / "explore" / "trials" / "attention_seed0"


def test_papermill_alone_repeats_the_sweeps_trial_to_the_last_digit(home, by_hand):
    sweep = home / "runs" / "toy" / "trials" / ATTENTION
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (by_hand, sweep))
    timing = ("seconds", "tok_per_sec")
    for mine, theirs in zip(one["epochs"], other["epochs"], strict=True):
        mine, theirs = ({k: v for k, v in row.items() if k not in timing} for row in (mine, theirs))
        assert mine == theirs
    pd.testing.assert_frame_equal(*(trial_predictions(folder) for folder in (by_hand, sweep)))


def test_the_saved_student_is_evaluated_as_it_was_in_its_trial(home):
    student = home / "artifacts" / "students" / "toy" / ATTENTION
    predictions = trial_predictions(home / "runs/toy/trials" / ATTENTION)
    for task, split in (("sst2", "validation"), ("mmlu", "test"), ("gsm8k", "test")):
        out = home / f"{task}.parquet"
        limits = ("--max-new-tokens", SMALL["max_new_tokens"], "--precision", "auto")
        evaluated(home, student, task, split, out, *limits)
        table = pd.read_parquet(out)
        assert {"row", "prompt", "gold", "prediction", "correct"} <= set(table.columns)
        mine = with_prompts(home, predictions[predictions["task"] == task])
        both = mine.merge(table, on="prompt", suffixes=("", "_folder"))
        assert len(both) == (predictions["task"] == task).sum()
        assert both["correct"].tolist() == both["correct_folder"].tolist()
        if task == "gsm8k":
            assert both["generated"].tolist() == both["generated_folder"].tolist()
        else:
            for mine, theirs in zip(both["loglikelihoods"], both["loglikelihoods_folder"]):
                assert list(mine) == pytest.approx(list(theirs), abs=1e-4)


def test_verify_looks_at_the_cache(home, capsys):
    [cache] = (home / "artifacts" / "cache").glob("toy-*")
    assert main(["verify", str(cache)]) == 0
    shard = next(cache.glob("train-*.parquet"))
    original = shard.read_bytes()
    shard.write_bytes(original[:-1])
    status = main(["verify", str(cache)])
    shard.write_bytes(original)
    assert status == 1 and shard.name in capsys.readouterr().err


@pytest.mark.parametrize(
    "parameter, message",
    [
        (
            ("-p", "temprature", "3.0"),
            "no notebook has a parameter 'temprature'; did you mean 'temperature'?",
        ),
        (("-p", "beta", "-1"), "beta = -1: Input should be greater than or equal to 0"),
        (("-p", "name", "nothing"), "run 01_prepare_data again"),
    ],
)
def test_03_refuses_bad_parameters_before_any_model_is_loaded(home, tmp_path, parameter, message):
    out = tmp_path / "out.ipynb"
    done = run(
        home, PAPERMILL, notebook_path("03_train_student"), out, *parameter, "--no-progress-bar"
    )
    assert done.returncode != 0 and message in done.stderr
    executed = [
        cell
        for cell in nbformat.read(out, 4).cells
        if cell.cell_type == "code" and cell.execution_count
    ]
    assert not any(
        "load_causal_lm(" in cell.source and "import" not in cell.source for cell in executed
    )


def test_05_measures_and_leaves_a_record(tmp_path):
    (tmp_path / "small.yaml").write_text(
        "shapes: tiny\nbench_rows: 16\nsize_rows: 7\ngrowth_rows: 20\nrepeats: 1\nsweep_trials: 0\n"
        "trial_rows: 21\ntrial_epochs: 2\ngenerate_prompts: 2\nmax_new_tokens: 8\n"
        "budget_tokens: 512\ncompile_backend: eager\n"
    )
    done = run(tmp_path, "kd_utils", "bench", tmp_path / "small.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "runs/bench/speed.json").read_text())
    assert set(GOALS) - {"sweep_overhead_s", "trial_start_vs_imports"} <= {
        key for key, value in record.items() if isinstance(value, float)
    }
    assert {"device", "shapes", "commit", "limits"} <= set(record) and set(record["limits"]) <= set(
        record
    )
    assert record["complete"] and not record["left_out"] and len(record["epochs"]) == 2
    page = (ROOT / "docs" / "speed.md").read_text()
    [table] = re.findall(r"(?s)the paper's work \(`key` in .*?\n\n", page)
    papers = set(re.findall(r"\(`(\w+)`\)", table))
    if "liger_vs_kd_loss" not in record:
        assert record["liger"].startswith("not installed")
        papers.remove("liger_vs_kd_loss")
    assert len(papers) >= 10 and all(record[key] > 0 for key in papers)
    assert set(record["parts"]) > {"wait", "body", "kd", "attention", "backward", "clip and step"}
    assert (
        record["cache_bytes_vs_naive"] <= 0.018 and record["cache_bytes_vs_naive/compact"] <= 0.013
    )
    assert (
        record["cache_grad_cosine"] >= 0.998
    )  # tiny maps are nearly flat, and rounding is most of their difference
    text = (tmp_path / "runs/bench/05_measure_speed.ipynb").read_text()
    assert text.count('"image/png": {') >= 3 and str(tmp_path) not in text
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["bench"]
    assert "speedup_vs_naive" in done.stdout


def test_06_lines_up_a_student_of_another_tokenizer_with_the_same_cache(home, tmp_path, shared):
    out = tmp_path / "06.ipynb"
    done = run(
        home,
        PAPERMILL,
        notebook_path("06_any_teacher"),
        out,
        "-p",
        "mass_rows",
        "3",
        "-p",
        "teacher_tokenizers",
        f"llama3={shared / 'tokenizers' / 'llama3'}",
        "--no-progress-bar",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = out.read_text()
    assert "teacher's pieces" in shown and "of them one token on each side" in shown
    assert "mass on shared pieces, T = 2" in shown and "llama3" in shown
    assert shown.count('"image/png": "iVBOR') == 2
    for key, value, message in (
        ("example", "abc", "no validation row of toy has this id"),
        ("map_head", "64", "map_head = 64: give 0 to "),
    ):
        wrong = run(
            home,
            PAPERMILL,
            notebook_path("06_any_teacher"),
            out,
            "-p",
            key,
            value,
            "--no-progress-bar",
        )
        assert wrong.returncode != 0 and message in wrong.stderr


def test_a_second_teacher_with_a_tokenizer_of_its_own(home):
    """Its cache is another experiment's; a trial is stale when that one is made anew."""
    other = {**SMALL, "name": "other", "teacher": "artifacts/embedded/toy/teacher-subwords"}
    (home / "grid1.yaml").write_text("distill_type: [combined]\nseed: [0]\n")
    (home / "both.yaml").write_text(
        "\n".join(f"{key}: {value}" for key, value in SMALL.items())
        + "\nmore_teachers: other=0.4\n"
    )
    sweep = (
        "kd_utils",
        "sweep",
        home / "both.yaml",
        "--grid",
        home / "grid1.yaml",
        "--run-dir",
        home / "runs/both",
    )

    def make_other(*stems, **changes):
        (home / "other.yaml").write_text(
            "\n".join(f"{key}: {value}" for key, value in {**other, **changes}.items())
        )
        for stem in stems:
            done = run(
                home,
                PAPERMILL,
                notebook_path(stem),
                home / f"{stem}.ipynb",
                "-f",
                home / "other.yaml",
                "--no-progress-bar",
            )
            assert done.returncode == 0, done.stderr[-3000:]

    alone = run(
        home,
        PAPERMILL,
        notebook_path("03_train_student"),
        home / "alone.ipynb",
        "-f",
        home / "both.yaml",
        "--no-progress-bar",
    )
    assert alone.returncode != 0
    assert "no finished teacher cache of experiment 'other'" in alone.stderr
    make_other("01_prepare_data", "02_cache_teacher")
    done = run(home, *sweep)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metrics = json.loads((home / "runs/both/trials/combined_seed0/metrics.json").read_text())
    assert set(metrics["more_caches"]) == {"other"}
    for term in ("kd", "hidden", "attention"):
        assert (
            metrics["final"][f"validation_loss/{term}"] > 0
            and metrics["final"][f"grad_share/{term}"] > 0
        )
    shown = (home / "runs/both/trials/combined_seed0.ipynb").read_text()
    assert (
        "weight 0.6" in shown
        and "weight 0.4" in shown
        and "logits id by id" in shown
        and "shared pieces" in shown
    )
    assert "1 of 1 trials are done" in run(home, *sweep, "--dry-run").stdout
    make_other("02_cache_teacher", teacher_seed=1)
    assert "stale: teacher cache changed (other)" in run(home, *sweep, "--dry-run").stdout


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_source_notebooks_are_clean(stem):
    notebook = nbformat.read(notebook_path(stem), 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert notebook.cells[0].source.startswith(f"# {stem[:2]} ")
    assert not re.search(r"/(home|root|tmp|Users)/", notebook_path(stem).read_text())
