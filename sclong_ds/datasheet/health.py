"""Whether a corpus is fit to train on: green, amber or red, with reasons and what to do.

    health = health_of(corpus.catalogue)
    print(health.text())

Reads the catalogue alone, so that `finalize`, the report, `plan` and the start of a training tell
the same at no cost. Red means that a validation figure of such a corpus means nothing, or that most
cells are of no use; amber that it means less than it seems to. What an earlier version did not
record is not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sclong_ds.corpus.catalogue import DatasetInfo

Level = Literal["amber", "red"]
FEWEST_VALIDATION_CELLS, FEW_VALIDATION_CELLS = 30, 60
"""Below the first the mean error is mostly chance; 64 cells bring its error to about 12%."""
FEW_GENES = 0.2
"""Share of the vocabulary; a dataset that names fewer is a selection of genes."""
SHALLOW_GENES = 200
"""Median genes a cell; fewer is what empty droplets and failed libraries have."""
MANY, SOME = 0.5, 0.1
"""Share of the cells of which something is red, or amber."""
DOMINATES, FEWEST_TO_DOMINATE = 0.8, 3
FEWEST_WITHOUT_DONORS = 5
"""Corpora of fewer datasets need no donors to be split."""
MOST_REPEATS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    level: Level
    reason: str
    cure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The verdict on a corpus."""

    findings: tuple[Finding, ...]
    """Red ones first."""

    @property
    def verdict(self) -> Literal["green", "amber", "red"]:
        """The worst of the findings."""
        return self.findings[0].level if self.findings else "green"

    def lines(self) -> list[str]:
        """Return the verdict and a line for each finding."""
        n = len(self.findings)
        head = f"{n} finding{'s' * (n != 1)}" if n else "fit to train on"
        return [
            f"health of the corpus: {self.verdict.upper()} ({head})",
            *(f"  {f.level}: {f.reason}; {f.cure}" for f in self.findings),
        ]

    def text(self) -> str:
        """Return the lines as one text."""
        return "\n".join(self.lines())

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as plain values."""
        found = [{"level": f.level, "reason": f.reason, "cure": f.cure} for f in self.findings]
        return {"verdict": self.verdict, "findings": found}


def health_of(catalogue: Mapping[str, Any]) -> Health:
    """Return the verdict on a corpus.

    Args:
        catalogue: Of the finished corpus (`sclong_ds.corpus.catalogue`).
    """
    datasets = [d for d in (DatasetInfo(**d) for d in catalogue["datasets"]) if d.n_cells]
    found = [
        *_validation(catalogue, datasets),
        *_cells(catalogue.get("n_genes"), datasets),
        *_sources(catalogue, datasets),
    ]
    return Health(findings=tuple(sorted(found, key=lambda f: f.level != "red")))


def _validation(catalogue: Mapping[str, Any], datasets: Sequence[DatasetInfo]) -> Iterator[Finding]:
    start, stop = catalogue["splits"]["validation"]
    n_cells, more = stop - start, "add datasets, or hold out more (--validation-fraction)"
    if n_cells < FEW_VALIDATION_CELLS:
        level: Level = "red" if n_cells < FEWEST_VALIDATION_CELLS else "amber"
        reason = f"{n_cells} validation cells, fewer than {FEW_VALIDATION_CELLS}"
        yield Finding(level=level, reason=reason, cure=more)
    if catalogue.get("split_unit") == "cell" and n_cells:
        yield Finding(
            level="amber",
            reason="single cells are held out, whose donors are in training, too",
            cure="add a dataset, or a donor column (manifest column donor_column)",
        )
    few = [d for d in datasets if d.split_cells.get("validation") and _names_few(catalogue, d)]
    held = sum(d.split_cells["validation"] for d in few)
    if n_cells and held > SOME * n_cells:
        yield Finding(
            level="red" if held > MANY * n_cells else "amber",
            reason=f"{held / n_cells:.0%} of the validation cells are of datasets that name less "
            f"than {FEW_GENES:.0%} of the genes ({_named(few)})",
            cure="validate on others (--validation-datasets), or leave these out",
        )


def _names_few(catalogue: Mapping[str, Any], dataset: DatasetInfo) -> bool:
    n_genes: int = catalogue.get("n_genes") or 0
    named = dataset.n_genes_mapped
    return named is not None and named < FEW_GENES * n_genes


def _cells(n_genes: int | None, datasets: Sequence[DatasetInfo]) -> Iterator[Finding]:
    """Yield what is wrong with many of the cells."""
    total = sum(d.n_cells for d in datasets)
    few = [d for d in datasets if _names_few({"n_genes": n_genes}, d)]
    shallow = [d for d in datasets if d.median_genes is not None and d.median_genes < SHALLOW_GENES]
    for found, reason, cure in (
        (
            few,
            f"of datasets that name less than {FEW_GENES:.0%} of the genes",
            "take the files with all genes, or data.unmeasured=mask",
        ),
        (
            shallow,
            f"of datasets whose median cell has fewer than {SHALLOW_GENES} genes",
            "take filtered matrices, or raise --min-genes",
        ),
    ):
        n_cells = sum(d.n_cells for d in found)
        if n_cells > SOME * total:
            yield Finding(
                level="red" if n_cells > MANY * total else "amber",
                reason=f"{n_cells / total:.0%} of the cells are {reason} ({_named(found)})",
                cure=cure,
            )


def _sources(catalogue: Mapping[str, Any], datasets: Sequence[DatasetInfo]) -> Iterator[Finding]:
    """Yield what is wrong with the datasets taken together."""
    train = {d.dataset_id: d.split_cells.get("train", 0) for d in datasets}
    largest = max(train, key=lambda name: train[name], default="")
    if len(train) >= FEWEST_TO_DOMINATE and train[largest] > DOMINATES * sum(train.values()):
        yield Finding(
            level="amber",
            reason=f"{train[largest] / sum(train.values()):.0%} of the training cells are of "
            f"{largest}",
            cure="weigh the datasets (data.balance_by=dataset)",
        )
    if len(datasets) >= FEWEST_WITHOUT_DONORS and catalogue.get("split_unit") == "dataset":
        if not any(d.n_donors for d in datasets):
            yield Finding(
                level="amber",
                reason="no dataset names its donors: one of two datasets may be on both sides",
                cure="name them in the manifest column donor_column and convert again",
            )
    repeats = sum(d.duplicates_dropped for d in datasets)
    staged = repeats + sum(d.n_cells for d in datasets)
    if repeats > MOST_REPEATS * staged:
        yield Finding(
            level="amber",
            reason=f"{repeats / staged:.0%} of the cells repeated others and were dropped",
            cure="look for datasets that are in the manifest twice",
        )
    near = sum(d.near_kept or 0 for d in datasets)
    total = sum(d.n_cells for d in datasets)
    if near > SOME * total:
        yield Finding(
            level="amber",
            reason=f"{near / total:.0%} of the cells are the same as one of another gene list on "
            f"the genes of both ({_named([d for d in datasets if d.near_kept])})",
            cure="keep one of each (finalize --near-duplicates drop)",
        )
    species = sorted({d.organism for d in datasets if d.organism})
    if len(species) > 1:
        yield Finding(
            level="red",
            reason=f"cells of several species ({', '.join(species)})",
            cure="make a corpus of each, with its own --genes",
        )


def _named(datasets: Sequence[DatasetInfo]) -> str:
    names = [d.dataset_id for d in sorted(datasets, key=lambda d: -d.n_cells)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
