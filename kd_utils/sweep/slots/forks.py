"""Forks of a slot's process: whether they are safe, and the kernel of a trial among them.

A forked process has everything that was imported before, and shares its memory until it writes to
it. It has none of the threads, so nothing that runs threads may have begun before.
"""

import ctypes
import os
import runpy
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl

#: What libraries read when they are loaded. Arrow's allocator would start a thread, which a fork
#: has not in any case; a kernel's debugger would warn of Python's frozen modules.
WHEN_LOADED = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


#: Variables that imports set in the slot's process; a kernel that imports has them too.
set_by_imports: dict[str, str] = {}


def why_not() -> str:
    """Why processes forked from this one are not safe, in one line; "" if they are.

    A first fork is tried: OpenBLAS, which has threads from its import on, stops them at a fork and
    starts others when they are needed.
    """
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return "CUDA is in use already, and a forked process cannot use it again"
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
    threads = len(os.listdir("/proc/self/task"))
    return f"{threads - 1} threads run beside the main one" if threads > 1 else ""


def fork(name: str) -> int:
    """Fork; the child, for which this returns 0, is shown by this name and is killed when this
    process ends.
    """
    parent = os.getpid()
    if child := os.fork():
        return child
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before
    show_as(name)
    return 0


def show_as(name: str) -> None:
    """Let `ps` and `top` show this process by a name, where they can."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)


class ForkedKernel:
    """A fork of this process that waits to become a kernel, with what `Popen` has for it.

    It is made before this process has threads, so before papermill runs; papermill's kernel manager
    says later which kernel it is to be.

    Args:
        unused: what it must not keep open.
    """

    stdin = stdout = stderr = None

    def __init__(self, unused: Connection) -> None:
        self._pipe, inside = Pipe()
        self.returncode: int | None = None
        self.pid = fork("kd-waiting")
        if not self.pid:
            unused.close()
            self._pipe.close()
            _wait_and_run(inside)
        inside.close()

    def run(self, command: list[str], cwd: str | None, environment: dict[str, str]) -> None:
        with suppress(OSError):  # it was killed: `poll` tells
            self._pipe.send((command, cwd, environment))

    def poll(self) -> int | None:
        if self.returncode is None:
            child, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if child else None
        return self.returncode

    def wait(self) -> int:
        if self.poll() is None:
            status = os.waitpid(self.pid, 0)[1]
            self.returncode = os.waitstatus_to_exitcode(status)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _wait_and_run(pipe: Connection) -> None:
    """Run the module that the command names, as `python -m` does, and end."""
    status = 1
    try:
        os.setsid()  # an interrupt goes to the kernel's whole process group
        command, cwd, environment = pipe.recv()
        show_as("kd-kernel")
        os.environ.clear()
        os.environ.update(set_by_imports | environment)
        os.chdir(cwd or ".")
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()  # from the system, as in a fresh process
        module, *arguments = command[command.index("-m") + 1 :]
        # Its default was read from the environment when ipykernel was imported.
        sys.argv = [module, *arguments, f"--IPKernelApp.parent_handle={os.getppid()}"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except EOFError:
        status = 0  # the trial ended without a notebook
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


#: The kernel that waits in this process, if it is a trial's; taken by its first notebook.
waiting: list[ForkedKernel] = []


class ForkedProvisioner(LocalProvisioner):
    """Starts the kernel that waits, in place of a fresh process."""

    process: Any

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        self.process = waiting.pop()
        self.pid = self.pgid = self.process.pid
        self.cwd = kwargs.get("cwd")
        self.process.run(cmd, self.cwd, kwargs["env"])
        return self.connection_info


def provisioner(manager: AsyncKernelManager) -> ForkedProvisioner | None:
    """For a kernel manager: what starts the kernel that waits; None where none does."""
    return ForkedProvisioner(parent=manager, kernel_spec=manager.kernel_spec) if waiting else None
