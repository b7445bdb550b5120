"""The files of install/: images, conda, module; their steps run as a plain script, and releases."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sclong_ds

ROOT = Path(__file__).parents[1]
INSTALL = ROOT / "install"
SCRIPT = INSTALL / "into_environment.sh"
DOCKER = (INSTALL / "Dockerfile").read_text()
APPTAINER = (INSTALL / "sclong.def").read_text()
spec = importlib.util.spec_from_file_location("release_notes", INSTALL / "release_notes.py")
assert spec is not None
assert spec.loader is not None
release_notes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release_notes)


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile and their arguments, continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKER, flags=re.MULTILINE)).splitlines()
    found = []
    for line in filter(str.strip, lines):
        name, _, rest = line.partition(" ")
        found.append((name, rest))
    return found


def test_the_image_is_pinned_clean_and_runs_as_an_ordinary_user() -> None:
    steps = instructions()
    assert steps[0][0] == "FROM"
    assert re.fullmatch(r"python:3\.1[123]-slim-\w+", steps[0][1])
    known = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    assert {name for name, _ in steps} <= known
    users = [rest for name, rest in steps if name == "USER"]
    assert users
    assert users[-1] not in ("root", "0")
    assert not [rest for name, rest in steps if name == "RUN" and "sudo" in rest]
    for name, rest in steps:
        if name == "RUN" and "apt-get install" in rest:
            assert "apt-get update" in rest
            assert "--no-install-recommends" in rest
            assert rest.rstrip().endswith("rm -rf /var/lib/apt/lists/*")
    assert steps[-1] == ("CMD", '["sclong", "--help"]')


def test_both_images_take_the_same_steps() -> None:
    base = re.search(r"^FROM (\S+)$", DOCKER, re.MULTILINE)
    assert base is not None
    assert f"From: {base[1]}" in APPTAINER
    packages = [set(re.findall(r"no-install-recommends (.+?)(?:=\S+)? *\\?$", text, re.MULTILINE))
                for text in (DOCKER, APPTAINER)]  # fmt: skip
    assert packages[0] == packages[1] == {"g++"}
    for text in (DOCKER, APPTAINER):
        named = re.findall(r"(?<![\w/])install/[\w.]+", text)
        assert "install/into_environment.sh" in named
        assert all((ROOT / name).exists() for name in named)
        assert "TORCH=cuda" in text
    sections = re.findall(r"^%(\w+)", APPTAINER, re.MULTILINE)
    assert sections == ["arguments", "files", "environment", "post", "test", "runscript", "labels"]


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a python that writes down how it is called."""
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$PWD: python $*"\n')
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    return subprocess.run(["bash", str(SCRIPT), *arguments], cwd=folder, text=True,
                          capture_output=True, env=os.environ | {"PATH": path})  # fmt: skip


@pytest.mark.parametrize("torch", ["cuda", "cpu"])
def test_the_step_installs_the_locked_versions_and_then_the_package(
    tmp_path: Path, torch: str
) -> None:
    done = run_script(tmp_path, torch, "--find-links", "wheels")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{ROOT}: python -m pip install --no-deps --require-hashes -r requirements.lock "
        f"-r requirements-{torch}.lock --find-links wheels",
        f"{ROOT}: python -m pip install --no-deps --no-build-isolation .",
        f"{ROOT}: python -m sclong_ds --version",
    ]


def test_another_kind_of_torch_is_refused(tmp_path: Path) -> None:
    done = run_script(tmp_path, "rocm")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: rocm: must be cuda or cpu\n"


def test_the_image_passes_its_linter() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "-"], input=DOCKER, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    bad = DOCKER.replace("USER 10001", "USER root").replace("g++=4:12.2.0-3", "g++")
    done = subprocess.run([hadolint, "-"], input=bad, capture_output=True, text=True)
    assert {"DL3002", "DL3008"} <= set(re.findall(r"DL\d+", done.stdout))


def section(name: str) -> str:
    """Return the lines of a section of the apptainer file."""
    found = re.search(rf"^%{name}\n((?:    .*\n|\n)*)", APPTAINER, re.MULTILINE)
    assert found is not None
    return found[1].replace("{{ TORCH }}", "cuda")


@pytest.mark.parametrize("name", ["script", "environment", "post", "test", "runscript"])
def test_shell_code_passes_shellcheck(name: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    given = SCRIPT.read_text() if name == "script" else f"#!/bin/sh\n{section(name)}"
    done = subprocess.run(["shellcheck", "-"], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_conda_environment_takes_the_requirements_and_the_package(tmp_path: Path) -> None:
    found = yaml.safe_load((INSTALL / "environment.yml").read_text())
    (lines,) = [one["pip"] for one in found["dependencies"] if isinstance(one, dict)]
    assert lines[0] == "-r ../requirements.txt"
    # conda gives pip the lines as a file of requirements, in the folder of environment.yml.
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "a-package"\nversion = "1"\n'
    )
    (tmp_path / "install").mkdir()
    (tmp_path / "install" / "lines.txt").write_text("\n".join(lines))
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps",
            "--no-build-isolation", "-r", "lines.txt",
        ],
        cwd=tmp_path / "install", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Would install a-package-1" in done.stdout


def test_the_citation_is_of_the_version_of_the_package() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == sclong_ds.__version__


def test_notes_are_the_section_of_the_tag_that_is_the_version(tmp_path: Path) -> None:
    (tmp_path / "sclong_ds").mkdir()
    (tmp_path / "sclong_ds" / "__init__.py").write_text('"""."""\n__version__ = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changes\n\n## 0.2.0 (today)\n\n- b\n\n## 0.1.0\n\n- a\n"
    )
    assert release_notes.notes("v0.2.0", tmp_path) == "- b\n"
    with pytest.raises(ValueError, match=r"the tag v0\.1\.0 is not v0\.2\.0"):
        release_notes.notes("v0.1.0", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 0.1.0\n\n- a\n")
    with pytest.raises(ValueError, match=r"no section of 0\.2\.0"):
        release_notes.notes("v0.2.0", tmp_path)


def test_workflows_are_yaml_that_run_what_there_is() -> None:
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert commands
        for name in re.findall(r"(?:install|\.ci|tests)/[\w./]+", " ".join(commands)):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
