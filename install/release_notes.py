"""Print the notes of a release, and make sure that its tag is the version of the package.

    python install/release_notes.py v0.2.0

Reads CHANGELOG.md and `sclong_ds/__init__.py`; standard library only. Exit status 1: the tag names
another version than the package, or the changes have no section of it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(tag: str, root: Path = ROOT) -> str:
    """Return the section of a version.

    Args:
        tag: Such as v0.2.0.
        root: Of the repository.

    Raises:
        ValueError: The tag, the package and the changes do not go together.
    """
    source = (root / "sclong_ds" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    version = found[1] if found else "none"
    if tag != f"v{version}":
        raise ValueError(f"the tag {tag} is not v{version}, the version in sclong_ds/__init__.py")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(version)}.*?\n(.*?)(?=^## |\Z)", changes, re.M | re.S)
    if section is None or not section[1].strip():
        raise ValueError(f"CHANGELOG.md has no section of {version}")
    return section[1].strip() + "\n"


def main() -> int:
    """Print the notes; return the exit status."""
    try:
        sys.stdout.write(notes(*sys.argv[1:2]))
    except (ValueError, TypeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
