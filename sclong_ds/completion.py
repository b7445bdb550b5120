"""`completion`: what a shell completes for `sclong` and `sclong-prep`.

    sclong completion bash >> ~/.bashrc
    sclong completion zsh >> ~/.zshrc
    sclong completion fish > ~/.config/fish/completions/sclong.fish

The script holds the commands, their options and the choices of these as they are now; nothing is
started while a word is completed. What has no choices is completed as a file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

from sclong_ds.config.arguments import add_training_arguments

SHELLS = ("bash", "zsh", "fish")


class Option(NamedTuple):
    """An option as a shell completes it."""

    flag: str
    text: str
    choices: tuple[str, ...]


class Command(NamedTuple):
    """A command as a shell completes it."""

    name: str
    text: str
    options: tuple[Option, ...]
    program: str = ""
    """The program that completes the words behind it, where another one does."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `python -m sclong_ds completion`."""
    parser.add_argument("shell", choices=SHELLS, help="for which the script is")


def run(args: argparse.Namespace) -> int:
    """Print the script; return the exit status."""
    from data_prep import __main__ as prepare
    from sclong_ds import __main__ as train

    training = argparse.ArgumentParser()
    add_training_arguments(training)
    programs = {
        "sclong": [_command(train.parser([name]), name) for name in train.COMMANDS],
        "sclong-prep": [_command(prepare.parser([name]), name) for name in prepare.COMMANDS],
    }
    texts = {name: text for name, (_, text) in train.FORWARDED.items()}
    programs["sclong"] += [
        Command("train", texts["train"], _options(training)),
        Command("prep", texts["prep"], (), program="sclong-prep"),
    ]
    sys.stdout.write(script(programs, args.shell))
    return 0


def script(programs: dict[str, list[Command]], shell: str) -> str:
    """Return what a shell reads.

    Args:
        programs: Name of each program to its commands.
        shell: One of SHELLS.
    """
    if shell == "fish":
        return "\n".join(line for item in programs.items() for line in _fish(*item)) + "\n"
    text = "\n".join(_bash(*item) for item in programs.items())
    # zsh runs the functions of bash; compinit is what bashcompinit adds to.
    before = "autoload -Uz compinit bashcompinit && compinit -u && bashcompinit\n"
    return (before if shell == "zsh" else "") + text


def _command(parser: argparse.ArgumentParser, name: str) -> Command:
    """Return a command of a parser that was made for it."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    command = commands.choices[name]
    return Command(name, str(command.description).rstrip("."), _options(command))


def _options(command: argparse.ArgumentParser) -> tuple[Option, ...]:
    """Return what can stand behind a command."""
    options = tuple(
        Option(flag, str(action.help or "").partition(" (default")[0], _words(action.choices))
        for action in command._actions
        for flag in action.option_strings
        if flag.startswith("--") and action.help != argparse.SUPPRESS
    )
    positional = tuple(
        Option("", "", _words(action.choices))
        for action in command._actions
        if not action.option_strings and action.choices
    )
    return options + positional


def _words(choices: object) -> tuple[str, ...]:
    return tuple(map(str, choices)) if isinstance(choices, tuple | list) else ()


def _bash(program: str, commands: list[Command]) -> str:
    function = _function(program)
    cases = []
    for command in commands:
        if command.program:
            cases.append(
                f'  {command.name})\n    COMP_WORDS=("${{COMP_WORDS[@]:1}}")\n'
                f"    COMP_CWORD=$((COMP_CWORD - 1))\n    {_function(command.program)}\n"
                "    return ;;\n"
            )
            continue
        flags = " ".join(option.flag for option in command.options if option.flag)
        words = " ".join(
            word for option in command.options if not option.flag for word in option.choices
        )
        choices = "".join(
            f'      {option.flag}) words="{" ".join(option.choices)}" ;;\n'
            for option in command.options
            if option.flag and option.choices
        )
        known = f'    case "$before" in\n{choices}    esac\n' if choices else ""
        cases.append(f'  {command.name})\n    flags="{flags}" words="{words}"\n{known}    ;;\n')
    names = " ".join(command.name for command in commands)
    return (
        f"{function}() {{\n"
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="" flags="" words=""\n'
        '  if [ "$COMP_CWORD" -gt 0 ]; then before="${COMP_WORDS[COMP_CWORD-1]}"; fi\n'
        '  if [ "$COMP_CWORD" -eq 1 ]; then\n'
        f'    COMPREPLY=($(compgen -W "{names} --help --version" -- "$word"))\n'
        "    return\n  fi\n"
        '  case "${COMP_WORDS[1]}" in\n'
        f"{''.join(cases)}  esac\n"
        '  case "$word" in\n'
        '  -*) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;\n'
        '  *) if [ -n "$words" ]; then COMPREPLY=($(compgen -W "$words" -- "$word"))\n'
        '    else COMPREPLY=($(compgen -f -- "$word")); fi ;;\n'
        "  esac\n}\n"
        f"complete -o filenames -F {function} {program}\n"
    )


def _function(program: str) -> str:
    """Return the name of the function that completes a program."""
    return f"_{program.replace('-', '_')}"


def _fish(program: str, commands: list[Command]) -> Iterator[str]:
    yield f"complete -c {program} -n __fish_use_subcommand -l version -d 'Print the version'"
    for command in commands:
        # The word behind the program alone: `sclong prep status` is not `sclong status`.
        start = f"complete -c {program} -n 'contains -- {command.name} (commandline -opc)[2]'"
        yield (
            f"complete -c {program} -n __fish_use_subcommand -f -a {command.name} "
            f"-d {_quoted(command.text)}"
        )
        if command.program:
            line = "(string escape -- (commandline -opc)[3..]) (commandline -ct)"
            yield f"{start} -fa '(complete -C (string join \" \" -- {command.program} {line}))'"
        for option in command.options:
            choices = f" -xa {_quoted(' '.join(option.choices))}" if option.choices else ""
            if option.flag:
                flag = option.flag.removeprefix("--")
                yield f"{start} -l {flag} -d {_quoted(option.text)}{choices}"
            else:
                yield f"{start}{choices}"


def _quoted(text: str) -> str:
    """Return text as one word of fish."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
