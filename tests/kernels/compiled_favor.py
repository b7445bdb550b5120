"""What the Triton kernels of FAVOR+ attention compile to, for GPUs that need not be present.

    python -m pytest -s tests/kernels/compiled_favor.py

Not collected by name: `test_favor_attention.py` runs this file in a process of its own, because
Triton compiles nothing where its interpreter was chosen. Every kernel is compiled once.
"""

import os
import sys

import pytest

from benchmarks.favor_compiled import CUOBJDUMP, Case, calls, compiled, figures, usage

assert os.environ.get("TRITON_INTERPRET") != "1", "unset TRITON_INTERPRET"
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KB of shared memory that a program can have."""
HOT = ("key_pass", "query_pass", "query_gradient", "summary_gradient", "key_gradient")
TESTED = [
    *(Case(capability=c, m=266) for c in SHARED_MEMORY),
    Case(capability=90, m=256),
    Case(capability=90, m=110, k=32),
    Case(capability=90, m=256, k=128),
    Case(capability=90, m=266, packed_cells=True, apart=True),
    Case(capability=90, m=266, dtype="float32"),
]
"""`python -m benchmarks.favor_compiled` shows more."""
PER_TOKEN = {
    "key_pass": 113,
    "query_pass": 160,
    "query_gradient": 225,
    "summary_gradient": 157,
    "key_gradient": 203,
}
"""Warp instructions for each token and head on sm_90 at 266 features, counted once."""


@pytest.mark.parametrize("case", TESTED, ids=str)
def test_resources(case):
    """Nothing is spilled, shared memory suffices, wide products run and are not serialised."""
    for name, launch in calls(case).items():
        # Kernels that take a few microseconds are looked at on one GPU.
        if name not in HOT and case != TESTED[3]:
            continue
        binary, said = compiled(launch, case.capability)
        assert binary.metadata.shared <= SHARED_MEMORY[case.capability] * 1024, name
        assert "C75" not in said, f"{name}: {said}"
        if not CUOBJDUMP.exists():
            pytest.skip("this build of Triton has no cuobjdump: SASS was not looked at")
        found = usage(binary, said, launch, case)
        sys.stdout.write(f"{case!s:40} {name:18}{figures(found)}\n")
        # Three TF32 products keep both halves of the operands: some registers may not fit.
        assert found.stack_bytes <= (256 if case.dtype == "float32" else 0), f"{name}: {found}"
        if name in HOT:
            wide = case.capability == 90 and (case.dtype == "bfloat16" or "summary" in name)
            assert found.wgmma if wide else found.wgmma + found.mma, f"{name}: {found}"
            # Each of the three TF32 products ends a group.
            assert found.waits <= (12 if case.dtype == "float32" else 4), f"{name}: {found}"
        if name in HOT and case == TESTED[3]:
            assert found.row_instructions <= 1.05 * PER_TOKEN[name], f"{name}: {found}"


def test_sizes_of_one_compile():
    """Triton takes an argument of 1 for a constant: every kernel must still be valid."""
    small = Case(capability=90, m=20, k=16)
    for launch in calls(small, heads=1).values():
        ones = {
            name: 1 if name.startswith(("stride", "n_", "total", "splits", "parts")) else value
            for name, value in launch.arguments.items()
        }
        assert compiled(launch._replace(arguments=ones), 90)[0].asm["cubin"]
