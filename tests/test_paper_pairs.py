"""The paper's parameter files with the real tokenizers and real rows, on random models of a few megabytes."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kd_utils.config import ROOT
from kd_utils.parameters import load_parameters, notebook_path

SMALL = {"sst2_train": 12, "sst2_validation": 4, "mmlu_train": 6, "mmlu_validation": 4, "gsm8k_train": 6,
         "gsm8k_validation": 3, "epochs": 1, "max_new_tokens": 4, "batch_tokens": 2048, "save_student": True}


def model_folder(folder, tokenizer, width):
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    config = LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def papermill(home, stem, parameters):
    (home / "p.yaml").write_text(yaml.safe_dump(parameters))
    return subprocess.run([sys.executable, "-m", "papermill", notebook_path(stem), home / f"{stem}.ipynb", "-f",
                           home / "p.yaml", "--no-progress-bar"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "KD_ROOT": str(home), "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def home(tmp_path_factory, shared):
    home = tmp_path_factory.mktemp("pairs")
    model_folder(home / "student", shared / "tokenizers" / "llama2", 16)
    return home


def parameters_of(home, shared, name, teacher):
    return {**load_parameters(ROOT / "papermill_params" / f"{name}.yaml"), **SMALL, "data_dir": str(shared / "data"),
            "tokenizer": str(home / "student"), "student": str(home / "student"), "teacher": teacher}


def test_the_llama2_pair_trains_on_real_rows(home, shared):
    parameters = parameters_of(home, shared, "llama2", model_folder(home / "teacher", shared / "tokenizers/llama2", 32))
    for stem in ("01_prepare_data", "02_cache_teacher", "03_train_student"):
        done = papermill(home, stem, {**parameters, "distill_type": "combined"})
        assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((home / "runs/explore/trials/combined_seed0/metrics.json").read_text())
    assert {"validation_loss/kd", "validation_loss/hidden", "validation_loss/attention"} <= set(metrics["final"])
    LlamaForCausalLM.from_pretrained(home / "artifacts/students/explore/combined_seed0")


@pytest.mark.parametrize("name, same", [("mistral", "270 of 32,000"), ("llama3", "of 128,")])
def test_a_teacher_with_another_tokenizer_is_refused_before_it_is_loaded(home, shared, name, same):
    teacher = home / name  # a tokenizer and no weights: loading the model would fail in another way
    AutoTokenizer.from_pretrained(shared / "tokenizers" / name).save_pretrained(teacher)
    parameters = parameters_of(home, shared, name, str(teacher))
    assert papermill(home, "01_prepare_data", parameters).returncode == 0
    done = papermill(home, "02_cache_teacher", parameters)
    assert done.returncode != 0 and "the teacher's tokenizer is not the student's" in done.stderr
    assert same in done.stderr and "not supported yet" in done.stderr
    assert not (home / "artifacts" / "cache").exists() or not list((home / "artifacts/cache").glob(f"{name}-*"))
