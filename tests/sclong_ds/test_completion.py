"""Every command's help has one form, and the three shells complete its words.

Covers also `sclong_ds/__main__.py` and `sclong_ds/config/arguments.py`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data_prep.__main__ as prepare
import sclong_ds.__main__ as train
from sclong_ds.__main__ import main
from sclong_ds.completion import SHELLS, Command, Option, script
from sclong_ds.config.arguments import EXAMPLE, add_training_arguments

EVERY = [(module, name) for module in (train, prepare) for name in module.COMMANDS]
METAVARS = {
    "BYTES", "CHECKPOINT_DIR", "CODE", "CONDITIONS", "CORPUS", "DATASET_ID", "DIR", "FACTOR",
    "FILE", "FILE|PRESET", "FORMAT", "GBIT", "GENES", "GIB", "ID", "INPUT", "KEY", "KEY=VALUE",
    "KIND", "MANIFEST", "MATRIX", "MB", "MODE", "MODEL_DIR", "N", "NAME", "NAMES", "ORG/NAME",
    "RUN_DIR", "RUN_DIR_OR_RUN_ID", "RUN|CHECKPOINT|MODEL", "SECONDS", "SHARE", "SOURCE", "TERM",
    "TEXT", "TYPE", "URL", "key=value",
}  # fmt: skip
"""One for a kind of value, whatever the command."""
VERBS = {
    "Compare", "Draft", "Drop", "Embed", "Estimate", "Fetch", "List", "Log", "Make", "Measure",
    "Open", "Print", "Read", "Score", "Send", "Stage", "Take", "Train", "Write",
}  # fmt: skip


def command_of(module: object, name: str) -> argparse.ArgumentParser:
    parser = module.parser([name])  # type: ignore[attr-defined]
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("module", "name"), EVERY)
def test_help_is_a_sentence_that_orders_with_one_example(module: object, name: str) -> None:
    command = command_of(module, name)
    sentence = str(command.description)
    assert sentence.split()[0] in VERBS, sentence
    assert sentence.endswith(".")
    text = command.format_help()
    example = re.findall(rf"\n *{re.escape(command.prog)} (\S.*)", text.partition("usage:")[2])
    assert len(example) == 1, text
    words = example[0].partition(" >")[0].split()
    command.parse_args(words)


@pytest.mark.parametrize(("module", "name"), EVERY)
def test_a_kind_of_value_has_one_name(module: object, name: str) -> None:
    for action in command_of(module, name)._actions:
        if action.nargs != 0 and not (action.choices and action.metavar is None):
            assert action.metavar in METAVARS, action.option_strings or action.dest


def test_prep_and_train_are_the_programs_they_name() -> None:
    example = f"example:\n  python -m sclong_ds.pretrain {EXAMPLE}\n"
    for words, said in ((["prep", "forget"], "DATASET_ID"), (["train"], example)):
        run = subprocess.run(
            [sys.executable, "-m", "sclong_ds", *words, "--help"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert said in run.stdout
        assert run.stderr == "", "nothing of another library"
    training = argparse.ArgumentParser()
    add_training_arguments(training)
    assert training.parse_args(EXAMPLE.split()).config == "sclong_tiny"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    found = {}
    for shell in SHELLS:
        text = subprocess.run(
            [sys.executable, "-m", "sclong_ds", "completion", shell],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        found[shell] = folder / shell
        found[shell].write_text(text)
    return found


CASES = [
    ("sclong pe", {"perturb", "perturb-bench"}),
    ("sclong embed --o", {"--out"}),
    ("sclong embed --device c", {"cpu", "cuda"}),
    ("sclong completion f", {"fish"}),
    ("sclong train --d", {"--dry-run"}),
    ("sclong prep fin", {"finalize"}),
    ("sclong prep finalize co", set()),
    ("sclong prep finalize --sp", {"--split-by"}),
    ("sclong prep finalize --split-by d", {"dataset", "donor"}),
    ("sclong prep convert cel", {"cells.h5ad"}),
    ("sclong prep status --", {"--help", "--json"}),
    ("sclong-prep fin", {"finalize"}),
    ("sclong-prep convert cel", {"cells.h5ad"}),
    ("sclong-prep finalize --split-by d", {"dataset", "donor"}),
]


@pytest.mark.parametrize(("line", "words"), CASES)
def test_bash_completes(
    scripts: dict[str, Path], tmp_path: Path, line: str, words: set[str]
) -> None:
    (tmp_path / "cells.h5ad").touch()
    program = line.split()[0]
    ask = f"""
    . {scripts["bash"]}
    COMP_WORDS=({line}) COMP_CWORD={len(line.split()) - 1}
    _{program.replace("-", "_")}
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    run = subprocess.run(
        ["bash", "-c", ask], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert set(run.stdout.split()) == words
    assert run.stderr == ""


def test_bash_completes_files_where_nothing_else_fits(
    scripts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "cells.h5ad").touch()
    ask = f". {scripts['bash']}; COMP_WORDS=(sclong embed cel) COMP_CWORD=2; _sclong; "
    ask += 'echo "$COMPREPLY"'
    run = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "cells.h5ad\n"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_zsh_and_fish_read_their_script(scripts: dict[str, Path], shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([program, "-n", str(scripts[shell])], check=True)


@pytest.mark.parametrize(("line", "words"), CASES)
def test_fish_completes(
    scripts: dict[str, Path], tmp_path: Path, line: str, words: set[str]
) -> None:
    (tmp_path / "cells.h5ad").touch()
    program = shutil.which("fish")
    if program is None:
        pytest.skip("fish is not installed")
    ask = f"source {scripts['fish']}; complete -C '{line}'"
    run = subprocess.run(
        [program, "-N", "-c", ask], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert {row.split("\t")[0] for row in run.stdout.splitlines()} == words


def test_texts_with_quotes_stay_one_word_in_fish() -> None:
    option = Option("--of", "a gene's \\ name", ())
    assert "-d 'a gene\\'s \\\\ name'" in script({"p": [Command("c", "x", (option,))]}, "fish")


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "tcsh"])
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err
