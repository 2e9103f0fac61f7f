"""A process beside a slot's that draws the pictures of its trials.

What draws a chart (vl-convert) starts a JavaScript engine, which takes as long as a tenth of a
trial's imports and cannot be forked, for it has threads. Here it starts once for a slot.
"""

import os
import sys
from contextlib import suppress
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from types import ModuleType
from typing import Any

from kd_utils.sweep.slots import forks

WAIT_SECONDS = 30  # for a picture; then whoever asked draws it

#: What a broken connection, a process that ended or a stranger's one raises.
GONE = (OSError, EOFError, AuthenticationError)


def draw_beside(unused: Connection) -> None:
    """Let this process and its forks have their charts drawn by one that begins now; nothing, where
    none draws.

    Args:
        unused: what that process must not keep open.
    """
    if plots := sys.modules.get("kd_utils.figures.plots"):
        key = os.urandom(32)
        # A name that begins with NUL is no file, so nothing is left of it.
        listener = Listener(f"\0kd-drawing-{os.urandom(8).hex()}", "AF_UNIX", authkey=key)
        if not forks.fork("kd-drawing"):
            unused.close()
            _serve(listener, plots)
        address = listener.address
        listener.close()
        plots.draw = partial(  # type: ignore[attr-defined]
            _ask, address, key, plots.draw
        )


def _serve(listener: Listener, plots: ModuleType) -> None:
    while True:
        with suppress(*GONE), listener.accept() as asked:
            specification, scale = asked.recv()
            with suppress(ValueError):  # whoever asked draws it, and has the error
                asked.send(plots.draw(specification, scale=scale))


def _ask(address: str, key: bytes, draw: Any, specification: dict, *, scale: float) -> bytes:
    with suppress(*GONE), Client(address, authkey=key) as asked:
        asked.send((specification, scale))
        if asked.poll(WAIT_SECONDS):
            return asked.recv()
    return draw(specification, scale=scale)
