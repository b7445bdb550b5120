"""Which datasets of a list are wanted, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.fetch.item import Item
from data_prep.genes.species import is_species

TERM_FILTERS = ("organism", "tissue", "assay", "disease", "suspension_type")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What a dataset must have; an empty filter lets every dataset through.

    Of the terms, a label in any case or an ontology id; one that fits is enough, except that every
    organism of a dataset must be wanted.
    """

    organism: tuple[str, ...] = ()
    tissue: tuple[str, ...] = ()
    assay: tuple[str, ...] = ()
    disease: tuple[str, ...] = ()
    suspension_type: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    """Ids, names excluded, or DOIs."""
    ids: tuple[str, ...] = ()
    primary_only: bool = False
    """Without datasets that hold no primary cell."""
    spatial: bool = False
    """With spatial assays."""

    def as_json(self) -> dict[str, list[str] | bool]:
        """Return the filters that are set, for a lock file."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return {n: sorted(v) if isinstance(v, tuple) else v for n, v in found.items() if v}


def select(items: Sequence[Item], filters: Filters) -> tuple[list[Item], Counter[str]]:
    """Return the datasets that are wanted, in the order given, and the others by reason.

    A dataset whose list lacks a field that a filter asks for is not taken.

    Args:
        items: The list.
        filters: What they must have.

    Raises:
        ValueError: An id that is asked for by name is not in the list.
    """
    known = {item.dataset_id for item in items} | {item.version for item in items}
    unknown = [name for name in filters.ids if name not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(f"dataset '{unknown[0]}'{more} of --ids not in the list")
    taken: list[Item] = []
    left_out: Counter[str] = Counter()
    for item in items:
        reason = _why_not(item, filters)
        if reason:
            left_out[reason] += 1
        else:
            taken.append(item)
    return taken, left_out


def _why_not(item: Item, filters: Filters) -> str:
    if filters.ids and not {item.dataset_id, item.version} & set(filters.ids):
        return "other ids"
    if filters.collections and not {item.collection, _doi(item.doi)} & {
        _doi(name) for name in filters.collections
    }:
        return "other collections"
    for name in TERM_FILTERS:
        wanted: tuple[str, ...] = getattr(filters, name)
        if not wanted:
            continue
        found = item.terms.get(name)
        if not found:
            return f"the list has no {name}"
        hits = [_is_wanted(term, wanted, name) for term in found]
        if not (all(hits) if name == "organism" else any(hits)):
            return f"other {name}"
    if filters.primary_only and item.n_primary is None:
        return "the list has no primary_cell_count"
    if filters.primary_only and not item.n_primary:
        return "no primary cell"
    if not filters.spatial and item.terms.get("spatial"):
        return "spatial"
    return ""


def _is_wanted(term: Sequence[str], wanted: Sequence[str], name: str) -> bool:
    label, term_id = (text.casefold() for text in term)
    for text in wanted:
        if text.casefold() in (label, term_id):
            return True
        if name == "organism" and text and is_species(label, text):
            return True
    return False


def _doi(text: str) -> str:
    return text.strip().removeprefix("https://doi.org/").removeprefix("doi:").casefold()
