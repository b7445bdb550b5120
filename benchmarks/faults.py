"""Try faults on every product: damaged files, failing system calls, kills at any of these calls.

    python -m benchmarks.faults flips [--product NAME ...] [--files '*.pt'] [--per-file 3]
    python -m benchmarks.faults calls [--product NAME ...] [--every 1] [--limit N] [--seconds S]

`flips`: each file of a product gets a flipped bit, is cut, dropped, replaced by the file of another
version of the product, and swapped with another of its files; then every reader of the product is
called. It must raise an error that names the file, or return what it returned before. `verify` must
reject every change.

`calls`: a command is run again and again; in run n the n-th system call of a kind below its folder
fails (or the process is killed there). The command must end in one clear error or succeed, leave
the products as they were or wholly new, and give the bytes of an undisturbed run when it is run
again. The session's log, in the folder of the products, gains a line with each. Every call of
convert-one, finalize-two, save, export and embed can be tried; of the others, take `--every`.

Both print a table and every outcome that is wrong; exit status 1: there is one. `--json` writes the
table to a file. Embeddings are HDF5, which has no checksum: their files are not damaged here.
Needs gcc; makes its products in a folder for temporary files (`--work DIR`: there, and keeps them).
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.damage import DAMAGES, OUTCOMES, Damage, Product, Trial, damaged, judge
from benchmarks.disturbed import FAULTS, STATES, Disturbed, disturb
from benchmarks.failing_calls import in_child, restart_with_preload
from benchmarks.fault_commands import COMMANDS
from benchmarks.fault_products import MAKERS, product, remove

USED = (
    "data_prep.convert.bundled_resolver",
    "data_prep.convert.convert",
    "data_prep.corpus.finalize",
    "data_prep.graph.gene_vectors",
    "data_prep.readers.open",
    "data_prep.verify.verify",
    "data_prep.convert.one_dataset",
    "data_prep.convert.workers",
    "sclong_ds.report.compare",
    "sclong_ds.loader.loader",
    "sclong_ds.embedding.embed",
    "sclong_ds.exported.export",
    "sclong_ds.exported.initial_weights",
    "sclong_ds.files.obs_table",
    "sclong_ds.report.report",
    "sclong_ds.training.run_checks",
    "sclong_ds.report.status",
    "sclong_ds.corpus.corpus",
)  # fmt: skip
"""Modules that are imported before anything is forked."""
HANG_S = 60.0
"""A reader that takes longer hangs."""


def make_products(work: Path, wanted: Iterable[str]) -> None:
    """Make products and what they are made from, where missing.

    Args:
        work: Folder for them.
        wanted: Their names.

    Raises:
        RuntimeError: One could not be made.
    """
    names = list(MAKERS)
    needed = names[: max((names.index(name) + 1 for name in wanted), default=0)]
    for name in needed:
        done = work / f"{name}.made"
        if done.exists():
            continue
        remove([work / name, work / f"other-{name}"])
        ended = in_child(
            functools.partial(MAKERS[name], work), log=work / "make.log", timeout_s=900
        )
        if ended.error is not None or ended.signal or ended.hung:
            raise RuntimeError(f"{name}: {ended.describe()}\n{ended.trace}{ended.output[-3000:]}")
        done.touch()


def read_all(what: Product) -> dict[str, tuple[Any, BaseException | None, str]]:
    """Call every reader; what each returned or raised, and what it logged."""
    from io import StringIO

    warnings.simplefilter("ignore")
    found = {}
    for name, reader in what.readers.items():
        said = StringIO()
        logging.basicConfig(level=logging.WARNING, stream=said, force=True, format="%(message)s")
        try:
            found[name] = (reader(what.folder), None, "")
        except BaseException as error:  # noqa: BLE001 - judged by its kind
            found[name] = (None, error, "")
        found[name] = (*found[name][:2], said.getvalue())
    return found


def try_damage(
    what: Product, file: str, damage: Damage, rng: random.Random, before: dict[str, Any], log: Path
) -> list[Trial]:
    """Damage one file and return what each reader made of it; nothing where it cannot be done."""
    trials = []
    for changed in damaged(what, file, damage, rng):
        work = functools.partial(compared, what, changed, damage, before)
        ended = in_child(work, log=log, timeout_s=HANG_S)
        outcomes = ended.result or {"(all)": ("crash", f"{ended.describe()} {ended.trace}")}
        for reader, (outcome, text) in outcomes.items():
            trials.append(
                Trial(product=what.name, file=file, kind=what.kind_of(file), damage=damage,
                      reader=reader, outcome=outcome, text=text)
            )  # fmt: skip
    return trials


def compared(
    what: Product, changed: tuple[str, ...], damage: Damage, before: dict[str, Any]
) -> dict[str, tuple[str, str]]:
    """Call every reader of a damaged product and judge each."""
    outcomes = {}
    for reader, (value, error, said) in read_all(what).items():
        if error is not None:
            outcomes[reader] = judge(what, changed, damage, error)
        elif value != before[reader] and any(Path(name).name in said for name in changed):
            outcomes[reader] = ("named", said)
        elif value != before[reader]:
            outcomes[reader] = ("silent", differing(value, before[reader]))
        elif reader in what.must_fail:
            outcomes[reader] = ("silent", "accepts the damage")
        else:
            outcomes[reader] = ("harmless", "")
    return outcomes


def differing(value: Any, expected: Any) -> str:
    """Return what differs between two results."""
    if isinstance(value, dict) and isinstance(expected, dict):
        names = [name for name in expected if value.get(name) != expected[name]]
        return f"another result: {', '.join(names)}"
    return "another result"


def flips(args: argparse.Namespace, work: Path) -> list[Trial]:
    """Damage every file of the products that are asked for."""
    wanted = args.product or [name for name in MAKERS if has_readers(name)]
    make_products(work, wanted)
    trials: list[Trial] = []
    last = time.monotonic() + args.seconds
    for number, name in enumerate(wanted):
        end = time.monotonic() + (last - time.monotonic()) / (len(wanted) - number)
        rng = random.Random(f"{args.seed} {name}")
        what = product(work, name)
        first = in_child(functools.partial(read_all, what), log=work / "read.log", timeout_s=HANG_S)
        before = {reader: value for reader, (value, _, _) in (first.result or {}).items()}
        errors = [e for _, e, _ in (first.result or {"": (0, first.error, "")}).values() if e]
        if errors or not before:
            raise RuntimeError(f"{name}: cannot be read undamaged: {errors} {first.trace}")
        # By kind, so that little time still reaches every kind.
        files = [file for file in what.files if any(fnmatch(file, p) for p in args.files)]
        chosen = sample(what, files, args.per_file, rng)[: args.limit]
        for file, damage in chosen:
            if time.monotonic() > end:
                break
            trials += try_damage(what, file, damage, rng, before, work / "read.log")
    return trials


def calls(args: argparse.Namespace, work: Path) -> list[Disturbed]:
    """Disturb the commands that are asked for."""
    wanted = [COMMANDS[name] for name in args.product or COMMANDS]
    make_products(work, {name for command in wanted for name in command.needs})
    found: list[Disturbed] = []
    end = time.monotonic() + args.seconds
    for number, command in enumerate(wanted):
        left_s = (end - time.monotonic()) / (len(wanted) - number)
        rng = random.Random(f"{args.seed} {command.name}")
        session = functools.partial(
            disturb, command, work, work / "calls", faults=args.fault or FAULTS, every=args.every,
            seconds=left_s, limit=args.limit, rng=rng,
        )  # fmt: skip
        ended = in_child(session, log=work / "session.log", timeout_s=1e9)
        if ended.result is None:
            raise RuntimeError(f"{command.name}: {ended.describe()}\n{ended.trace}{ended.output}")
        found += ended.result
    return found


def calls_table(found: Sequence[Disturbed]) -> list[str]:
    """Return the outcomes by command and kind of call."""
    groups: dict[tuple[str, str], list[Disturbed]] = {}
    for one in found:
        groups.setdefault((one.command, one.fault), []).append(one)
    lines = [f"{'command':13} {'fault':9} {'calls':>6} {'tried':>6} "
             + " ".join(f"{name:>6}" for name in (*STATES, "wrong"))]  # fmt: skip
    for (command, fault), group in groups.items():
        states = Counter(one.state for one in group)
        cells = [*(states[name] for name in STATES), sum(bool(one.wrong) for one in group)]
        lines.append(f"{command:13} {fault:9} {group[0].calls:6} {len(group):6} "
                     + " ".join(f"{cell:6}" for cell in cells))  # fmt: skip
    return lines


def complain(trial: Trial | Disturbed) -> str:
    """Return a line on a wrong outcome, or nothing."""
    if isinstance(trial, Disturbed):
        where = f"{trial.command}, {trial.fault} {trial.at} of {trial.calls} ({trial.path})"
        return f"{where}: {trial.wrong[:400]}" if trial.wrong else ""
    if trial.outcome in ("harmless", "named"):
        return ""
    where = f"{trial.outcome}: {trial.product} {trial.file}, {trial.damage} -> {trial.reader}"
    return f"{where}: {trial.text[:300]}"


def has_readers(name: str) -> bool:
    """Tell whether a product is damaged by default."""
    from benchmarks.fault_readers import READERS

    return name in READERS


def sample(
    what: Product, files: list[str], per_file: int, rng: random.Random
) -> list[tuple[str, Damage]]:
    """Return what to damage and how, kinds of files in turn; `per_file` flips and cuts of each."""
    rng.shuffle(files)
    seen: Counter[str] = Counter()
    ranked = []
    for file in files:
        kind = what.kind_of(file)
        tries = [d for d in DAMAGES for _ in range(per_file if d in ("flip", "cut") else 1)]
        ranked += [(seen[kind], rng.random(), file, damage) for damage in tries]
        seen[kind] += 1
    return [(file, damage) for _, _, file, damage in sorted(ranked)]


def flips_table(trials: Sequence[Trial]) -> list[str]:
    """Return the outcomes by product and kind of file."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for trial in trials:
        counts.setdefault((trial.product, trial.kind), Counter())[trial.outcome] += 1
    lines = [f"{'product':10} {'file':60} {'tried':>6} " + " ".join(f"{o:>8}" for o in OUTCOMES)]
    for (name, kind), found in sorted(counts.items()):
        cells = " ".join(f"{found[outcome]:8}" for outcome in OUTCOMES)
        lines.append(f"{name:10} {kind:60} {found.total():6} {cells}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the gates and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gate", choices=("flips", "calls"))
    parser.add_argument("--product", nargs="+", help="default: all")
    parser.add_argument("--files", nargs="+", default=["*"], help="patterns; default: all")
    parser.add_argument("--per-file", type=int, default=3, help="flips and cuts a file; default 3")
    parser.add_argument("--every", type=int, default=1, help="every k-th call; default 1")
    parser.add_argument("--fault", nargs="+", choices=FAULTS, help="of calls; default: all")
    parser.add_argument("--limit", type=int, help="tries of a product or command; default: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after; default: never")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--work", type=Path, help="folder for the products, kept")
    parser.add_argument("--json", type=Path, help="file for all outcomes")
    args = parser.parse_args(argv)
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    restart_with_preload(["-m", "benchmarks.faults", *(argv or sys.argv[1:])])
    import_all()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if args.gate == "flips":
            trials: Sequence[Trial | Disturbed] = flips(args, work)
            table = flips_table(trials)
        else:
            trials = calls(args, work)
            table = calls_table(trials)
        print("\n".join(table))
        wrong = [complaint for trial in trials if (complaint := complain(trial))]
        print("\n".join(wrong))
        if args.json:
            args.json.write_text(json.dumps([asdict(trial) for trial in trials], indent=1))
    return int(bool(wrong))


def import_all() -> None:
    """Import what the commands need, once for all forked children."""
    import importlib

    import torch

    torch.set_num_threads(1)
    libraries = ("anndata", "h5py", "numcodecs.zstd", "pandas", "pyarrow.parquet", "zarr")
    for name in (*libraries, *USED):
        importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
