"""The paper's parameter files with the real tokenizers and real rows, on random models of a few
megabytes.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from kd_utils.config.notebook_files import notebook_path
from kd_utils.config.parameter_files import load_parameters
from kd_utils.config.project_paths import ROOT

SMALL = {
    "train_rows": "sst2:12 mmlu:6 gsm8k:6",
    "held_out_rows": 2,
    "validation_rows": "sst2:4 mmlu:4 gsm8k:3",
    "epochs": 1,
    "max_new_tokens": 4,
    "batch_tokens": 2048,
    "save_student": True,
}


#: The teachers' own classes and vocabularies; two of them have other numbers of heads, and a
#: window.
TEACHERS = {
    "llama2": (LlamaForCausalLM, LlamaConfig, dict(vocab_size=32_000)),
    "mistral": (MistralForCausalLM, MistralConfig, dict(vocab_size=32_000, sliding_window=48)),
    "llama3": (LlamaForCausalLM, LlamaConfig, dict(vocab_size=128_256, num_attention_heads=8)),
}


def model_folder(folder, tokenizer, width, name="llama2"):
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    model, config, sizes = TEACHERS[name]
    model(
        config(
            **{
                **dict(
                    hidden_size=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=1024,
                ),
                **sizes,
            }
        )
    ).save_pretrained(folder)
    return str(folder)


def papermill(home, stem, parameters):
    (home / "p.yaml").write_text(yaml.safe_dump(parameters))
    return subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "papermill_cli.py",
            notebook_path(stem),
            home / f"{stem}.ipynb",
            "-f",
            home / "p.yaml",
            "--no-progress-bar",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "KD_ROOT": str(home), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory, shared):
    home = tmp_path_factory.mktemp("pairs")
    model_folder(home / "student", shared / "tokenizers" / "llama2", 16)
    return home


def parameters_of(home, shared, name, teacher):
    return {
        **load_parameters(ROOT / "papermill_params" / f"{name}.yaml"),
        **SMALL,
        "data_dir": str(shared / "data"),
        "tokenizer": str(home / "student"),
        "student": str(home / "student"),
        "teacher": teacher,
    }


@pytest.mark.parametrize(
    "name, more, said",
    [
        (
            "llama2",
            {},
            "logits id by id; hidden of layers 2:2 (teacher:student); "
            "attention of layers 2:2 (teacher:student), head by head",
        ),
        (
            "mistral",
            {},
            "logits over 24,184 shared pieces (not shared: 7,816 of the teacher, 7,816 of the "
            "student)",
        ),
        (
            "llama3",
            {
                "head_mapping": "mean_groups",
                "hidden_layers": "uniform",
                "attention_layers": "reversed",
            },
            "logits over 26,601 shared pieces (not shared: 101,655 of the teacher, 5,399 of the "
            "student); hidden of layers 1:1, 2:2 (teacher:student); attention of layers 2:1, 1:2 "
            "(teacher:student), 8 heads mixed to 4",
        ),
    ],
    ids=["llama2", "mistral", "llama3"],
)
def test_the_pairs_train_on_real_rows(home, shared, name, more, said):
    teacher = model_folder(home / f"teacher-{name}", shared / "tokenizers" / name, 32, name)
    parameters = {**parameters_of(home, shared, name, teacher), **more, "run_dir": f"runs/{name}"}
    for stem in ("01_prepare_data", "02_cache_teacher", "03_train_student"):
        done = papermill(home, stem, {**parameters, "distill_type": "combined"})
        assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((home / f"runs/{name}/trials/combined_seed0/metrics.json").read_text())
    for term in ("kd", "hidden", "attention"):
        assert (
            metrics["final"][f"validation_loss/{term}"] > 0
            and metrics["final"][f"grad_share/{term}"] > 0
        )
    assert said in (home / "03_train_student.ipynb").read_text().replace('",\n      "', "")
    LlamaForCausalLM.from_pretrained(home / f"artifacts/students/{name}/combined_seed0")
