"""Programs that are forked behave as those that Python starts."""

from __future__ import annotations

import pytest
from launching import run_forked

PROGRAM = "import os, sys; print(sys.argv[1:], os.environ['RANK_OF_TEST']); {}"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("end", "status", "says"),
    [
        ("sys.exit(75)", 75, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_status_output_and_environment_are_those_of_a_program_of_its_own(
    monkeypatch: pytest.MonkeyPatch, end: str, status: int, says: str
) -> None:
    monkeypatch.setenv("RANK_OF_TEST", "7")
    done = run_forked(["-c", PROGRAM.format(f"sys.stdout.flush(); {end}"), "a b"], timeout=60)
    assert (done.returncode, done.stdout) == (status, "['a b'] 7\n")
    assert done.stderr.endswith(says)
