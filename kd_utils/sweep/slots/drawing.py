"""A process beside a slot's that draws the pictures of its trials.

What draws a chart (vl-convert) starts a JavaScript engine, which takes as long as a tenth of a
trial's imports and cannot be forked, for it has threads. Here it starts once for a slot.
"""

import json
import os
import socket
import sys
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from kd_utils.sweep.slots import forks

WAIT_SECONDS = 30.0  # for each step on the way to a picture; then whoever asked draws it

PNG_END = b"IEND\xaeB`\x82"  # a picture without it was cut


def draw_beside(unused: Connection) -> None:
    """Let this process and its forks have their charts drawn by one that begins now. Without
    notebook 03's module of figures, or room for a process, each draws its own.

    Args:
        unused: what that process must not keep open.
    """
    if plots := sys.modules.get("kd_utils.figures.plots"):
        with suppress(OSError):
            requesting, serving = socket.socketpair(type=socket.SOCK_SEQPACKET)
            if not forks.fork("kd-drawing"):
                try:
                    unused.close()
                    requesting.close()
                    _serve(serving, plots.draw)
                finally:
                    os._exit(1)
            serving.close()
            requesting.settimeout(WAIT_SECONDS)
            plots.draw = partial(_ask, requesting, plots.draw)  # type: ignore[attr-defined]


def _serve(serving: socket.socket, draw: Any) -> None:
    """Answer requests: each is the end of a connection of its own, so that nothing of a trial that
    was killed while it asked is left for the next.
    """
    while descriptors := socket.recv_fds(serving, 1, 1)[1]:
        with suppress(Exception), socket.socket(fileno=descriptors[0]) as answering:
            answering.settimeout(WAIT_SECONDS)
            specification, scale = json.loads(_all_of(answering))
            answering.sendall(draw(specification, scale=scale))


def _ask(
    requesting: socket.socket, draw: Any, specification: dict[str, Any], *, scale: float
) -> bytes:
    with suppress(OSError):
        asking, answering = socket.socketpair()
        with asking:
            with answering:
                socket.send_fds(requesting, [b" "], [answering.fileno()])
            asking.settimeout(WAIT_SECONDS)
            asking.sendall(json.dumps([specification, scale]).encode())
            asking.shutdown(socket.SHUT_WR)
            if (png := _all_of(asking)).endswith(PNG_END):
                return png
    return draw(specification, scale=scale)  # it also raises what is wrong with the chart


def _all_of(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(2**16), b""))
