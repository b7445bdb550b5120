"""What the Triton kernels of FAVOR+ attention compile to, for GPUs that need not be present.

    python -m pytest tests/kernels/compiled_favor.py

Not collected by name: `test_favor_attention.py` runs this file in a process of its own, because
Triton compiles nothing where its interpreter was chosen.
"""

import os

import pytest

from benchmarks.favor_compiled import CASES, CUOBJDUMP, Case, calls, compiled, usage

assert os.environ.get("TRITON_INTERPRET") != "1", "unset TRITON_INTERPRET"
SHARED_MEMORY = {90: 227 * 1024, 80: 163 * 1024}
"""Bytes of shared memory that a program can have."""
HOT = ("key_pass", "query_pass", "query_gradient", "summary_gradient", "key_gradient")
TESTED = [
    case
    for case in CASES
    if case.m != 128 and (case.capability == 90 or (case.k == 64 and case.dtype == "bfloat16"))
]
"""The others take a minute more and differ in little; `python -m benchmarks.favor_compiled` shows
all."""


@pytest.mark.parametrize("case", TESTED, ids=str)
def test_resources(case):
    """No register is spilled, shared memory suffices, the products run on the tensor cores."""
    for name, (kernel, block, arguments) in calls(case).items():
        binary = compiled(kernel, block, arguments, case.capability)
        assert binary.metadata.shared <= SHARED_MEMORY[case.capability], name
        if name in HOT:
            wide = case.capability == 90 and (case.dtype == "bfloat16" or "summary" in name)
            assert ("wgmma.mma_async" if wide else "mma") in binary.asm["ptx"], name
        if not CUOBJDUMP.exists():
            pytest.skip("this build of Triton has no cuobjdump: SASS was not looked at")
        found = usage(binary)
        # Three TF32 products keep both halves of the operands: some registers may not fit.
        assert found.stack_bytes <= (256 if case.dtype == "float32" else 0), f"{name}: {found}"
        if name in HOT:
            assert found.wgmma if wide else found.wgmma + found.mma, f"{name}: {found}"


def test_sizes_of_one_compile():
    """Triton takes an argument of 1 for a constant: every kernel must still be valid."""
    small = Case(capability=90, m=20, k=16)
    for kernel, block, arguments in calls(small, heads=1).values():
        ones = {
            name: 1 if name.startswith(("stride", "n_", "total", "splits", "parts")) else value
            for name, value in arguments.items()
        }
        assert compiled(kernel, block, ones, 90).asm["cubin"]
