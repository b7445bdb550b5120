"""Largest differences from the released code, in float32 and float64.

    python -m benchmarks.agreement [--json OUT]

Runs the tests that compare the model with numbers of the released code
(`tests/sclong_ds/test_reference_parity.py`) and takes the table of errors that they print: of
outputs and encodings the largest absolute error, of the gradients the largest relative to the
largest gradient of their tensor.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result

ROOT = Path(__file__).parents[1]
TESTS = "tests/sclong_ds/test_reference_parity.py"
_ROW = re.compile(
    r"(?P<golden>\w+) +(?P<case>[\w/]+) +(?P<scope>tensor|sample) +(?P<dtype>float\d+) +\d+"
    r" +(?P<output>\S+) +(?P<encoding>\S+) \(.*?\) +(?P<loss>\S+) +(?P<gradients>\S+) +\S+"
)


def measure() -> dict[str, Any]:
    """Return the number of goldens and cases, and by dtype the largest errors.

    Raises:
        RuntimeError: The tests fail, or print no table.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    rows = [found.groupdict() for found in map(_ROW.match, done.stdout.splitlines()) if found]
    # Cells alone are given in float32 only.
    rows = [row for row in rows if not row["case"].endswith("/solo")]
    result: dict[str, Any] = {
        "goldens": len({row["golden"] for row in rows}),
        "cases": len({(row["golden"], row["case"]) for row in rows}),
        "rows": rows,
    }
    for dtype in ("float32", "float64"):
        own = [row for row in rows if row["dtype"] == dtype]
        if not own:
            raise RuntimeError(f"no line of {dtype} in the table")
        result[dtype] = {
            name: max(float(row[name]) for row in own if row[name] != "-")
            for name in ("output", "encoding", "loss", "gradients")
        }
    return result


def main() -> int:
    """Run the tests and print the largest errors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    result = measure()
    for dtype in ("float32", "float64"):
        print(dtype, *(f"{name} {error:.1e}" for name, error in result[dtype].items()))
    if args.json:
        write_result(args.json, "agreement", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
