"""Ray, on this machine or a cluster; trials through Ray Tune, one papermill execution of 03 per trial."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import config, records
from .display import Progress
from .environment import git_commit
from .execution import code_root, execute_trial, keep_failure

#: What Ray would say on its own account; the sweep has its own display, and so has 02.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0",
         "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1",
         "RAY_DATA_LOG_LEVEL": "CRITICAL"}


@contextmanager
def ray_running(address: str | None) -> Iterator[None]:
    """Ray for as long as the block runs; a Ray that this process has started already is used and goes on.

    Args:
        address: of a Ray cluster; None or "local" starts Ray on this machine and stops it afterwards.

    Raises:
        ValueError: no cluster answers.
    """
    os.environ.update(QUIET)
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray's sockets on this machine need a path well under 107 characters, hence /tmp.
    sockets = tempfile.mkdtemp(prefix="kd-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
    try:
        _start_ray(address, sockets)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(sockets, ignore_errors=True)


def run_trials(trials: dict[str, dict[str, Any]], run_dir: Path, progress: Progress, address: str | None, cpus: float,
               gpus: float | None) -> None:
    """Run trials through Ray Tune, as many side by side as the resources allow; one that fails does not stop others.

    Args:
        trials: name -> its entry of `sweep.json`.
        progress: told of every start, epoch, end and failure.
        address: of a Ray cluster; None starts Ray on this machine and stops it afterwards.
        cpus, gpus: what Ray reserves for a trial, fractions too; no GPUs given: one where any machine has one.

    Raises:
        ValueError: no cluster answers, or no machine could ever run a trial.
    """
    os.environ.update(QUIET)
    import ray
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Tune's own state is not needed after the run. On a cluster every node must see it, hence the shared root.
    config.resolve("artifacts").mkdir(parents=True, exist_ok=True)
    storage = tempfile.mkdtemp(prefix="tune-", dir=config.resolve("artifacts"))

    def train(chosen: dict[str, Any]) -> None:
        execute_trial(trials[chosen["trial"]], run_dir, max(1, int(cpus)), tune.report, scratch=Path.cwd())

    progress.say(f"{len(trials)} trials to run; Ray is starting")
    try:
        with ray_running(address):
            gpus = fitting_gpus(ray.nodes(), cpus, gpus)
            names = tune.TuneConfig(reuse_actors=True, trial_name_creator=_name, trial_dirname_creator=_name)
            run = tune.RunConfig(name="trials", storage_path=storage, verbose=0, callbacks=[watch(progress, run_dir)])
            tune.Tuner(tune.with_resources(train, {"cpu": cpus, "gpu": gpus}), tune_config=names, run_config=run,
                       param_space={"trial": tune.grid_search(list(trials))}).fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _start_ray(address: str | None, sockets: str) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address in (None, "local"):
        # Trials hand over a few numbers and a teacher pool is handed tokens, so the object store needs no third of the
        # memory, which is Ray's default.
        ray.init(address="local", include_dashboard=False, object_store_memory=128 * 2**20, _temp_dir=sockets, **quiet)
        return
    excluded = ["/.git", "/.venv", "/artifacts", "/runs", "__pycache__"]
    variables = {"KD_ROOT": str(config.ROOT), "KD_COMMIT": git_commit()}
    try:
        ray.init(address=address, **quiet,
                 runtime_env={"working_dir": str(code_root()), "excludes": excluded, "env_vars": variables})
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        # Ray sends its token to an address given by hand only when it is told to: that choice stays the user's.
        raise ValueError(f"no Ray cluster answers at {address} ({type(error).__name__}): see `ray status` there; if it "
                         "asks for a token, set RAY_AUTH_MODE=token") from None


def fitting_gpus(nodes: list[dict[str, Any]], cpus: float, gpus: float | None) -> float:
    """GPUs per trial (default: one where any node has one); an error when no node could ever run a trial."""
    have = [node["Resources"] for node in nodes if node["Alive"]]
    if gpus is None:
        gpus = 1 if any(node.get("GPU", 0) >= 1 for node in have) else 0
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in have):
        there = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in have)
        raise ValueError(f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, but the machines have: {there}; "
                         "ask for less with --cpus-per-trial or --gpus-per-trial")
    return gpus


def _name(trial: Any) -> str:
    return trial.config["trial"]


def watch(progress: Progress, run_dir: Path) -> Any:
    """Tune's callback that feeds the display and sees to it that every failed trial leaves its cause."""
    from ray import tune

    class Watch(tune.Callback):
        def __init__(self, progress: Progress, run_dir: Path) -> None:
            self.progress, self.run_dir = progress, run_dir

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles its callbacks to restore a run by; the records do that here

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.progress.started(_name(trial))

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            if "epoch" in result:
                self.progress.reported(_name(trial), result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.progress.finished(_name(trial))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            notebook = self.run_dir / "trials" / f"{_name(trial)}.ipynb"
            # Where the actor itself died, nobody has kept the failure yet.
            keep_failure(notebook, "03_train_student",
                         "the trial's process died: killed, out of memory, or its machine was lost")
            cause = records.failure_cause(notebook.with_name(f"{_name(trial)}.failed.ipynb"))
            self.progress.broke(_name(trial), cause)

    return Watch(progress, run_dir)
