"""Ray, on this machine or a cluster: one task per trial, which executes 03 through papermill and
yields its epochs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from kd_utils.config import project_paths
from kd_utils.records.provenance import git_commit

#: What Ray would say on its own account; the sweep has its own display, and so has 02.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
}

RESTARTS = 3  # of a trial whose process or machine was lost; it goes on from its last epoch
CONNECT_SECONDS = 10


@contextmanager
def ray_running(address: str | None) -> Iterator[None]:
    """Ray for as long as the block runs; a Ray that this process has started already is used and
    goes on.

    Args:
        address: of a Ray cluster; None or "local" starts Ray on this machine and stops it
            afterwards.

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
    on_sigterm, earlier = (
        signal.getsignal(signal.SIGTERM),
        set(psutil.Process().children(recursive=True)),
    )
    try:
        try:
            _start_ray(address, sockets)
        except SystemExit:  # of the handler of SIGTERM that Ray puts there while it starts
            raise KeyboardInterrupt from None
        if on_sigterm and threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGTERM, on_sigterm
            )  # Ray has put its own there, which leaves with status 1
        yield
    finally:
        started = set(psutil.Process().children(recursive=True)) - earlier
        with _interrupts_later() as catch_again:
            closing = threading.Thread(target=ray.shutdown)
            closing.start()
            while closing.is_alive():
                # Ray's C++ side sets SIGTERM back to killing at once, a second before it is done
                catch_again()
                closing.join(0.01)
            stopped: set[psutil.Process] = set()
            while new := set(psutil.Process().children(recursive=True)) - earlier - stopped:
                for process in (
                    new
                ):  # Ray may have been starting still: a process that is stopped starts no others
                    with suppress(psutil.Error):
                        process.suspend()
                stopped |= new
            for process in (
                started | stopped
            ):  # its agents would wait a minute for an answer of those that are gone
                with suppress(psutil.Error):
                    process.kill()
            shutil.rmtree(sockets, ignore_errors=True)


@contextmanager
def _interrupts_later() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM wait for the end of the block, which gets what catches them again should a
    library let go.
    """
    caught, here = (
        [],
        threading.current_thread() is threading.main_thread(),
    )  # nowhere else are signals to be caught
    handlers = (
        {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)} if here else {}
    )

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


def _start_ray(address: str | None, sockets: str) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    # For all that, Ray prints its own errors: twenty lines of its log for every machine that is
    # lost.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    try:
        if address in (None, "local"):
            # Trials hand over a few numbers and a teacher pool is handed tokens, so the object
            # store needs no third of the memory, which is Ray's default.
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=128 * 2**20,
                _temp_dir=sockets,
                **quiet,
            )
            return
        _require_listener(address)
        os.environ.setdefault(
            "RAY_gcs_server_port_wait_time_s", "1"
        )  # attempts, of 40 seconds each: the default is 20
        excluded = ["/.git", "/.venv", "/.venv-lm-eval", "/artifacts", "/runs", "__pycache__"]
        variables = {"KD_SWEEP_ROOT": str(project_paths.ROOT), "KD_COMMIT": git_commit()}
        ray.init(
            address=address,
            **quiet,
            runtime_env={
                "working_dir": str(project_paths.CODE_ROOT),
                "excludes": excluded,
                "env_vars": variables,
            },
        )
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        # Ray sends its token to an address given by hand only when it is told to: that choice stays
        # the user's.
        if address in (None, "local"):
            home = (
                "; it keeps a token in ~/.ray: where HOME cannot be written, name a file that "
                "holds one in "
                "RAY_AUTH_TOKEN_PATH"
                if type(error) in (OSError, PermissionError, FileNotFoundError)
                else ""
            )
            raise ValueError(
                f"Ray does not start on this machine ({_in_words(error)}){home}"
            ) from None
        raise ValueError(
            f"no Ray cluster can be joined at {address} ({_in_words(error)}): see `ray status` "
            f"there; if "
            "it asks for a token, set RAY_AUTH_MODE=token"
        ) from None


def _require_listener(address: str) -> None:
    """Fail at once where nothing answers at HOST:PORT: Ray itself would go on trying for a quarter
    of an hour.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(
            f"--address {address}: give HOST:PORT, as `ray start --head` showed it, or auto; the "
            f"sweep "
            "must be started on a machine of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there: {error}") from None


def _was_lost(error: Exception) -> bool:
    """Whether a trial ended with its process or machine, and not by an error of its own."""
    from ray import exceptions

    return isinstance(
        error,
        (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.OutOfMemoryError,
            exceptions.ObjectLostError,
        ),
    )


def _in_words(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "out of memory: Ray killed the trial's process to save its machine; ask for more "
            "--cpus-per-trial, "
            "so that fewer trials run side by side"
        )
    if _was_lost(error):
        return f"the trial's process or machine was lost {RESTARTS + 1} times: killed, or out of memory"
    cause = getattr(error, "cause", None) or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:500]
