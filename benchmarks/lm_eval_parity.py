"""The same model and the same rows through lm-evaluation-harness and through `kd_utils evaluate`:
the same predictions?

    make parity                                                         # MODEL=folder DATA=folder LIMIT=rows to choose
    python benchmarks/lm_eval_parity.py --lm-eval-python .venv-lm-eval/bin/python --model FOLDER
    --data FOLDER

lm-evaluation-harness runs in its own environment and in a process of its own, as `lm_eval --model
hf` would run it: its own task files, prompts, model class, filters and metrics. Changed are the
place of the data (parquet files in the hub's schema) and the sampler of shots, which draws at
random for SST-2 and GSM8K and here takes the first rows, as it does for MMLU. Ours is
`evaluate_folder`, which is what `python -m kd_utils evaluate` calls. Both read the same folder.

Required of every row, at every batch size, padded on either side: the same prompt, the same
prediction (text and extracted numbers, for GSM8K), the same verdict, and log-likelihoods within
1e-4 nats in float32. Exit status: 0 if so, 1 if not, 2 for wrong input. Nothing is downloaded.

Without --model three are compared: a student that a toy sweep left, on the toy's rows, and two
small ones made here for the two kinds of real tokenizer (one puts a begin token first, one does
not), on real rows.
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
#: (task, shots), and how many rows of it by default (MMLU: of each of its 57 subjects).
RUNS = (("sst2", 0), ("mmlu", 0), ("mmlu", 5), ("gsm8k", 0), ("gsm8k", 5))
LIMITS = {"sst2": 100, "mmlu": 1, "gsm8k": 16}
MAX_NEW_TOKENS = 256  # the harness's own
#: (batch size, padding side of the tokenizer) of the harness's runs and of ours; the harness's
#: first is the reference.
THEIR_SETTINGS = ((1, "left"), (4, "right"))
OUR_SETTINGS = ((1, "left"), (3, "left"), (3, "right"), (16, "left"), (16, "right"))

#: How every prompt ends, and what the models made here are drawn to write after it.
PROMPT_END, PHRASES = "\nAnswer:", (" #### 5", "\n#### 1,2", " $24.\nQuestion:", " 38.9")

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


# ------------------------------------------------------------- lm-evaluation-harness, in a process
# of its environment


def lm_eval_side(jobs: list[Record]) -> None:
    """Do each job (`model`, `data`, `task`, `shots`, `limit`, `batch_size`, `max_new_tokens`) and
    write its `out`.
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
            for record in their_records(samples[files[task].stem], numbers)
        ]
        Path(job["out"]).write_text(json.dumps(records))
        print(
            f"lm-eval {done}/{len(jobs)}  {job['task']} {job['shots']}-shot, batch "
            f"{job['batch_size']}: "
            f"{len(records)} rows in {time.perf_counter() - start:.1f} s",
            flush=True,
        )


def row_numbers(job: Record) -> dict[str, list[int]]:
    """For each subject of the split ("" where there are none), its rows' numbers in the split's
    file.
    """
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
    """For each subject, a task file that includes the harness's own and changes data and sampler
    only.
    """
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
            if (
                not base.is_file()
            ):  # the toy's subjects: the harness's template, and its rule for the first line
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


def their_records(samples: list[Record], numbers: list[int]) -> list[Record]:
    """The harness's log of one task as records of the form of `our_records`; `numbers` are its
    rows' numbers.
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
    """What the harness says to each job, from one process of its environment.

    Raises:
        RuntimeError: it failed; with the end of its standard error.
    """
    jobs = [job | {"out": str(work / f"lm-eval-{place}.json")} for place, job in enumerate(jobs)]
    (work / "jobs.json").write_text(json.dumps(jobs))
    # Its caches of the data go where the job's other files are; it must not look for anything on
    # the hub.
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
                f"lm-evaluation-harness failed (exit status "
                f"{done.returncode}):\n{log.read()[-3000:]}"
            )
    return [json.loads(Path(job["out"]).read_text()) for job in jobs]


def padded_on(model: Path, side: str, folder: Path) -> Path:
    """A folder that is `model`, but for its tokenizer's padding side."""
    folder.mkdir()
    for path in model.resolve().iterdir():
        (folder / path.name).symlink_to(path)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text()) if config.exists() else {}
    config.unlink(missing_ok=True)  # the link, not the file
    config.write_text(json.dumps(values | {"padding_side": side}))
    return folder


def our_records(model: Path, job: Record, work: Path) -> list[Record]:
    """What `python -m kd_utils evaluate` writes for a job, a record per row."""
    from transformers.utils.logging import disable_progress_bar

    from kd_utils.data.tasks.gsm8k import extract_flexible
    from kd_utils.evaluation.scoring import evaluate_folder

    disable_progress_bar()  # the model is loaded for every setting
    with warnings.catch_warnings():
        # MMLU's longest prompts with 5 shots pass a small context: both sides must cut them in the
        # same place.
        warnings.filterwarnings("ignore", message=".* lost their beginning")
        table = evaluate_folder(
            model,
            job["task"],
            SPLITS[job["task"]],
            work / "ours.parquet",
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


def compare(theirs: list[Record], ours: list[Record]) -> dict[str, Any]:
    """Which rows differ, and by what.

    Returns:
        `rows` (all that either side has), `worst` (largest difference of two log-likelihoods, nats;
        0.0 without any), `differ` (row to a sentence on what differs first; empty if the sides
        agree within the tolerance).
    """
    left, right = ({record["row"]: record for record in records} for records in (theirs, ours))
    differ, worst = {}, 0.0
    for row in sorted(left.keys() | right.keys()):
        if row not in left or row not in right:
            differ[row] = f"only {'lm-eval' if row in left else 'kd_utils'} has it"
            continue
        one, other = left[row], right[row]
        gaps = [
            abs(a - b)
            for a, b in zip(
                one.get("loglikelihoods", ()), other.get("loglikelihoods", ()), strict=True
            )
        ]
        worst = max([worst, *(gap if gap == gap else float("inf") for gap in gaps)])
        wrong = [
            f"{key}: lm-eval {one[key]!r:.200}, kd_utils {other.get(key)!r:.200}"
            for key in one
            if key != "loglikelihoods" and one[key] != other.get(key)
        ]
        if not all(gap <= TOLERANCE for gap in gaps):
            wrong.append(
                f"loglikelihoods: lm-eval {one['loglikelihoods']}, kd_utils "
                f"{other['loglikelihoods']}"
            )
        if wrong:
            differ[row] = wrong[0]
    return {"rows": len(left.keys() | right.keys()), "worst": worst, "differ": differ}


def without_own_differences(reference: list[Record], other: list[Record]) -> list[Record]:
    """`other` without the rows for which the harness generated another text than in `reference`.

    One by one it stops at a special token such as <|im_end|>, in a batch it goes on and drops the
    token from the text: what it says to such a row alone is what we hold ourselves to.
    """
    texts = {record["row"]: record.get("generated") for record in reference}
    return [record for record in other if record.get("generated") == texts[record["row"]]]


def check(
    cases: list[Case],
    python: str | Path,
    *,
    runs: tuple = RUNS,
    their_settings: tuple = THEIR_SETTINGS,
    our_settings: tuple = OUR_SETTINGS,
) -> list[str]:
    """Compare every run of every case at every setting and print a line for each.

    Returns:
        A line for each comparison that failed; none if all is the same.
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
            python, [job(*run, *setting) for run in asked for setting in their_settings], work
        )
        print(
            f"\n{'model':<24}{'task':<8}{'shots':>5}{'batch':>7} "
            f"{'padding':<9}{'rows':>5}{'same':>6}"
            f"{'worst difference':>18}{'right':>7}{'flexible':>10}{'#### n':>8}"
        )
        failed = []
        for place, (case, task, shots) in enumerate(asked):
            reference, *others = said[
                place * len(their_settings) : (place + 1) * len(their_settings)
            ]
            kept = [without_own_differences(reference, other) for other in others]
            for (size, _), all_rows, rows in zip(their_settings[1:], others, kept, strict=True):
                if len(rows) < len(all_rows):
                    print(
                        f"{case.name}, {task}: in batches of {size} lm-eval generates another text "
                        f"than one by one "
                        f"for {len(all_rows) - len(rows)} of {len(all_rows)} rows; they are held "
                        f"to the latter only"
                    )
            for size, side in our_settings:
                given = job(case, task, shots, size, side)
                ours = our_records(Path(given["model"]), given, work)
                rows = [{record["row"] for record in other} for other in kept]
                results = [compare(reference, ours)] + [
                    compare(other, [record for record in ours if record["row"] in there])
                    for other, there in zip(kept, rows, strict=True)
                ]
                differ = {
                    row: what
                    for result in reversed(results)
                    for row, what in result["differ"].items()
                }
                right = sum(record["correct"] for record in ours)
                worst, more = f"{max(result['worst'] for result in results):.1e}", ""
                if task == "gsm8k":
                    strict = sum(record["prediction"] != "[invalid]" for record in ours)
                    worst, more = (
                        "(text)",
                        f"{sum(record['correct_flexible'] for record in ours):>10}{strict:>8}",
                    )
                print(
                    f"{case.name:<24}{task:<8}{shots:>5}{size:>7} "
                    f"{side:<9}{len(ours):>5}{len(ours) - len(differ):>6}"
                    f"{worst:>18}{right:>7}{more}",
                    flush=True,
                )
                failed += [
                    f"{case.name}, {task} {shots}-shot, batch {size}, padding {side}: "
                    f"{len(differ)} of "
                    f"{len(ours)} rows differ; row {row}, {what}"
                    for row, what in list(differ.items())[:1]
                ]
    return failed


# ---- what is compared


def make_model(tokenizer: Any, folder: Path, *, seed: int = 0) -> Path:
    """A small random Llama that tends to write what the scoring of GSM8K looks for, saved as a
    student is.

    Plain random weights would do for log-likelihoods, but write no `####`, no stop string and no
    end token. Here each row of the head is drawn towards the embeddings of the tokens that come
    before its token in `PHRASES`; which of several ways it goes on is left to the random layers,
    and so to the prompt.
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
    """A student of the toy sweep and two models with real tokenizers; what is missing is named and
    left out.
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
            f"no trained student here ({short_path(missing)} is missing): `make sweep` makes one, "
            f"MODEL=folder and "
            "DATA=folder name another"
        )
    if not (shared / "tokenizers").is_dir() or not (shared / "data").is_dir():
        print(
            f"no real tokenizers and data in {shared} (or KD_SHARED): nothing is compared on them"
        )
        return cases
    for name, begin in (("llama2", True), ("mistral", False)):
        # These tokenizers put a begin token first only where they are told to.
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
            "give --lm-eval-python, the Python of an environment with lm-evaluation-harness (`make "
            "lm-eval`)"
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
