"""The list of CELLxGENE Discover: one JSON entry per dataset, with its files and its terms.

The curation API answers `GET /curation/v1/datasets` with every public dataset in its current
version; the address of a file holds the id of that version and stays. It names no checksums. All
data of the collection are published under CC BY 4.0.

Source: https://api.cellxgene.cziscience.com/curation/ui/
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from data_prep.fetch.budgets import Stopped
from data_prep.fetch.download import Rules
from data_prep.fetch.item import Item
from data_prep.fetch.remote import FetchError, get, refusal, translated
from data_prep.ledger.ledger import is_safe_id
from data_prep.manifest.address import check_address

ADDRESS = "https://api.cellxgene.cziscience.com/curation/v1/datasets"
LICENCE = "CC BY 4.0"
TERMS = ("organism", "tissue", "assay", "disease", "suspension_type")
_SPATIAL = re.compile(r"(?i)visium|slide-?seq|merfish|stereo-seq|xenium|cosmx")
_MOST_PAGES = 10_000


def read_listing(address: str, rules: Rules) -> tuple[list[Item], Counter[str]]:
    """Return every dataset of the list, sorted by id, and how many are of no use, by reason.

    Args:
        address: Of the list, or of its first page.
        rules: Tries and pauses.

    Raises:
        ValueError: No list can be had, or none of its entries is of use.
    """
    items: dict[str, Item] = {}
    problems: Counter[str] = Counter()
    page: str | None = address
    seen: set[str] = set()
    while page:
        if page in seen or len(seen) > _MOST_PAGES:
            raise ValueError(f"{address}: the pages of the list go in circles")
        seen.add(page)
        entries, page = _read_page(page, rules)
        for entry in entries:
            found = _item(entry)
            if isinstance(found, str):
                problems[found] += 1
            elif found.dataset_id in items:
                problems["the same dataset twice"] += 1
            else:
                items[found.dataset_id] = found
    if not items:
        reasons = ", ".join(f"{n} {reason}" for reason, n in problems.items())
        raise ValueError(
            f"{address}: a list without a dataset to fetch ({reasons or 'it is empty'})"
        )
    return [items[name] for name in sorted(items)], problems


def _read_page(address: str, rules: Rules) -> tuple[list[Any], str | None]:
    """Return the entries of one page and the address of the next one."""
    for attempt in range(1, rules.attempts + 1):
        try:
            with translated(), get(address, silence_s=rules.silence_s) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, response.headers.get("Retry-After", ""))
                body = response.content
                following = response.links.get("next", {}).get("url")
            return _entries(body, address), following and _joined(address, following)
        except FetchError as error:
            if not error.again or attempt >= min(rules.attempts, error.most or rules.attempts):
                raise ValueError(f"{address}: {error}") from None
            longest = min(rules.first_wait_s * 2 ** (attempt - 1), rules.longest_wait_s)
            if rules.stop.wait(longest if error.wait_s is None else error.wait_s):
                raise Stopped from None
    raise AssertionError("the last try ends the loop")


def _joined(address: str, following: str) -> str:
    from urllib.parse import urljoin

    return urljoin(address, following)


def _entries(body: bytes, address: str) -> list[Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        start = body[:40].decode("utf-8", "replace").strip()
        raise FetchError(f"no JSON list but '{start}'", most=3) from None
    if not isinstance(found, list):
        raise FetchError(f"a JSON list was expected, got {type(found).__name__}", most=3)
    return found


def _item(entry: Any) -> Item | str:
    """Return one dataset, or why it cannot be fetched."""
    if not isinstance(entry, dict):
        return "entry that is no mapping"
    name = entry.get("dataset_id")
    if not isinstance(name, str) or not is_safe_id(name):
        return "without a dataset_id"
    if entry.get("tombstone") is True:
        return "withdrawn"
    assets = entry.get("assets")
    assets = [a for a in assets if isinstance(a, dict)] if isinstance(assets, list) else []
    file = next((a for a in assets if str(a.get("filetype", "")).upper() == "H5AD"), None)
    if file is None:
        return "without an H5AD file"
    try:
        check_address(str(file.get("url") or ""))
    except ValueError:
        return "without the address of its file"
    terms = {term: _terms(entry[term]) for term in TERMS if entry.get(term)}
    if entry.get("spatial") or any(_SPATIAL.search(label) for label, _ in terms.get("assay", ())):
        terms["spatial"] = [["yes", ""]]
    return Item(
        dataset_id=name,
        url=str(file["url"]),
        size=_count(file.get("filesize")),
        version=_text(entry.get("dataset_version_id")),
        title=_text(entry.get("title")),
        doi=_text(entry.get("collection_doi")),
        citation=_text(entry.get("citation")),
        licence=LICENCE,
        collection=_text(entry.get("collection_id")),
        n_cells=_count(entry.get("cell_count")),
        n_primary=_count(entry.get("primary_cell_count")),
        terms=terms,
        schema="cellxgene",
    )


def _terms(value: Any) -> list[list[str]]:
    """Return labels and ids of one field: a list of mappings, or of plain texts."""
    found = value if isinstance(value, list) else [value]
    return [
        [_text(one.get("label")), _text(one.get("ontology_term_id"))]
        if isinstance(one, dict)
        else [_text(one), ""]
        for one in found
    ]


def _text(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    """Return a number of bytes or cells; JSON of some writers has 12.0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Of infinity, which JSON may hold, the rest is NaN.
    return int(value) if value >= 0 and value % 1 == 0 else None
