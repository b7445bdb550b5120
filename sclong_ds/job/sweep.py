"""A sweep: one training for each line of a file, each a task of a Slurm job array.

    python -m sclong_ds.job.sweep --sweep FILE --config FILE|PRESET run.dir=SWEEP_DIR [...]
    python -m sclong_ds.job.sweep --task N --last N --sweep FILE --config FILE|PRESET ...

A line holds the settings of one task, `key=value` words as on a command line (quotes as in a
shell); what begins with # is a comment, and empty lines do not count. Every line is checked with
the settings that all tasks share, before anything starts; a task's setting replaces a shared one of
the same key, which is logged, and a key twice in a line is an error. Without `--task` the program
says how to submit; slurm/pretrain.sh calls it with the number of its task and that of the array's
last one. It then writes SWEEP_DIR/sweep.json and prints the arguments of the task's training,
quoted for a shell: its run folder is SWEEP_DIR/task_N, and all tasks' MLflow runs have one parent.
For a task that has begun its own line alone is checked, since others may be at work on the file.
Exit status: 0, or 2 with a line for everything that is wrong.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sclong_ds.command_line import add_example, local_path, parse_arguments, repeated, whole
from sclong_ds.config.arguments import add_training_arguments
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import RunConfig
from sclong_ds.files.atomic import read_file
from sclong_ds.page.words import counted
from sclong_ds.run_folder.files import RUN_FILE
from sclong_ds.sweep.folder import task_name, write_sweep

_OWN_KEYS = ("run.dir", "tracking.parent_run")
"""What a task is given by the sweep."""


@dataclass(frozen=True, slots=True)
class Task:
    """One training of a sweep."""

    line: int
    """Line of the file, from 1."""
    settings: tuple[str, ...]
    """The settings that are its own."""

    @property
    def words(self) -> str:
        """Its settings as one text."""
        return " ".join(self.settings)


def read_tasks(path: Path) -> list[Task]:
    """Return the tasks of a sweep's file, in its order.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no text, a line's quotes do not match, or there are no settings in it.
    """
    try:
        lines = read_file(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not a text file ({error}); write one line for each task"
        ) from None
    tasks = []
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(_without_comment(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}: '{line.strip()}'") from None
        if words:
            tasks.append(Task(number, tuple(words)))
    if not tasks:
        raise ValueError(f"{path}: no settings in it; write one line of key=value for each task")
    return tasks


def _without_comment(line: str) -> str:
    """Return a line without what follows a # that begins a word outside of quotes."""
    quote = ""
    for i, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (i == 0 or line[i - 1].isspace()):
            return line[:i]
    return line


def problems(path: Path, tasks: Sequence[Task], config: str, shared: Sequence[str]) -> list[str]:
    """Return what is wrong with the tasks, a text each.

    Args:
        path: The sweep's file.
        tasks: What `read_tasks` found in it.
        config: Preset or YAML file.
        shared: Settings of all tasks.
    """
    found: list[str] = []
    seen: dict[int, RunConfig] = {}
    for task in tasks:
        where = f"{path}, line {task.line}"
        keys = [_key(word) for word in task.settings]
        own = [key for key in keys if key in _OWN_KEYS]
        if own:
            found.append(f"{where}: {own[0]} is set by the sweep; give run.dir=SWEEP_DIR once")
            continue
        twice = repeated(task.settings)
        if twice:
            found.append(f"{where}: {' and '.join(twice)}: the same key twice; keep one of them")
            continue
        try:
            settings = load_config(config, [*shared, *task.settings])
        except (ValueError, OSError) as error:
            found.append(f"{where}: {' '.join(str(error).split())}")
            continue
        first = next((line for line, other in seen.items() if other == settings), None)
        if first is not None:
            found.append(f"{where}: trains the same as line {first}; change one, or remove it")
        seen[task.line] = settings
    return found


def task_arguments(
    tasks: Sequence[Task], number: int, *, folder: Path, config: str, shared: Sequence[str]
) -> list[str]:
    """Return the arguments of a task's training.

    Args:
        tasks: All tasks.
        number: Which one, from 1.
        folder: The sweep's folder.
        config: Preset or YAML file.
        shared: Settings of all tasks.
    """
    task, name = tasks[number - 1], task_name(number)
    over = replaced(task, shared)
    shared = [word for word in shared if word not in over and _key(word) not in _OWN_KEYS]
    own = [f"run.dir={folder / name}", f"tracking.parent_run={folder.resolve()}"]
    if not any(word.startswith("tracking.run_name=") for word in (*shared, *task.settings)):
        own.append(f"tracking.run_name={name}: {task.words}")
    return ["--config", config, *shared, *task.settings, *own]


def replaced(task: Task, shared: Sequence[str]) -> list[str]:
    """Return the settings of all tasks that a task has values of its own for.

    Args:
        task: The task.
        shared: Settings of all tasks.
    """
    keys = {_key(word) for word in task.settings}
    return [word for word in shared if _key(word) in keys]


def _key(word: str) -> str:
    return word.partition("=")[0].strip()


def sweep_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sclong_ds.job.sweep",
        description="Check a sweep and say how to submit it, or print the arguments of one task.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sweep", type=local_path, required=True, metavar="FILE",
        help="settings of one training in a line, key=value words",
    )  # fmt: skip
    add_training_arguments(parser)
    parser.add_argument("--task", type=whole(1), metavar="N", help="of the array, from 1")
    parser.add_argument("--last", type=whole(1), metavar="N", help="last task of the array")
    add_example(parser, "--sweep rates.txt --config sclong_100m run.dir=runs/a data.corpus=corpus")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check the sweep, print what is asked for, and return the exit status."""
    args = parse_arguments(sweep_parser(), argv)
    try:
        said = _answer(args)
    except (ValueError, OSError) as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        return 2
    sys.stdout.write(f"{said}\n")
    return 0


def _answer(args: argparse.Namespace) -> str:
    """Return what `main` prints.

    Raises:
        ValueError: What is wrong, a line each.
    """
    tasks = read_tasks(args.sweep)
    run_dir = load_config(args.config, args.overrides).run.dir
    if run_dir is None:
        raise ValueError("run.dir is not set: add run.dir=SWEEP_DIR, the folder of the sweep")
    own = tasks[args.task - 1 : args.task] if args.task else []
    begun = bool(own) and (Path(run_dir) / task_name(args.task) / RUN_FILE).is_file()
    wrong = problems(args.sweep, own if begun else tasks, args.config, args.overrides)
    if args.last is not None and args.last > len(tasks) and not begun:
        wrong.append(
            f"{args.sweep}: {counted(len(tasks), 'line')} of settings, but the array goes to "
            f"{args.last}: submit with --array=1-{len(tasks)}"
        )
    elif args.task is not None and args.task > len(tasks):
        wrong.append(
            f"--task {args.task}: {args.sweep} has {counted(len(tasks), 'line')} of settings; "
            f"allowed: 1 to {len(tasks)}"
        )
    if wrong:
        raise ValueError("\n".join(wrong))
    if args.task is None:
        n = len(tasks)
        return f"{args.sweep}: {counted(n, 'task')}, submit with sbatch --array=1-{n}"
    for word in replaced(own[0], args.overrides):
        sys.stderr.write(f"task {args.task}: line {own[0].line} replaces {word} of all tasks\n")
    write_sweep(Path(run_dir), {task_name(n): t.words for n, t in enumerate(tasks, start=1)})
    words = task_arguments(
        tasks, args.task, folder=Path(run_dir), config=args.config, shared=args.overrides
    )
    return shlex.join([*words, *(["--dry-run"] if args.dry_run else [])])


if __name__ == "__main__":
    sys.exit(main())
