"""How notebook 05 measures, and what the project asks of each measurement."""

import ctypes
import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from kd_utils.cluster import machines
from kd_utils.config import project_paths, stages, trial
from kd_utils.cost.work import best_rate
from kd_utils.records.trial_record import read_record

#: A measurement must be at most ("<=") or at least (">=") its goal.
GOALS = {
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
    "trial_start_vs_imports": ("<=", 0.5),
}

#: The paper's work, and the goals of one H100 for it.
PAPERS_WORK = {"shapes": "llama2", "trial_rows": 7000, "trial_epochs": 3, "bench_batch_size": 8}
PAPERS_GOALS = {"teacher_pass_s": ("<=", 60.0), "trial_s": ("<=", 120.0)}

#: If one H100 takes more seconds than these for the paper's work, the code is at fault.
PAPERS_FLOORS = {"teacher_pass_s": 90.0, "trial_s": 180.0}

#: What every process of a trial imports, if it is a fresh one.
IMPORTS = "import pandas, transformers.models.llama.modeling_llama"

RESET_PEAK = Path("/proc/self/clear_refs")  # Linux; some sandboxes lack it


def goals_for(config: stages.SpeedConfig, device: torch.device) -> dict[str, tuple[str, float]]:
    """The goals that a run is judged by: seconds count for the paper's work on a GPU only."""
    asked = config.model_dump(include=set(PAPERS_WORK))
    papers = asked == PAPERS_WORK and device.type == "cuda"
    return {**PAPERS_GOALS, **GOALS} if papers else GOALS


def against_goals(
    measured: dict[str, float],
    limits: dict[str, float],
    goals: dict[str, tuple[str, float]] = GOALS,
) -> pd.DataFrame:
    """Compare measurements with their goals; those without a goal are left out.

    Args:
        limits: the best that is possible, for every key that has a goal.
        goals: the sense of the comparison and the bound, by key.

    Returns:
        A row per measurement: `key`, `measured`, the sense of the comparison, `goal`, `limit`,
        `met`, and `margin`: how many times better than its goal the measurement is.
    """
    rows = [(key, measured[key], *goals[key], limits[key]) for key in goals if key in measured]
    table = pd.DataFrame(rows, columns=["key", "measured", "", "goal", "limit"])
    below = table["goal"] / table["measured"].clip(lower=1e-9)
    margin = below.where(table[""] == "<=", table["measured"] / table["goal"])
    return table.assign(met=margin >= 1, margin=margin)


class Laps:
    """Seconds between calls of `lap`, summed by part in `seconds`; a GPU is waited for."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = torch.device(device)
        self._last = self._now()  # what a GPU was given before is no part of the first lap

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self, part: str) -> None:
        """End a lap, add its seconds to `part`, and start the next one."""
        now = self._now()
        self.seconds[part] += now - self._last
        self._last = now


def alternate(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    device: torch.device | str = "cpu",
    warm_up: bool = True,
) -> pd.DataFrame:
    """Time several sides in turn, so that other load on the machine slows all of them alike.

    Args:
        sides: the work of each side, by name; a GPU is waited for at its end.
        warm_up: first run every side once without measuring it.

    Returns:
        Seconds, a row per repeat and a column per side.
    """
    rounds, first = [], int(warm_up)
    for number in range(first + repeats):
        if number == first:
            gc.collect()
        laps = Laps(device)
        for name, work in sides.items():
            work()
            laps.lap(name)
        rounds.append(laps.seconds)
    return pd.DataFrame(rounds[first:])


def memory_rate(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written ones together; the best of five."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**25, device=device)  # 1 GB, 128 MB
    target = torch.ones_like(source)
    return best_rate(lambda: target.copy_(source), 2 * source.nbytes, device)


def peak_mb(
    work: Callable[[], object], *, device: torch.device | str = "cpu", all_held: bool = False
) -> float:
    """Run `work` and return the most memory in MB (2**20 bytes) that it held beyond what was held.

    On a GPU this counts torch's allocations, otherwise the resident set of the process (Linux),
    looked at every 5 ms where the kernel keeps no peak that can be restarted.

    Args:
        all_held: count what was held before, too.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = 0 if all_held else torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but not returned would hide new memory
    before = 0 if all_held else _resident_kb("VmRSS")
    try:
        RESET_PEAK.write_text("5")
    except OSError:
        peak = _seen_peak_kb(work)
    else:
        work()
        peak = _resident_kb("VmHWM")
    # The kernel counts pages per core and adds them up now and then: the peak can be a few short.
    return max(peak - before, 0) / 2**10


def _seen_peak_kb(work: Callable[[], object]) -> int:
    """Run `work`, and look at the resident set meanwhile."""
    done, seen = threading.Event(), [_resident_kb("VmRSS")]

    def look() -> None:
        while not done.wait(0.005):
            seen.append(_resident_kb("VmRSS"))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look)
        try:
            work()
        finally:
            done.set()
    return max(seen)


def _resident_kb(field: str) -> int:
    [line] = re.findall(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(line)


def measure_sweep(trials: int, *, artifacts_dir: str, folder: Path) -> dict[str, float]:
    """Run a toy sweep on two slots, and measure what it adds to its trials.

    The sweep is an experiment of its own, "bench", with one epoch a trial: data and cache of "toy"
    do not change. A first command, which is not measured, makes data, cache and one trial; a second
    one runs the others.

    Args:
        trials: about how many; rounded to whole seeds of all methods.
        artifacts_dir, folder: where data and cache are made, and where the sweep is run.

    Returns:
        `trials`; `wall_s` of the second command; `inside_s`, the seconds of its trials' training
        and evaluation; `overhead_s` = (2 x wall_s - inside_s) / trials; `import_s`, the seconds of
        a process's imports.

    Raises:
        RuntimeError: the sweep failed; with the end of its output.
    """
    seeds = range(max(round(trials / len(trial.DISTILLATIONS)), 1))
    parameters, grid = folder / "toy.yaml", folder / "grid.yaml"
    parameters.write_text(
        "name: bench\nteacher_epochs: 2\nepochs: 1\nsave_student: false\n"
        f"artifacts_dir: {json.dumps(artifacts_dir)}\n"
    )
    grid.write_text(f"distill_type: [{', '.join(trial.DISTILLATIONS)}]\nseed: {list(seeds)}\n")
    sweep = ["-m", "kd_utils", "sweep", parameters, "--grid", grid, "--run-dir", folder / "sweep"]
    sweep += ["--cpus-per-trial", machines.cores() / 2]
    python_seconds(*sweep, "--only", "distill_type=black_box,seed=0")
    wall = python_seconds(*sweep)
    names = [trial.trial_name(method, seed) for method in trial.DISTILLATIONS for seed in seeds]
    names.remove("black_box_seed0")
    spent = [read_record(folder / "sweep" / "trials" / name)["seconds"] for name in names]
    inside = sum(seconds["training"] + seconds["evaluation"] for seconds in spent)
    return {
        "trials": len(names),
        "wall_s": wall,
        "inside_s": inside,
        "overhead_s": (2 * wall - inside) / len(names),
        "import_s": python_seconds("-c", IMPORTS),
    }


def python_seconds(*arguments: object) -> float:
    """Seconds that Python takes with these arguments."""
    start = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=project_paths.CODE_ROOT, capture_output=True, text=True)
    if done.returncode:
        output = " ".join((done.stdout + done.stderr).split())
        raise RuntimeError(f"the toy sweep failed: {output[-500:]}")
    return time.perf_counter() - start
