"""Ray, on this machine or a cluster: one task per trial, which executes 03 through papermill and yields its epochs."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from . import config
from .display import Progress
from .environment import git_commit
from .execution import NotebookFailed, code_root, execute_trial, keep_failure, unlike_the_sweeps

#: What Ray would say on its own account; the sweep has its own display, and so has 02.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1", "RAY_DATA_LOG_LEVEL": "CRITICAL"}
RESTARTS = 3  # of a trial whose process or machine was lost; it goes on from its last epoch
WAIT_SECONDS = 0.5  # between two looks at what the trials report: Ctrl-C is answered within it
NODES_SECONDS = 120  # for every machine to say what it sees: it has to unpack and import the code first
CONNECT_SECONDS = 10


@contextmanager
def ray_running(address: str | None) -> Iterator[None]:
    """Ray for as long as the block runs; a Ray that this process has started already is used and goes on.

    Args:
        address: of a Ray cluster; None or "local" starts Ray on this machine and stops it afterwards.

    Raises:
        ValueError: no cluster answers, or it cannot be joined.
    """
    os.environ.update(QUIET)
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray's sockets on this machine need a path well under 107 characters, hence /tmp.
    sockets = tempfile.mkdtemp(prefix="kd-", dir="/tmp" if os.access("/tmp", os.W_OK) else None)
    on_sigterm, earlier = signal.getsignal(signal.SIGTERM), set(psutil.Process().children(recursive=True))
    try:
        try:
            _start_ray(address, sockets)
        except SystemExit:  # of the handler of SIGTERM that Ray puts there while it starts
            raise KeyboardInterrupt from None
        if on_sigterm and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there, which leaves with status 1
        yield
    finally:
        started = set(psutil.Process().children(recursive=True)) - earlier
        with _interrupts_later() as catch_again:
            closing = threading.Thread(target=ray.shutdown)
            closing.start()
            while closing.is_alive():
                catch_again()  # Ray's C++ side sets SIGTERM back to killing at once, a second before it is done
                closing.join(0.01)
            stopped: set[psutil.Process] = set()
            while new := set(psutil.Process().children(recursive=True)) - earlier - stopped:
                for process in new:  # Ray may have been starting still: a process that is stopped starts no others
                    with suppress(psutil.Error):
                        process.suspend()
                stopped |= new
            for process in started | stopped:  # its agents would wait a minute for an answer of those that are gone
                with suppress(psutil.Error):
                    process.kill()
            shutil.rmtree(sockets, ignore_errors=True)


@contextmanager
def _interrupts_later() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM wait for the end of the block, which gets what catches them again should a library let go."""
    caught, here = [], threading.current_thread() is threading.main_thread()  # nowhere else are signals to be caught
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)} if here else {}

    def catch() -> None:
        for number in handlers:
            signal.signal(number, lambda number, _: caught.append(number))

    catch()
    try:
        yield catch
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


def run_trials(trials: dict[str, dict[str, Any]], run_dir: Path, progress: Progress, *, cpus: float, gpus: float,
               seen: dict[str, str]) -> None:
    """Run trials on the Ray that is running, as many side by side as fit; one that fails does not stop others.

    A trial whose process or machine is lost starts again elsewhere, `RESTARTS` times at the most.

    Args:
        trials: name -> its entry of `sweep.json`.
        run_dir: where the records go.
        progress: told of every start, epoch, end and failure.
        cpus, gpus: what Ray reserves for a trial, fractions too.
        seen: files that every trial must see as they are here (`execution.unlike_the_sweeps`).

    Raises:
        OSError: Ray itself ended; of trials that were not done nothing is said to have failed.
    """
    import ray

    place = config.short_path(run_dir)  # a node may have its own root

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    def run(trial: dict[str, Any]) -> Iterator[dict[str, Any]]:
        # No pickled exception: one line is enough, and it must not need this code's classes where it is read.
        try:
            yield {"started": True}
            for row in execute_trial(trial, config.resolve(place), max(1, int(cpus)), seen):
                yield row
        except NotebookFailed as error:
            yield {"failure": error.cause, "kept": error.kept}

    running = {run.options(name=name).remote(trial): name for name, trial in trials.items()}
    restarts = dict.fromkeys(trials, 0)
    while running:
        ready, _ = ray.wait(list(running), num_returns=len(running), timeout=WAIT_SECONDS, fetch_local=False)
        for stream in ready:
            name, row = running[stream], _next_row(stream)
            if "started" in row:
                progress.started(name)
            elif "ended" in row:
                del running[stream]
                progress.finished(name)
            elif "failure" not in row:
                progress.reported(name, row)
            else:
                del running[stream]
                if row.get("lost") and restarts[name] < RESTARTS:
                    restarts[name] += 1
                    progress.lost(name, f"its process or machine was lost; starting again ({restarts[name]} of "
                                        f"{RESTARTS})")
                    running[run.options(name=name).remote(trials[name])] = name
                    continue
                if not row["kept"]:  # the process was killed, or its machine does not see the run's folder
                    keep_failure(run_dir / "trials" / f"{name}.ipynb", "03_train_student", row["failure"])
                progress.broke(name, row["failure"])


def require_same_view(seen: dict[str, str], cpus: float = 0, gpus: float = 0) -> None:
    """Ask every machine that can run a trial whether it sees the files that trials read and write as they are here.

    Args:
        seen: path under the project's root -> SHA-256 (`execution.unlike_the_sweeps`).
        cpus, gpus: of a trial. A machine that has less, as the head of many clusters, needs no shared folder.

    Raises:
        ValueError: names each machine that does not, and the path.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(unlike_the_sweeps)
    asked = {look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(seen):
             node for node in _able(ray.nodes(), cpus, gpus)}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NODES_SECONDS)
    there, problems = {node["NodeID"] for node in _able(ray.nodes(), cpus, gpus)}, []
    for ref, node in asked.items():
        try:
            problem = ray.get(ref) if ref in answered else "does not answer"
        except ray.exceptions.RayError as error:
            problem = f"cannot run this code ({_in_words(error)})"
        if problem and node["NodeID"] in there:  # one that was lost in the meantime is in nobody's way
            problems.append(f"node {node['NodeManagerAddress']}: {problem}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError("; ".join(problems[:4]) + more + ". All nodes must see one folder: run from a checkout on it, "
                         "or set KD_ROOT to it (on a node that sees it elsewhere, before `ray start` there)")


def fitting_gpus(nodes: list[dict[str, Any]], cpus: float, gpus: float | None, device: str = "auto") -> float:
    """GPUs per trial (default: one where any node has one); an error when no node could ever run a trial.

    Args:
        nodes: `ray.nodes()`.
        cpus, gpus: asked for; no GPUs given: decided here.
        device: the trials' parameter: "cuda" needs a GPU, "cpu" none.
    """
    if gpus is None:
        gpus = 1 if device != "cpu" and _able(nodes, 0, 1) else 0
    kinds = Counter(f"{node['Resources'].get('CPU', 0):g} CPUs and {node['Resources'].get('GPU', 0):g} GPUs"
                    for node in _able(nodes, 0, 0))
    there = "; ".join(f"{number} x {kind}" if number > 1 else kind for kind, number in kinds.items())
    if any(not 0 <= n < math.inf or 0 < n < 1e-4 for n in (cpus, gpus)) or gpus > 1 and gpus % 1:
        raise ValueError(f"a trial cannot ask for {cpus:g} CPUs and {gpus:g} GPUs: give 0, or 0.0001 and more, and of "
                         "more than one GPU a whole number")
    if device.startswith("cuda") and gpus <= int(device.partition(":")[2] or 0):
        raise ValueError(f"device = {device!r}, but a trial gets {gpus:g} GPUs (the machines have: {there}): set "
                         "device to 'auto' or 'cpu', or ask for more with --gpus-per-trial where there are more")
    if not _able(nodes, cpus, gpus):
        raise ValueError(f"a trial asks for {cpus:g} CPUs and {gpus:g} GPUs, but the machines have: {there}; "
                         "ask for less with --cpus-per-trial or --gpus-per-trial")
    return gpus


def _able(nodes: list[dict[str, Any]], cpus: float, gpus: float) -> list[dict[str, Any]]:
    """The machines that are there and have so much, in use or not."""
    return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= cpus
            and node["Resources"].get("GPU", 0) >= gpus]


def _start_ray(address: str | None, sockets: str) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    # For all that, Ray prints its own errors: twenty lines of its log for every machine that is lost.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        if address in (None, "local"):
            # Trials hand over a few numbers and a teacher pool is handed tokens, so the object store needs no third of
            # the memory, which is Ray's default.
            ray.init(address="local", include_dashboard=False, object_store_memory=128 * 2**20, _temp_dir=sockets,
                     **quiet)
            return
        _require_listener(address)
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # attempts, of 40 seconds each: the default is 20
        excluded = ["/.git", "/.venv", "/.venv-lm-eval", "/artifacts", "/runs", "__pycache__"]
        variables = {"KD_SWEEP_ROOT": str(config.ROOT), "KD_COMMIT": git_commit()}
        ray.init(address=address, **quiet,
                 runtime_env={"working_dir": str(code_root()), "excludes": excluded, "env_vars": variables})
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        # Ray sends its token to an address given by hand only when it is told to: that choice stays the user's.
        if address in (None, "local"):
            home = "; it keeps a token in ~/.ray: where HOME cannot be written, name a file that holds one in " \
                   "RAY_AUTH_TOKEN_PATH" if type(error) in (OSError, PermissionError, FileNotFoundError) else ""
            raise ValueError(f"Ray does not start on this machine ({_in_words(error)}){home}") from None
        raise ValueError(f"no Ray cluster can be joined at {address} ({_in_words(error)}): see `ray status` there; if "
                         "it asks for a token, set RAY_AUTH_MODE=token") from None


def _require_listener(address: str) -> None:
    """Fail at once where nothing answers at HOST:PORT: Ray itself would go on trying for a quarter of an hour."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"--address {address}: give HOST:PORT, as `ray start --head` showed it, or auto; the sweep "
                         "must be started on a machine of the cluster")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there: {error}") from None


def _next_row(stream: Iterator[Any]) -> dict[str, Any]:
    """What a trial says next: "started", an epoch's row, "ended", or why it is a "failure" and whether it was lost."""
    import ray

    try:
        return ray.get(next(stream))
    except StopIteration:
        return {"ended": True}
    except ray.exceptions.LocalRayletDiedError:
        raise OSError("Ray's process on this machine ended: killed, or out of memory; what is done is kept: run the "
                      "same command again") from None
    except ray.exceptions.RayError as error:
        return {"failure": _in_words(error), "lost": _was_lost(error), "kept": False}


def _was_lost(error: Exception) -> bool:
    """Whether a trial ended with its process or machine, and not by an error of its own."""
    from ray import exceptions

    return isinstance(error, (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError,
                              exceptions.ObjectLostError))


def _in_words(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory: Ray killed the trial's process to save its machine; ask for more --cpus-per-trial, " \
               "so that fewer trials run side by side"
    if _was_lost(error):
        return f"the trial's process or machine was lost {RESTARTS + 1} times: killed, or out of memory"
    cause = getattr(error, "cause", None) or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:500]
