"""Write the pages of docs/reference that follow from the code.

    python docs/write_reference.py

Reads the configuration's sections and presets, the parsers of all commands, the table of exit
statuses, the names of metrics and the public names of `sclong_ds`; writes config.md, cli.md,
exit-status.md and metrics.md beside the other pages, and the last part of python-api.md. A test
compares them with the code.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import data_prep.__main__ as data_prep
import sclong_ds
import sclong_ds.__main__ as sclong
from sclong_ds import pretrain
from sclong_ds.config import sections
from sclong_ds.config.load import load_config, preset_names
from sclong_ds.job import exit_status, sweep
from sclong_ds.run_folder import metric_names

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "reference"
_NAMES = "## Names"
"""Heading of what follows from the code in python-api.md."""
_NOTE = "<!-- Written by docs/write_reference.py; change the code, then run it again. -->\n"
_WIDTH = 100


def pages() -> dict[str, str]:
    """Return the text of each page by file name."""
    return {
        "config.md": _config_page(),
        "cli.md": _cli_page(),
        "exit-status.md": _exit_status_page(),
        "metrics.md": _metrics_page(),
        "python-api.md": _python_page(),
    }


def _config_page() -> str:
    lines = [
        "# Configuration\n",
        _NOTE,
        "A run is described by one complete YAML file: a preset (`--config sclong_tiny`) or a file "
        "of your own, and `section.key=value` on the command line. An unknown or missing key is an "
        "error. `python -m sclong_ds config sclong_tiny > mine.yaml` writes all keys of a preset "
        "for editing. The resolved file is `config.yaml` of the run folder.\n",
    ]
    presets = {name: load_config(name, []) for name in preset_names()}
    for section in fields(sections.RunConfig):
        kind = get_type_hints(sections.RunConfig)[section.name]
        lines.append(f"## {section.name}\n")
        lines.append(f"{_text(inspect.getdoc(kind))}\n")
        meanings = _field_docs(kind)
        for key in fields(kind):
            lines.append(f"### {section.name}.{key.name}\n")
            lines.append(f"{_text(meanings[key.name])}\n")
            values = {
                name: _value(getattr(getattr(config, section.name), key.name))
                for name, config in presets.items()
            }
            lines.append(f"Type: `{_type(kind, key.name)}`. {_presets(values)}\n")
    lines.append("## Performer stacks\n")
    lines.append(f"{_text(inspect.getdoc(sections.PerformerConfig))}\n")
    for name, meaning in _field_docs(sections.PerformerConfig).items():
        lines.append(f"- `{name}` (`{_type(sections.PerformerConfig, name)}`): {_text(meaning)}")
    return "\n".join(lines) + "\n"


def _field_docs(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a section."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = str(ast.literal_eval(after.value))
    return found


def _type(kind: type, key: str) -> str:
    """Return the type as it is written in the section."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    for field in body.body:
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == key:
            text = ast.unparse(field.annotation).replace("None", "null")
            # The alias of a Literal as what it stands for.
            choices = get_args(getattr(sections, text, None))
            if choices:
                return " | ".join(map(repr, choices))
            return re.sub(r"Literal\[([^\]]*)\]", lambda m: m[1].replace(", ", " | "), text)
    raise KeyError(key)


def _value(value: Any) -> str:
    if isinstance(value, sections.PerformerConfig):
        return ", ".join(f"{f.name} {_value(getattr(value, f.name))}" for f in fields(value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _presets(values: dict[str, str]) -> str:
    """Return the presets' values, those that agree together."""
    if len(set(values.values())) == 1:
        return f"All presets: `{next(iter(values.values()))}`."
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    return "; ".join(f"{', '.join(names)}: `{value}`" for value, names in by_value.items()) + "."


def _cli_page() -> str:
    lines = [
        "# Commands\n",
        _NOTE,
        "An installed package has the programs `sclong` and `sclong-prep`, which are "
        "`python -m sclong_ds` and `python -m data_prep` of the repository; `sclong prep` is "
        "`sclong-prep`. Training is started by the `deepspeed` launcher, by "
        "`sbatch slurm/pretrain.sh` or, on one rank, by `sclong train`.\n",
    ]
    programs = (("python -m sclong_ds", sclong.COMMANDS, sclong.parser),
                ("python -m data_prep", data_prep.COMMANDS, data_prep.parser))  # fmt: skip
    for program, commands, parser in programs:
        lines.append(f"## {program}\n")
        for name in commands:
            command = _command(parser([name]), name)
            command.formatter_class = _fixed_width(command.formatter_class)
            command.prog = f"{program} {name}"
            lines += [f"### {name}\n", _help(command)]
    for command, also in (
        (pretrain.parser(), "; `sclong train`, on one rank"),
        (sweep.sweep_parser(), " ([sweeps](../operate/sweep.md))"),
    ):
        command.formatter_class = _fixed_width(command.formatter_class)
        lines += [f"## {command.prog}\n", f"`{command.prog}`{also}.\n", _help(command)]
    return "\n".join(lines)


def _help(command: argparse.ArgumentParser) -> str:
    return f"```text\n{command.format_help().rstrip()}\n```\n"


def _command(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            command: argparse.ArgumentParser = action.choices[name]
            return command
    raise KeyError(name)


def _fixed_width(base: Any) -> Any:
    """Return a help formatter whose lines do not depend on the terminal."""
    return lambda prog: base(prog, width=_WIDTH)


def _exit_status_page() -> str:
    lines = ["# Exit statuses of training\n", _NOTE, "| status | meaning |", "|---|---|"]
    lines += [f"| {status} | {meaning} |" for status, meaning in _statuses()]
    lines.append(
        "\nThe `deepspeed` launcher does not pass them on; `srun` and `slurm/pretrain.sh` do."
    )
    return "\n".join(lines) + "\n"


def _statuses() -> Iterator[tuple[int, str]]:
    text = str(inspect.getdoc(exit_status)).split("\n\n")[1]
    for part in _text(text).rstrip(".").split("; "):
        number, meaning = part.split(" ", 1)
        yield int(number), meaning


def _metrics_page() -> str:
    lines = [
        "# Names of metrics\n",
        _NOTE,
        "Columns of metrics.jsonl, in MLflow and the other trackers under the same names; a figure "
        "of a baseline is `val/BASELINE/FIGURE`, of "
        f"{', '.join(f'`{name}`' for name in metric_names.BASELINES)}. "
        "[All that is recorded](../operate/review-in-mlflow.md)\n",
        "| name | meaning |",
        "|---|---|",
    ]
    body = ast.parse(inspect.getsource(metric_names)).body
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            meaning = _text(str(ast.literal_eval(after.value))) if said else _MEANINGS[
                str(node.value.value)]  # fmt: skip
            lines.append(f"| `{node.value.value}` | {meaning} |")
    return "\n".join(lines) + "\n"


def _python_page() -> str:
    """Return the page as it is, with the names below its last heading."""
    written, _, _ = (FOLDER / "python-api.md").read_text(encoding="utf-8").partition(_NAMES)
    lines = [f"{written.rstrip()}\n", f"{_NAMES}\n", _NOTE]
    for name in sclong_ds.__all__:
        path = ROOT / f"{sclong_ds._HOMES[name].replace('.', '/')}.py"
        found = [
            node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        ]
        lines.append(f"### {name}\n")
        if not found:
            lines.append(f"Another name of `{getattr(sclong_ds, name).__name__}`.\n")
            continue
        call = _call(found[0])
        lines.append(f"```python\n{name}({call})\n```\n")
        lines.append(f"{_docstring(found[0])}\n")
    return "\n".join(lines)


def _call(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Return the arguments of a function or of a class's constructor."""
    if isinstance(node, ast.FunctionDef):
        return ast.unparse(node.args)
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return ast.unparse(method.args).removeprefix("self").removeprefix(", ")
    fields_of = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
    return ", ".join(fields_of)


def _docstring(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Return a docstring as Markdown: the text, then a list of arguments, returns and errors."""
    text, lines = inspect.cleandoc(ast.get_docstring(node) or ""), []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if re.fullmatch(r"(Args|Returns|Raises|Source|Yields|Example|Examples):", line):
            lines += ["", f"**{line[:-1]}**", ""]
        elif indent == 4 and re.match(r"\s+\*{0,2}\w+(?: \([^)]*\))?: ", line):
            name, _, meaning = line.strip().partition(": ")
            lines.append(f"- `{name}`: {meaning}")
        else:
            lines.append(line.strip())
    return "\n".join(lines)


_MEANINGS = {
    "val/mse": "Mean squared error of the hidden values of held-out cells.",
    "val/pearson": "Correlation of predicted and true hidden values.",
    "val/baseline_pearson": "The same of the per-gene mean.",
}
"""Of names that need no word in the code."""


def _text(text: str | None) -> str:
    """Return a docstring as one line."""
    return re.sub(r"\s+", " ", text or "").strip()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for page, content in pages().items():
        (FOLDER / page).write_text(content, encoding="utf-8")
