"""Write requirements.lock, requirements-cuda.lock and requirements-cpu.lock again.

    pip install uv && python install/refresh_locks.py [--find-links FOLDER]

`requirements.lock` pins everything that requirements.txt leads to, for Python 3.11 to 3.13, with
the hashes of all files, except torch and what torch alone brings. The machine decides these:
`requirements-cuda.lock` is torch of PyPI with its CUDA libraries, `requirements-cpu.lock` torch's
CPU build. An installation takes the first and one of the others:

    pip install --no-deps --require-hashes -r requirements.lock -r requirements-cuda.lock

Reads the package index through uv; the hash of the CPU build is that of the wheels in --find-links
or, where there are none, of https://download.pytorch.org/whl/cpu. tests/test_requirements.py
compares the files with requirements.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_FOR_TORCH = re.compile(r"^(torch==|triton==|nvidia-(?!ml-py)|cuda-)")


def main() -> int:
    """Resolve, split and write; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the lock files again.")
    parser.add_argument(
        "--find-links", type=Path, metavar="FOLDER", help="folder with wheels of torch's CPU build"
    )
    args = parser.parse_args()
    entries = resolve(ROOT / "requirements.txt")
    torch = [entry for entry in entries if _FOR_TORCH.match(entry)]
    others = [entry for entry in entries if entry not in torch]
    write("requirements.lock", "everything but torch and its CUDA libraries", others)
    write("requirements-cuda.lock", "torch of PyPI with its CUDA libraries", torch)
    pin = next(entry for entry in torch if entry.startswith("torch==")).split()[0]
    write(
        "requirements-cpu.lock", "torch's CPU build, for machines without a GPU",
        [f"--find-links {CPU_INDEX}/torch/", cpu_build(pin, args.find_links)],
    )  # fmt: skip
    return 0


def resolve(requirements: Path) -> list[str]:
    """Return the pinned requirements, each with the hashes of its files on lines of their own.

    Args:
        requirements: What to resolve.
    """
    done = subprocess.run(
        [
            "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11",
            "--generate-hashes", "--no-annotate", "--no-header", str(requirements),
        ],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return re.split(r"\n(?=\S)", done.stdout.strip())


def cpu_build(pin: str, folder: Path | None) -> str:
    """Return the pin of the CPU build with its hashes.

    Args:
        pin: Such as torch==2.13.0.
        folder: Wheels on the disk; None: those of torch's own index.

    Raises:
        ValueError: No wheel of this version.
    """
    version = pin.split("==")[1]
    if folder is not None:
        files = folder.glob(f"torch-{version}+cpu-*.whl")
        sums = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    else:
        sums = []
        for python in ("3.11", "3.12", "3.13"):
            done = subprocess.run(
                ["uv", "pip", "compile", "--quiet", "--no-deps", "--no-annotate", "--no-header",
                 "--generate-hashes", "--python-version", python, "--index-url", CPU_INDEX, "-"],
                input=f"torch=={version}+cpu", stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            sums += re.findall(r"sha256:(\w+)", done.stdout)
    if not sums:
        raise ValueError(f"no wheel of torch {version}+cpu in {folder}")
    lines = [f"torch=={version}+cpu", *(f"    --hash=sha256:{one}" for one in sorted(set(sums)))]
    return " \\\n".join(lines)


def write(name: str, what: str, entries: list[str]) -> None:
    """Write one lock file below the root of the repository.

    Args:
        name: Its name.
        what: What it pins, for the first line.
        entries: Its requirements.
    """
    head = f"# {what[0].upper()}{what[1:]}. Written by install/refresh_locks.py."
    (ROOT / name).write_text("\n".join([head, *entries]) + "\n", encoding="utf-8")
    sys.stdout.write(f"{name}: {sum('==' in entry for entry in entries)} packages\n")


if __name__ == "__main__":
    sys.exit(main())
