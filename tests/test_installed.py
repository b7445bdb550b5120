"""The built wheel, installed in an environment of its own and used from another folder.

Covers also `sclong_ds/demo.py`, `sclong_ds/files/places.py`, `sclong_ds/job/scripts.py`.
"""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from sclong_ds.engine.extensions import extensions_folder

ROOT = Path(__file__).parents[1]
BUILT_FROM = (
    "sclong_ds", "kernels", "data_prep", "ds_configs", "slurm", "setup.py", "pyproject.toml",
    "requirements.txt", "README.md", "LICENSE", "MANIFEST.in",
)  # fmt: skip


def run(*command: object, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "DS_ACCELERATOR": "cpu",
        # Built once for all tests.
        "TORCH_EXTENSIONS_DIR": str(extensions_folder()),
    }
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution of a clean copy of this checkout."""
    copy = tmp_path_factory.mktemp("copy")
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    code = "from setuptools.build_meta import build_sdist; build_sdist('sdist')"
    run(sys.executable, "-c", code, cwd=copy)
    (source,) = (copy / "sdist").iterdir()
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w",
        copy / "dist", source, cwd=copy)  # fmt: skip
    (found,) = (copy / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def other_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package `kernels` of PyPI; without a network, one that owns the same folder."""
    folder = tmp_path_factory.mktemp("other")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder),
               "--only-binary", ":all:", "--retries", "1", "--timeout", "20",
               "kernels"]  # fmt: skip
    if subprocess.run(command, capture_output=True).returncode == 0:
        (found,) = folder.iterdir()
        return found
    made = folder / "kernels-0.0.1-py3-none-any.whl"
    info = "kernels-0.0.1.dist-info"
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("kernels/__init__.py", "")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "kernels/__init__.py,,\n")
    return made


def environment(folder: Path, *wheels: Path) -> Path:
    """Return the python of a new environment with these wheels, in this order."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig as s; print(s.get_path('purelib'))",
                    cwd=folder).strip())  # fmt: skip
    # What the wheels need; an editable installation there is not seen through a .pth file.
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for file in wheels:
        run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", file,
            cwd=folder)  # fmt: skip
    return python


def damaged(site: Path) -> list[str]:
    """Return the files that are not as a wheel's RECORD says."""
    found = []
    for record in site.glob("*.dist-info/RECORD"):
        for line in record.read_text().splitlines():
            name, digest, _ = line.rsplit(",", 2)
            if digest:
                data = hashlib.sha256((site / name).read_bytes()).digest()
                text = base64.urlsafe_b64encode(data).decode().rstrip("=")
                if digest != f"sha256={text}":
                    found.append(name)
    return found


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_package_named_kernels_and_this_one_leave_each_other_whole(
    wheel: Path, other_kernels: Path, tmp_path: Path, *, ours_first: bool
) -> None:
    wheels = (wheel, other_kernels) if ours_first else (other_kernels, wheel)
    python = environment(tmp_path / "env", *wheels)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    assert not damaged(site)
    assert {p.name for p in site.iterdir() if p.is_dir()} >= {"kernels", "sclong_ds"}
    for name in ("data_prep", "ds_configs", "slurm"):
        assert not (site / name).exists()
    code = "import sclong_ds.kernels.favor_torch, importlib.util as u; "
    code += "print(u.find_spec('kernels').origin); import sys; print('kernels' in sys.modules)"
    assert run(python, "-c", code, cwd=tmp_path).split() == [
        str(site / "kernels" / "__init__.py"), "False",
    ]  # fmt: skip


def test_the_installed_programs_work_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env", wheel)
    modules = """
import pkgutil, sys, warnings
from importlib import import_module
import sclong_ds
warnings.simplefilter("ignore")
for found in pkgutil.walk_packages(sclong_ds.__path__, "sclong_ds."):
    if not found.name.endswith("__main__") and ".resources" not in found.name:
        import_module(found.name)
print(sorted({"kernels", "data_prep"} & set(sys.modules)), sclong_ds.__version__)
"""
    assert run(python, "-c", modules, cwd=tmp_path).splitlines()[-1].startswith("[] ")
    programs = python.parent
    (package,) = (tmp_path / "env").glob("lib/python*/site-packages/sclong_ds")
    cells = package / "data_prep" / "resources" / "demo" / "immune_b.h5"
    (tmp_path / "one.tsv").write_text(f"dataset_id\tpath\na\t{cells}\n")
    run(programs / "sclong-prep", "convert", "one.tsv", "--out", "corpus", cwd=tmp_path)
    run(programs / "sclong-prep", "finalize", "corpus", cwd=tmp_path)
    run(programs / "sclong-prep", "verify", "corpus", cwd=tmp_path)
    run(python, "-m", "sclong_ds.pretrain", "--config", "sclong_tiny", "--dry-run",
        "run.dir=run", "data.corpus=corpus", "model.gene_encoder=embedding",
        cwd=tmp_path)  # fmt: skip
    said = run(programs / "sclong", "slurm", "site", cwd=tmp_path)
    assert str(tmp_path / "site") in said
    env = (tmp_path / "site" / "slurm" / "env.sh").read_text()
    assert f'default_venv="{tmp_path / "env"}"' in env
    job = (tmp_path / "site" / "slurm" / "data_prep.sh").read_text()
    assert "python -m sclong_ds.data_prep" in job
