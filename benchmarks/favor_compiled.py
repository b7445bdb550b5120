"""What the Triton kernels of FAVOR+ attention compile to, for GPUs that need not be present.

    python -m benchmarks.favor_compiled [--json OUT]

Prints registers, spilled bytes, shared memory and tensor-core instructions of every kernel for
sm_90 and sm_80, compiled by the installed Triton as the launcher would: the same arguments,
specialised in the same way. Another version: put it first on PYTHONPATH, installed with
`pip install --no-deps --target FOLDER triton==VERSION`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.environment import environment
from kernels.favor_launch import Setting, backward, default_plan, forward

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int16: "*i16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A call whose kernels are compiled: 32 heads of 4,096 tokens, exact gradients."""

    capability: int
    """90 or 80."""
    m: int
    """Number of features M."""
    k: int = 64
    """Head width K."""
    dtype: str = "bfloat16"
    packed_cells: bool = False
    """Whether cells of different lengths lie on one axis."""
    apart: bool = False
    """Whether queries and keys differ in number."""

    def __str__(self) -> str:
        """Return the case as readable text."""
        forms = {"packed cells": self.packed_cells, "queries apart": self.apart}
        sizes = f"sm_{self.capability} {self.dtype} m={self.m} k={self.k}"
        return " ".join([sizes, *(name for name, is_on in forms.items() if is_on)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a compiled kernel takes."""

    registers: int
    """Per thread."""
    stack_bytes: int
    """Per thread; what is spilled lies here."""
    shared_bytes: int
    """Per program."""
    wgmma: int
    """Instructions of Hopper's wide tensor-core path."""
    mma: int
    """Instructions of the older one."""
    instructions: int


CASES = [
    *(Case(capability=c, m=m) for c in (90, 80) for m in (256, 266)),
    *(Case(capability=c, m=m, k=k) for c in (90, 80) for m, k in ((110, 32), (256, 128))),
    Case(capability=90, m=128),
    Case(capability=90, m=266, packed_cells=True, apart=True),
    *(Case(capability=c, m=266, dtype="float32") for c in (90, 80)),
]


def calls(case: Case, *, heads: int = 32) -> dict[str, tuple[Any, ...]]:
    """Return every kernel of a forward and backward pass, its block and its arguments, by name."""
    recorded = {}

    def record(kernel: Any, grid: Any, block: Any, **arguments: Any) -> None:
        recorded[kernel.__name__] = (kernel, block, arguments)

    dtype, n, k = getattr(torch, case.dtype), 4096, case.k
    shape = (n, 3, heads, k) if case.packed_cells else (1, n, 3, heads, k)
    q, key, v = torch.empty(shape, dtype=dtype).unbind(-3)
    cu_seqlens = torch.zeros(2, dtype=torch.int32) if case.packed_cells else None
    setting = Setting(eps=1e-4, per_head=False, exact=True, max_seqlen=n)
    plan = default_plan(case.m, k, dtype, divmod(case.capability, 10))
    w = torch.empty(case.m, k)
    out, saved = forward(q, key, v, w, cu_seqlens, setting, plan, save=True, run=record)
    given = (case.m, cu_seqlens, saved, setting, plan)
    backward(out, q, key, v, *given, apart=case.apart, run=record)
    return recorded


def compiled(kernel: Any, block: Any, arguments: dict[str, Any], capability: int) -> Any:
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


def usage(binary: Any) -> Usage:
    """Return what a compiled kernel takes, from its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        resources, code = (
            subprocess.run(
                [str(CUOBJDUMP), flag, str(path)], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(re.search(rf"{name}:(\d+)", resources)[1]) for name in ("REG", "STACK")}
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z0-9]+)", code, re.M)
    return Usage(
        registers=found["REG"],
        stack_bytes=found["STACK"],
        shared_bytes=binary.metadata.shared,
        wgmma=operations.count("HGMMA"),
        mma=operations.count("HMMA"),
        instructions=len(operations),
    )


def usages(case: Case) -> Iterator[tuple[str, Usage]]:
    """Yield each kernel's name and what it takes."""
    for name, (kernel, block, arguments) in calls(case).items():
        yield name, usage(compiled(kernel, block, arguments, case.capability))


def main() -> None:
    """Compile all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    rows = []
    fields = ("registers", "stack", "shared", "wgmma", "mma", "instructions")
    for case in CASES:
        print(f"{case!s:52}" + "".join(f"{field:>13}" for field in fields))
        for name, found in usages(case):
            figures = asdict(found)
            print(f"  {name:50}" + "".join(f"{value:13}" for value in figures.values()), flush=True)
            rows.append(asdict(case) | {"kernel": name} | figures)
    if args.json:
        document = {"environment": environment(), "kernels": rows}
        document["environment"]["versions"] |= {"triton": triton.__version__}
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
