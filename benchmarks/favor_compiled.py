"""What the Triton kernels of FAVOR+ attention compile to, for GPUs that need not be present.

    python -m benchmarks.favor_compiled [--json OUT]

Prints, for every kernel and GPU generation, what the machine code takes and does: registers,
spilled bytes, shared memory, tensor-core instructions, waits for them, what ptxas says about
serialised products (C75xx), warp instructions for each token, and the bytes a launch moves through
the second-level cache. Compiled by the installed Triton as the launcher would: the same arguments,
specialised in the same way. Another version: put it first on PYTHONPATH, installed with
`pip install --no-deps --target FOLDER triton==VERSION`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.environment import write_result
from kernels.favor_launch import Setting, backward, forward
from kernels.favor_plan import Block, default_plan, tiles

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
    """80, 86, 89, 90, 100 or 120."""
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
    """Instructions of the wide tensor-core path: Hopper's wgmma, Blackwell's tcgen05."""
    mma: int
    """Instructions of the older one."""
    waits: int
    """Waits of the main loop for wide products."""
    serialized: tuple[str, ...]
    """Codes of what ptxas says about serialised products."""
    row_instructions: float
    """Warp instructions for each token and head, of all programs."""
    l2_bytes: int
    """What a launch reads and writes in accesses of 16 bytes: rows of matrices."""


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    block: Block
    arguments: dict[str, Any]


TOKENS = 4096
WIDE = ("key_pass", "summary_gradient")
"""Kernels that walk over tokens; the other hot ones walk over features."""
CASES = [
    *(Case(capability=c, m=266) for c in (86, 89, 100, 120)),
    *(Case(capability=c, m=m) for c in (90, 80) for m in (256, 266)),
    *(Case(capability=c, m=m, k=k) for c in (90, 80) for m, k in ((110, 32), (256, 128))),
    Case(capability=90, m=128),
    Case(capability=90, m=266, packed_cells=True, apart=True),
    *(Case(capability=c, m=266, dtype="float32") for c in (90, 80)),
]


def calls(case: Case, *, heads: int = 32) -> dict[str, Launch]:
    """Return every kernel's launch in a forward and backward pass, by name."""
    recorded = {}

    def record(kernel: Any, grid: tuple[int, ...], block: Block, **arguments: Any) -> None:
        recorded[kernel.__name__] = Launch(kernel, grid, block, arguments)

    dtype, n, k = getattr(torch, case.dtype), TOKENS, case.k
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


def compiled(launch: Launch, capability: int) -> tuple[Any, str]:
    """Compile a kernel for a launch's arguments; return it and what ptxas said."""
    kernel, _, block, arguments = launch
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
    knobs, said = triton.knobs, io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(said):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return binary, said.getvalue()


def usage(binary: Any, said: str, launch: Launch, case: Case) -> Usage:
    """Return what a compiled kernel takes, from its machine code and ptxas's words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        resources, listing = (
            subprocess.run(
                [str(CUOBJDUMP), flag, str(path)], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = {name: int(re.search(rf"{name}:(\d+)", resources)[1]) for name in ("REG", "STACK")}
    code = [
        (int(address, 16), re.sub(r"^@!?\w+ +", "", text))
        for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.M)
    ]
    everything = [text for _, text in code]
    loop = _main_loop(code)
    warps, programs = launch.block.warps, math.prod(launch.grid)
    trips = _trips(launch, case) if loop else 0
    each = len(everything) + (trips - 1) * len(loop) if loop else len(everything)
    # What a pipelined loop fetches ahead of itself is fetched in it as often less.
    once = [text for text in everything if not text.startswith("LDGSTS")]
    moved = sum(map(_bytes, once)) + sum(map(_bytes, loop)) * trips
    moved -= sum(_bytes(text) for text in loop if not text.startswith("LDGSTS"))
    return Usage(
        registers=found["REG"],
        stack_bytes=found["STACK"],
        shared_bytes=binary.metadata.shared,
        wgmma=sum("HGMMA" in t or bool(re.match("UTC.*MMA", t)) for t in everything),
        mma=sum(t.startswith("HMMA") for t in everything),
        waits=sum("WARPGROUP.DEPBAR" in t for t in loop),
        serialized=tuple(sorted(set(re.findall(r"C75\d\d", said)))),
        row_instructions=each * warps * programs / (TOKENS * 32),
        l2_bytes=moved * 32 * warps * programs,
    )


def _main_loop(code: list[tuple[int, str]]) -> list[str]:
    """Return the instructions of the longest loop with products; empty where there is none."""
    loops = []
    for address, text in code:
        jump = re.match(r"BRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            body = [t for a, t in code if int(jump[1], 16) <= a <= address]
            loops.append(body if any("MMA" in t for t in body) else [])
    return max(loops, key=len, default=[])


def _trips(launch: Launch, case: Case) -> int:
    """Return how often a hot kernel's program goes through its main loop."""
    block = launch.block
    if launch.kernel.__name__ in WIDE:
        return tiles(TOKENS // launch.grid[1], block.rows)
    return case.m // block.features if block.tail else tiles(case.m, block.features)


def _bytes(text: str) -> int:
    """Return what one thread moves by an instruction, where it is 16 bytes: rows of matrices."""
    return 16 if re.match(r"(?:LDG|LDGSTS|STG)\b\S*\.128\b", text) else 0


def usages(case: Case) -> Iterator[tuple[str, Usage]]:
    """Yield each kernel's name and what it takes."""
    for name, launch in calls(case).items():
        yield name, usage(*compiled(launch, case.capability), launch, case)


COLUMNS = ("regs", "spill", "KB", "wide", "mma", "waits", "/token", "L2 MB")


def figures(found: Usage) -> str:
    """Return what is found under the names of `COLUMNS`, and what ptxas says."""
    values = (
        found.registers, found.stack_bytes, found.shared_bytes // 1024, found.wgmma, found.mma,
        found.waits, round(found.row_instructions), round(found.l2_bytes / 1e6),
    )  # fmt: skip
    return "".join(f"{value:7}" for value in values) + " " + " ".join(found.serialized)


def main() -> None:
    """Compile all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    rows = []
    for case in CASES:
        print(f"{case!s:44}" + "".join(f"{field:>7}" for field in COLUMNS))
        for name, found in usages(case):
            print(f"  {name:42}{figures(found)}", flush=True)
            rows.append(asdict(case) | {"kernel": name} | asdict(found))
    if args.json:
        write_result(args.json, "favor_compiled", {"kernels": rows})


if __name__ == "__main__":
    main()
