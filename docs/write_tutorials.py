"""Tutorials: run the scripts of docs/tutorials/, and write each as a notebook and as a page.

    python docs/write_tutorials.py            # run all, write .ipynb, .md and pictures
    python docs/write_tutorials.py --check    # run all and compare what commands say; write nothing
    python docs/write_tutorials.py h5ad_to_umap --folder DIR    # one, in the folder of the first

A script has cells in the percent format (`# %%`, text behind `# %% [markdown]`). A cell
`# !COMMAND` is a command of this package, `!COMMAND` in the notebook; it is run in this process,
since a notebook waits for the same imports at each. All run in one temporary folder, in the order
of `NAMES`: the first makes the model that the others read.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "tutorials"
NAMES = (
    "pretrain_and_review",
    "h5ad_to_umap",
    "annotate_held_out_donors",
    "what_does_this_gene_do",
)
"""The tutorials in the order in which they are run."""
COMMAND = "# !"
LONGEST = 60
"""Lines of an output that are kept."""


@dataclass
class Cell:
    """A cell of a notebook, and what running it gave."""

    kind: str
    """markdown or code."""
    source: str
    text: str = ""
    """What it printed, and its last value."""
    pictures: list[bytes] = field(default_factory=list)
    """PNG."""


def cells_of(name: str) -> list[Cell]:
    """Return the cells of a tutorial.

    Args:
        name: Of `NAMES`.
    """
    found: list[Cell] = []
    for part in (FOLDER / f"{name}.py").read_text(encoding="utf-8").split("# %%")[1:]:
        first, _, body = part.partition("\n")
        if first.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().split("\n")]
            found.append(Cell("markdown", "\n".join(lines)))
        else:
            found.append(Cell("code", body.strip()))
    return found


def shown_source(cell: Cell) -> str:
    """Return a cell's source as a notebook has it."""
    if cell.kind == "markdown":
        return cell.source
    lines = cell.source.split("\n")
    return "\n".join(
        "!" + line.removeprefix(COMMAND) if line.startswith(COMMAND) else line for line in lines
    )


def run_cell(cell: Cell, names: dict[str, Any]) -> None:
    """Run a cell of code and keep what it shows.

    Args:
        cell: The cell.
        names: Variables of the notebook; changed.

    Raises:
        RuntimeError: A command failed.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if cell.source.startswith(COMMAND):
            run_command(cell.source.removeprefix(COMMAND))
        else:
            tree = ast.parse(cell.source)
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "cell", "exec"), names)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
                show(value, cell)
    cell.text = plain(printed.getvalue())


def run_command(line: str) -> None:
    """Run a command of this package in this process.

    Raises:
        RuntimeError: It failed.
    """
    from data_prep.__main__ import main as prepare
    from sclong_ds.__main__ import main

    program, *words = shlex.split(line)
    status = {"sclong": main, "sclong-prep": prepare}[program](words)
    if status:
        raise RuntimeError(f"`{line}` ended with status {status}")


def show(value: Any, cell: Cell) -> None:
    """Show the last value of a cell: a figure as a picture, another as text."""
    if hasattr(value, "savefig"):
        picture = io.BytesIO()
        value.savefig(picture, format="png", dpi=70, metadata={"Software": None})
        cell.pictures.append(picture.getvalue())
    elif value is not None:
        print(value)


def plain(text: str) -> str:
    """Return an output without the folder it was made in, and not longer than `LONGEST` lines."""
    text = text.replace(f"{os.getcwd()}/", "").rstrip()
    lines = [line for line in text.split("\n") if "deepspeed" not in line.lower()]
    if len(lines) > LONGEST:
        lines = [*lines[:LONGEST], f"... {len(lines) - LONGEST} more lines"]
    return "\n".join(lines)


def notebook(cells: list[Cell]) -> str:
    """Return cells as the text of an .ipynb."""
    found = []
    for number, cell in enumerate(cells):
        lines = shown_source(cell).splitlines(keepends=True)
        entry: dict[str, Any] = {
            "cell_type": cell.kind, "id": f"cell{number}", "metadata": {}, "source": lines
        }  # fmt: skip
        if cell.kind == "code":
            outputs: list[dict[str, Any]] = []
            if cell.text:
                text = cell.text.splitlines(keepends=True)
                outputs.append({"output_type": "stream", "name": "stdout", "text": text})
            outputs += [
                {
                    "output_type": "display_data",
                    "metadata": {},
                    "data": {"image/png": base64.b64encode(picture).decode()},
                }
                for picture in cell.pictures
            ]
            entry |= {"execution_count": None, "outputs": outputs}
        found.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": found,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def page(name: str, cells: list[Cell]) -> tuple[str, dict[str, bytes]]:
    """Return a tutorial as the text of a page, and its pictures by file name."""
    parts, pictures = [], dict[str, bytes]()
    for cell in cells:
        if cell.kind == "markdown":
            parts.append(cell.source)
            if len(parts) == 1:
                parts.append(f"This page as a notebook: [{name}.ipynb]({name}.ipynb).")
            continue
        language = "bash" if cell.source.startswith(COMMAND) else "python"
        parts.append(f"```{language}\n{shown_source(cell).removeprefix('!')}\n```")
        if cell.text:
            parts.append(f"```text\n{cell.text}\n```")
        for picture in cell.pictures:
            file = f"{name}_{len(pictures) + 1}.png"
            pictures[file] = picture
            title = cells[0].source.split("\n")[0].removeprefix("# ")
            parts.append(f"![{title}: figure {len(pictures)}]({file})")
    return "\n\n".join(parts) + "\n", pictures


def run_tutorial(name: str) -> list[Cell]:
    """Run a tutorial in the working folder; returns its cells with what they showed.

    Args:
        name: Of `NAMES`.
    """
    import matplotlib

    matplotlib.use("agg")
    import pandas as pd

    wall, cpu = time.monotonic(), sum(os.times()[:4])
    cells, names = cells_of(name), {"__name__": "notebook"}
    with pd.option_context("display.width", 100, "display.max_columns", 8):
        for cell in cells:
            if cell.kind == "code":
                run_cell(cell, names)
    wall, cpu = time.monotonic() - wall, sum(os.times()[:4]) - cpu
    print(f"{name}: {wall:.0f} s, {cpu:.0f} s of CPU", file=sys.stderr, flush=True)
    return cells


def write(name: str, cells: list[Cell]) -> None:
    """Write a tutorial that was run as notebook, page and pictures."""
    (FOLDER / f"{name}.ipynb").write_text(notebook(cells), encoding="utf-8")
    text, pictures = page(name, cells)
    (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")
    for file, picture in pictures.items():
        (FOLDER / file).write_bytes(picture)


def words_of(text: str) -> set[str]:
    """Return the lines of an output without numbers, blanks and which embedding was chosen."""
    lines = (re.sub(r"[-+]?\d[\d.,:e%-]*", "#", line).split() for line in text.splitlines())
    return {" ".join(line) for line in lines if line[:1] != ["embedding:"]}


def stale(name: str, cells: list[Cell]) -> list[str]:
    """Return what commands say now and do not on the page, or the other way round.

    Numbers may differ, and the log of a training.

    Args:
        name: Of `NAMES`.
        cells: Those that were run.
    """
    written = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    found = []
    for cell, entry in zip(cells, written, strict=True):
        if not cell.source.startswith(COMMAND) or " train " in cell.source:
            continue
        outputs = "".join(line for out in entry["outputs"] for line in out.get("text", []))
        now, then = words_of(cell.text), words_of(outputs)
        found += [f"now: {line}" for line in sorted(now - then)]
        found += [f"on the page: {line}" for line in sorted(then - now)]
    return found


def main() -> int:
    """Run tutorials and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="tutorials (default: all)")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--folder", type=Path, help="run in this folder, and keep it")
    args = parser.parse_args()
    sys.path.insert(0, str(FOLDER.parents[1]))
    with contextlib.ExitStack() as stack:
        folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.chdir(folder))
        names = args.names or NAMES
        if len(names) > 1:  # each in a process of its own, as a notebook is
            for name in names:
                words = [name, "--folder", ".", *(["--check"] if args.check else [])]
                subprocess.run([sys.executable, str(Path(__file__).resolve()), *words], check=True)
            return 0
        cells = run_tutorial(names[0])
        if not args.check:
            write(names[0], cells)
        elif differences := stale(names[0], cells):
            print(f"{names[0]}: run python docs/write_tutorials.py", *differences, sep="\n  ")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
