"""Hypothesis strategies of whole datasets whose true counts are known before they are written.

Each feature is made from the gene that it shall mean (or from none: an antibody, a peak, a gene of
the other genome, a name of nothing), so that the truth needs no reader and no resolver of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import assume
from hypothesis import strategies as st
from made_sources import (
    EXPRESSION,
    SPARSE,
    TEXT,
    WITH_GENOMES,
    WITH_OBS,
    WITH_TYPES,
    Made,
)

from sclong_ds.corpus.genes import GeneVocabulary

_BUNDLED = GeneVocabulary.bundled()
_STEP = 70
GENES = GeneVocabulary(_BUNDLED.ids[::_STEP], _BUNDLED.symbols[::_STEP], _BUNDLED.classes[::_STEP])
"""Every 70th gene: 399, so that most genes of the world are not listed."""
MOST = 2**32 - 1
INTEGERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")
FLOATS = ("f2", "f4", "f8")
_VALUES = (
    *(1, 1, 1, 2, 3, 7, 44, 100, 127, 128, 200, 255, 256, 300, 2047, 32_767, 32_768, 40_000),
    *(65_535, 65_536, 2**24, 2**24 + 1, 2**31 - 1, 2**31, MOST),
)
OTHER_TYPES = (
    "Antibody Capture",
    "CRISPR Guide Capture",
    "Multiplexing Capture",
    "Peaks",
    "Custom",
    "Antigen Capture",
)
EXACT_STYLES = ("id", "version", "symbol", "prefixed", "joined", "mixed")
LOSSY_STYLES = ("dots", "lower")
"""Writings in which a name may be found to be of several genes, and its counts lost and said."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A dataset, how to convert it and what must come out."""

    made: Made
    targets: Sequence[int | None]
    """Column of the vocabulary that each feature means; None for none."""
    certain: Sequence[bool]
    """Whether a feature's name may not be lost."""
    options: dict[str, str] = field(default_factory=dict)
    must: bool = True
    """Nothing about the dataset is a reason to refuse it."""

    def truth(self, without: frozenset[int] = frozenset()) -> np.ndarray:
        """Return (cells, genes) counts as Python integers, without some features."""
        counts = np.zeros((self.made.n_cells, len(GENES)), dtype=object)
        for (cell, feature), value in self.made.totals().items():
            target = self.targets[feature]
            if target is not None and feature not in without:
                counts[cell, target] += value
        return counts

    @property
    def too_large(self) -> bool:
        """Whether a place or a gene holds more than a count may be."""
        return bool((self.truth() > MOST).any() or max([0, *self.made.totals().values()]) > MOST)


def _fits(value: int, dtype: str) -> bool:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return value <= 2 ** (np.finfo(kind).nmant + 1)
    return value <= np.iinfo(kind).max


@st.composite
def _dtypes(draw: st.DrawFn, container: str) -> str:
    if container in TEXT:
        return draw(st.sampled_from(["<i8", "<f8"]))
    name = draw(st.sampled_from([*INTEGERS, *FLOATS]))
    # npz files of the other byte order are refused, as scipy writes none.
    big = container.startswith(("h5ad", "zarr", "tenx", "loom")) and draw(st.booleans())
    return f"{'>' if big else '<'}{name}"


@st.composite
def _triples(
    draw: st.DrawFn, container: str, n_cells: int, n_features: int, dtype: str
) -> list[tuple[int, int, int]]:
    values = [value for value in _VALUES if _fits(value, dtype)]
    # Sums of the largest are no counts any more, and mostly refused.
    values = 4 * [value for value in values if value < 2**25] + values
    # A few places take most of the values, so that many are there twice and more.
    places = draw(
        st.lists(
            st.tuples(st.integers(0, n_cells - 1), st.integers(0, n_features - 1)),
            min_size=1 if n_cells * n_features < 9 else 3,
            max_size=25,
            unique=container not in SPARSE,
        )
    )
    zeros = container in SPARSE and draw(st.booleans())
    pool = st.sampled_from([*values, 0, *values] if zeros else values)
    triples = [(*place, draw(pool)) for place in places]
    if container in SPARSE and draw(st.booleans()):
        again = draw(st.lists(st.sampled_from(places), max_size=20))
        triples += [(*place, draw(pool)) for place in again]
    return triples


def _written(draw: st.DrawFn, gene: int, style: str, mark: str) -> str:
    """Return a name of a gene in one writing."""
    name, symbol = GENES.ids[gene], GENES.symbols[gene]
    if style == "mixed":
        style = draw(st.sampled_from(["id", "version", "symbol", "prefixed"]))
    if style == "version":
        return f"{name}.{draw(st.integers(1, 19))}"
    if style == "prefixed":
        return f"GRCh38{draw(st.sampled_from(['_', '___']))}{draw(st.sampled_from([name, symbol]))}"
    if style == "joined":
        return f"{symbol}{mark}{name}" if mark != "|" else f"{name}{mark}{symbol}"
    if style == "dots":
        return symbol.replace("-", ".")
    if style == "lower":
        return name.lower()
    return symbol if style == "symbol" else name


_NOTHING = ("nothing", "tdTomato", "ERCC-00002", "__alignment_not_unique", "AC000000.99")


@dataclass(frozen=True, kw_only=True)
class _Feature:
    name: str
    symbol: str
    target: int | None = None
    certain: bool = True
    type: str = EXPRESSION
    genome: str = "GRCh38"


def _genes(draw: st.DrawFn) -> list[_Feature]:
    """Draw genes in one writing, some of them twice, and names of nothing."""
    genes = draw(st.lists(st.integers(0, len(GENES) - 1), min_size=1, max_size=7, unique=True))
    style = draw(st.sampled_from([*EXACT_STYLES, *LOSSY_STYLES]))
    mark = draw(st.sampled_from(["_", "|"]))
    found = [
        _Feature(
            name=_written(draw, gene, style, mark),
            symbol=GENES.symbols[gene],
            target=gene,
            certain=style not in LOSSY_STYLES,
        )
        for gene in genes
    ]
    for number in range(draw(st.integers(0, 2))):
        # The same gene a second time: as it stands, or made unique as scanpy and R do.
        first = found[draw(st.integers(0, len(genes) - 1))]
        end = draw(st.sampled_from(["", f"-{number + 1}", f".{number + 1}"]))
        found.append(
            replace(first, name=first.name + end, symbol=first.symbol + end, certain=not end)
        )
    nothing = draw(st.lists(st.sampled_from(_NOTHING), max_size=2, unique=True))
    return found + [_Feature(name=name, symbol=name) for name in nothing]


def _of_other_types(draw: st.DrawFn) -> list[_Feature]:
    """Draw features that are not gene expression, some by the name of a gene."""
    found = []
    for _ in range(draw(st.integers(0, 4))):
        gene = draw(st.integers(0, len(GENES) - 1))
        names = [GENES.ids[gene], GENES.symbols[gene], "CD4_TotalSeqB", "HTO_1", "chr1:1-90"]
        name = draw(st.sampled_from(names))
        symbol = draw(st.sampled_from([name, GENES.symbols[gene]]))
        found.append(_Feature(name=name, symbol=symbol, type=draw(st.sampled_from(OTHER_TYPES))))
    return found


def _of_another_genome(draw: st.DrawFn) -> list[_Feature]:
    """Draw genes of a mouse, some by the name of a human gene."""
    found = []
    for number in range(draw(st.integers(0, 3))):
        gene = draw(st.integers(0, len(GENES) - 1))
        name = draw(st.sampled_from([f"mm10___Gene{number}", GENES.symbols[gene]]))
        found.append(_Feature(name=name, symbol=name, genome="mm10"))
    return found


@st.composite
def examples(draw: st.DrawFn, container: str) -> Example:
    """Draw a dataset for a container.

    Args:
        draw: Of hypothesis.
        container: One of made_sources.CONTAINERS.
    """
    n_cells = draw(st.integers(1, 6))
    features = _genes(draw)
    with_types = container in WITH_TYPES and draw(st.booleans())
    if with_types:
        features += _of_other_types(draw)
    options, must = {}, True
    with_genomes = container in WITH_GENOMES and draw(st.booleans())
    if with_genomes:
        others = _of_another_genome(draw)
        features += others
        if draw(st.integers(0, 3)):
            options["genome"] = "GRCh38"
        must = not others or "genome" in options
    features = draw(st.permutations(features))
    dtype = draw(_dtypes(container))
    both = draw(st.booleans())
    made = Made(
        n_cells=n_cells,
        triples=draw(_triples(container, n_cells, len(features), dtype)),
        ids=[feature.name for feature in features],
        symbols=[feature.symbol for feature in features] if both else None,
        types=[feature.type for feature in features] if with_types else None,
        genomes=[feature.genome for feature in features] if with_genomes else None,
        dtype=dtype,
        pointers=draw(st.sampled_from(["<i4", "<i8"])),
        obs=_obs(draw, container, n_cells) if container in WITH_OBS else _no_obs(n_cells),
        barcodes=draw(_barcodes(container, n_cells)),
    )
    # Equal numbers of rows and columns do not tell which are the cells.
    assume("transposed" not in container or n_cells != len(features))
    options["counts"] = draw(st.sampled_from(["X", "X", "auto"]))
    if len(made.obs.columns):
        options["obs_columns"] = "*"
    return Example(
        made=made,
        targets=[feature.target for feature in features],
        certain=[feature.certain for feature in features],
        options=options,
        must=must and options["counts"] == "X" and container not in TEXT,
    )


def _characters(container: str) -> st.SearchStrategy[str]:
    # HDF5 holds no NUL in a text, and no file a lone surrogate.
    least = 0 if container.startswith("zarr") else 1
    return st.characters(min_codepoint=least, exclude_categories=["Cs"])


def _texts(container: str) -> st.SearchStrategy[str]:
    hard = ["", "\r", "a\rb", "\n", "\t", '"', "NA", "nan", "None", "  x ", "\u2028", "\x1f", "é"]
    return st.one_of(
        st.sampled_from(hard),
        st.text(_characters(container), max_size=8),
        st.just("long" * 50_000),
    )


def _barcodes(container: str, n_cells: int) -> st.SearchStrategy[list[str]]:
    plain = [f"AAAC{n}-1" for n in range(n_cells)]
    if container not in WITH_OBS:
        return st.just(plain if "npz" not in container else [])
    texts = st.text(_characters(container), min_size=1, max_size=6)
    return st.one_of(st.just(plain), st.lists(texts, min_size=n_cells, max_size=n_cells))


def _no_obs(n_cells: int) -> pd.DataFrame:
    return pd.DataFrame(index=range(n_cells))


def _obs(draw: st.DrawFn, container: str, n_cells: int) -> pd.DataFrame:
    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=n_cells, max_size=n_cells))

    texts = _texts(container)
    floats = st.one_of(st.floats(width=32), st.just(float("nan")))
    kinds: dict[str, Any] = {
        "text": lambda: pd.Series(column(texts), dtype=object),
        "float64": lambda: np.array(column(st.floats()), dtype=np.float64),
        "float32": lambda: np.array(column(floats), dtype=np.float32),
        "int64": lambda: np.array(column(st.integers(-(2**63), 2**63 - 1)), dtype=np.int64),
        "uint8": lambda: np.array(column(st.integers(0, 255)), dtype=np.uint8),
    }
    if container != "loom":
        missing = st.one_of(st.none(), texts)
        whole = st.one_of(st.none(), st.integers(-9, 9))
        kinds |= {
            "category": lambda: pd.Categorical(column(missing)),
            "ordered": lambda: pd.Categorical(column(texts), ordered=True),
            "codes": lambda: pd.Categorical(column(whole)),
            "boolean": lambda: np.array(column(st.booleans()), dtype=bool),
            "Int64": lambda: pd.array(column(whole), dtype="Int64"),
        }
    names = draw(st.lists(st.sampled_from(sorted(kinds)), max_size=3, unique=True))
    frame = pd.DataFrame({name: kinds[name]() for name in names}, index=range(n_cells))
    if len(names) and draw(st.booleans()):
        frame = frame.rename(columns={names[0]: "cell_type"})
    return frame
