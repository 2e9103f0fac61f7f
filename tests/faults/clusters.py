"""A Ray cluster of several nodes on this machine, and stub trials that tell when and where they
ran.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import yaml
from ray.cluster_utils import Cluster
from stubs import stub_project
from sweeps import Command
from sweeps import _environment as process_environment

#: 03 as a stub: it tells of itself in events.jsonl, waits while there is a file `hold`, fails as
#: `fault-TRIAL` says. Its predictions are ready-made: pandas would cost more than all the rest.
TRIAL = """
import json, os, shutil, signal, time
from kd_utils.records import trial_record as records
from kd_utils.store.sealed import SealedFolder
from kd_utils.config.project_paths import project_path
from kd_utils.config.trial import TrialConfig
from kd_utils.records.provenance import environment
from kd_utils.records.provenance import code_of
config, code = TrialConfig.from_notebook(globals()), code_of("03_train_student")
trial, artifacts = config.trial, config.artifacts
def tell(what):
    with open(artifacts / "events.jsonl", "a") as file:
        file.write(json.dumps({"trial": trial, "what": what, "time": time.time(), "pid": os.getpid(),
                               "node": os.environ.get("KD_NODE")}) + "\\n")
tell("begins")
until = time.monotonic() + 1500
while (artifacts / "hold").exists() and time.monotonic() < until:
    time.sleep(0.1)
if (fault := artifacts / f"fault-{trial}").exists():
    exec(fault.read_text())
rows = [{"epoch": epoch, "train_loss": 1.0, "validation_loss": 1 / epoch, "seconds": 0.1,
         "validation_accuracy": 0.5, "validation_accuracy/sst2": 0.5} for epoch in range(1, config.epochs + 1)]
for row in rows:
    records.report_row(row)
manifest = next(artifacts.glob(f"cache/{config.name}-*/manifest.json"))
metrics = {"config": config.model_dump(), "config_hash": config.fingerprint(), **environment(),
           "code": code, "tokenizer": "t",
           "cache": {"name": manifest.parent.name, "content_hash": json.loads(manifest.read_text())["checksums"]["sha256"]},
           "started": "2026-01-01T00:00:00Z", "seconds": {"total": 1.0}, "peak_memory_mb": 1.0, "epochs": rows,
           "final": rows[-1]}
tell("ends")
with SealedFolder(project_path(config.run_dir) / "trials" / trial, "metrics.json").replaced(
        {"format": records.FORMAT, **metrics}) as aside:
    shutil.copy(artifacts / "predictions.parquet", aside)"""
METHODS = ["black_box", "hidden_state", "attention", "combined"]
RAISES = "raise FloatingPointError('the loss is not finite')"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
MEMORY = """import numpy, resource
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))
numpy.ones(2**28)"""
#: A trial asks for next to no CPU: logical GPUs are what is shared out here.
ON_GPU = ("--gpus-per-trial", "1", "--cpus-per-trial", "0.1")


def project(folder: Path, **grid: list[Any]) -> Path:
    """A project root with these stubs, `p.yaml`, and a `grid.yaml`: four methods times seven seeds unless told."""
    notebook = stub_project(folder) / "notebooks" / "03_train_student.ipynb"
    document = json.loads(notebook.read_text())
    document["cells"][1]["source"] = TRIAL.strip()
    notebook.write_text(json.dumps(document))
    (folder / "p.yaml").write_text("epochs: 1\n")
    (folder / "grid.yaml").write_text(
        yaml.safe_dump({"distill_type": METHODS, "seed": list(range(7))} | grid)
    )
    (folder / "artifacts").mkdir()
    pd.DataFrame(
        {
            "example_id": ["a", "b"],
            "task": "sst2",
            "correct": [True, False],
            "loglikelihoods": [[-1.0, -2.0]] * 2,
        }
    ).to_parquet(folder / "artifacts" / "predictions.parquet")
    return folder


class Sweep(Command):
    """`python -m kd_utils sweep p.yaml --grid grid.yaml ...` in a project of stubs, on its own copy of the package."""

    def __init__(
        self, project: Path, *arguments: str, command: str = "sweep", **environment: str
    ) -> None:
        self.project, self.began = project, time.monotonic()
        self.mark = f"KD_MARK={uuid.uuid4().hex}"
        first = ("p.yaml", "--grid", "grid.yaml") if command == "sweep" else ()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kd_utils", command, *first, *arguments],
            cwd=project,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment_of(project) | {"KD_MARK": self.mark.partition("=")[2], **environment},
        )


def environment_of(project: Path) -> dict[str, str]:
    """Of a process that runs the project's own copy of the package, at the place where that is."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("KD_ROOT", "RAY_TMPDIR", "RAY_ADDRESS")
    }
    return inherited | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}


def events(project: Path) -> pd.DataFrame:
    """What the trials told so far: columns trial, what ("begins", "ends"), time, pid, node."""
    path = project / "artifacts" / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return pd.DataFrame(map(json.loads, lines), columns=["trial", "what", "time", "pid", "node"])


def begun(project: Path, trials: int, sweep: Sweep, within: float = 1200) -> pd.DataFrame:
    """Wait until so many executions have begun, and return what they told."""
    until = time.monotonic() + within
    while ((told := events(project))["what"] == "begins").sum() < trials:
        if sweep.process.poll() is not None or time.monotonic() > until:
            sweep.process.kill()
            raise AssertionError(
                f"only {len(told)} of {trials} began: {sweep.process.communicate()[0]}"
            )
        time.sleep(0.1)
    return told


def hold(project: Path, on: bool) -> None:
    """Whether the trials wait; after 25 minutes they go on anyway."""
    path = project / "artifacts" / "hold"
    path.touch() if on else path.unlink()


def fault(project: Path, trial: str, code: str) -> None:
    """What a trial meets in its notebook from now on; "" for nothing."""
    path = project / "artifacts" / f"fault-{trial}"
    path.write_text(code) if code else path.unlink()


def ended(pids: Collection[int], within: float = 120) -> bool:
    """Whether these processes end within so many seconds."""
    until = time.monotonic() + within
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    return not any(map(psutil.pid_exists, pids))


def forget(project: Path, *trials: str) -> None:
    """Remove these trials' records, so that they are missing."""
    for trial in trials:
        shutil.rmtree(project / "runs" / "stub" / "trials" / trial)
        (project / "runs" / "stub" / "trials" / f"{trial}.ipynb").unlink()
    (project / "artifacts" / "events.jsonl").unlink()


def most_at_once(told: pd.DataFrame) -> int:
    """The largest number of executions that ran side by side; one that was never told to end goes
    on for ever.
    """
    steps = told.sort_values("time", kind="stable")["what"].map({"begins": 1, "ends": -1})
    return int(steps.cumsum().max())


@contextmanager
def cluster(**gpus: int) -> Iterator[Cluster]:
    """A cluster with a node of each name and so many logical GPUs, for the block; nothing of it is
    left behind.
    """
    mark = uuid.uuid4().hex
    ours = {
        "KD_MARK": mark,
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="kd-", dir="/tmp"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
    }  # the starts are counted: Ray is to kill none to save memory
    before = {key: os.environ.get(key) for key in (*ours, "KD_ROOT")}
    os.environ.update(ours)
    os.environ.pop("KD_ROOT", None)
    os.makedirs(f"{ours['RAY_TMPDIR']}/ray")
    started = Cluster()
    try:
        for name, number in gpus.items():
            add_node(started, name, number)
        yield started
    finally:
        started.shutdown()
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        shutil.rmtree(ours["RAY_TMPDIR"], ignore_errors=True)
    left = left_behind(f"KD_MARK={mark}")
    assert left == [], left


def add_node(cluster: Cluster, name: str, gpus: int, **environment: str) -> Any:
    """One more node, which unpacks the code at a place of its own; its trials tell `name` as their
    node.
    """
    node = cluster.add_node(
        wait=False,
        num_cpus=1,
        num_gpus=gpus,
        include_dashboard=False,
        include_log_monitor=False,
        temp_dir=f"{os.environ['RAY_TMPDIR']}/{name}",
        env_vars={"KD_NODE": name, **environment},
    )
    cluster._wait_for_node(node, timeout=300)
    return node


def left_behind(mark: str, within: float = 50) -> list[str]:
    """Processes with this in their environment that still run after so many seconds."""
    until = time.monotonic() + within
    while True:
        left = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and mark in process_environment(
                    process.pid
                ):
                    left.append(" ".join(process.cmdline())[:80])
            except psutil.Error:
                continue
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.2)
