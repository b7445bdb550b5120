"""The tutorials run on the bundled cells, and notebooks and pages are those of their scripts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment

spec = importlib.util.spec_from_file_location(
    "write_tutorials", ROOT / "docs" / "write_tutorials.py"
)
assert spec is not None
assert spec.loader is not None
write_tutorials = importlib.util.module_from_spec(spec)
sys.modules["write_tutorials"] = write_tutorials  # for its dataclass
spec.loader.exec_module(write_tutorials)
NAMES = write_tutorials.NAMES


@pytest.mark.distributed
def test_tutorials_run(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "write_tutorials.py"), "--check"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    left = {path.name for path in tmp_path.iterdir()}
    assert {"model", "report.html", "embedded.h5ad", "annotated", "effects.h5ad"} <= left


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_that_of_its_script(name: str) -> None:
    cells = write_tutorials.cells_of(name)
    written = json.loads((write_tutorials.FOLDER / f"{name}.ipynb").read_text())["cells"]
    ours = [(cell.kind, write_tutorials.shown_source(cell)) for cell in cells]
    assert [(c["cell_type"], "".join(c["source"])) for c in written] == ours
    page = (write_tutorials.FOLDER / f"{name}.md").read_text()
    for kind, source in ours:
        assert source.removeprefix("!" if kind == "code" else "") in page


def test_pages_that_say_what_commands_no_longer_say_are_noticed() -> None:
    name = "what_does_this_gene_do"
    cells = write_tutorials.cells_of(name)
    written = json.loads((write_tutorials.FOLDER / f"{name}.ipynb").read_text())["cells"]
    for cell, entry in zip(cells, written, strict=True):
        cell.text = "".join(
            line for out in entry.get("outputs", []) for line in out.get("text", [])
        )
    assert write_tutorials.stale(name, cells) == []
    (command,) = (c for c in cells if "sclong genes" in c.source)
    command.text = command.text.replace("10 edges", "11 edges")
    assert write_tutorials.stale(name, cells) == []
    command.text = command.text.replace(" edges", " lines")
    now, then = write_tutorials.stale(name, cells)
    assert (now[:4], then[:12]) == ("now:", "on the page:")


def test_every_script_is_run() -> None:
    assert {path.stem for path in write_tutorials.FOLDER.glob("*.py")} == set(NAMES)


def test_a_cell_shows_its_last_value_and_a_failed_command_stops(tmp_path: Path) -> None:
    names: dict[str, object] = {}
    cell = write_tutorials.Cell("code", "x = 2\nprint('one')\nx + 1")
    write_tutorials.run_cell(cell, names)
    assert cell.text == "one\n3"
    missing = write_tutorials.Cell("code", f"# !sclong status {tmp_path / 'nothing'}")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        write_tutorials.run_cell(missing, names)
