"""The parts of the kit, each by itself: `python benchmarks/gpu/parts.py PART --out DIR` (run.sh
sets it up). A part writes its record as it goes, ends at its limit, and leaves at most 8 files:

    DIR/PART.json       what ran where, for how long, and the table that is printed last
    DIR/PART.log        everything that the part printed
    DIR/PART.tar.gz     its records, cut into .00, .01, ... of 16 MB where they are larger
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import kit
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the kd_utils beside this file, whatever else is installed

from kd_utils.cluster import cuda, machines  # noqa: E402
from kd_utils.records import check, provenance  # noqa: E402
from kd_utils.speed import meters  # noqa: E402
from kd_utils.store import files  # noqa: E402
from kd_utils.sweep.slots import slot  # noqa: E402

PARAMS = ROOT / "papermill_params"

FILE_BYTES, MOST_FILES = 16 * 10**6, 8  # bytes of a file that is left, and how many

TRIAL_BYTES = 7e9  # of a card, for each trial of smol-full; a test holds it against the estimate

VERSIONS = ("triton", "liger-kernel")  # of packages that no other record names

PACKED_EVERY = 30  # seconds between two states of the records that a killed part leaves

MOST_SEEDS = 14  # twice those of the benchmark's grid

ENDING = 20  # seconds that a stopped command has to end cleanly


class Run:
    """One execution of a part: its limit, its log, and what it leaves.

    Args:
        part, out: the part's name, and the folder that gets its files.
        seconds: how long it may take, packing included.
        tiny: the sizes of a rehearsal.
    """

    def __init__(self, part: str, out: Path, seconds: float, tiny: bool) -> None:
        self.part, self.out, self.seconds, self.tiny = part, out, seconds, tiny
        self.began, self.deadline = time.time(), time.time() + seconds
        self.status = 1  # of the part, as a command's
        self.records: dict[str, Path] = {}  # name in the archive -> file or folder
        self.found: dict[str, Any] = {}  # for the summary
        self.log = out / f"{part}.log"
        out.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        self.ran_on = {**provenance.environment(), "cards": cards()}
        self.ran_on["versions"] |= {name: kit.installed(name) for name in VERSIONS}

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    def command(self, *words: object, reserve: float = 0, **variables: object) -> int | None:
        """Run a command to its end, its output into the log and onto the screen.

        Args:
            reserve: seconds that must be left for what comes after it.
            variables: of its environment.

        Returns:
            Its exit status; None: it was stopped at the limit.
        """
        mark = uuid.uuid4().hex  # of all processes that the command starts
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        end, packed = self.deadline - reserve, time.time()
        with self.log.open("ab") as log, self.log.open("rb") as said:
            said.seek(0, io.SEEK_END)
            process = subprocess.Popen(
                [*map(str, words)],
                cwd=ROOT,
                env=environment | {slot.MARK: mark},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while process.poll() is None and time.time() < end:
                    time.sleep(0.2)
                    sys.stdout.write(said.read().decode(errors="replace"))
                    if time.time() > packed + PACKED_EVERY:
                        self.pack()
                        packed = time.time()
                if stopped := process.poll() is None:
                    process.terminate()  # alone: a sweep ends its own trials
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(ENDING)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                slot.end_marked(mark)
                process.wait()
            sys.stdout.write(said.read().decode(errors="replace"))
        if _bytes(self.log) > FILE_BYTES:
            self.log.write_bytes(self.log.read_bytes()[-FILE_BYTES:])
        return None if stopped else process.returncode

    def pack(self, **found: Any) -> None:
        """Write the summary, with all that was `found` so far, and the archive of the records.

        What would be more than `MOST_FILES` is left out, the largest first, and named.
        """
        self.found |= found
        document = {
            "part": self.part,
            "tiny": self.tiny,
            "began": datetime.fromtimestamp(self.began, UTC).isoformat(timespec="seconds"),
            "limit_seconds": self.seconds,
            "seconds": round(time.time() - self.began, 1),
            **self.ran_on,
            **self.found,
        }
        files.write_json(self.out / f"{self.part}.json", document)
        inside = {
            str(Path(name, *file.relative_to(path).parts)): file
            for name, path in self.records.items()
            for file in ([path] if path.is_file() else sorted(path.rglob("*")))
            if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
        }
        while len(left := volumes(_archive(inside), f"{self.part}.tar.gz")) > MOST_FILES - 2:
            largest = max(inside, key=lambda name: _bytes(inside[name]))
            print(f"too large to be left, stays on this machine: {inside.pop(largest)}")
        for name, content in left.items():
            with files.written_aside(self.out / name) as aside:
                aside.write_bytes(content)
        for old in self.out.glob(f"{self.part}.tar.gz*"):
            if old.name not in left:
                old.unlink()


def _bytes(path: Path) -> int:
    with suppress(OSError):  # a trial removes files meanwhile
        return path.stat().st_size
    return 0


def _archive(inside: dict[str, Path]) -> bytes:
    """A tar.gz of these files, by the names that they have in it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, file in inside.items():
            with suppress(OSError):  # as above
                archive.add(file, name)
    return packed.getvalue()


def volumes(content: bytes, name: str) -> dict[str, bytes]:
    """A file whole, or cut into `NAME.00`, `NAME.01`, ... (`cat NAME.* | tar xz` joins them)."""
    if len(content) <= FILE_BYTES:
        return {name: content}
    starts = range(0, len(content), FILE_BYTES)
    return {f"{name}.{n:02d}": content[at : at + FILE_BYTES] for n, at in enumerate(starts)}


def cards() -> list[str]:
    """Name, driver and memory of every card, as nvidia-smi says them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in said.splitlines() if line.strip()]


def card_bytes(cards: list[str]) -> float:
    """Memory of the smallest of these cards; 0 where nvidia-smi does not say it."""
    memory = [re.search(r"(\d+) MiB$", card) for card in cards]
    return min((int(found[1]) * 2.0**20 for found in memory if found), default=0)


def correct(run: Run) -> pd.DataFrame:
    """The tests marked `gpu`: a row per file, and one for each test that did not pass."""
    record = ROOT / "artifacts" / "gpu" / "correct.jsonl"
    record.parent.mkdir(parents=True, exist_ok=True)
    planned = record.with_suffix(".planned")
    for old in (record, planned):
        old.unlink(missing_ok=True)
    run.records["correct.jsonl"] = record
    # Estimates of memory last, in case the limit comes first.
    paths = sorted(ROOT.glob("tests/gpu/test_*.py"), key=lambda path: ("cost" in path.name, path))
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "recorder", "-p", "no:cacheprovider"]
    status = run.command(
        *pytest, "-m", "gpu", *paths,
        reserve=5,
        KD_RECORD=record,
        KD_DEADLINE=run.deadline - 10,
        PYTEST_DISABLE_PLUGIN_AUTOLOAD=1,  # an image brings plugins that nobody asked for
        PYTHONPATH=f"{ROOT / 'benchmarks' / 'gpu'}:{os.environ.get('PYTHONPATH', ROOT)}",
    )  # fmt: skip
    lines = record.read_text().splitlines() if record.exists() else []
    tests = pd.DataFrame(
        [json.loads(line) for line in lines], columns=["test", "outcome", "seconds", "said"]
    )
    expected = int(planned.read_text()) if planned.exists() else 0
    if tests.empty:
        print("no test was run: the log says why")
        return tests
    tests["file"] = tests["test"].str.split("::").str[0].str.split("/").str[-1]
    table = pd.crosstab(tests["file"], tests["outcome"]).reindex(
        columns=["passed", "failed", "skipped"], fill_value=0
    )
    table["seconds"] = tests.groupby("file")["seconds"].sum().round(1)
    table.loc["all"] = table.sum()
    for row in tests[tests["outcome"] != "passed"].itertuples():
        print(f"{row.outcome}: {row.test}: {row.said}")
    whole = len(tests) == expected and (tests["outcome"] == "passed").all()
    run.status = 0 if whole and status == 0 else 1
    if len(tests) < expected:
        print(f"{expected - len(tests)} of {expected} tests were not run: the limit came first")
    return table.reset_index()


def shapes(run: Run) -> pd.DataFrame:
    """Notebook 05 at the paper's shapes: each measurement beside its goal."""
    values = yaml.safe_load((PARAMS / "bench-llama2.yaml").read_text())
    folder = ROOT / "runs" / values["name"]
    shutil.rmtree(folder, ignore_errors=True)
    run.records[values["name"]] = folder
    values |= {"seconds": int(0.75 * run.seconds)} | (TINY_SHAPES if run.tiny else {})
    status = run.command(
        sys.executable, "-m", "kd_utils", "bench", _parameters(values), "--run-dir", folder,
        reserve=ENDING + 5,
    )  # fmt: skip
    if not (folder / "speed.json").exists():
        return pd.DataFrame()
    found = json.loads((folder / "speed.json").read_text())
    numbers = {key: value for key, value in found.items() if isinstance(value, float)}
    # The limit may end the part when it has what it is for.
    enough = status is None and meters.PAPERS_FLOORS.keys() <= numbers.keys()
    run.status = 0 if status == 0 or enough else 1
    if status is None:
        print(f"stopped at the limit, in section {found['running']!r}")
    if found.get("left_out"):
        print("left out for want of time:", ", ".join(found["left_out"]))
    goals = meters.GOALS if run.tiny else meters.GOALS | meters.PAPERS_GOALS
    table = pd.DataFrame({"measured": numbers, "limit": pd.Series(found["limits"], dtype=float)})
    table.insert(1, "goal", {key: f"{sense} {bound:g}" for key, (sense, bound) in goals.items()})
    table.insert(2, "floor", pd.Series({} if run.tiny else meters.PAPERS_FLOORS, dtype=float))
    beyond = table.index[table["measured"] > table["floor"]]
    if len(beyond):
        print("beyond the floor:", ", ".join(beyond))
        run.status = 1
    table = table.loc[list(numbers)].astype(object).fillna("")
    return table.rename_axis("measurement").reset_index()


def smol_full(run: Run) -> pd.DataFrame:
    """SmolLM2-135M on all rows: as many whole seeds, all methods of each, as the limit admits."""
    values = yaml.safe_load((PARAMS / "smol-full.yaml").read_text())
    methods = yaml.safe_load((PARAMS / "grid.yaml").read_text())["distill_type"]
    if run.tiny:
        values, methods = values | TINY_SMOL, ["untrained", "black_box", "combined"]
    if pieces := os.environ.get("KD_KIT"):
        values["data_dir"] = os.path.relpath(Path(pieces) / "2" / "data", ROOT)
    folder, seeds, spent = ROOT / "runs" / values["name"], [], []
    run.records[values["name"]] = folder
    reserve = ENDING + 60  # to end, and to analyse what is whole
    sweep = partial(_sweep, run, values, _share(run.ran_on["cards"]))
    # The first seed's time includes the teacher's: half of it is a guess at the next one's.
    while len(seeds) < (2 if run.tiny else MOST_SEEDS) and run.left - reserve > max(
        spent[1:] or [second / 2 for second in spent], default=0
    ):
        start, grid = time.time(), {"distill_type": methods, "seed": [*seeds, len(seeds)]}
        if (status := sweep(grid, reserve)) != 0:
            print("stopped at the limit" if status is None else f"the sweep ended with {status}")
            if seeds:  # the plan and 04 again, of the whole seeds alone
                _remove_other_seeds(folder, seeds)
                sweep(grid | {"seed": seeds}, 0)
            break
        seeds.append(len(seeds))
        spent.append(time.time() - start)
        run.pack(whole_seeds=seeds)
    problems = check.check_run(folder) if seeds else ["no seed is whole"]
    print(*problems, sep="\n")
    run.status = 1 if problems else 0
    summary = folder / "results_summary.csv"
    if not seeds:
        return pd.DataFrame(columns=["method", "trials"])
    table = pd.read_csv(summary).groupby("config/distill_type", sort=False)
    return table.agg(
        trials=("status", "size"),
        accuracy=("validation_accuracy/macro", "mean"),
        sd=("validation_accuracy/macro", "std"),
        seconds=("seconds", "mean"),
    ).round(4).rename_axis("method").reset_index()  # fmt: skip


def _share(cards: list[str]) -> list[object]:
    """What of this machine, which has these cards, each trial gets: several share a card."""
    cores, gpus = machines.cores(), len(cuda.usable_gpus(None, "auto", print))
    side_by_side = 1
    if gpus:
        fitting = int(0.9 * card_bytes(cards) / TRIAL_BYTES)
        side_by_side = gpus * max(1, min(8, cores // 3 // gpus, fitting))
    # Rounded down to the steps in which executors count, so that all of them fit.
    cpu_share, gpu_share = (math.floor(n / side_by_side * 1e4) / 1e4 for n in (cores, gpus))
    return ["--cpus-per-trial", cpu_share, *(["--gpus-per-trial", gpu_share] if gpus else [])]


def _sweep(
    run: Run, values: dict[str, Any], share: list[object], grid: dict[str, list], reserve: float
) -> int | None:
    """A sweep through the local pool."""
    asked = [_parameters(values), "--grid", _parameters(grid, "grid")]
    place = ["--run-dir", ROOT / "runs" / values["name"], "--executor", "local"]
    sweep = [sys.executable, "-m", "kd_utils", "sweep", *asked, *place, *share]
    return run.command(*sweep, reserve=reserve)


def _remove_other_seeds(folder: Path, seeds: Sequence[int]) -> None:
    """Remove what trials of other seeds left: a seed counts whole or not at all."""
    plan = json.loads((folder / "sweep.json").read_text())
    for trial in plan["trials"]:
        if trial["swept"]["seed"] not in seeds and trial["swept"]["distill_type"] != "untrained":
            name, trials = trial["trial"], folder / "trials"
            whole = [trials / name, trials / f"{name}.ipynb", trials / f"{name}.failed.ipynb"]
            for path in [*whole, *trials.glob(f".{name}.*"), *trials.glob(f".{name}-*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _parameters(values: dict[str, Any], name: str = "params") -> Path:
    path = ROOT / "artifacts" / "gpu" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


#: What a rehearsal takes in place of the parts' sizes.
TINY_SHAPES = {
    "shapes": "tiny",
    "bench_rows": 16,
    "size_rows": 0,
    "growth_rows": 20,
    "trial_rows": 16,
    "trial_epochs": 2,
    "generate_prompts": 2,
    "max_new_tokens": 8,
    "budget_tokens": 512,
    "repeats": 1,
}
TINY_SMOL = {
    "max_length": 256,
    "train_rows": "sst2:8 mmlu:2 gsm8k:2",
    "held_out_rows": 2,
    "validation_rows": "sst2:6 mmlu:2 gsm8k:2",
    "teacher_epochs": 1,
    "teacher_batch_size": 4,
    "batch_tokens": 1024,
    "epochs": 1,
    "student_layers": 2,
    "eval_batch_size": 4,
    "max_new_tokens": 8,
    "precision": "float32",
}

#: Every part, ordered by value: what it does and its limit in seconds.
PARTS: dict[str, tuple[Callable[[Run], pd.DataFrame], int]] = {
    "correct": (correct, 90),
    "shapes": (shapes, 240),
    "smol-full": (smol_full, 420),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="gets the part's files")
    parser.add_argument("--seconds", type=float, help="its limit; default: the part's own")
    parser.add_argument("--tiny", action="store_true", help="the sizes of a rehearsal")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work, limit = PARTS[given.part]
    run = Run(given.part, given.out.absolute(), given.seconds or limit, given.tiny)
    table = pd.DataFrame()
    try:
        table = work(run)
    finally:
        run.pack(status=run.status, table=json.loads(table.to_json(orient="records")))
    print(table.to_string(index=False))
    print(f"{given.part}: {time.time() - run.began:.0f} s of {run.seconds:.0f}; left in {run.out}:")
    for path in sorted(run.out.glob(f"{given.part}.*")):
        print(f"  {path.name} {path.stat().st_size / 1e6:.2f} MB")
    return run.status


if __name__ == "__main__":
    sys.exit(main())
