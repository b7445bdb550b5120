"""Starts Python programs for tests without importing torch and DeepSpeed for each: by a fork.

    python tests/fork_server.py SOCKET

Imports what `sclong_ds.pretrain` imports (some eight seconds), and then makes every program that
`launching.fork` asks for a child of its own, with the arguments, the environment and the outputs
given. It ends with its standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any, NoReturn

FIRST_PART = 4
"""Bytes that say how long a request is."""
POLL_S = 0.02


def serve(path: str) -> None:
    """Fork for every connection, and tell it how its child ends.

    Args:
        path: Where to listen.
    """
    listener = socket.socket(socket.AF_UNIX)
    # Under its name only when it listens: who waits for the name connects at once.
    listener.bind(f"{path}.new")
    listener.listen()
    os.rename(f"{path}.new", path)
    told: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], POLL_S if told else None)
        if sys.stdin in ready:
            return
        if listener in ready:
            caller, _ = listener.accept()
            request, outputs = receive(caller)
            child = os.fork()
            if child == 0:
                for other in (listener, caller, *told.values()):
                    other.close()
                run(request, outputs)
            for descriptor in outputs:
                os.close(descriptor)
            told[child] = caller
            send(caller, child)
        for child in list(told):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                send(told[child], os.waitstatus_to_exitcode(status))
                told.pop(child).close()


def send(caller: socket.socket, number: int) -> None:
    """Send a number as a line; a caller that is gone needs none."""
    with contextlib.suppress(OSError):
        caller.sendall(f"{number}\n".encode())


def receive(caller: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return a request, and the descriptors of its standard output and error."""
    first, outputs, _, _ = socket.recv_fds(caller, FIRST_PART, 2)
    with caller.makefile("rb") as rest:
        return json.loads(rest.read(int.from_bytes(first))), outputs


def run(request: dict[str, Any], outputs: list[int]) -> NoReturn:
    """Be the program that is asked for, to its end."""
    os.environ.clear()
    os.environ.update(request["env"])
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    for number, descriptor in enumerate(outputs, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What it raises ends this process as any other of Python.
    execute(request["arguments"])
    sys.exit()


def execute(arguments: list[str]) -> None:
    """Do what Python does with these arguments.

    Args:
        arguments: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.
    """
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    import sclong_ds.pretrain

    # The programs import it themselves, as a new process would; what it needs is there.
    del sys.modules["sclong_ds.pretrain"]
    del sclong_ds.pretrain
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.argv[1])
