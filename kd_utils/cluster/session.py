"""A session of Ray, on this machine or a cluster: started, joined, and stopped without a trace."""

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from kd_utils.cluster import machines
from kd_utils.config import project_paths
from kd_utils.records.provenance import git_commit

#: Ray prints nothing of its own: the sweep has its own display, and so has 02.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}

CONNECT_SECONDS = 10


@contextmanager
def ray_running(address: str | None, gpus: int | None = None) -> Iterator[None]:
    """Ray for as long as the block runs: the cluster at `address`, or with None or "local" Ray on
    this machine. A Ray that this process already runs is used, and left.

    Args:
        gpus: of this machine (`cuda.usable_gpus`); None: as many as Ray counts.

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
    on_sigterm, earlier = signal.getsignal(signal.SIGTERM), _children()
    try:
        try:
            _start_ray(address, sockets, gpus)
        except SystemExit:  # raised by the handler of SIGTERM that Ray installs while it starts
            raise KeyboardInterrupt from None
        if on_sigterm and threading.current_thread() is threading.main_thread():
            # Ray has installed its own, which leaves with status 1.
            signal.signal(signal.SIGTERM, on_sigterm)
        yield
    finally:
        _stop_ray(earlier)
        shutil.rmtree(sockets, ignore_errors=True)


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _stop_ray(earlier: set[psutil.Process]) -> None:
    """Shut Ray down, and kill every child process that was not there `earlier`."""
    import ray

    started = _children() - earlier
    with _interrupts_later() as catch_again:
        closing = threading.Thread(target=ray.shutdown)
        closing.start()
        while closing.is_alive():
            # Ray's C++ side restores the default of SIGTERM a second before it is done.
            catch_again()
            closing.join(0.01)
        suspended: set[psutil.Process] = set()
        while new := _children() - earlier - suspended:
            # Ray may still be starting: a suspended process starts no others.
            for process in new:
                with suppress(psutil.Error):
                    process.suspend()
            suspended |= new
        # Ray's agents would wait a minute for an answer from processes that are gone.
        for process in started | suspended:
            with suppress(psutil.Error):
                process.kill()


@contextmanager
def _interrupts_later() -> Iterator[Callable[[], None]]:
    """Delay Ctrl-C and SIGTERM to the end of the block, which gets a function that catches them
    again in case a library lets go.
    """
    caught: list[int] = []
    here = threading.current_thread() is threading.main_thread()  # no other thread gets signals
    numbers = (signal.SIGINT, signal.SIGTERM) if here else ()
    handlers = {number: signal.getsignal(number) for number in numbers}

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


def _start_ray(address: str | None, sockets: str, gpus: int | None) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    # Ray would still print twenty lines of its log for every machine that is lost.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    # Under `uv run` Ray would start each worker by that command too, in a copy of the project
    # without its environment: workers run this Python, as they do without uv.
    ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    try:
        if address in (None, "local"):
            # Trials hand over a few numbers and a pool of teachers gets tokens, so the object store
            # does not need a third of the memory, which is Ray's default.
            ray.init(
                address="local",
                num_cpus=machines.cores(),
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=128 * 2**20,
                _temp_dir=sockets,
                **quiet,
            )
            return
        _require_listener(address)
        # In attempts of 40 seconds each; the default is 20 attempts.
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
        excluded = ["/.git", "/.venv", "/.venv-lm-eval", "/artifacts", "/runs", "__pycache__"]
        variables = {"KD_SWEEP_ROOT": str(project_paths.ROOT), "KD_COMMIT": git_commit()}
        code = {"working_dir": str(project_paths.CODE_ROOT), "excludes": excluded}
        ray.init(address=address, **quiet, runtime_env={**code, "env_vars": variables})
    except Exception as error:  # also the plain Exception of a machine that is too busy
        if address not in (None, "local"):
            # Ray sends its token to an address given by hand only when told to: the user's choice.
            raise ValueError(
                f"cannot join a Ray cluster at {address} ({in_words(error)}): see `ray status` "
                "there; if it asks for a token, set RAY_AUTH_MODE=token"
            ) from None
        token = (
            "; Ray keeps a token in ~/.ray: if HOME is not writable, set RAY_AUTH_TOKEN_PATH to a "
            "file with a token"
        )
        is_file_error = type(error) in (OSError, PermissionError, FileNotFoundError)
        raise ValueError(
            f"Ray does not start on this machine ({in_words(error)}){token * is_file_error}"
        ) from None


def _require_listener(address: str) -> None:
    """Fail at once where nothing answers at HOST:PORT: Ray would try for a quarter of an hour."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(
            f"--address {address}: give HOST:PORT, as `ray start --head` showed it, or auto; start "
            "the sweep on a machine of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there: {error}") from None


def was_lost(error: Exception) -> bool:
    """Whether a task ended with its process or machine, and not by an error of its own."""
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

    return isinstance(error, (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError))


def in_words(error: Exception) -> str:
    """An error of Ray's in one line."""
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "out of memory: Ray killed the process to save its machine; ask for more "
            "--cpus-per-trial, so that fewer trials run side by side"
        )
    if was_lost(error):
        return "the process was killed or ran out of memory"
    cause = getattr(error, "cause", None) or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:500]
