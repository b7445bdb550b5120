"""Finds the matrix of a dataset that holds its raw counts, and reports what every matrix holds.

Every matrix is looked at: the first block with values, of which the first 2^18 values are described
for the ledger. With `counts = auto`, raw.X, the layers of COUNT_LAYERS and X are candidates; those
whose first block is proven (`counts.exact_counts`) and does not look like anything else qualify.

- One qualifies: it is taken.
- Several hold the same values wherever they name the same genes: the one with most genes is taken,
  and the others are compared with it while it is read, to the last cell (`side_by_side.py`).
- Two disagree: neither is taken; the manifest must name one.

What cannot be decided but should be known (few genes, spliced counts alone, capped values) is a
warning.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from scipy import sparse

from data_prep.counts.invert import find_target
from data_prep.counts.option import INVERT_LOG1P, CountsOption, parse_counts
from data_prep.counts.proof import exact_counts
from data_prep.counts.side_by_side import (
    Columns,
    added,
    compared,
    count_differences,
    shared_columns,
)
from data_prep.counts.whole_numbers import describe_limits, describe_whole
from data_prep.ledger.ledger import MatrixFinding
from data_prep.source.source import Matrix, UnusableError

COUNT_LAYERS = ("counts", "raw_counts", "count", "raw", "umi", "umis", "umi_counts")
"""Layer names tried for raw counts when the manifest states `auto`, in this order and any case.
Other layers are not guessed: the spliced counts of a velocity file are whole numbers too."""
VELOCITY_LAYERS = ("spliced", "unspliced", "ambiguous", "spanning", "mature", "nascent")
"""Layers that hold parts of the counts."""
FEW_GENES = 0.5
"""A matrix with a smaller share of another one's genes is reported."""
_SEEN_VALUES = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The matrix to read, and what was found on the way."""

    matrix: Matrix
    """Only the first blocks of the file have been read; the next pass does not read them again."""
    option: CountsOption
    """What was asked for."""
    target: float | None = None
    """Total that cells were scaled to, where counts are restored from log1p values; else None."""
    reason: str
    """Why this one."""
    warnings: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True, eq=False)
class _Look:
    """What the first values of a matrix show."""

    matrix: Matrix
    """Its next pass continues from where the look ended."""
    n_genes: int
    first: int = 0
    """Number of the first cell of `head`: cells before it are empty."""
    head: sparse.csr_matrix | None = None
    """(cells, genes) proven counts; None if they are not counts."""
    total: float | None = None
    largest: float | None = None
    n_cells: int = 0
    block: sparse.csr_matrix | None = None
    """Its first block with values, as stored."""
    error: ValueError | None = None
    """Why it does not qualify."""
    oddity: str = ""
    """What is odd about counts that qualify."""
    running: Iterator[sparse.csr_matrix] | None = None
    """The pass that the look began, which may hold a file open."""

    @property
    def name(self) -> str:
        return self.matrix.name

    def close(self) -> None:
        """End the pass that the look began."""
        if isinstance(self.running, Generator):
            self.running.close()

    def finding(self) -> MatrixFinding:
        """Return the entry of the ledger."""
        looks = "counts" if self.error is None else str(self.error).removeprefix(f"{self.name} ")
        return MatrixFinding(
            name=self.name,
            genes=self.n_genes,
            cells=self.n_cells,
            total=self.total,
            largest=self.largest,
            looks=looks,
        )

    def amount(self) -> str:
        return (
            f"{self.name} (total {self.total:.0f} in the {self.n_cells} cells looked at, largest "
            f"value {self.largest:.0f})"
        )


def choose_counts(
    matrices: Sequence[Matrix], wanted: str = "auto", findings: list[MatrixFinding] | None = None
) -> Choice:
    """Find the raw counts of a dataset.

    Args:
        matrices: All matrices of the dataset.
        wanted: A `counts` entry (`counts_option.py`).
        findings: Takes what each matrix of the dataset holds, also where none can be taken.

    Raises:
        UnusableError: None holds counts, and the message states what each one looks like; two hold
            different ones, and the message states how to choose; or the values are not log1p of
            counts where they are to be restored.
        ValueError: There is no matrix of that name, it is damaged or without any count, or the
            matrices to add up have different genes.
    """
    option = _known_name(parse_counts(wanted), matrices)
    for name in option.matrices:
        _named(matrices, name)
    layers = () if option.how == "invert" else COUNT_LAYERS
    order = list(option.matrices) or [matrix.name for matrix in _in_order(matrices, layers)]
    looks = [_look(matrix, kept=matrix.name in order) for matrix in matrices]
    if findings is not None:
        findings.extend(look.finding() for look in looks)
    seen = {look.name: look for look in looks}
    used: list[_Look] = []
    try:
        choice = _choose(option, [seen[name] for name in order], looks)
        how = option.how
        used = [seen[name] for name in order if how != "auto" or seen[name].error is None]
    finally:
        for look in looks:
            if look not in used:
                look.close()
    return choice


def _choose(option: CountsOption, order: Sequence[_Look], looks: Sequence[_Look]) -> Choice:
    """Return the choice among the looks that an option names, or all candidates in order."""
    target = None
    if option.how == "invert":
        best, target = _restored(order)
        matrix, reason = best.matrix, f"log1p of counts scaled to {target:g}, to be restored"
    elif option.how == "auto":
        best, matrix, reason = _decide(order, looks)
    else:
        parts = [look.matrix for look in order]
        best, reason = order[0], f"named by counts = {option.text}"
        matrix = added(parts, proven=option.how == "named") if len(parts) > 1 else parts[0]
    return Choice(
        matrix=matrix,
        option=option,
        target=target,
        reason=reason,
        warnings=tuple(_warnings(best, looks, option)),
    )


def restorable(matrices: Sequence[Matrix]) -> str:
    """Return the advice to restore counts from log1p values, '' where that is not possible.

    Args:
        matrices: Matrices of a dataset.
    """
    looks = [_look(matrix, kept=True) for matrix in _in_order(matrices, ())]
    try:
        look, target = _restored(looks)
    except ValueError:
        return ""
    finally:
        for seen in looks:
            seen.close()
    return f"; write counts = {INVERT_LOG1P}:{look.name} to restore them (scaled to {target:g})"


def _known_name(option: CountsOption, matrices: Sequence[Matrix]) -> CountsOption:
    """Return the option with a layer whose name looks like a sum taken for what it is."""
    name = "+".join(option.matrices)
    known = len(option.matrices) > 1 and any(matrix.name == name for matrix in matrices)
    return replace(option, matrices=(name,)) if known else option


def _named(matrices: Sequence[Matrix], wanted: str) -> Matrix:
    named = {matrix.name: matrix for matrix in matrices}
    if wanted not in named:
        raise ValueError(f"there is no matrix '{wanted}'; the file holds {', '.join(named)}")
    return named[wanted]


def _in_order(matrices: Sequence[Matrix], layers: Sequence[str]) -> list[Matrix]:
    """Return raw.X, the layers of the given names and X, as far as they are there."""
    order = ["raw.X", *(f"layers/{name}" for name in layers), "X"]
    return [matrix for name in order for matrix in matrices if _plain_name(matrix) == name]


def _plain_name(matrix: Matrix) -> str:
    """Return the name without the case of a layer: `Counts` and `counts` may both be there."""
    return matrix.name.lower() if matrix.name.startswith("layers/") else matrix.name


def _look(matrix: Matrix, *, kept: bool) -> _Look:
    """Look at the first values of a matrix.

    Args:
        matrix: The matrix.
        kept: Whether it may be the one that is read; others are not held in memory.
    """
    part = matrix.name.removeprefix("layers/").lower() in VELOCITY_LAYERS
    look = _Look(matrix=matrix, n_genes=matrix.shape[1])
    if matrix.by_gene and not (kept or part):
        look.error = UnusableError(f"{matrix.name} was not looked at (it is stored gene by gene)")
        return look
    try:
        begun, block, first, look.running = _first_values(matrix)
    except (ValueError, OSError) as error:
        found = error if isinstance(error, ValueError) else ValueError(str(error))
        look.error = found.with_traceback(None)
        return look
    if kept:
        look.matrix, look.block = begun, block
    else:
        look.close()
    n_cells = max(1, int(np.searchsorted(block.indptr, _SEEN_VALUES, side="right")) - 1)
    head = block[:n_cells]
    look.first, look.n_cells = first, first + head.shape[0]
    if head.nnz and head.dtype.kind in "iuf":
        total, largest = float(head.data.sum(dtype=np.float64)), float(head.data.max())
        if np.isfinite(total):
            look.total, look.largest = total, largest
    try:
        # The whole block: a head of counts says nothing about the cells after it.
        counts = exact_counts(block, where=matrix.name)
        reason = describe_whole(counts, first=first)
        if reason:
            raise UnusableError(
                f"{matrix.name} {reason}; if they are raw counts, write counts = {matrix.name} in "
                "the manifest (--counts)"
            )
    except ValueError as error:
        # Its traceback would hold the block.
        look.error = error.with_traceback(None)
        return look
    look.oddity = describe_limits(counts, dtype=block.dtype)
    look.head = counts[:n_cells]
    return look


def _restored(looks: Sequence[_Look]) -> tuple[_Look, float]:
    """Return the first matrix whose counts can be restored, and what its cells were scaled to."""
    errors: list[ValueError] = []
    for look in looks:
        if look.block is None:
            assert look.error is not None
            errors.append(look.error)
            continue
        try:
            return look, find_target(look.block, where=look.name)
        except ValueError as error:
            errors.append(error)
    raise _all_wrong(errors, "no counts to restore")


def _first_values(
    matrix: Matrix,
) -> tuple[Matrix, sparse.csr_matrix, int, Iterator[sparse.csr_matrix]]:
    """Return the first block that holds a value, its first cell, and the pass continuing from it.

    Empty cells prove nothing. The matrix returned is the same one, but its next pass continues from
    here: a small table or file is one block, and would be read twice.
    """
    running = matrix.blocks()
    seen: list[sparse.csr_matrix] = []
    first = 0
    for block in running:
        seen.append(block)
        if block.nnz and np.any(block.data):
            break
        first += block.shape[0]
    else:
        raise ValueError(f"{matrix.name} holds no counts: all {matrix.shape[0]} cells are empty")
    begun = [chain(_emptied(seen), running)]

    def blocks() -> Iterator[sparse.csr_matrix]:
        return begun.pop() if begun else matrix.blocks()

    return replace(matrix, blocks=blocks), block, first, running


def _emptied(blocks: list[sparse.csr_matrix]) -> Iterator[sparse.csr_matrix]:
    """Yield blocks and let go of each."""
    while blocks:
        yield blocks.pop(0)


def _decide(order: Sequence[_Look], looks: Sequence[_Look]) -> tuple[_Look, Matrix, str]:
    """Return the best look, its matrix as it is to be read, and why it was taken."""
    qualified = [look for look in order if look.error is None]
    if not qualified:
        raise _nothing(order, looks)
    best = max(qualified, key=lambda look: look.n_genes)
    others = [look for look in qualified if look is not best]
    if not others:
        return best, best.matrix, "the only candidate that holds raw counts"
    matrix = best.matrix
    for other in others:
        columns = shared_columns(best.matrix, other.matrix)
        n_different = _differences(best, other, columns)
        if n_different:
            raise UnusableError(
                f"{best.amount()} and {other.amount()} both look like raw counts and differ in "
                f"{n_different} values; find out which holds the raw counts, and write counts = "
                f"{best.name} or counts = {other.name} in the manifest (--counts)"
            )
        if columns is not None:
            matrix = compared(matrix, other.matrix, columns)
    names = ", ".join(look.name for look in others)
    return best, matrix, f"holds the same counts as {names}, and no fewer genes"


def _all_wrong(errors: Sequence[ValueError], nothing: str, hint: str = "") -> ValueError:
    """Return the error to raise where no matrix can be taken."""
    text = "; ".join(str(error) for error in errors) or "the file holds neither raw.X nor X"
    # A damaged matrix is the more useful report: the dataset may be fine at its source.
    if all(isinstance(error, UnusableError) for error in errors):
        return UnusableError(f"{nothing}: {text}{hint}")
    return ValueError(text)


def _nothing(order: Sequence[_Look], looks: Sequence[_Look]) -> ValueError:
    """Return the error to raise where no candidate holds counts."""
    found = [look.name for look in looks if look.error is None]
    hint = ""
    parts = [name for name in found if name.removeprefix("layers/").lower() in VELOCITY_LAYERS]
    if len(parts) > 1:
        hint = (
            f"; {' and '.join(parts)} hold parts of the counts: write counts = {'+'.join(parts)} "
            "to add them"
        )
    elif found:
        hint = (
            f"; whole numbers are in {', '.join(found)}: if they are the raw counts, name the "
            "matrix in the manifest column 'counts' (--counts)"
        )
    errors = [look.error for look in order if look.error is not None]
    return _all_wrong(errors, "no raw counts", hint)


def _differences(one: _Look, other: _Look, columns: Columns | None) -> int:
    """Return how many values of the looked-at cells differ; 0 where nothing can be compared."""
    assert one.head is not None
    assert other.head is not None
    first = min(one.first, other.first)
    n_cells = min(one.first + one.head.shape[0], other.first + other.head.shape[0]) - first
    if columns is None or n_cells <= 0:
        return 0
    rows = [_rows(look.head, look.first - first, n_cells) for look in (one, other)]
    return count_differences(rows[0], rows[1], columns)


def _rows(head: sparse.csr_matrix, n_empty: int, n_cells: int) -> sparse.csr_matrix:
    """Return the first cells of a matrix whose first ones, empty, are not in `head`."""
    n_empty = min(n_empty, n_cells)
    empty = sparse.csr_matrix((n_empty, head.shape[1]), dtype=head.dtype)
    return (
        sparse.vstack([empty, head[: n_cells - n_empty]], format="csr")
        if n_empty
        else (head[:n_cells])
    )


def _strangers(chosen: _Look, looks: Sequence[_Look]) -> Iterator[str]:
    """Yield which candidates could not be compared with the one chosen."""
    for look in looks:
        qualifies = look.error is None and look.block is not None and look is not chosen
        if qualifies and shared_columns(chosen.matrix, look.matrix) is None:
            yield (
                f"{chosen.name} and {look.name} name no gene alike and could not be compared; "
                f"{chosen.amount()} was taken"
            )


def _warnings(chosen: _Look, looks: Sequence[_Look], option: CountsOption) -> Iterator[str]:
    """Yield what the user should know of a choice."""
    if chosen.oddity:
        yield f"{chosen.name} {chosen.oddity}"
    largest = max(looks, key=lambda look: look.n_genes)
    if chosen.n_genes < FEW_GENES * largest.n_genes:
        yield (
            f"{chosen.name} has {chosen.n_genes} genes, {largest.name} {largest.n_genes}: the "
            f"other {largest.n_genes - chosen.n_genes} genes are lost, export raw counts of all "
            f"genes{restorable([largest.matrix])}"
        )
    if option.how != "auto":
        return
    yield from _strangers(chosen, looks)
    found = [look for look in looks if look.error is None and look is not chosen]
    names = [f"layers/{name}" for name in VELOCITY_LAYERS]
    parts = [look for name in names for look in found if _plain_name(look.matrix) == name]
    for look in parts:
        if not _differences(chosen, look, shared_columns(chosen.matrix, look.matrix)):
            everything = "+".join({_plain_name(part.matrix): part.name for part in parts}.values())
            yield (
                f"{chosen.name} equals {look.name}, which is only a part of the counts; write "
                f"counts = {everything} for all of them"
            )
    for look in found:
        known = [*VELOCITY_LAYERS, *COUNT_LAYERS]
        layer = look.name.removeprefix("layers/")
        if layer == look.name or layer.lower() in known:
            continue
        if _differences(chosen, look, shared_columns(chosen.matrix, look.matrix)):
            yield (
                f"{look.amount()} holds other whole numbers than {chosen.amount()}; if those are "
                f"the raw counts, write counts = {look.name}"
            )
