"""Command line of the data preparation: `python -m data_prep COMMAND`; `--help` works for each.

    fetch --from SOURCE --out DIR   fetch public datasets, and list them for convert
    manifest FOLDER [--out FILE]    draft a manifest from a folder tree
    convert MANIFEST --out CORPUS   stage the datasets of a manifest, each on its own
    status CORPUS                   list every dataset: ok, excluded, failed or pending, and why
    forget CORPUS DATASET_ID ...    take datasets out of a corpus folder
    finalize CORPUS                 drop duplicates, split, shuffle, write the corpus
    compact CORPUS                  make one corpus of the parts of a corpus that has grown
    verify CORPUS                   read the corpus again and check everything
    report CORPUS --out FILE        quality report of a corpus: one HTML page
    gene-graph --out FILE           make a gene graph from the Gene Ontology
    gene-vectors CORPUS --out FILE  make gene vectors from co-expression

Exit status: 0 done; 1 the work failed, with one line on stderr; 2 wrong usage; 130 or 143 ended by
SIGINT or SIGTERM. With `--json` one JSON document goes to stdout; progress and logs always go to
stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from data_prep.arguments import (
    DEFAULT_VALIDATION_FRACTION,
    NEAR_RULES,
    SPLIT_BY,
    add_codec,
    add_genes,
    add_json,
    add_tasks,
    check_tasks,
    chosen_genes,
)
from sclong_ds import __version__
from sclong_ds.command_line import add_example, local_path, missing_package, new_file, share, whole
from sclong_ds.page.words import counted

COMMANDS = {
    "fetch": "fetch public datasets, and list them for convert",
    "manifest": "draft a manifest from a folder tree",
    "convert": "stage the datasets of a manifest, each on its own",
    "status": "list every dataset: ok, excluded, failed or pending, and why",
    "forget": "take datasets out of a corpus folder",
    "finalize": "drop duplicates, split, shuffle, write the corpus",
    "compact": "make one corpus of the parts of a corpus that has grown",
    "verify": "read the corpus again and check everything",
    "report": "write the quality report of a corpus as one HTML page",
    "gene-graph": "make a gene graph from the Gene Ontology",
    "gene-vectors": "make gene vectors from co-expression",
}
EXAMPLES = {
    "fetch": "--from cellxgene --organism human --tissue blood --out public --dry-run",
    "manifest": "h5ad_files --out manifest.tsv",
    "convert": "manifest.tsv --out corpus",
    "status": "corpus",
    "forget": "corpus blood_2021",
    "finalize": "corpus --validation-fraction 0.05",
    "compact": "corpus --jobs 8",
    "verify": "corpus --sources 1000",
    "report": "corpus --out qc.html",
    "gene-graph": "--out graph.npz",
    "gene-vectors": "corpus --out vectors.npy",
}
"""Command to an example of its arguments."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command line without the program's name; that of the process when None.

    Returns:
        The exit status.

    Raises:
        SystemExit: Wrong usage (2), or --help (0).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # Names of files need not be text of this locale.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Slurm ends a job with SIGTERM: leave through the clean-up that stops the workers.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(arguments)
    except _Stopped:
        print("error: stopped by SIGTERM; the same command continues", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("error: interrupted; the same command continues", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


class _Stopped(BaseException):
    """SIGTERM has arrived; nothing between here and `main` may take it for an error."""


def _stop(signal_number: int, frame: object) -> NoReturn:
    # Handle the first signal, ignore repeats: a second one would break off the clean-up.
    signal.signal(signal_number, signal.SIG_IGN)
    raise _Stopped


def _run(arguments: Sequence[str]) -> int:
    args = parser(arguments).parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", force=True
    )
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        line = missing_package(error, prefer="prep")
        if line is None:
            raise  # not of an extra: a fault, to be seen whole
        print(f"error: {line}", file=sys.stderr)
        return 1


def parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser; only the command in `arguments` has its arguments."""
    parser = argparse.ArgumentParser(
        prog="sclong-prep" if Path(sys.argv[0]).name == "sclong-prep" else "python -m data_prep",
        description="Prepare single-cell datasets for pretraining.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add: dict[str, Callable[[argparse.ArgumentParser], None]] = {
        "fetch": _delegate("data_prep.fetch.command"),
        "manifest": _add_manifest,
        "convert": _delegate("data_prep.convert.command"),
        "status": _add_status,
        "forget": _add_forget,
        "finalize": _add_finalize,
        "compact": _add_compact,
        "verify": _add_verify,
        "report": _delegate("data_prep.report.qc_report", "data_prep.report.arguments"),
        "gene-graph": _delegate(
            "data_prep.graph.gene_graph", "data_prep.graph.gene_graph_arguments"
        ),
        "gene-vectors": _delegate(
            "data_prep.graph.gene_vectors", "data_prep.graph.gene_vectors_arguments"
        ),
    }
    # Only the command that runs imports its libraries: `status` should not wait for goatools.
    chosen = next((word for word in arguments if word in COMMANDS), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            add[name](command)
            add_example(command, EXAMPLES[name])
    return parser


def _delegate(
    module: str, arguments: str | None = None
) -> Callable[[argparse.ArgumentParser], None]:
    """Return what adds the arguments of a command; its module is imported when it runs.

    Args:
        module: Has run(args).
        arguments: Has add_arguments(parser); None: the same module.
    """

    def run(args: argparse.Namespace) -> int:
        return int(importlib.import_module(module).run(args))

    def add(parser: argparse.ArgumentParser) -> None:
        importlib.import_module(arguments or module).add_arguments(parser)
        parser.set_defaults(run=run)

    return add


def _add_manifest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=local_path, metavar="DIR", help="folder tree with datasets")
    parser.add_argument(
        "--out", type=new_file, metavar="FILE", help="manifest to write (default: print it)"
    )
    add_genes(parser)
    add_json(parser)
    parser.set_defaults(run=_run_manifest)


def _run_manifest(args: argparse.Namespace) -> int:
    from data_prep.manifest.draft import draft_manifest, format_manifest, write_draft

    base = args.out.parent if args.out else Path()
    draft = draft_manifest(args.folder, genes=chosen_genes(args), relative_to=base)
    if args.out and draft["datasets"]:
        write_draft(draft, args.out)
    if args.json:
        print(json.dumps(draft, indent=1))
    elif not args.out:
        print(format_manifest(draft), end="")
    n_refused = sum(bool(d["note"]) for d in draft["datasets"])
    print(
        f"{args.folder}: {counted(len(draft['datasets']), 'dataset')} of "
        f"{counted(sum(d['n_cells'] or 0 for d in draft['datasets']), 'cell')} to be read"
        f"{f' ({n_refused} will be excluded: see the column note)' if n_refused else ''}, "
        f"{counted(len(draft['unreadable']), 'file')} not readable, "
        f"{counted(len(draft['skipped']), 'file')} without data",
        file=sys.stderr,
    )
    if not draft["datasets"]:
        print(f"error: {args.folder}: no dataset found that can be read", file=sys.stderr)
    return 0 if draft["datasets"] else 1


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_corpus(parser)
    add_json(parser)
    parser.set_defaults(run=_run_status)


def _run_status(args: argparse.Namespace) -> int:
    from data_prep.ledger.ledger import count_statuses, read_ledger
    from data_prep.ledger.pending import read_pending
    from data_prep.ledger.table import format_table

    entries = read_ledger(args.corpus)
    pending = read_pending(args.corpus, entries)
    if args.json:
        counts = {**count_statuses(entries), "pending": len(pending)}
        missing = [dataclasses.asdict(dataset) for dataset in pending]
        print(json.dumps({"datasets": entries, "pending": missing, "counts": counts}, indent=1))
    else:
        print(format_table(entries, pending))
    return 0


def _add_forget(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Removes the staging, the ledger entry and the place in the recorded manifests of each\n"
        "dataset. A finished corpus keeps their cells; the next finalize goes without them.\n"
        "A convert whose manifest still lists one brings it back."
    )
    _add_corpus(parser)
    parser.add_argument("datasets", nargs="+", metavar="DATASET_ID", help="datasets to take out")
    add_json(parser)
    parser.set_defaults(run=_run_forget)


def _run_forget(args: argparse.Namespace) -> int:
    from data_prep.staging.forget import forget

    forget(args.corpus, args.datasets)
    finished = (args.corpus / "corpus.json").is_file()
    if args.json:
        print(json.dumps({"forgotten": args.datasets, "finalize_again": finished}, indent=1))
    else:
        note = "; the finished corpus keeps its cells until the next finalize" if finished else ""
        print(f"{args.corpus}: {counted(len(args.datasets), 'dataset')} forgotten{note}")
    return 0


def _add_finalize(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Of a corpus that was finalized before the split stays, whatever was added: what is not\n"
        "given is as then (CORPUS/split.json). Another seed or --split-by draws it again.\n"
        "New datasets become a part of their own (CORPUS/parts); no file that is there changes.\n"
        "Where other options are given, or a dataset of before is converted again or forgotten,\n"
        "all of it is made again.\n"
        "The work is cut into units. The processes of --jobs share them, and so do the tasks of a\n"
        "job array: started with the same options, any number of them in any order, they give the\n"
        "same bytes, and what one that is killed has not done is done by the others."
    )
    _add_corpus(parser)
    _add_processes(parser)
    parser.add_argument(
        "--seed",
        metavar="N",
        type=whole(0),
        help="of the split and the order of cells (default: 0)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=share,
        metavar="SHARE",
        help="share of cells to validate on, about "
        f"(default: {DEFAULT_VALIDATION_FRACTION}, none with --validation-datasets)",
    )
    parser.add_argument(
        "--test-fraction",
        type=share,
        metavar="SHARE",
        help="the same for tests (default: 0)",
    )
    parser.add_argument(
        "--split-by",
        choices=SPLIT_BY,
        help="what is held out as a whole (default: auto: donors, else datasets, else cells)",
    )
    parser.add_argument(
        "--validation-datasets", nargs="+", default=[], metavar="ID", help="datasets to validate on"
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="continue without datasets that convert has not done yet",
    )
    parser.add_argument(
        "--near-duplicates",
        choices=NEAR_RULES,
        help="cells that are the same as one of a dataset with another gene list, on the genes of "
        "both (default: as before, primary at first). primary: leave out those that "
        "is_primary_data calls copies of a primary one; drop: leave out all but one; keep: leave "
        "out none",
    )
    add_codec(parser)
    add_json(parser)
    parser.set_defaults(run=_run_finalize)


def _run_finalize(args: argparse.Namespace) -> int:
    from data_prep.corpus.finalize import finalize

    options = {
        "seed": args.seed,
        "validation_fraction": args.validation_fraction,
        "test_fraction": args.test_fraction,
        "split_by": args.split_by,
        "validation_datasets": args.validation_datasets,
        "near_duplicates": args.near_duplicates,
        "allow_missing": args.allow_missing,
    }
    return _finish(args, partial(finalize, **options))


def _finish(args: argparse.Namespace, make: Callable[..., dict[str, Any]]) -> int:
    """Make a corpus on the processes that were asked for, with progress, and describe it."""
    from sclong_ds.progress import stage_progress

    check_tasks(args)
    with stage_progress("cells") as progress:
        catalogue = make(
            args.corpus,
            codec=args.codec,
            jobs=args.jobs,
            task=args.task or 0,
            tasks=args.tasks,
            progress=progress,
        )
    _tell_finished(args, catalogue)
    return 0


def _tell_finished(args: argparse.Namespace, catalogue: dict[str, Any]) -> None:
    from data_prep.ledger.cell_counts import cell_counts
    from data_prep.ledger.ledger import read_ledger
    from sclong_ds.datasheet.health import health_of

    counts = cell_counts(read_ledger(args.corpus), catalogue)
    if args.json:
        more = {"health": health_of(catalogue).as_json(), "cells": counts.as_json()}
        print(json.dumps(catalogue | more, indent=1))
        return
    left_out = sum(d["status"] in ("failed", "excluded") for d in catalogue["unused"])
    splits = ", ".join(
        f"{name} {stop - start}{_share_text(catalogue, name)}"
        for name, (start, stop) in catalogue["splits"].items()
    )
    parts = len(catalogue.get("parts", ()))
    print(
        f"{args.corpus}: {counted(catalogue['n_cells'], 'cell')} x {catalogue['n_genes']} genes of "
        f"{counted(len(catalogue['datasets']), 'dataset')}; "
        f"{splits} (split by {catalogue['split_unit']}); "
        f"{counted(catalogue['duplicates_dropped'], 'duplicate')} dropped; "
        f"{counted(left_out, 'dataset')} left out (failed or excluded); "
        f"{f'{parts} parts; ' if parts else ''}hash {catalogue['hash'][:12]}"
    )
    print(counts.text())
    print(health_of(catalogue).text())


def _share_text(catalogue: Mapping[str, Any], name: str) -> str:
    """Return how near a split comes to the share that was asked for."""
    share = catalogue["split_shares"].get(name)
    if not share or not share["wanted"]:
        return ""
    unit, groups = catalogue["split_unit"], ""
    if unit != "cell":
        groups = f", {share['groups']:.1%} of the {unit}s"
    return f" ({share['cells']:.1%} of the cells{groups}; {share['wanted']:.1%} asked for)"


def _add_processes(parser: argparse.ArgumentParser) -> None:
    add_tasks(parser, "begin with the units of this one of --tasks, from 0")
    parser.add_argument(
        "--jobs", type=whole(1), default=1, metavar="N", help="processes here (default: 1)"
    )


def _add_compact(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Makes what finalize makes of all datasets at once, with the split and the options of\n"
        "before, from their staging; the parts are removed when it is there. A run that began on\n"
        "the parts does not continue on the new corpus."
    )
    _add_corpus(parser)
    _add_processes(parser)
    add_codec(parser)
    add_json(parser)
    parser.set_defaults(run=_run_compact)


def _run_compact(args: argparse.Namespace) -> int:
    from data_prep.corpus.growth.compact import compact

    return _finish(args, compact)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_corpus(parser)
    parser.add_argument(
        "--sources",
        type=whole(1),
        default=0,
        metavar="N",
        help="read N drawn cells again from their sources, in a second, slow way, and compare",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=whole(0),
        default=0,
        help="of the draw of these cells (default: 0)",
    )
    parser.add_argument(
        "--require-sources",
        action="store_true",
        help="a source that is gone or changed is a problem (default: it is listed)",
    )
    add_json(parser)
    parser.set_defaults(run=_run_verify)


def _run_verify(args: argparse.Namespace) -> int:
    from data_prep.verify.files import links_text
    from data_prep.verify.sources import sources_line
    from data_prep.verify.verify import verify
    from sclong_ds.progress import stage_progress

    with stage_progress("cells") as progress:
        report = verify(
            args.corpus,
            sources=args.sources,
            seed=args.seed,
            require_sources=args.require_sources,
            progress=progress,
        )
    if args.json:
        print(json.dumps(report, indent=1))
    elif report["ok"]:
        print(
            f"{args.corpus}: ok, {counted(report['n_cells'], 'cell')} in "
            f"{counted(report['n_files'], 'file')}"
        )
        if args.sources:
            print(sources_line(report["sources"]))
        print(links_text(report["links"]))
    else:
        print("\n".join(report["problems"]))
    if not report["ok"]:
        print(
            f"error: {args.corpus}: {counted(report['n_problems'], 'problem')} found",
            file=sys.stderr,
        )
    return 0 if report["ok"] else 1


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", type=local_path, metavar="CORPUS", help="corpus folder")


if __name__ == "__main__":
    sys.exit(main())
