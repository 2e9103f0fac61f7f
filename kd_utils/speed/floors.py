"""What the project asks of each measurement of notebook 05, and what a sweep adds to its trials."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from kd_utils.config.project_paths import CODE_ROOT
from kd_utils.config.trial import DISTILLATIONS
from kd_utils.records.trial_record import read_record

#: A measurement must be at most ("<=") or at least (">=") its floor.
FLOORS = {
    "cache_bytes_vs_naive": ("<=", 0.018),
    "cache_bytes_vs_naive/compact": ("<=", 0.013),
    "cache_grad_cosine": (">=", 0.999),
    "cache_write_vs_forward": (">=", 0.90),
    "data_wait_share": ("<=", 0.03),
    "black_box_vs_finetune": ("<=", 1.25),
    "combined_vs_black_box": ("<=", 1.15),
    "peak_memory_vs_finetune": ("<=", 1.25),
    "speedup_vs_naive": (">=", 8.0),
    "sweep_overhead_s": ("<=", 8.0),
}


def against_floors(measured: dict[str, float], limits: dict[str, float]) -> pd.DataFrame:
    """Compare measurements with their floors.

    Args:
        measured: by key; those without a floor are left out.
        limits: the best that is possible, for every key that has a floor.

    Returns:
        A row per measurement: `key`, `measured`, the sense of the comparison, `floor`, `limit`,
        `met`, and `margin`: how many times better than its floor the measurement is (below 1 the
        floor is missed).
    """
    rows = []
    for key, (sense, floor) in FLOORS.items():
        if key in measured:
            value = measured[key]
            margin = value / floor if sense == ">=" else floor / max(value, 1e-9)
            rows.append((key, value, sense, floor, limits[key], bool(margin >= 1), margin))
    return pd.DataFrame(rows, columns=["key", "measured", "", "floor", "limit", "met", "margin"])


def measure_sweep(trials: int, *, artifacts_dir: str, folder: Path) -> dict[str, float]:
    """Run a toy sweep on two slots and measure the time beyond the trials' own training and
    evaluation.

    The sweep is an experiment of its own, "bench", with one epoch a trial: data and cache of "toy"
    do not change. A first command, which is not measured, makes data, cache and one trial. A second
    command runs the others.

    Args:
        trials: about how many; rounded to whole seeds of all methods.
        artifacts_dir: where data and cache are made.
        folder: where the sweep is run.

    Returns:
        `trials`; `wall_s` of the second command; `inside_s`, seconds in which its trials trained
        and were evaluated; `overhead_s` = (2 x wall_s - inside_s) / trials; `import_s`, seconds
        that a process needs for its imports alone.

    Raises:
        RuntimeError: the sweep failed; with the end of its output.
    """
    seeds = range(max(round(trials / len(DISTILLATIONS)), 1))
    parameters, grid = folder / "toy.yaml", folder / "grid.yaml"
    parameters.write_text(
        "name: bench\nteacher_epochs: 2\nepochs: 1\nsave_student: false\n"
        f"artifacts_dir: {json.dumps(artifacts_dir)}\n"
    )
    grid.write_text(f"distill_type: [{', '.join(DISTILLATIONS)}]\nseed: {list(seeds)}\n")
    sweep = ["-m", "kd_utils", "sweep", parameters, "--grid", grid, "--run-dir", folder / "sweep"]
    sweep += ["--cpus-per-trial", os.cpu_count() / 2]
    _seconds(*sweep, "--only", "distill_type=black_box,seed=0")
    wall = _seconds(*sweep)
    names = [f"{method}_seed{seed}" for method in DISTILLATIONS for seed in seeds]
    names.remove("black_box_seed0")
    spent = [read_record(folder / "sweep" / "trials" / name)["seconds"] for name in names]
    inside = sum(trial["training"] + trial["evaluation"] for trial in spent)
    return {
        "trials": len(names),
        "wall_s": wall,
        "inside_s": inside,
        "overhead_s": (2 * wall - inside) / len(names),
        "import_s": _seconds("-c", "import pandas, transformers.models.llama.modeling_llama"),
    }


def _seconds(*arguments: object) -> float:
    """Seconds that Python takes with these arguments."""
    start = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=CODE_ROOT, capture_output=True, text=True)
    if done.returncode:
        output = " ".join((done.stdout + done.stderr).split())
        raise RuntimeError(f"the toy sweep failed: {output[-500:]}")
    return time.perf_counter() - start
