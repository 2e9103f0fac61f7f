"""What lm-evaluation-harness 0.4.13 asked and read, recorded once, beside what we ask and read: the
short form of `test_parity.py`, which runs the harness itself (`make test-slow`).

`lm_eval_records.json` has the harness's prompts for rows of the toy, and what it read from the
texts that a model wrote. Log-likelihoods are not in it: they depend on the model's weights.
"""

import hashlib
import json
from pathlib import Path

import pytest
from test_parity import GOLDS, cases, data, parity  # noqa: F401 (cases, data: fixtures)

from kd_utils.data.tasks import find_task

RUNS = json.loads(Path(__file__).with_name("lm_eval_records.json").read_text())


@pytest.mark.parametrize("run", RUNS, ids=[f"{run['task']}-{run['shots']}" for run in RUNS])
def test_prompts_are_the_harnesss(cases, tmp_path, run):  # noqa: F811
    case = cases[1]
    job = {
        "data": case.data,
        "task": run["task"],
        "limit": case.limits[run["task"]],
        "shots": run["shots"],
        "batch_size": 4,
        "max_new_tokens": 1,
    }
    records = parity.kd_utils_records(case.model, job, tmp_path)
    prompts = {record["row"]: record["prompt"] for record in records}
    digests = {row: hashlib.sha256(prompt.encode()).hexdigest() for row, prompt in prompts.items()}
    first = min(prompts)
    assert prompts[first] == run["first_prompt"]
    assert digests == {int(row): digest for row, digest in run["prompts"].items()}


def test_numbers_are_read_from_texts_as_the_harness_reads_them():
    generation = find_task("gsm8k").generation
    texts = [text for run in RUNS for text in run.get("texts", [])]
    assert {True, False} == {text["correct"] for text in texts}
    for text in texts:
        read = generation.score(text["generated"], GOLDS[text["row"] % len(GOLDS)])
        read["flexible"] = generation.flexible(text["generated"])
        assert read == {key: text[key] for key in read}
