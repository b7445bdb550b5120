"""pyproject.toml, requirements.txt and the locks name the same packages at fitting versions."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launching import environment
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sclong_ds.command_line import EXTRAS

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "golden" / "written_by" / "3_436d87b" / "model"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {
    "sklearn": "scikit-learn", "umap": "umap-learn", "pynvml": "nvidia-ml-py",
}  # fmt: skip
"""Module to package, where the names differ."""
PYTHONS = ("3.11", "3.12", "3.13")


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Return requirements by name; comments, options and hashes are left out."""
    texts = [re.sub(r"\s#.*|\s*\\$", "", line).strip() for line in lines]
    found = [Requirement(text) for text in texts if text and text[0].isalnum()]
    return {canonicalize_name(one.name): one for one in found}


def declared() -> dict[str, Requirement]:
    """Return what the package asks for with all extras."""
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [one for name in extras if name != "all"
                                       for one in extras[name]]  # fmt: skip
    return requirements(lines)


def locked(python: str) -> dict[str, Requirement]:
    """Return the pins of the lock files for a version of Python on Linux."""
    found: dict[str, Requirement] = {}
    where = {"python_full_version": f"{python}.9", "python_version": python,
             "sys_platform": "linux", "platform_system": "Linux",
             "platform_machine": "x86_64"}  # fmt: skip
    for name in ("requirements.lock", "requirements-cuda.lock"):
        for line in (ROOT / name).read_text().splitlines():
            for one in requirements([line]).values():
                marker: Marker | None = one.marker
                if marker is None or marker.evaluate(where):
                    assert canonicalize_name(one.name) not in found, one
                    found[canonicalize_name(one.name)] = one
    return found


def version(pin: Requirement) -> str:
    (one,) = pin.specifier
    assert one.operator == "==", pin
    return one.version


def test_requirements_are_those_of_the_package() -> None:
    listed = requirements((ROOT / "requirements.txt").read_text().splitlines())
    assert set(listed) == set(declared())
    for name, asked in declared().items():
        specifier = listed[name].specifier
        if any(one.operator == "==" for one in specifier):  # pinned for the tests
            assert asked.specifier.contains(version(listed[name])), name
        else:
            assert specifier == asked.specifier, name


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_a_version_in_range_of_every_requirement(python: str) -> None:
    pins = locked(python)
    for name, asked in declared().items():
        assert asked.specifier.contains(version(pins[name])), name
    listed = requirements((ROOT / "requirements.txt").read_text().splitlines())
    for name in ("torch", "deepspeed"):
        assert version(pins[name]) == version(listed[name])


@pytest.mark.parametrize(
    "name", ["requirements.lock", "requirements-cuda.lock", "requirements-cpu.lock"]
)
def test_every_line_of_a_lock_has_hashes(name: str) -> None:
    entries = re.split(r"\n(?=[\w#-])", (ROOT / name).read_text())
    pins = [entry for entry in entries if "==" in entry]
    assert pins
    for entry in pins:
        assert re.search(r"\\\n    --hash=sha256:[0-9a-f]{64}(?: \\)?$", entry, re.MULTILINE), entry


def test_an_extra_names_the_modules_that_it_brings() -> None:
    base = set(requirements(PROJECT["dependencies"]))
    for extra, modules in EXTRAS.items():
        packages = {canonicalize_name(MODULES.get(module, module)) for module in modules}
        assert packages == set(requirements(PROJECT["optional-dependencies"][extra])), extra
        assert not packages & base
    assert PROJECT["optional-dependencies"]["all"] == [f"sclong_ds[{','.join(EXTRAS)}]"]


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Finder:
    def find_spec(self, name, path=None, target=None):
        return None if name in {names} else PathFinder.find_spec(name, path, target)

    def find_distributions(self, context=None):
        return PathFinder.find_distributions(context)

sys.meta_path = [Finder() if finder is PathFinder else finder for finder in sys.meta_path]
import anndata, numpy as np
from sclong_ds.__main__ import main
from sclong_ds.corpus.genes import GeneVocabulary
from pathlib import Path
counts = np.random.default_rng(0).poisson(1.5, (8, 400)).astype(np.float32)
cells = anndata.AnnData(counts)
cells.var_names = GeneVocabulary.read(Path("{model}/genes.tsv")).ids
cells.write_h5ad("cells.h5ad")
assert main(["embed", "{model}", "cells.h5ad", "--out", "out.h5ad"]) == 0
for command in (["evaluate", "{model}", "cells.h5ad", "--label", "k", "--out", "s"],
                ["export", "{model}", "--out", "m"], ["ui", "run"], ["report", "run"]):
    assert main(command) == 1
from data_prep.__main__ import main as prepare
assert prepare(["gene-graph", "--genes", "{model}/genes.tsv", "--out", "g.npz"]) == 1
"""


def test_embedding_needs_no_extra_and_other_commands_name_theirs(tmp_path: Path) -> None:
    hidden = {module for modules in EXTRAS.values() for module in modules}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=hidden, model=MODEL)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.h5ad").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    extras = ("evaluate", "train", "track", "train", "prep")
    assert [re.findall(r"is not installed: pip install 'sclong_ds\[(\w+)\]'$", line)
            for line in lines] == [[extra] for extra in extras]  # fmt: skip
