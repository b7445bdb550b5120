"""What the Triton kernels of FAVOR+ attention compile to, for GPUs that need not be present.

    python -m pytest tests/kernels/compiled_favor.py

Not collected by name: `test_favor_attention.py` runs this file in a process of its own, because
Triton compiles nothing where its interpreter was chosen. Each kernel is compiled as the launcher
would: the same arguments, specialised in the same way.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.favor_launch import Setting, backward, default_plan, forward

assert os.environ.get("TRITON_INTERPRET") != "1", "unset TRITON_INTERPRET"
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
SHARED_MEMORY = {90: 227 * 1024, 80: 163 * 1024}
"""Bytes of shared memory that a program can have."""
HOT = ("key_pass", "query_pass", "query_gradient", "summary_gradient", "key_gradient")
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int16: "*i16",
}


def calls(m, k, dtype, capability, *, packed_cells=False, heads=32, apart=False):
    """Return every kernel of a forward and backward pass with its block and arguments."""
    recorded = {}

    def record(kernel, grid, block, **arguments):
        recorded[kernel.__name__] = (kernel, block, arguments)

    shape = (4096, 3, heads, k) if packed_cells else (1, 4096, 3, heads, k)
    q, key, v = torch.empty(shape, dtype=dtype).unbind(-3)
    cu_seqlens = torch.zeros(2, dtype=torch.int32) if packed_cells else None
    setting = Setting(eps=1e-4, per_head=False, exact=True, max_seqlen=4096)
    plan = default_plan(m, k, dtype, divmod(capability, 10))
    w = torch.empty(m, k)
    out, saved = forward(q, key, v, w, cu_seqlens, setting, plan, save=True, run=record)
    backward(out, q, key, v, m, cu_seqlens, saved, setting, plan, apart=apart, run=record)
    return recorded


def compiled(kernel, block, arguments, capability):
    """Compile a kernel for these arguments."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        kind = TYPES[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
        signature[parameter.name] = kind
        whole = kind == "i32" and not parameter.do_not_specialize and value % 16 == 0
        if is_tensor or whole:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": block.warps, "num_stages": block.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dump(flag, cubin, folder):
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run(
        [str(CUOBJDUMP), flag, str(path)], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("capability", "m", "k", "dtype", "form"),
    [
        (90, 256, 64, torch.bfloat16, {}),
        (90, 266, 64, torch.bfloat16, {"packed_cells": True, "apart": True}),
        (90, 266, 64, torch.float32, {}),
        (80, 266, 64, torch.bfloat16, {}),
        (90, 256, 128, torch.bfloat16, {}),
    ],
)
def test_resources(capability, m, k, dtype, form, tmp_path):
    """No register is spilled, shared memory suffices, the products run on the tensor cores."""
    for name, (kernel, block, arguments) in calls(m, k, dtype, capability, **form).items():
        binary = compiled(kernel, block, arguments, capability)
        assert binary.metadata.shared <= SHARED_MEMORY[capability], name
        if name in HOT:
            wide = capability == 90 and (dtype == torch.bfloat16 or "summary" in name)
            assert ("wgmma.mma_async" if wide else "mma") in binary.asm["ptx"], name
        if not CUOBJDUMP.exists():
            pytest.skip("this build of Triton has no cuobjdump: SASS was not looked at")
        usage = dump("-res-usage", binary.asm["cubin"], tmp_path)
        stack = int(re.search(r"STACK:(\d+)", usage)[1])
        # Three TF32 products keep both halves of the operands: a few registers may not fit.
        assert stack <= (64 if dtype == torch.float32 else 0), f"{name}: {usage}"
        if name in HOT and capability == 90 and dtype == torch.bfloat16:
            assert "HGMMA" in dump("-sass", binary.asm["cubin"], tmp_path), name


def test_sizes_of_one_compile():
    """Triton takes an argument of 1 for a constant: every kernel must still be valid."""
    for kernel, block, arguments in calls(20, 16, torch.bfloat16, 90, heads=1).values():
        ones = {
            name: 1 if name.startswith(("stride", "n_", "total", "splits", "parts")) else value
            for name, value in arguments.items()
        }
        assert compiled(kernel, block, ones, 90).asm["cubin"]
