"""The command line of `python -m data_prep convert`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import NoReturn

from data_prep.arguments import (
    add_codec,
    add_genes,
    add_json,
    add_tasks,
    byte_count,
    check_tasks,
    chosen_genes,
)
from data_prep.convert.convert import convert
from data_prep.convert.limits import DEFAULT_MINUTES, MOST_DEFAULT_GIB
from data_prep.ledger.ledger import count_statuses
from data_prep.ledger.table import format_table
from data_prep.manifest.manifest import COLUMNS, read_manifest
from data_prep.manifest.where import WHERE_HELP, parse_where
from data_prep.staging.settings import GENES_SHARE, MIN_GENES, Settings
from sclong_ds.command_line import local_path, need, new_folder, positive, share, whole
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.page.words import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`.

    Args:
        parser: Of the command.
    """
    columns = "\n".join(f"  {name:<13} {text}" for name, text in COLUMNS.items())
    parser.epilog = (
        f"manifest columns (tab-separated with a header line, or a YAML list):\n{columns}\n\n"
        "A dataset that is done is skipped, one that failed is tried again. Exit status 1 if any\n"
        "dataset failed; the others are converted all the same. A dataset that is staged and\n"
        "whose source cannot be reached is kept as it is, with a warning; so it is where its\n"
        "changed source, or other options, fail."
    )
    parser.add_argument("manifest", type=local_path, metavar="MANIFEST", help="list of datasets")
    parser.add_argument("--out", type=new_folder, required=True, metavar="CORPUS", help="a folder")
    add_tasks(parser, "this one of --tasks, from 0")
    parser.add_argument(
        "--jobs",
        type=whole(1),
        default=1,
        metavar="N",
        help="datasets, or row ranges of large ones, at a time (default: 1)",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="let a dataset replace another of the same id that is staged from other files",
    )
    parser.add_argument(
        "--verify-sources",
        action="store_true",
        help="hash the files of datasets that are done, too, and not only those whose size, times "
        "or inode are other ones than when they were hashed",
    )
    parser.add_argument(
        "--max-memory",
        type=positive,
        metavar="GIB",
        help="memory that one dataset may take (default: 90%% of what the machine or job has, "
        f"divided by --jobs, at most {MOST_DEFAULT_GIB:g})",
    )
    parser.add_argument(
        "--max-minutes",
        type=positive,
        default=DEFAULT_MINUTES,
        metavar="N",
        help=f"time that one dataset may take (default: {DEFAULT_MINUTES:g})",
    )
    _add_sources(parser)
    add_genes(parser)
    _add_thresholds(parser)
    add_codec(parser, default="zstd")
    add_json(parser)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    """Add what concerns files behind an address."""
    parser.add_argument(
        "--keep-bytes",
        type=byte_count,
        metavar="BYTES",
        help="most bytes of files behind an address that lie on the disk at a time, in each task, "
        "such as 200GB (default: a few files more than --jobs)",
    )
    parser.add_argument(
        "--sources",
        type=local_path,
        metavar="DIR",
        help="where they lie; each is removed once it is converted (default: CORPUS/.sources)",
    )


def _add_thresholds(parser: argparse.ArgumentParser) -> None:
    """Add what drops cells and excludes datasets; the names are those of `Settings`."""
    default = Settings(genes_hash="")
    parser.add_argument(
        "--min-genes",
        type=whole(1),
        metavar="N",
        help=f"drop cells with fewer expressed genes of the vocabulary (default: {MIN_GENES}, or "
        f"{GENES_SHARE:.0%}% of the vocabulary genes that the file names where that is less; 1 "
        "keeps every cell with counts)",
    )
    for name, text in (
        ("min_counts", "drop cells with fewer counts on them"),
        ("min_genes_mapped", "exclude datasets that reach fewer genes of the vocabulary"),
    ):
        value = getattr(default, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=whole(1), default=value, metavar="N", help=f"{text} (default: {value})"
        )
    parser.add_argument(
        "--where",
        type=_where,
        default="",
        metavar="CONDITIONS",
        help=f"of every dataset whose line of the manifest has no where: {WHERE_HELP}",
    )
    parser.add_argument(
        "--max-counts", type=whole(1), metavar="N", help="drop cells with more (default: no limit)"
    )
    parser.add_argument(
        "--max-mito-fraction",
        type=share,
        metavar="SHARE",
        help="drop cells with a larger mitochondrial share of all their counts (default: no limit)",
    )
    for name, text in (
        ("min_share_mapped", "exclude datasets with a smaller share of known genes"),
        ("min_counts_kept", "exclude datasets with a smaller share of counts on known genes"),
    ):
        value = getattr(default, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=share, default=value, metavar="SHARE", help=f"{text} (default: {value})"
        )


def run(args: argparse.Namespace) -> int:
    """Run `convert`.

    Args:
        args: Parsed arguments.

    Returns:
        The exit status: 1 if a dataset failed.
    """
    usage_error: Callable[[str], NoReturn] = args.usage_error
    check_tasks(args)
    if args.max_counts is not None and args.max_counts < args.min_counts:
        usage_error(f"--max-counts {args.max_counts} is below --min-counts {args.min_counts}")
    need("pyarrow", extra="prep")  # the workers write with it
    datasets = read_manifest(args.manifest)
    if args.where:
        datasets = tuple(
            d if d.where else dataclasses.replace(d, where=args.where) for d in datasets
        )
    # A folder that was begun with another list, say an earlier version's, keeps it.
    begun = args.out / "genes.tsv"
    known = args.genes is None and begun.is_file()
    genes = GeneVocabulary.read(begun) if known else chosen_genes(args)
    names = [field.name for field in dataclasses.fields(Settings) if field.name != "genes_hash"]
    settings = Settings(genes_hash=genes.hash, **{name: getattr(args, name) for name in names})
    entries = convert(
        datasets,
        out=args.out,
        genes=genes,
        settings=settings,
        task=args.task or 0,
        tasks=args.tasks or 1,
        jobs=args.jobs,
        replace=args.replace,
        verify_sources=args.verify_sources,
        max_memory_gib=args.max_memory,
        max_minutes=args.max_minutes,
        sources=args.sources,
        keep_bytes=args.keep_bytes,
    )
    if args.json:
        print(json.dumps({"datasets": entries, "counts": count_statuses(entries)}, indent=1))
    else:
        print(format_table(entries))
    failed = [entry for entry in entries if entry["status"] == "failed"]
    if failed:
        first = " ".join(f"{failed[0]['dataset_id']}: {failed[0]['reason']}".split())
        print(
            f"error: {len(failed)} of {counted(len(entries), 'dataset')} failed ({first}"
            f"{'; ...' if len(failed) > 1 else ''})",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _where(text: str) -> str:
    try:
        parse_where(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
