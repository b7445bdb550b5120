"""A signal asks for a stop once; what follows cannot kill a process that is ending by itself."""

from __future__ import annotations

import subprocess
import sys

from launching import ROOT

SAVES_AND_ENDS = """
import os, signal, sys
from sclong_ds.job.signals import StopRequest

class Last:
    # Python has by then given handled signals back their default.
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):
        kill(pid, number)

stop = StopRequest()
assert stop.reason() is None
os.kill(os.getpid(), signal.SIGUSR1)
assert stop.reason() == "SIGUSR1"
last = Last()
sys.exit(75)
"""

ASKED_FIRST = """
import os, signal
from sclong_ds.job.signals import StopRequest

for reason, told in (("the loss is fine", "the loss is fine"), ("", "a callback")):
    stop = StopRequest()
    stop.ask(reason)
    stop.ask("too late")
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason() == told, stop.reason()
    stop.release()
"""


def test_the_first_reason_stays_also_one_without_words() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASKED_FIRST], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_a_repeated_signal_does_not_kill_a_process_that_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVES_AND_ENDS], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 75, done.stderr
