"""The options of the tests."""

import subprocess
import sys

from launching import ROOT


def test_what_begins_too_late_is_not_run_and_counted():
    chosen = "tests/test_floor.py::test_moments_are_those_of_a_poisson_count_known_to_be_seen"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", chosen, "--minutes", "0"]
    late = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "1 skipped" in late.stdout.splitlines()[-1]
    assert "not run, since 0 minutes were over" in late.stdout
    assert "number of tests: 1" in late.stdout
