"""What one call of `finalize` is about: its inputs and options, and whether anything is to do."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from data_prep.corpus.build import Codec
from data_prep.corpus.growth.earlier import (
    EARLIER,
    MISSING,
    EarlierParts,
    check_parts,
    earlier_parts,
    find_earlier,
    finished_inputs,
)
from data_prep.corpus.growth.part_list import remove_unlisted
from data_prep.corpus.inputs import Inputs, read_inputs
from data_prep.corpus.near.kept_cells import forget_lost
from data_prep.corpus.near.near_duplicates import NearRule
from data_prep.corpus.publish import begun, is_sealed
from data_prep.corpus.seal import restated, unused
from data_prep.corpus.split.rule import SplitRule, read_rule, resolve
from data_prep.corpus.work_folder import clear, discard, open_work
from data_prep.ledger.pending import Pending, read_pending, tasks_to_run
from data_prep.passes.crew import has_failed
from sclong_ds.corpus.catalogue import PARTS, read_catalogue, write_catalogue
from sclong_ds.corpus.location import Location
from sclong_ds.corpus.shards import read_metadata
from sclong_ds.page.words import counted

logger = logging.getLogger(__name__)

_WORK_VERSION = 11
"""Raised when an interrupted run of an older program could not be continued."""


class Job:
    """What one call of finalize is about."""

    def __init__(
        self,
        corpus: Path,
        given: Mapping[str, Any],
        codec: Codec | None,
        near: NearRule | None,
        *,
        allow_missing: bool,
        whole: bool,
    ) -> None:
        self.corpus, self.given, self.allow_missing = corpus, given, allow_missing
        self.whole, self.asked = whole, (codec, near)
        self.codec: Codec
        self.near: NearRule
        self.lock = corpus / ".locks" / "~units"
        """Of the units of the work."""

    @cached_property
    def inputs(self) -> Inputs:
        """What lies in the folder when it is first asked for; staged files are not compared yet."""
        return read_inputs(self.corpus)

    @cached_property
    def pending(self) -> list[Pending]:
        """Datasets that were never converted."""
        return read_pending(self.corpus, self.inputs.ledger)

    @property
    def options_hash(self) -> str:
        """Stands for the options, which all tasks of one work have in common."""
        options = [*self.given.items(), *self.asked, self.allow_missing, self.whole]
        return _hash([_WORK_VERSION, options])

    @property
    def inputs_hash(self) -> str:
        """Stands for the datasets, which all tasks of one work have in common."""
        return _hash([self.inputs.documents, [dataset.dataset_id for dataset in self.pending]])

    def begin(self, *, again: bool = False) -> tuple[Path, SplitRule] | None:
        """Return the work folder, with what an earlier run has left of this work, and its rule.

        No other process may be at work in the corpus folder: one that publishes has no corpus
        there. Where compact finds no parts, the inputs are not read.

        Args:
            again: Make one corpus again also where nothing has changed, and read all cells of one
                with parts.

        Returns:
            None where the corpus is what this call would make.

        Raises:
            FileNotFoundError: One corpus is to be made of the parts, and nothing was finalized.
            ValueError: Datasets that were never converted, or inputs or parts that are damaged.
        """
        if self.whole and PARTS not in begun(self.corpus)[0] and not self.has_parts:
            return None
        self.require_all()
        rule = self.rule()
        # A list of parts with nothing new stays.
        if (not again or self.has_parts) and (self.is_finished(rule) or self.restate(rule)):
            if again:
                check_parts(earlier_parts(self.corpus, read_catalogue(self.corpus)))
            clear(self.corpus)
            remove_unlisted(self.corpus)
            return None
        return self.open(rule)

    def require_all(self) -> None:
        """Raise a ValueError if datasets were never converted, unless that is allowed."""
        pending = self.pending
        if pending and not self.allow_missing:
            names = ", ".join(dataset.dataset_id for dataset in pending[:3])
            n_datasets = len(self.inputs.ledger) + len(pending)
            raise ValueError(
                f"{self.corpus}: {len(pending)} of {counted(n_datasets, 'dataset')} not "
                "converted yet "
                f"({names}{', ...' if len(pending) > 3 else ''}): {tasks_to_run(pending)}, or "
                "finalize with --allow-missing to continue without them"
            )

    def settle(self) -> None:
        """Take the options that are not given from the corpus."""
        codec, near = "zstd", "primary"
        with suppress(ValueError, LookupError, *MISSING):
            catalogue, codec = begun(self.corpus)
            near = catalogue.get("near_duplicates", near)
        self.codec = self.asked[0] or cast("Codec", codec)
        self.near = self.asked[1] or cast("NearRule", near)

    def rule(self) -> SplitRule:
        """Return the rule of the split: that of the corpus and what is given; settle the rest."""
        self.settle()
        before = read_rule(self.corpus)
        rule = resolve(self.given, before)
        if before is not None and rule.datasets != before.datasets:
            logger.warning(
                "%s: the split is drawn again (seed %s, split_by %s; before: %s, %s): validation "
                "figures before and after cannot be compared, and earlier models were trained on "
                "cells that are held out now",
                *(self.corpus, rule.options.seed, rule.options.split_by),
                *(before.options.seed, before.options.split_by),
            )
        return rule

    def open(self, rule: SplitRule) -> tuple[Path, SplitRule]:
        """Return the work folder, with what an earlier run has left of this work, and its rule."""
        missing = [dataset.dataset_id for dataset in self.pending]
        ledger = [dict(entry) for entry in self.inputs.ledger]
        earlier = self.earlier(rule)
        if earlier is not None:
            rule = earlier.rule
        options = [rule.as_json(), self.codec, self.near]
        content = [_WORK_VERSION, *options, ledger, self.inputs.documents, missing]
        if earlier is not None:
            content.append(earlier.catalogue["hash"])
        work = open_work(self.corpus, content)
        sealed = (work / "corpus.json").exists()
        if has_failed(work) or (sealed and not is_sealed(self.corpus, work)):
            discard(work)
            work = open_work(self.corpus, content)
        elif not sealed:
            forget_lost(work)
        if earlier is not None:
            (work / EARLIER).mkdir(exist_ok=True)
            write_catalogue(work / EARLIER, earlier.catalogue)
        return work, rule

    def earlier(self, rule: SplitRule) -> EarlierParts | None:
        """Return the parts that this work adds one to; None where it makes one corpus."""
        if self.whole:
            return None
        found, reason = find_earlier(
            self.corpus, self.inputs, rule, codec=self.codec, near=self.near
        )
        if reason:
            logger.warning(
                "%s: is made again as one corpus, with another hash: %s", self.corpus, reason
            )
        # Little beside the staging of all datasets, which this work reads.
        if found is not None:
            check_parts(found)
        return found

    def is_finished(self, rule: SplitRule) -> bool:
        """Tell whether the corpus is what this call would make; its cells are not read."""
        try:
            catalogue = read_catalogue(self.corpus)
            cells = read_metadata(Location(self.corpus / "cells.zarr"))
            return (
                not (self.whole and PARTS in catalogue)
                and catalogue.get("split_rule") == rule.as_json()
                and catalogue.get("near_duplicates") == self.near
                and catalogue.get("unused") == unused(self.inputs, self.pending)
                and cells["attributes"]["codec"] == self.codec
                and finished_inputs(self.corpus, catalogue) == self.inputs.checksums()
            )
        except (ValueError, KeyError, *MISSING):
            return False

    def restate(self, rule: SplitRule) -> bool:
        """Tell whether the parts hold all cells already; then write which datasets are unused.

        The cells stay, and with them the hash: a dataset that failed concerns none of them.
        """
        if self.whole or not self.has_parts:
            return False
        try:
            catalogue = read_catalogue(self.corpus)
        except (ValueError, *MISSING):
            return False
        if PARTS not in catalogue or len(self.inputs.used) != len(catalogue["datasets"]):
            return False
        if not find_earlier(self.corpus, self.inputs, rule, codec=self.codec, near=self.near)[0]:
            return False
        self.inputs.check_documents()
        write_catalogue(self.corpus, restated(catalogue, self.inputs, self.pending))
        return True

    @property
    def has_parts(self) -> bool:
        """Whether there are parts, be it those that a killed compact has left."""
        return (self.corpus / PARTS).is_dir()


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
