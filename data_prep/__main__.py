"""Command line of the data preparation: `python -m data_prep COMMAND`; `--help` works for each.

    convert MANIFEST --out CORPUS   stage the datasets of a manifest, each on its own
    status CORPUS                   list every dataset: ok, excluded or failed, with the reason
    finalize CORPUS                 drop duplicates, split, shuffle, write the corpus
    verify CORPUS                   read the corpus again and check everything
    gene-graph --out FILE           gene graph from the Gene Ontology
    gene-vectors CORPUS --out FILE  gene vectors from co-expression

Exit status: 0 done; 1 the work failed, with one line on stderr; 2 wrong usage. With `--json` one
JSON document goes to stdout; progress and logs always go to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

COMMANDS = {
    "convert": "stage the datasets of a manifest, each on its own",
    "status": "list every dataset: ok, excluded or failed, with the reason",
    "finalize": "drop duplicates, split, shuffle, write the corpus",
    "verify": "read the corpus again and check everything",
    "gene-graph": "gene graph from the Gene Ontology",
    "gene-vectors": "gene vectors from co-expression",
}


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
    args = _parser(arguments).parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", force=True
    )
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command continues", file=sys.stderr)
        return 130


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Prepare single-cell datasets for pretraining."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add: dict[str, Callable[[argparse.ArgumentParser], None]] = {
        "convert": _add_convert,
        "status": _add_status,
        "finalize": _add_finalize,
        "verify": _add_verify,
        "gene-graph": _delegate("data_prep.gene_graph"),
        "gene-vectors": _delegate("data_prep.gene_vectors"),
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
    return parser


def _delegate(module_name: str) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        module = importlib.import_module(module_name)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)

    return add


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {least} on")
        return int(text)

    return parse


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number between 0 and 1")
    return value


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    from data_prep.convert import Settings
    from data_prep.manifest import COLUMNS

    columns = "\n".join(f"  {name:<13} {text}" for name, text in COLUMNS.items())
    parser.epilog = (
        f"manifest columns (tab-separated with a header line, or a YAML list):\n{columns}\n\n"
        "A dataset that is done is skipped, one that failed is tried again. Exit status 1 if any\n"
        "dataset failed; the others are converted all the same."
    )
    default = Settings(genes_hash="")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="list of datasets")
    parser.add_argument("--out", type=Path, required=True, metavar="CORPUS", help="corpus folder")
    parser.add_argument(
        "--task", type=_whole(0), metavar="I", help="do every N-th dataset from the I-th on, from 0"
    )
    parser.add_argument(
        "--tasks", type=_whole(1), metavar="N", help="number of tasks (with --task)"
    )
    parser.add_argument(
        "--jobs", type=_whole(1), default=1, metavar="N", help="datasets at a time (default: 1)"
    )
    parser.add_argument(
        "--genes", type=Path, metavar="FILE", help="gene vocabulary (default: the bundled one)"
    )
    for name, text in (
        ("min_genes", "drop cells with fewer expressed genes"),
        ("min_counts", "drop cells with fewer counts"),
        ("min_genes_mapped", "exclude datasets that reach fewer genes of the vocabulary"),
    ):
        value = getattr(default, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=_whole(1), default=value, metavar="N", help=f"{text} (default: {value})"
        )
    parser.add_argument(
        "--min-share-mapped",
        type=_share,
        default=default.min_share_mapped,
        metavar="F",
        help="exclude datasets with a smaller share of known genes "
        f"(default: {default.min_share_mapped})",
    )
    _add_codec(parser)
    _add_json(parser)
    parser.set_defaults(run=lambda args: _run_convert(args, parser.error))


def _run_convert(args: argparse.Namespace, usage_error: Callable[[str], NoReturn]) -> int:
    from data_prep.convert import Settings, convert
    from data_prep.ledger import format_table
    from data_prep.manifest import read_manifest
    from sclong_ds.genes import GeneVocabulary

    if (args.task is None) != (args.tasks is None):
        usage_error("--task and --tasks go together")
    if args.task is not None and args.task >= args.tasks:
        usage_error(f"--task {args.task}: with --tasks {args.tasks} it is 0 to {args.tasks - 1}")
    datasets = read_manifest(args.manifest)
    if args.task is not None:
        datasets = datasets[args.task :: args.tasks]
    genes = GeneVocabulary.read(args.genes) if args.genes else GeneVocabulary.bundled()
    settings = Settings(
        genes_hash=genes.hash,
        min_genes=args.min_genes,
        min_counts=args.min_counts,
        min_genes_mapped=args.min_genes_mapped,
        min_share_mapped=args.min_share_mapped,
        codec=args.codec,
    )
    # Slurm ends a job with SIGTERM: leave through the clean-up that stops the workers.
    signal.signal(signal.SIGTERM, _stop)
    entries = convert(datasets, out=args.out, genes=genes, settings=settings, jobs=args.jobs)
    _print_ledger(entries, args.json, format_table)
    n_failed = sum(entry["status"] == "failed" for entry in entries)
    if n_failed:
        print(f"error: {n_failed} of {len(entries)} datasets failed", file=sys.stderr)
    return 1 if n_failed else 0


def _stop(signal_number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signal_number)


def _print_ledger(
    entries: list[Any], as_json: bool, format_table: Callable[[list[Any]], str]
) -> None:
    from data_prep.ledger import count_statuses

    if as_json:
        counts = count_statuses(entries)
        print(json.dumps({"datasets": entries, "counts": counts}, indent=1))
    else:
        print(format_table(entries))


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_corpus(parser)
    _add_json(parser)
    parser.set_defaults(run=_run_status)


def _run_status(args: argparse.Namespace) -> int:
    from data_prep.ledger import format_table, read_ledger

    _print_ledger(read_ledger(args.corpus), args.json, format_table)
    return 0


def _add_finalize(parser: argparse.ArgumentParser) -> None:
    from data_prep.splits import DEFAULT_VALIDATION_FRACTION, SPLIT_BY

    _add_corpus(parser)
    parser.add_argument(
        "--seed", type=_whole(0), default=0, help="of the split and the order of cells (default: 0)"
    )
    parser.add_argument(
        "--validation-fraction",
        type=_share,
        metavar="F",
        help="largest share of cells to validate on "
        f"(default: {DEFAULT_VALIDATION_FRACTION}, none with --validation-datasets)",
    )
    parser.add_argument(
        "--test-fraction",
        type=_share,
        default=0.0,
        metavar="F",
        help="the same for tests (default: 0)",
    )
    parser.add_argument(
        "--split-by",
        choices=SPLIT_BY,
        default="auto",
        help="what is held out as a whole (default: auto: donors, else datasets, else cells)",
    )
    parser.add_argument(
        "--validation-datasets", nargs="+", default=[], metavar="ID", help="datasets to validate on"
    )
    _add_codec(parser)
    _add_json(parser)
    parser.set_defaults(run=_run_finalize)


def _run_finalize(args: argparse.Namespace) -> int:
    from data_prep.finalize import finalize
    from data_prep.progress import stage_progress

    with stage_progress("cells") as progress:
        catalogue = finalize(
            args.corpus,
            seed=args.seed,
            validation_fraction=args.validation_fraction,
            test_fraction=args.test_fraction,
            split_by=args.split_by,
            validation_datasets=args.validation_datasets,
            codec=args.codec,
            progress=progress,
        )
    if args.json:
        print(json.dumps(catalogue, indent=1))
        return 0
    splits = ", ".join(
        f"{name} {stop - start}" for name, (start, stop) in catalogue["splits"].items()
    )
    print(
        f"{args.corpus}: {catalogue['n_cells']} cells x {catalogue['n_genes']} genes of "
        f"{len(catalogue['datasets'])} datasets; {splits} (split by {catalogue['split_unit']}); "
        f"{catalogue['duplicates_dropped']} duplicates dropped; hash {catalogue['hash'][:12]}"
    )
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_corpus(parser)
    _add_json(parser)
    parser.set_defaults(run=_run_verify)


def _run_verify(args: argparse.Namespace) -> int:
    from data_prep.progress import stage_progress
    from data_prep.verify import verify

    with stage_progress("cells") as progress:
        report = verify(args.corpus, progress=progress)
    if args.json:
        print(json.dumps(report, indent=1))
    elif report["ok"]:
        print(f"{args.corpus}: ok, {report['n_cells']} cells in {report['n_files']} files")
    else:
        print("\n".join(report["problems"]))
    if not report["ok"]:
        print(f"error: {args.corpus}: {report['n_problems']} problems found", file=sys.stderr)
    return 0 if report["ok"] else 1


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help="corpus folder")


def _add_codec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codec",
        choices=("zstd", "none"),
        default="zstd",
        help="compression of the cells (default: zstd; none is twice as large)",
    )


if __name__ == "__main__":
    sys.exit(main())
