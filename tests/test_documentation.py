"""The pages of docs/ that follow from the code are those that the code gives, and all are found."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
spec = importlib.util.spec_from_file_location("write_reference", DOCS / "write_reference.py")
assert spec is not None
assert spec.loader is not None
write_reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_reference)


@pytest.mark.parametrize(
    "name", ["config.md", "cli.md", "exit-status.md", "metrics.md", "python-api.md"]
)
def test_reference_says_what_the_code_says(name: str) -> None:
    # Versions of Python break the lines of a help text in other places.
    written = (DOCS / "reference" / name).read_text().split()
    assert written == write_reference.pages()[name].split(), "run: python docs/write_reference.py"


def test_the_page_on_run_folders_names_every_file_of_the_code() -> None:
    page = (DOCS / "reference" / "run-folder.md").read_text()
    modules = [
        *(ROOT / "sclong_ds" / "run_folder").glob("*.py"),
        *(ROOT / "sclong_ds" / "recorders").glob("*.py"),
        *(ROOT / "sclong_ds" / f"{name}.py" for name in ("job/failures", "job/restarts",
                                                        "tracking/tracker", "training/saving")),
    ]  # fmt: skip
    names = set()
    for path in modules:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                kind = node.targets[0].id.rpartition("_")[2]
                if kind in ("FILE", "DIR", "FOLDER", "COPIED"):
                    parts = ast.walk(node.value)
                    names |= {str(part.value) for part in parts if isinstance(part, ast.Constant)}
    assert {"metrics.jsonl", "system", "failure.json", "config.yaml"} <= names
    missing = {name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", page)}
    assert missing == set(), "docs/reference/run-folder.md does not say what these are"


def test_every_page_is_in_the_table_of_contents() -> None:
    def pages(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        values = node.values() if isinstance(node, dict) else node
        assert not isinstance(values, str)
        return [page for value in values for page in pages(value)]  # type: ignore[attr-defined]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    there = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(there)


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
