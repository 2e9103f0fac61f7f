"""Compare the predictions of lm-evaluation-harness and of `kd_utils evaluate`, row by row.

    make parity
    make parity MODEL=folder DATA=folder LIMIT=rows
    python benchmarks/lm_eval_parity.py --lm-eval-python .venv-lm-eval/bin/python --model FOLDER

lm-evaluation-harness runs in its own environment and in a process of its own, as `lm_eval --model
hf` would run it: with its own task files, prompts, model class, filters and metrics. Two things are
changed: the place of the data (Parquet files in the hub's schema), and the sampler of shots, which
for SST-2 and GSM8K draws at random by default and here takes the first rows, as it does for MMLU.
The other side is `evaluate_folder`, which `python -m kd_utils evaluate` calls. Both read the same
folder.

For every row, at every batch size and with padding on either side, these must be the same: the
prompt, the prediction (for GSM8K the text and the extracted numbers) and whether it is correct.
Log-likelihoods must agree within 1e-4 nats in float32. The exit status is 0 if so, 1 if not, and 2
for wrong input. Nothing is downloaded.

Without --model three models are compared: a student that a toy sweep saved, on the toy's rows, and
two small ones that are made here for the two kinds of real tokenizer (with and without a begin
token), on real rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

TOLERANCE = 1e-4  # nats
SPLITS = {"sst2": "validation", "mmlu": "test", "gsm8k": "test"}
SHOT_SPLITS = {"sst2": "train", "mmlu": "dev", "gsm8k": "train"}
#: (task, shots) of each run.
RUNS = (("sst2", 0), ("mmlu", 0), ("mmlu", 5), ("gsm8k", 0), ("gsm8k", 5))
#: Rows of each task by default (MMLU: of each of its 57 subjects).
LIMITS = {"sst2": 100, "mmlu": 1, "gsm8k": 16}
MAX_NEW_TOKENS = 256  # the default of the harness
#: (batch size, padding side of the tokenizer) of the runs of either side. The harness's first
#: setting is the reference.
LM_EVAL_SETTINGS = ((1, "left"), (4, "right"))
KD_UTILS_SETTINGS = ((1, "left"), (3, "left"), (3, "right"), (16, "left"), (16, "right"))

#: The end of every prompt, and texts that the models made here tend to write after it.
PROMPT_END, PHRASES = "\nAnswer:", (" #### 5", "\n#### 1,224", " $24.\nQuestion:", " 38.9")

Record = dict[str, Any]


class Case(NamedTuple):
    """One model on one data folder: at most `limits[task]` rows of each task (MMLU: of each
    subject).
    """

    name: str
    model: Path
    data: Path
    limits: dict[str, int] = LIMITS
    max_new_tokens: int = MAX_NEW_TOKENS


# ---- lm-evaluation-harness, in a process of its environment


def lm_eval_side(jobs: list[Record]) -> None:
    """Run the harness for every job and write the records to the job's file `out`.

    Args:
        jobs: with `model`, `data`, `task`, `shots`, `limit`, `batch_size`, `max_new_tokens`, `out`.
    """
    import torch
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for done, job in enumerate(jobs, 1):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            files = task_files(job, Path(scratch))
            results = simple_evaluate(
                model="hf",
                model_args={"pretrained": job["model"], "dtype": "float32"},
                device=device,
                tasks=[str(path) for path in files.values()],
                task_manager=TaskManager(include_defaults=False),
                batch_size=job["batch_size"],
                limit=job["limit"],
                gen_kwargs={"max_gen_toks": job["max_new_tokens"]},
                bootstrap_iters=0,
                log_samples=True,
            )
        samples = results["samples"]
        records = [
            record
            for task, numbers in row_numbers(job).items()
            for record in lm_eval_records(samples[files[task].stem], numbers)
        ]
        Path(job["out"]).write_text(json.dumps(records))
        seconds = time.perf_counter() - start
        print(
            f"lm-eval {done}/{len(jobs)}  {job['task']} {job['shots']}-shot, "
            f"batch {job['batch_size']}: {len(records)} rows in {seconds:.1f} s",
            flush=True,
        )


def row_numbers(job: Record) -> dict[str, list[int]]:
    """The numbers of the rows in the split's file, by subject ("" for a task without subjects)."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(
        Path(job["data"]) / job["task"] / f"{SPLITS[job['task']]}.parquet"
    )
    if job["task"] != "mmlu":
        return {"": list(range(table.num_rows))}
    numbers: dict[str, list[int]] = {}
    for number, subject in enumerate(table["subject"].to_pylist()):
        numbers.setdefault(subject, []).append(number)
    return numbers


def task_files(job: Record, scratch: Path) -> dict[str, Path]:
    """Write a task file for each subject: the harness's own file with other data and sampler."""
    import lm_eval.tasks
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    task, own = job["task"], Path(lm_eval.tasks.__file__).parent
    data = {
        split: Path(job["data"]) / task / f"{split}.parquet"
        for split in (SPLITS[task], SHOT_SPLITS[task])
    }
    files = {}
    for subject in row_numbers(job):
        changed: Record = {
            "task": f"{task}_{subject}".rstrip("_"),
            "dataset_path": "parquet",
            "dataset_name": None,
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": job["shots"],
        }
        parts = data
        if task == "mmlu":  # the hub has a part for each subject; here all are in one file
            parts = {split: scratch / f"{subject}-{split}.parquet" for split in data}
            for split, path in parts.items():
                table = pq.read_table(data[split])
                pq.write_table(table.filter(pc.equal(table["subject"], subject)), path)
            base = own / "mmlu" / "default" / f"mmlu_{subject}.yaml"
            if not base.is_file():
                # The toy's subjects: the harness's template, and its rule for the first line.
                base = base.with_name("_default_template_yaml")
                changed["description"] = (
                    "The following are multiple choice questions (with answers) about "
                    f"{' '.join(subject.split('_'))}.\n\n"
                )
        else:
            base = own / {"sst2": "glue/sst2/default.yaml", "gsm8k": "gsm8k/gsm8k.yaml"}[task]
        changed |= {
            "include": str(base),
            "dataset_kwargs": {"data_files": {k: str(v) for k, v in parts.items()}},
        }
        files[subject] = scratch / f"{changed['task']}.yaml"
        files[subject].write_text(json.dumps(changed))  # JSON is YAML
    return files


def lm_eval_records(samples: list[Record], numbers: list[int]) -> list[Record]:
    """Convert the harness's log of one task to the records that `kd_utils_records` gives.

    Args:
        samples: the harness's log.
        numbers: of the rows in the split's file.
    """
    by_document: dict[int, dict[str, Record]] = {}
    for sample in samples:
        by_document.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
    records = []
    for document, filtered in sorted(by_document.items()):
        sample = next(iter(filtered.values()))
        record = {"row": numbers[document], "prompt": sample["arguments"][0][0]}
        if "strict-match" in filtered:
            strict, flexible = filtered["strict-match"], filtered["flexible-extract"]
            record |= {
                "generated": sample["resps"][0][0],
                "prediction": strict["filtered_resps"][0],
                "correct": bool(strict["exact_match"]),
                "flexible": flexible["filtered_resps"][0],
                "correct_flexible": bool(flexible["exact_match"]),
            }
        else:
            values = [float(value) for value, _ in sample["filtered_resps"]]
            record |= {
                "loglikelihoods": values,
                "prediction": values.index(max(values)),
                "correct": bool(sample["acc"]),
            }
        records.append(record)
    return records


# ---- the comparison


def run_lm_eval(python: str | Path, jobs: list[Record], work: Path) -> list[list[Record]]:
    """Run all jobs in one process of the harness's environment and return their records.

    Raises:
        RuntimeError: the harness failed; with the end of its standard error.
    """
    jobs = [job | {"out": str(work / f"lm-eval-{place}.json")} for place, job in enumerate(jobs)]
    (work / "jobs.json").write_text(json.dumps(jobs))
    # The harness must not look for anything on the hub, and caches its data beside the jobs.
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with open(work / "lm-eval.log", "w+") as log:
        done = subprocess.run(
            [python, __file__, "--jobs", work / "jobs.json"],
            check=False,
            stderr=log,
            env={**os.environ, **offline},
        )
        if done.returncode:
            log.seek(0)
            raise RuntimeError(
                f"lm-evaluation-harness failed (exit status {done.returncode}):\n"
                f"{log.read()[-3000:]}"
            )
    return [json.loads(Path(job["out"]).read_text()) for job in jobs]


def padded_on(model: Path, side: str, folder: Path) -> Path:
    """Make a copy of the model (by links) whose tokenizer pads on the given side."""
    folder.mkdir()
    for path in model.resolve().iterdir():
        (folder / path.name).symlink_to(path)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text()) if config.exists() else {}
    config.unlink(missing_ok=True)  # the link, not the file
    config.write_text(json.dumps(values | {"padding_side": side}))
    return folder


def kd_utils_records(model: Path, job: Record, work: Path) -> list[Record]:
    """Evaluate a job as `python -m kd_utils evaluate` does; a record per row."""
    from transformers.utils.logging import disable_progress_bar

    from kd_utils.data.tasks.gsm8k import extract_flexible
    from kd_utils.evaluation.scoring import evaluate_folder

    disable_progress_bar()  # the model is loaded for every setting
    with warnings.catch_warnings():
        # MMLU's longest prompts with 5 shots exceed a small context: both sides must cut them at
        # the same place.
        warnings.filterwarnings("ignore", message=".* lost their beginning")
        table = evaluate_folder(
            model,
            job["task"],
            SPLITS[job["task"]],
            work / "kd_utils.parquet",
            data_dir=job["data"],
            limit=job["limit"],
            num_fewshot=job["shots"],
            batch_size=job["batch_size"],
            max_new_tokens=job["max_new_tokens"],
            progress=sys.stderr.isatty(),
        )
    records = table.drop(columns="gold").to_dict("records")
    return [
        record | {"flexible": extract_flexible(record["generated"])}
        if "generated" in record
        else record
        for record in records
    ]


def compare(lm_eval: list[Record], kd_utils: list[Record]) -> dict[str, Any]:
    """Find the rows in which the two sides differ.

    Returns:
        `rows`, the number of rows that either side has; `worst`, the largest difference of two
        log-likelihoods in nats (0.0 if there are none); `differ`, for each row that differs a
        sentence on the first difference.
    """
    left, right = ({record["row"]: record for record in side} for side in (lm_eval, kd_utils))
    differ, worst = {}, 0.0
    for row in sorted(left.keys() | right.keys()):
        if row not in left or row not in right:
            differ[row] = f"only {'lm-eval' if row in left else 'kd_utils'} has it"
            continue
        expected, found = left[row], right[row]
        values = (record.get("loglikelihoods", ()) for record in (expected, found))
        gaps = [abs(a - b) for a, b in zip(*values, strict=True)]
        worst = max([worst, *(gap if gap == gap else float("inf") for gap in gaps)])
        wrong = [
            f"{key}: lm-eval {expected[key]!r:.200}, kd_utils {found.get(key)!r:.200}"
            for key in expected
            if key != "loglikelihoods" and expected[key] != found.get(key)
        ]
        if not all(gap <= TOLERANCE for gap in gaps):
            wrong.append(
                f"loglikelihoods: lm-eval {expected['loglikelihoods']}, "
                f"kd_utils {found['loglikelihoods']}"
            )
        if wrong:
            differ[row] = wrong[0]
    return {"rows": len(left.keys() | right.keys()), "worst": worst, "differ": differ}


def without_own_differences(reference: list[Record], batched: list[Record]) -> list[Record]:
    """Drop the rows for which the harness generates another text in a batch than one by one.

    One by one the harness stops at a special token such as <|im_end|>; in a batch it continues and
    drops the token from the text. Such rows are compared with the reference only.

    Args:
        reference: the harness's records at batch size 1.
        batched: its records at a larger batch size.
    """
    texts = {record["row"]: record.get("generated") for record in reference}
    return [record for record in batched if record.get("generated") == texts[record["row"]]]


def check(
    cases: list[Case],
    python: str | Path,
    *,
    runs: tuple = RUNS,
    lm_eval_settings: tuple = LM_EVAL_SETTINGS,
    kd_utils_settings: tuple = KD_UTILS_SETTINGS,
) -> list[str]:
    """Compare every run of every case at every setting and print a line for each.

    Returns:
        A line for each comparison that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        padded = {
            (case.name, side): padded_on(case.model, side, work / f"{place}-{side}")
            for place, case in enumerate(cases)
            for side in ("left", "right")
        }

        def job(case: Case, task: str, shots: int, batch_size: int, side: str) -> Record:
            return {
                "model": str(padded[case.name, side]),
                "data": str(case.data.resolve()),
                "task": task,
                "shots": shots,
                "limit": case.limits[task],
                "batch_size": batch_size,
                "max_new_tokens": case.max_new_tokens,
            }

        asked = [(case, *run) for case in cases for run in runs]
        said = run_lm_eval(
            python, [job(*run, *setting) for run in asked for setting in lm_eval_settings], work
        )
        print(
            f"\n{'model':<24}{'task':<8}{'shots':>5}{'batch':>7} "
            f"{'padding':<9}{'rows':>5}{'same':>6}"
            f"{'worst difference':>18}{'right':>7}{'flexible':>10}{'#### n':>8}"
        )
        failed = []
        for place, (case, task, shots) in enumerate(asked):
            reference, *others = said[
                place * len(lm_eval_settings) : (place + 1) * len(lm_eval_settings)
            ]
            kept = [without_own_differences(reference, batched) for batched in others]
            for (size, _), all_rows, rows in zip(lm_eval_settings[1:], others, kept, strict=True):
                if len(rows) < len(all_rows):
                    print(
                        f"{case.name}, {task}: for {len(all_rows) - len(rows)} of "
                        f"{len(all_rows)} rows lm-eval generates another text in batches of "
                        f"{size} than one by one; they are compared with the latter only"
                    )
            for size, side in kd_utils_settings:
                given = job(case, task, shots, size, side)
                records = kd_utils_records(Path(given["model"]), given, work)
                rows = [{record["row"] for record in batched} for batched in kept]
                results = [compare(reference, records)] + [
                    compare(batched, [record for record in records if record["row"] in there])
                    for batched, there in zip(kept, rows, strict=True)
                ]
                differ = {
                    row: what
                    for result in reversed(results)
                    for row, what in result["differ"].items()
                }
                right = sum(record["correct"] for record in records)
                worst, more = f"{max(result['worst'] for result in results):.1e}", ""
                if task == "gsm8k":
                    strict = sum(record["prediction"] != "[invalid]" for record in records)
                    worst, more = (
                        "(text)",
                        f"{sum(record['correct_flexible'] for record in records):>10}{strict:>8}",
                    )
                print(
                    f"{case.name:<24}{task:<8}{shots:>5}{size:>7} "
                    f"{side:<9}{len(records):>5}{len(records) - len(differ):>6}"
                    f"{worst:>18}{right:>7}{more}",
                    flush=True,
                )
                failed += [
                    f"{case.name}, {task} {shots}-shot, batch {size}, padding {side}: "
                    f"{len(differ)} of {len(records)} rows differ; row {row}, {what}"
                    for row, what in list(differ.items())[:1]
                ]
    return failed


# ---- what is compared


def make_model(tokenizer: Any, folder: Path, *, seed: int = 0) -> Path:
    """Save a small random Llama that tends to write what the scoring of GSM8K looks for.

    Plain random weights would do for log-likelihoods, but they never write `####`, a stop string or
    an end token. Here each row of the head is moved towards the embeddings of the tokens that come
    before its token in `PHRASES`. The random layers, and so the prompt, decide between several
    continuations.
    """
    from itertools import pairwise

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kd_utils.models.loading import save_model

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.14,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        embeddings, head = (
            model.model.embed_tokens.weight.data.normal_(),
            model.lm_head.weight.data.normal_(std=0.2),
        )
    start = len(tokenizer.encode(PROMPT_END)) - 1
    steps = {
        step
        for phrase in PHRASES
        for step in pairwise(
            [*tokenizer.encode(PROMPT_END + phrase)[start:], tokenizer.eos_token_id]
        )
    }
    for token, following in sorted(steps):
        head[following] += 6 * embeddings[token] / embeddings[token].norm()
    save_model(model, tokenizer, folder)
    return folder


def default_cases(work: Path, shared: Path) -> list[Case]:
    """A student of the toy sweep and two models with real tokenizers.

    What is missing is left out and printed.
    """
    from transformers import AutoTokenizer

    from kd_utils.config.project_paths import project_path, short_path

    cases = []
    students = sorted(
        path.parent for path in project_path("artifacts/students/toy").glob("*/config.json")
    )
    toy_data = project_path("artifacts/embedded/toy/data")
    if students and toy_data.is_dir():
        cases.append(
            Case(
                f"toy {students[0].name}",
                students[0],
                toy_data,
                LIMITS | {"mmlu": 60, "gsm8k": 100},
            )
        )
    else:
        missing = toy_data if students else project_path("artifacts/students/toy")
        print(
            f"no trained student here ({short_path(missing)} is missing): run `make sweep` to make "
            "one, or choose another with MODEL=folder and DATA=folder"
        )
    if not (shared / "tokenizers").is_dir() or not (shared / "data").is_dir():
        print(
            f"no real tokenizers and data in {shared}: nothing is compared on them (set KD_SHARED "
            "to their folder)"
        )
        return cases
    for name, begin in (("llama2", True), ("mistral", False)):
        # These tokenizers put a begin token first only if they are told to.
        tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name, add_bos_token=begin)
        title = f"{name}, {'begin' if begin else 'no begin'} token"
        cases.append(Case(title, make_model(tokenizer, work / name), shared / "data"))
    return cases


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lm-eval-python", help="Python of the environment that `make lm-eval` makes"
    )
    parser.add_argument(
        "--model", type=Path, help="a saved model with its tokenizer (default: see above)"
    )
    parser.add_argument(
        "--data", type=Path, help="folder with TASK/SPLIT.parquet (default: data in ../shared)"
    )
    parser.add_argument(
        "--limit", type=int, help=f"rows of each task, MMLU: of each subject (default: {LIMITS})"
    )
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.jobs:
        lm_eval_side(json.loads(options.jobs.read_text()))
        return 0
    if not options.lm_eval_python or not Path(options.lm_eval_python).is_file():
        parser.error(
            "give --lm-eval-python, the Python of an environment with lm-evaluation-harness "
            "(`make lm-eval` makes one)"
        )
    shared = Path(os.environ.get("KD_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    data = options.data or shared / "data"
    if options.data and not options.model:
        parser.error("--data goes with --model: give both")
    if options.model and not (options.model / "config.json").is_file():
        parser.error(f"no model in {options.model} (config.json is missing)")
    if options.model:
        for task, split in (*SPLITS.items(), *SHOT_SPLITS.items()):
            if not (path := data / task / f"{split}.parquet").is_file():
                parser.error(f"no file {path}: give --data, a folder with the hub's schema")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        cases = (
            [Case(options.model.name, options.model, data)]
            if options.model
            else default_cases(Path(work), shared)
        )
        if options.limit:
            cases = [case._replace(limits=dict.fromkeys(LIMITS, options.limit)) for case in cases]
        if not cases:
            parser.error("nothing to compare")
        failed = check(cases, options.lm_eval_python)
    print(f"\n{time.perf_counter() - start:.0f} s")
    for line in failed:
        print(f"DIFFERENT: {line}")
    if not failed:
        print(f"The same predictions on every row, log-likelihoods within {TOLERANCE:.0e} nats.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
