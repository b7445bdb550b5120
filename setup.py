"""Builds the wheel: everything below `sclong_ds`, so that no other package's name is taken.

In the repository `kernels`, `data_prep`, `ds_configs` and `slurm` lie beside `sclong_ds`. PyPI has
another `kernels`, and two packages that write to one folder destroy each other. The wheel therefore
holds them as `sclong_ds.kernels` and so on, and the modules are built with these names in their
imports and commands. An editable installation serves the repository and keeps its names.
"""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

INSIDE = ("kernels", "data_prep", "ds_configs", "slurm")
EDITABLE = "editable_wheel" in sys.argv
_MODULE = r"(?:kernels|data_prep)\b"
_NAMES = re.compile(
    rf"(?P<before>^\s*(?:from|import)\s+|-m )(?P<name>{_MODULE})(?![\w/])"
    rf"|(?<![\w./-])(?P<dotted>{_MODULE})(?=\.(?!sh\b)[a-z_])",
    re.MULTILINE,
)


def installed_names(text: str) -> str:
    """Return the text of a module or script with the names that the wheel has."""
    return _NAMES.sub(
        lambda found: f"{found['before'] or ''}sclong_ds.{found['name'] or found['dotted']}", text
    )


class BuildInside(build_py):
    """Copies the modules and scripts, and gives them the names of the wheel."""

    def run(self) -> None:
        """Build; nothing is rewritten in an editable installation."""
        super().run()
        if EDITABLE or self.editable_mode:
            return
        for file in Path(self.build_lib, "sclong_ds").rglob("*"):
            if file.suffix in (".py", ".sh"):
                text = file.read_text(encoding="utf-8")
                file.write_text(installed_names(text), encoding="utf-8")


own = find_packages(include=["sclong_ds*"])
beside = find_packages(include=["kernels*", "data_prep*"])
if EDITABLE:
    setup(packages=own + beside)
else:
    setup(
        packages=own + [f"sclong_ds.{name}" for name in (*beside, "ds_configs", "slurm")],
        package_dir={f"sclong_ds.{name}": name for name in INSIDE},
        cmdclass={"build_py": BuildInside},
    )
