"""The command line of `python -m data_prep fetch`."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.arguments import add_json, byte_count
from data_prep.fetch.budgets import Bandwidth, DiskBudget
from data_prep.fetch.cellxgene import ADDRESS, read_listing
from data_prep.fetch.download import Rules
from data_prep.fetch.fetch import Outcome, fetch, size_text
from data_prep.fetch.item import Item, items_of, manifest_text, path_in
from data_prep.fetch.lock_file import LOCK_NAME, Lock, read_lock, with_digests, write_lock
from data_prep.fetch.selection import TERM_FILTERS, Filters, select
from data_prep.manifest.address import without_secrets
from sclong_ds.command_line import local_path, new_folder, whole
from sclong_ds.files.atomic import read_file, write_atomic
from sclong_ds.page.words import counted

_MARK = "# written by data_prep fetch; the next one replaces it\n"
"""First line of a manifest."""
_EPILOG = """\
The first run writes which files it takes to DIR/fetch.lock.json, with version, bytes and, once a
file was fetched, its SHA-256; later runs, here or elsewhere (--lock), take exactly these. What is
there and whole is not fetched again; what was broken off continues where it stopped, after kill -9
too. DIR/manifest.tsv lists what is there for `convert`. With --list it names the addresses instead
and nothing is fetched: `convert --keep-bytes` then fetches, converts and deletes file by file.
Files that lie in DIR and were not fetched by this command are never changed or removed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fetch`.

    Args:
        parser: Of the command.
    """
    parser.epilog = _EPILOG
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="cellxgene; http(s), s3, gs, ftp or file addresses; or a text file with one a line, "
        "each perhaps behind a dataset id and a tab (default: the lock file)",
    )
    parser.add_argument("--out", type=new_folder, required=True, metavar="DIR", help="a folder")
    parser.add_argument(
        "--lock", type=local_path, metavar="FILE", help="lock file (default: DIR/fetch.lock.json)"
    )
    parser.add_argument(
        "--manifest",
        type=local_path,
        metavar="FILE",
        help="list for convert (default: DIR/manifest.tsv)",
    )
    parser.add_argument(
        "--update", action="store_true", help="make the list again, though there is a lock file"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be fetched; write nothing"
    )
    parser.add_argument(
        "--list", action="store_true", help="write lock file and manifest; fetch nothing"
    )
    _add_filters(parser)
    _add_limits(parser)
    parser.add_argument(
        "--listing", default=ADDRESS, metavar="URL", help="where the list of cellxgene is read"
    )
    add_json(parser)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which datasets of cellxgene (any of the values given)")
    for name in TERM_FILTERS:
        group.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="+",
            default=[],
            metavar="TERM",
            help="label or ontology id",
        )
    group.add_argument(
        "--collections", nargs="+", default=[], metavar="ID", help="collection ids or DOIs"
    )
    group.add_argument(
        "--ids", nargs="+", default=[], metavar="ID", help="dataset ids, or those of versions"
    )
    group.add_argument(
        "--primary-only", action="store_true", help="leave out datasets without a primary cell"
    )
    group.add_argument("--spatial", action="store_true", help="take spatial assays too")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parallel", type=whole(1), default=4, metavar="N", help="files at a time (default: 4)"
    )
    parser.add_argument(
        "--max-rate", type=byte_count, metavar="BYTES", help="bytes a second in all, such as 50MB"
    )
    parser.add_argument(
        "--max-bytes",
        type=byte_count,
        metavar="BYTES",
        help="most that the files may take in OUT, such as 2TB; the others are left for later",
    )
    parser.add_argument(
        "--attempts",
        type=whole(1),
        default=8,
        metavar="N",
        help="tries of a file in a row that bring nothing (default: 8)",
    )
    parser.add_argument(
        "--rate",
        type=byte_count,
        default=byte_count("50MB"),
        metavar="BYTES",
        help="bytes a second that --dry-run reckons with (default: 50MB)",
    )


def run(args: argparse.Namespace) -> int:
    """Run `fetch`.

    Args:
        args: Parsed arguments.

    Returns:
        The exit status: 1 if a file is not there.
    """
    rules = Rules(
        attempts=args.attempts,
        bandwidth=Bandwidth(args.max_rate),
        disk=DiskBudget(args.max_bytes),
    )
    lock, notes = _chosen(args, rules)
    facts = {**_facts(lock.items, args.rate), **notes}
    if not lock.items:
        raise ValueError(f"no dataset to fetch ({_counted(notes['left_out'])})")
    if args.dry_run:
        print(json.dumps(facts, indent=1) if args.json else _plan_text(facts))
        return 0
    lock_path = args.lock or args.out / LOCK_NAME
    manifest = args.manifest or args.out / "manifest.tsv"
    _refuse_foreign(manifest)
    print(_plan_text(facts), file=sys.stderr)
    if args.list:
        write_lock(lock_path, lock)
        _write_manifest(manifest, [(item, item.address) for item in lock.items], [])
        if any(item.address != item.url for item in lock.items):
            print(
                f"{manifest}: holds signed addresses, which open the files to whoever reads it; "
                "nothing else that is written does",
                file=sys.stderr,
            )
        print(
            json.dumps(facts, indent=1)
            if args.json
            else f"{manifest}: {counted(len(lock.items), 'dataset')}"
        )
        return 0
    return _fetch_all(args, lock, lock_path, manifest, rules)


def _chosen(args: argparse.Namespace, rules: Rules) -> tuple[Lock, dict[str, dict[str, int]]]:
    """Return the list of the lock file, or a new one, and what was left out of it."""
    filters = Filters(
        **{name: tuple(getattr(args, name)) for name in (*TERM_FILTERS, "collections", "ids")},
        primary_only=args.primary_only,
        spatial=args.spatial,
    )
    path = args.lock or args.out / LOCK_NAME
    if path.exists() and not args.update:
        lock = read_lock(path)
        wanted = filters.as_json()
        # With neither, the list is asked for as it is.
        sources = [without_secrets(source) for source in args.sources]
        asked = sources or wanted
        if asked and (sources or lock.sources, wanted) != (lock.sources, lock.filters):
            raise ValueError(
                f"{path} was made from {' '.join(lock.sources)} with {json.dumps(lock.filters)}, "
                f"not from {' '.join(sources or lock.sources)} with {json.dumps(wanted)}; use "
                "the same, leave out --from and filters, or use another --lock or --update"
            )
        print(f"{path}: the list of {lock.made}; --update makes a new one", file=sys.stderr)
        return _signed(lock, args.sources), {"left_out": {}, "no_use": {}}
    if not args.sources:
        raise ValueError(f"--from is missing, and there is no lock file {path}")
    items, left_out, no_use = _listed(args, filters, rules)
    made = datetime.datetime.now(datetime.UTC).date().isoformat()
    sources = [without_secrets(source) for source in args.sources]
    lock = Lock(sources=sources, filters=filters.as_json(), made=made, items=items)
    return lock, {"left_out": dict(left_out), "no_use": dict(no_use)}


def _signed(lock: Lock, sources: Sequence[str]) -> Lock:
    """Return a lock with the signatures that the sources give now; it keeps none itself."""
    given = {item.url: item.address for item in _addressed(sources)}
    items = [
        dataclasses.replace(item, address=given.get(item.url, item.url)) for item in lock.items
    ]
    return dataclasses.replace(lock, items=items)


def _addressed(sources: Sequence[str]) -> list[Item]:
    """Return the files of lists of addresses, and of addresses."""
    items: list[Item] = []
    for source in sources:
        if source != "cellxgene" and "://" not in source:
            text = read_file(local_path(source)).decode("utf-8", "replace")
            items += items_of(text.splitlines(), where=source)
    return items + items_of([s for s in sources if "://" in s], where="--from")


def _listed(
    args: argparse.Namespace, filters: Filters, rules: Rules
) -> tuple[list[Item], Counter[str], Counter[str]]:
    left_out: Counter[str] = Counter()
    no_use: Counter[str] = Counter()
    items: list[Item] = []
    if "cellxgene" in args.sources:
        found, no_use = read_listing(args.listing, rules)
        items, left_out = select(found, filters)
    elif filters.as_json():
        raise ValueError("addresses have no terms to choose by; filters are for --from cellxgene")
    items += _addressed(args.sources)
    count = Counter(item.dataset_id.lower() for item in items)
    twice = [name for name, n in count.items() if n > 1]
    if twice:
        raise ValueError(f"dataset '{twice[0]}' is in two sources; give one of them another id")
    return items, left_out, no_use


def _facts(items: Sequence[Item], rate: int) -> dict[str, Any]:
    sizes = [item.size for item in items]
    known = sum(size or 0 for size in sizes)
    return {
        "datasets": len(items),
        "cells": sum(item.n_cells or 0 for item in items),
        "cells_unknown": sum(item.n_cells is None for item in items),
        "primary_cells": sum(item.n_primary or 0 for item in items),
        "bytes": known,
        "bytes_unknown": sum(size is None for size in sizes),
        "largest": max((size or 0 for size in sizes), default=0),
        "hours": round(known / rate / 3600, 2),
        "rate": rate,
    }


def _plan_text(facts: dict[str, Any]) -> str:
    lines = [
        f"{counted(facts['datasets'], 'dataset')}, {counted(facts['cells'], 'cell')}, of which "
        f"{facts['primary_cells']:,} primary; {size_text(facts['bytes'])}, the largest file "
        f"{size_text(facts['largest'])}; {facts['hours']:g} h at {size_text(facts['rate'])}/s"
    ]
    if facts["bytes_unknown"] or facts["cells_unknown"]:
        lines.append(
            f"the list does not give the bytes of {facts['bytes_unknown']} and the cells of "
            f"{facts['cells_unknown']} datasets; these are not in the sums"
        )
    for name, text in (("left_out", "left out"), ("no_use", "not usable")):
        if facts[name]:
            lines.append(f"{text}: {_counted(facts[name])}")
    return "\n".join(lines)


def _counted(reasons: dict[str, int]) -> str:
    found = sorted(reasons.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{n:,} {reason}" for reason, n in found) or "the list is empty"


def _fetch_all(
    args: argparse.Namespace, lock: Lock, lock_path: Path, manifest: Path, rules: Rules
) -> int:
    write_lock(lock_path, lock)
    outcomes: list[Outcome] = []
    try:
        fetch(lock.items, args.out, rules, parallel=args.parallel, each=outcomes.append)
    finally:
        # Of a run that is stopped, too; one that was killed fills in the rest next time.
        digests = {
            o.item.dataset_id: (o.record["size"], o.record["sha256"]) for o in outcomes if o.record
        }
        lock = with_digests(lock, digests)
        write_lock(lock_path, lock)
    items = {item.dataset_id: item for item in lock.items}
    here = sorted(o.item.dataset_id for o in outcomes if o.record)
    missing = sorted((o.item.dataset_id, o.reason) for o in outcomes if not o.record)
    base = manifest.parent.resolve()
    places = [(items[name], _shown(path_in(args.out, items[name]), base)) for name in here]
    _write_manifest(manifest, places, [(items[name], reason) for name, reason in missing])
    total = sum(o.record["size"] for o in outcomes if o.record)
    if args.json:
        facts = {"fetched": here, "bytes": total, "not_fetched": dict(missing)}
        print(json.dumps(facts | {"manifest": str(manifest)}, indent=1))
    else:
        print(
            f"{args.out}: {len(here)} of {counted(len(outcomes), 'file')}, "
            f"{size_text(total)}; {manifest}"
        )
    if missing:
        name, reason = missing[0]
        print(
            f"error: not there: {len(missing)} of {counted(len(outcomes), 'file')} "
            f"({name}: {reason}"
            f"{'; ...' if len(missing) > 1 else ''}); the same command tries them again",
            file=sys.stderr,
        )
    return 1 if missing else 0


def _write_manifest(
    path: Path, places: Sequence[tuple[Item, str]], missing: Sequence[tuple[Item, str]]
) -> None:
    """Write the manifest; one that somebody wrote stays."""
    data = (_MARK + manifest_text(places, missing=missing)).encode()
    _refuse_foreign(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def _refuse_foreign(manifest: Path) -> None:
    if manifest.exists() and not read_file(manifest).startswith(_MARK.encode()):
        raise ValueError(f"{manifest} was not written by fetch; choose another --manifest")


def _shown(path: Path, base: Path) -> str:
    full = path.resolve()
    return str(full.relative_to(base)) if full.is_relative_to(base) else str(full)
