"""What stands for the real thing in several tests: a project with stubs for notebooks, and a run's
folder, made up.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kd_utils.config import notebook_files, project_paths, stages
from kd_utils.config.trial import trial_name
from kd_utils.records import check, run_folder, trial_record
from kd_utils.records.provenance import environment
from kd_utils.store.files import sha256_file, sha256_json
from kd_utils.store.sealed import write_sealed

#: The real notebooks' own parameters, under another name and on one CPU.
VALUES = {
    key: value
    for stem in stages.NOTEBOOKS
    for key, value in notebook_files.notebook_defaults(stem).items()
}
VALUES |= {
    "name": "stub",
    "build": "none",
    "device": "cpu",
    "epochs": 2,
    "teacher_epochs": 0,
    "run_dir": "runs/stub",
}
SOURCES = {
    "01_prepare_data": """
from kd_utils.config.stages import DataConfig
from kd_utils.data import prepared_data as data
from kd_utils.store import sealed
config = DataConfig.from_notebook(globals())
sealed.write_sealed(config.data_path / "manifest.json", {
    "format": data.FORMAT, "name": config.name, "config_fingerprint": config.fingerprint(),
    "tokenizer_fingerprint": "t", "data_hash": str(config.data_seed), "counts": [],
    "made_from": data.ingredients(config)}, "checksums")""",
    "02_cache_teacher": """
from kd_utils.cache import manifest as cache
from kd_utils.config.stages import CacheConfig
from kd_utils.data import prepared_data as data
from kd_utils.store import files, sealed
config = CacheConfig.from_notebook(globals())
prepared = data.read_manifest(config.data_path)
manifest = {"format": cache.FORMAT_VERSION, "teacher": config.teacher, "base_teacher": config.teacher,
            "data_hash": prepared["data_hash"], "code": cache.cache_code(), "shards": []}
folder = config.artifacts / "cache" / f"{config.name}-2026-01-01-{files.sha256_json(manifest)[:8]}"
sealed.write_sealed(folder / "manifest.json", manifest, "checksums")
cache.sealed_cache(folder, "verified.json").seal(
    {"content_hash": cache.read_manifest(folder)["content_hash"]}, {})""",
    "03_train_student": """
import os, time
import pandas as pd
from kd_utils.cache import manifest as cache
from kd_utils.config.project_paths import project_path
from kd_utils.config.trial import TrialConfig
from kd_utils.records import trial_record as records
from kd_utils.records.provenance import environment
from kd_utils.records.provenance import code_of
config = TrialConfig.from_notebook(globals())
trial = config.trial
with open(config.artifacts / "executed.txt", "a") as file:
    file.write(f"{trial} {os.environ['OMP_NUM_THREADS']}\\n")
rows = []
for epoch in range(1, config.epochs + 1):
    time.sleep(0.3)
    rows.append({"epoch": epoch, "train_loss": 1.0, "validation_loss": 1 / epoch, "seconds": 0.3,
                 "validation_accuracy": 0.5 + 0.01 * config.seed, "validation_accuracy/sst2": 0.5})
    records.report_row(rows[-1])
if (config.artifacts / f"fail-{trial}").exists():
    raise FloatingPointError("the loss is not finite")
folder = cache.find_cache(config.artifacts, config.name)
metrics = {"config": config.model_dump(), "config_hash": config.fingerprint(), **environment(),
           "code": code_of("03_train_student"), "tokenizer": "t",
           "cache": {"name": folder.name, "content_hash": cache.read_manifest(folder)["content_hash"]},
           "started": "2026-01-01T00:00:00Z", "seconds": {"total": 1.0}, "peak_memory_mb": 1.0, "epochs": rows,
           "final": rows[-1]}
predictions = pd.DataFrame({"example_id": ["a", "b"], "task": "sst2", "correct": [True, False],
                            "loglikelihoods": [[-1.0, -2.0]] * 2})
records.write_record(project_path(config.run_dir) / "trials" / trial, metrics, predictions)""",
    "04_analyse_results": """
from kd_utils.config.project_paths import project_path
from kd_utils.config.stages import AnalysisConfig
from kd_utils.records import run_folder
run_folder.collect(project_path(AnalysisConfig.from_notebook(globals()).run_dir))""",
    "05_measure_speed": "",
    "06_any_teacher": "",
    "07_published_claim": "",
    "09_prune": "",
    "12_compare_worlds": """
from kd_utils.config.stages import WorldsConfig
from kd_utils.worlds import runs
config = WorldsConfig.from_notebook(globals())
results = runs.collect(runs.find(config.name, config.run_dir))
(runs.find(config.name, config.run_dir) / "verdict.txt").write_text(f"{len(results)} trials\\n")""",
}


def write_notebooks(folder: Path) -> None:
    """The notebooks' stubs: all parameters, then a few lines that leave what the real ones
    leave.
    """
    folder.mkdir(parents=True)
    for stem, source in SOURCES.items():
        keys = stages.NOTEBOOKS[stem].model_fields
        cells = [
            ("\n".join(f"{key} = {VALUES[key]!r}" for key in keys), ["parameters"]),
            (source.strip(), []),
        ]
        notebook = {
            "nbformat": 4,
            "nbformat_minor": 5,
            "cells": [
                {
                    "cell_type": "code",
                    "id": f"c{n}",
                    "metadata": {"tags": tags},
                    "source": text,
                    "outputs": [],
                    "execution_count": None,
                }
                for n, (text, tags) in enumerate(cells)
            ],
            "metadata": {
                "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
            },
        }
        (folder / f"{stem}.ipynb").write_text(json.dumps(notebook))


@pytest.fixture
def stub_notebooks(tmp_path, monkeypatch):
    """Stub notebooks under tmp_path, which is the project's root too."""
    write_notebooks(tmp_path / "notebooks")
    monkeypatch.setattr(project_paths, "ROOT", tmp_path)
    monkeypatch.setattr(
        notebook_files, "notebook_path", lambda stem: tmp_path / "notebooks" / f"{stem}.ipynb"
    )
    return tmp_path


def stub_project(folder: Path) -> Path:
    """A project root of its own: a copy of the package beside stub notebooks, for `sweep_in`."""
    shutil.copytree(
        project_paths.CODE_ROOT / "kd_utils",
        folder / "kd_utils",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    write_notebooks(folder / "notebooks")
    return folder


def sweep_in(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The real command in a `stub_project`."""
    environment = {**os.environ, "PYTHONPATH": str(project)}
    environment.pop("KD_ROOT", None)
    return subprocess.run(
        [sys.executable, "-m", "kd_utils", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )


#: What a made-up run is made of; of its two validation examples the first is right.
MADE = {
    "cache": {"name": "n", "content_hash": "k" * 64},
    "more_caches": {"other": "m" * 64},
    "tokenizer": "t" * 16,
    "students": {"tiny": "f" * 64},
    "code": {"kd_utils/losses.py": "0" * 12},
}
PREDICTIONS = pd.DataFrame(
    {
        "example_id": ["a", "b"],
        "task": ["sst2", "gsm8k"],
        "correct": [True, False],
        "loglikelihoods": [[-1.5, -0.25], None],
        "generated": [None, "It is 4.\n#### 4"],
    }
)

_environment = cache(environment)  # which asks git


def metrics_of(method: str = "attention", seed: int = 3, **other: Any) -> dict[str, Any]:
    """Metrics of a trial of two epochs; the keys of `other`, all but `accuracy`, go before what is
    said here.
    """
    settings = {"distill_type": method, "seed": seed, "student": "tiny"}
    accuracy = {
        "validation_accuracy": other.pop("accuracy", 0.5),
        "validation_accuracy/sst2": 1.0,
        "validation_accuracy/gsm8k": 0.0,
    }
    epochs = [{"epoch": e, "train_loss": 1 / e, **accuracy, "seconds": 9.0} for e in (1, 2)]
    return {
        "config": settings,
        "config_hash": sha256_json(settings)[:16],
        "epochs": epochs,
        "final": epochs[-1],
        "cache": MADE["cache"] | {"name": "toy-2026-01-01-00000000"},
        **_environment(),
        "more_caches": MADE["more_caches"],
        "tokenizer": MADE["tokenizer"],
        "student": {"name": "tiny", "fingerprint": MADE["students"]["tiny"]},
        "precision": "torch.float32",
        "code": MADE["code"],
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": {"total": 21.5},
        "peak_memory_mb": 300.0,
    } | other


def write_notebook(
    path: Path,
    about: dict[str, Any],
    outputs: Any = (),
    execution_count: int | None = 1,
    stem: str = "",
) -> None:
    """An executed notebook of three cells; `about` is its `metadata.kd_utils`."""
    cells = [
        {"cell_type": "markdown", "source": "# Title", "metadata": {}},
        {"cell_type": "code", "source": "", "metadata": {}, "outputs": [], "execution_count": None},
        {
            "cell_type": "code",
            "source": ["1 + 1"],
            "metadata": {},
            "outputs": list(outputs),
            "execution_count": execution_count,
        },
    ]
    papermill = {"input_path": f"notebooks/{stem or path.stem}.ipynb"}
    notebook = {
        "cells": cells,
        "metadata": {"papermill": papermill, "kd_utils": about},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, notebook, "metadata.kd_utils")


def write_trial(
    run_dir: Path,
    method: str = "attention",
    seed: int = 3,
    predictions: pd.DataFrame = PREDICTIONS,
    **other: Any,
) -> str:
    """A whole trial, record and notebook; its name."""
    trial = trial_name(method, seed)
    trial_record.write_record(
        run_dir / "trials" / trial, metrics_of(method, seed, **other), predictions
    )
    record = trial_record.read_record(run_dir / "trials" / trial)
    write_notebook(
        run_dir / "trials" / f"{trial}.ipynb",
        {
            "trial": trial,
            "config_hash": record["config_hash"],
            "record": record["checksums"]["sha256"],
        },
        stem="03_train_student",
    )
    return trial


def write_plan(run_dir: Path, **other: Any) -> dict[str, Any]:
    """`sweep.json` of 2 methods x 2 seeds; `other` goes before what is said here."""
    planned = [
        {
            "trial": trial_name(method, seed),
            "swept": {"distill_type": method, "seed": seed},
            "config_hash": metrics_of(method, seed)["config_hash"],
            "epochs": 2,
        }
        for method in ("black_box", "attention")
        for seed in (0, 1)
    ]
    plan = {
        "format": trial_record.FORMAT,
        **MADE,
        "trials": planned,
    } | other
    write_sealed(run_dir / run_folder.PLAN, plan, "checksums")
    return plan


def write_summary(run_dir: Path, cache: dict[str, Any] = MADE["cache"]) -> None:
    """What ends a sweep: the results table, two files that 04 wrote, and the stages' notebooks."""
    results, data = run_folder.collect(run_dir), sha256_json(MADE)
    results.to_csv(run_dir / run_folder.SUMMARY, index=False)
    results.describe().to_csv(run_dir / "analysis.csv")
    (run_dir / run_folder.VERDICT).write_text(
        f"Nothing can be said of {sha256_file(run_dir / run_folder.SUMMARY)[:8]}.\n"
    )
    wrote = {
        name: sha256_file(run_dir / name)
        for name in ("analysis.csv", run_folder.SUMMARY, run_folder.VERDICT)
    }
    for stem, about in zip(
        check.STAGES,
        (
            {"artifact": {"data": data}},
            {"artifact": {"data": data, "cache": cache}},
            {"wrote": wrote},
        ),
    ):
        write_notebook(run_dir / f"{stem}.ipynb", about)


def whole_run(run_dir: Path, more: float = 0.0, cache: dict[str, Any] | None = None) -> Path:
    """A run without a fault, of four trials, their accuracies `more` than 0.25 and 0.75."""
    run_dir.mkdir(parents=True, exist_ok=True)
    made = {} if cache is None else {"cache": cache}
    for planned in write_plan(run_dir, **made)["trials"]:
        method, seed = planned["swept"].values()
        write_trial(run_dir, method, seed, accuracy=0.25 + seed / 2 + more, **made)
    write_summary(run_dir, cache or MADE["cache"])
    return run_dir


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def nested(depth: int) -> list:
    """[[[...]]]"""
    value: list = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run without a fault, of four trials, in a folder of its own."""
    return whole_run(tmp_path / "toy")
