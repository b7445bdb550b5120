"""Sizes of an installation: the package's requirements alone, and with each extra.

    python -m benchmarks.install_sizes --out FOLDER --json benchmarks/results/install_sizes.json \
        [--find-links FOLDER]

Makes an environment for each below --out with uv, as pip would install it (compiled bytecode
included), adds up what its files take on the disk, and removes it. torch is pinned as in
requirements.txt; --find-links gives its CPU build. Needs uv and a package index.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.environment import write_result

ROOT = Path(__file__).parents[1]


def requirements() -> dict[str, list[str]]:
    """Return what is installed, by extra; `none` is without any, `all` with all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "all"}
    pins = re.findall(r"^(?:torch|deepspeed)==\S+", (ROOT / "requirements.txt").read_text(), re.M)
    base = [one for one in project["dependencies"] if not one.startswith("torch>")] + pins[:1]
    found = {"none": base} | {name: base + more for name, more in extras.items()}
    found["all"] = [*base, *pins[1:], *(one for more in extras.values() for one in more)]
    return found


def measure(folder: Path, wanted: list[str], links: Path | None) -> dict[str, Any]:
    """Install into a new environment and return its size.

    Args:
        folder: Made and removed.
        wanted: Requirements.
        links: Folder with wheels.

    Returns:
        `mb`: 10^6 bytes of allocated blocks, `packages`: their number, and the `largest` folders.
    """
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, folder], check=True)
    found = ["--find-links", str(links)] if links else []
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", folder, *found,
         *wanted],
        check=True,
    )  # fmt: skip
    (site,) = folder.glob("lib/python*/site-packages")
    sizes = {path.name: allocated(path) for path in site.iterdir()}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:8]
    result = {
        "mb": round(sum(sizes.values())),
        "packages": len(list(site.glob("*.dist-info"))),
        "largest": {name: round(sizes[name]) for name in largest},
    }
    shutil.rmtree(folder)
    return result


def allocated(path: Path) -> float:
    """Return what a file or folder takes on the disk, 10^6 bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.lstat().st_blocks * 512 for file in files) / 1e6


def main() -> int:
    """Measure all extras and print them."""
    parser = argparse.ArgumentParser(description="Measure the sizes of installations.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the environments")
    parser.add_argument("--find-links", type=Path, metavar="FOLDER", help="folder with wheels")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures as JSON")
    args = parser.parse_args()
    result = {}
    for name, wanted in requirements().items():
        result[name] = measure(args.out / f"env_{name}", wanted, args.find_links)
        print(f"{name:<10} {result[name]['mb']:>6,} MB  {result[name]['packages']:>4} packages")
    if args.json:
        write_result(args.json, "install_sizes", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
