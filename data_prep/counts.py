"""Proof that the values of a matrix are raw counts, or the reason why they are not.

Raw counts are finite, not negative, below 2^32 and whole up to float noise (1e-6). Anything else is
named for what it looks like (`not_counts.py`): a damaged file is an error, a normalised,
log-transformed or scaled matrix is `UnusableError`. Only log1p of scaled counts can be undone, with
a proof for each cell (`invert.py`), and only where the manifest asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import sparse

from data_prep.invert import find_target
from data_prep.not_counts import check_finite, describe, describe_whole
from data_prep.source import Matrix, UnusableError

MAX_COUNT = 2**32 - 1
WHOLE_TOLERANCE = 1e-6
"""Largest distance from a whole number: tables written by R carry 0.999999999999997 for 1."""
COUNT_LAYERS = ("counts", "raw_counts", "count", "raw", "umi", "umis", "umi_counts")
"""Layer names tried for raw counts when the manifest says `auto`, in this order and any case. Other
layers are not guessed: the spliced counts of a velocity file are whole numbers too."""
INVERT_LOG1P = "invert_log1p"
"""Begins the manifest entry that asks for counts out of log1p values: invert_log1p or
invert_log1p:MATRIX."""
_MOSTLY = 0.9
_Finding = TypeVar("_Finding")


def exact_counts(block: sparse.csr_matrix, *, where: str) -> sparse.csr_matrix:
    """Return the block as whole numbers, or say why its values are not raw counts.

    Args:
        block: (cells, genes) of any real type.
        where: Name of the matrix, for the message.

    Returns:
        The same matrix as int64, canonical (sorted columns, no repeats, no stored zeros). Each
        stored value is proven first; values of one place are then added in int64, whatever type
        they are stored in.

    Raises:
        UnusableError: Well-formed values that are not counts (log-normalised, scaled, TPM,
            fractions, true/false).
        ValueError: Damaged values: NaN, infinite, negative counts, 2^32 and more (added up, too),
            columns out of range, floats too large to tell neighbouring whole numbers apart.
    """
    block.check_format(full_check=True)
    values = block.data
    # Nearly every block is found to be counts by the first look; only others need all the checks.
    whole = _whole_numbers(values)
    if whole is None:
        _check_values(block, where)
        whole = (np.rint(values) if values.dtype.kind == "f" else values).astype(np.int64)
    counts = sparse.csr_matrix((whole, block.indices, block.indptr), shape=block.shape)
    if not block.has_canonical_format:
        # In place: the arrays of the block are not ours.
        counts = counts.copy()
        counts.sum_duplicates()
        if counts.nnz and counts.data.max() > MAX_COUNT:
            raise ValueError(
                f"{where} holds values of one cell and gene that add up to {counts.data.max()}; "
                "counts must be below 2^32"
            )
    counts.has_canonical_format = True
    if not whole.all():
        counts = counts.copy()
        counts.eliminate_zeros()
    return counts


def _whole_numbers(values: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
    """Return values as int64 if all are plainly counts, without any rounding; else None."""
    if values.dtype.kind not in "iuf":
        return None
    if not values.size:
        return values.astype(np.int64)
    exact_up_to = MAX_COUNT
    if values.dtype.kind == "f":
        exact_up_to = min(MAX_COUNT, 2 ** (np.finfo(values.dtype).nmant + 1))
    # NaN passes no comparison.
    if not (values.min() >= 0 and values.max() <= exact_up_to):
        return None
    whole = values.astype(np.int64)
    return whole if values.dtype.kind != "f" or bool((whole == values).all()) else None


def choose_matrix(matrices: Sequence[Matrix], wanted: str) -> Matrix:
    """Pick the matrix that holds the raw counts.

    Args:
        matrices: All matrices of a dataset.
        wanted: `auto`, or the name of one (X, raw.X, layers/NAME). `auto` takes the first whose
            first block with values passes `exact_counts` and is neither all ones nor rounded
            normalised values, in the order raw.X, the layers of COUNT_LAYERS, X.

    Returns:
        The matrix; only its first blocks have been looked at, and the next pass over it does not
        read them again.

    Raises:
        UnusableError: `auto`, and none holds counts; the message says what each one looks like.
        ValueError: There is no matrix of that name, or it is damaged or without any count.
    """
    if wanted != "auto":
        return _named(matrices, wanted)
    try:
        return _first(_in_order(matrices, COUNT_LAYERS), _is_counts, nothing="no raw counts")[0]
    except UnusableError as error:
        raise UnusableError(f"{error}{_other_counts(matrices)}") from None


def choose_log1p(matrices: Sequence[Matrix], wanted: str) -> tuple[Matrix, float]:
    """Pick the matrix whose log1p values are to be turned back into counts.

    Args:
        matrices: All matrices of a dataset.
        wanted: `invert_log1p` (the first of raw.X and X that qualifies) or `invert_log1p:MATRIX`.

    Returns:
        The matrix and the total its cells were scaled to, for `invert.restore_counts`.

    Raises:
        UnusableError: The values are not log1p of counts scaled to one total.
        ValueError: There is no matrix of that name, or it is damaged.
    """
    name = wanted.removeprefix(INVERT_LOG1P).removeprefix(":")
    candidates = [_named(matrices, name)] if name else _in_order(matrices, ())
    return _first(candidates, _target_of, nothing="no counts to restore")


def _named(matrices: Sequence[Matrix], wanted: str) -> Matrix:
    named = {matrix.name: matrix for matrix in matrices}
    if wanted not in named:
        raise ValueError(f"there is no matrix '{wanted}'; the file holds {', '.join(named)}")
    return named[wanted]


def _in_order(matrices: Sequence[Matrix], layers: Sequence[str]) -> list[Matrix]:
    """Return raw.X, the layers of the given names and X, as far as they are there."""
    named = {matrix.name: matrix for matrix in matrices}
    named |= {name.lower(): matrix for name, matrix in named.items() if name.startswith("layers/")}
    order = ["raw.X", *(f"layers/{name}" for name in layers), "X"]
    return [named[name] for name in order if name in named]


def _first(
    candidates: Sequence[Matrix],
    look: Callable[[sparse.csr_matrix, str], _Finding],
    *,
    nothing: str,
) -> tuple[Matrix, _Finding]:
    """Return the first matrix that `look` accepts and what it found, or raise what was wrong."""
    reasons: list[ValueError] = []
    for matrix in candidates:
        try:
            begun, block = _first_values(matrix)
            return begun, look(block, matrix.name)
        except ValueError as error:
            reasons.append(error)
    text = "; ".join(str(error) for error in reasons) or "the file holds neither raw.X nor X"
    # A damaged matrix is the more useful report: the dataset may be fine at its source.
    if all(isinstance(error, UnusableError) for error in reasons):
        raise UnusableError(f"{nothing}: {text}")
    raise ValueError(text)


def _first_values(matrix: Matrix) -> tuple[Matrix, sparse.csr_matrix]:
    """Return the first block that holds a value: empty cells prove nothing.

    The matrix returned is the same one, but its next pass goes on from here: a small table or file
    is one block, and would be read twice.
    """
    running = matrix.blocks()
    seen: list[sparse.csr_matrix] = []
    for block in running:
        seen.append(block)
        if block.nnz and np.any(block.data):
            break
    else:
        raise ValueError(f"{matrix.name} holds no counts: all {matrix.shape[0]} cells are empty")
    begun = [chain(_emptied(seen), running)]

    def blocks() -> Iterator[sparse.csr_matrix]:
        return begun.pop() if begun else matrix.blocks()

    return replace(matrix, blocks=blocks), block


def _emptied(blocks: list[sparse.csr_matrix]) -> Iterator[sparse.csr_matrix]:
    """Yield blocks and let go of each."""
    while blocks:
        yield blocks.pop(0)


def _is_counts(block: sparse.csr_matrix, where: str) -> None:
    reason = describe_whole(exact_counts(block, where=where))
    if reason:
        raise UnusableError(
            f"{where} {reason}; if they are raw counts, write counts = {where} in the manifest"
        )


def _target_of(block: sparse.csr_matrix, where: str) -> float:
    return find_target(block, where=where)


def _other_counts(matrices: Sequence[Matrix]) -> str:
    """Return a hint at layers that hold whole numbers but whose name says nothing, or ''."""
    found = []
    for matrix in matrices:
        name = matrix.name.removeprefix("layers/")
        if name != matrix.name and name.lower() not in COUNT_LAYERS:
            try:
                _is_counts(_first_values(matrix)[1], matrix.name)
            except ValueError:
                continue
            found.append(matrix.name)
    if not found:
        return ""
    return (
        f"; whole numbers are in {', '.join(found)}: if they are the raw counts, name the matrix "
        "in the manifest column 'counts'"
    )


def _check_values(block: sparse.csr_matrix, where: str) -> None:
    """Raise what is wrong with the values of a block; nothing may be."""
    values = block.data
    if values.dtype == np.bool_:
        raise UnusableError(f"{where} holds true/false, not counts")
    if values.dtype.kind not in "iuf":
        raise ValueError(
            f"{where} holds values of type {values.dtype}; counts are integers or floats"
        )
    if values.dtype.kind == "f":
        _check_floats(block, where)
    elif values.dtype.kind == "i" and values.size and values.min() < 0:
        raise ValueError(f"{where} holds the negative count {values.min()}; counts are 0 or more")
    if values.size and values.max() > MAX_COUNT:
        raise ValueError(f"{where} holds {values.max():.0f}; counts must be below 2^32")


def _check_floats(block: sparse.csr_matrix, where: str) -> None:
    values = block.data
    if not values.size:
        return
    check_finite(values, where)
    distance = np.abs(values - np.rint(values))
    whole = float(np.mean(distance <= WHOLE_TOLERANCE))
    if values.min() < 0:
        if whole > _MOSTLY:
            n_negative = int(np.count_nonzero(values < 0))
            raise ValueError(
                f"{where} holds {n_negative} negative values among whole numbers "
                f"(smallest {values.min():g})"
            )
        raise UnusableError(
            f"{where} looks scaled, not counts "
            f"(values from {values.min():.3g} to {values.max():.3g})"
        )
    if whole < 1:
        fraction = values[distance > WHOLE_TOLERANCE][0]
        raise UnusableError(f"{where} {describe(block)} (first fraction {fraction:.6g})")
    exact_up_to = 2 ** (np.finfo(values.dtype).nmant + 1)
    if values.max() > exact_up_to:
        raise ValueError(
            f"{where} holds {values.max():.0f} as {values.dtype}, which is exact up to "
            f"{exact_up_to} only; the count may have been rounded"
        )
