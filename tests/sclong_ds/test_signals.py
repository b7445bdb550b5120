"""A signal asks for a stop once; those that follow cannot end the process while it ends by itself."""

from __future__ import annotations

import subprocess
import sys

from launching import ROOT

SAVES_AND_ENDS = """
import atexit, os, signal, sys, time
from sclong_ds.signals import StopRequest

class Last:
    def __del__(self):  # when python has given handled signals back their default
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)

stop = StopRequest()
assert stop.reason() is None
os.kill(os.getpid(), signal.SIGUSR1)
assert stop.reason() is not None
sys.last_object = Last()
sys.exit(75)
"""


def test_repeated_signals_do_not_kill_a_process_that_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVES_AND_ENDS], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 75, done.stderr
