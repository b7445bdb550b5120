"""Names as programs mangle them: each spelling of a gene finds it, and never another gene."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from gene_matrices import GENES, matrix, names
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.genes.gene_names import GeneResolver
from data_prep.genes.settlement import KINDS

RESOLVER = GeneResolver(GENES)
TP53, TBCE = GENES.index["ENSG00000141510"], GENES.symbols.index("TBCE")


def in_r(name: str) -> str:
    """Return a name as R's make.names writes it."""
    dotted = re.sub(r"[^A-Za-z0-9._]", ".", name)
    return dotted if dotted[0].isalpha() else f"X{dotted}"


SPELLINGS: dict[str, Callable[[str, str], str]] = {
    "id": lambda gene, symbol: gene,
    "id with version": lambda gene, symbol: f"{gene}.12",
    "lower-case id": lambda gene, symbol: f"{gene.lower()}.3",
    "id of the Y chromosome": lambda gene, symbol: f"{gene}.4_PAR_Y",
    "id made unique": lambda gene, symbol: f"{gene}.4.1",
    "symbol": lambda gene, symbol: symbol,
    "blanks": lambda gene, symbol: f" {symbol}\u00a0",
    "quotes": lambda gene, symbol: f'"{symbol}"',
    "byte order mark": lambda gene, symbol: f"\ufeff{symbol}",
    "typographic hyphen": lambda gene, symbol: symbol.replace("-", "\u2011"),
    "genome, dashes": lambda gene, symbol: f"GRCh38---{symbol}",
    "genome, patch": lambda gene, symbol: f"GRCh38.p13_{symbol}",
    "genome, underscores": lambda gene, symbol: f"GRCh38___{symbol}",
    "genome, hg19": lambda gene, symbol: f"hg19_{symbol}",
    "genome, id": lambda gene, symbol: f"hg38-{gene}.1",
    "genome of a 10x reference": lambda gene, symbol: f"GRCh38-2020-A_{symbol}",
    "symbol_id": lambda gene, symbol: f"{symbol}_{gene}",
    "id_symbol": lambda gene, symbol: f"{gene}_{symbol}",
    "id|symbol": lambda gene, symbol: f"{gene}.7|{symbol}",
    "symbol:id": lambda gene, symbol: f"{symbol}:{gene}",
    "symbol;id": lambda gene, symbol: f"{symbol};{gene}.2",
    "id,symbol": lambda gene, symbol: f"{gene},{symbol}",
    "symbol (id)": lambda gene, symbol: f"{symbol} ({gene})",
    "Seurat": lambda gene, symbol: f"{symbol}-{gene}",
}
R_SPELLINGS: dict[str, Callable[[str, str], str]] = {
    "R dots": lambda gene, symbol: in_r(symbol),
    "R dots behind a genome": lambda gene, symbol: in_r(f"GRCh38_{symbol}"),
    "R dots, joined": lambda gene, symbol: in_r(f"{symbol}|{gene}"),
    "upper case": lambda gene, symbol: symbol.upper(),
}
"""Spellings that a few genes share; of those nothing is said."""


@pytest.mark.thorough
@pytest.mark.parametrize("spelling", [*SPELLINGS, *R_SPELLINGS])
def test_each_gene_of_the_vocabulary_is_found(spelling: str) -> None:
    write = (SPELLINGS | R_SPELLINGS)[spelling]
    labels = names(*map(write, GENES.ids, GENES.symbols))
    found, own = RESOLVER.columns(labels), np.arange(len(GENES))
    lost = np.count_nonzero(found < 0)
    assert np.all((found == own) | (found < 0))
    assert lost == 0 if spelling in SPELLINGS else lost < 40


@given(seed=st.integers(0, 2**32 - 1), n_genes=st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_counts_reach_their_gene_or_are_reported_lost(seed: int, n_genes: int) -> None:
    rng = np.random.default_rng(seed)
    genes = rng.choice(len(GENES), n_genes, replace=False)
    written = list((SPELLINGS | R_SPELLINGS).values())
    labels, own = [], []
    for gene in genes.tolist():
        labels.append(rng.choice(written)(GENES.ids[gene], GENES.symbols[gene]))
        own.append(gene)
        if rng.random() < 0.1:  # a repeat, as R, scanpy and others number it
            labels.append(labels[-1] + rng.choice([".1", "-1", "_1"]))
            own.append(gene)
    nothing = ["1-Mar", "44256", "NaN", "", "TRAV1-1", "AC004556.1", "tp53", "eGFP"]
    nothing.append("ENSG00000999000")
    labels += nothing
    own += [-1] * len(nothing)
    order = rng.permutation(len(labels))
    found = RESOLVER.columns(names(*labels)[order])
    assert np.all((found == np.array(own)[order]) | (found == -1))
    assert sum(RESOLVER.kinds(names(*labels)).values()) == len(labels)
    assert np.count_nonzero(found >= 0) >= n_genes * 0.9 - 1


def test_a_name_that_means_a_gene_is_not_repaired() -> None:
    # NKX2.1 is an alias in its own right; SNORD116-1 is a gene, and no second SNORD116.
    assert RESOLVER.read_name("NKX2.1") == "NKX2.1"
    labels = names("SNORD116", "SNORD116-1", "MT-RNR2", "MT.RNR2")
    found = RESOLVER.columns(labels)
    assert [GENES.symbols[column] if column >= 0 else None for column in found] == [
        "SNORD116", "SNORD116-1", None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".1", "-2", "_3"])
def test_a_number_is_a_suffix_only_where_the_bare_name_is_there(suffix: str) -> None:
    assert RESOLVER.columns(names(f"TBCE{suffix}")).tolist() == [-1]
    assert RESOLVER.columns(names(f"TBCE{suffix}", "TBCE")).tolist() == [TBCE] * 2


def test_a_name_with_two_readings_is_lost() -> None:
    # HCCS-1 is an alias of ST20, and the second HCCS of a list made unique.
    st20 = GENES.symbols.index("ST20")
    assert RESOLVER.columns(names("HCCS-1")).tolist() == [st20]
    assert RESOLVER.columns(names("HCCS-1", "HCCS"))[0] == -1
    # KRTAP16.1 is an alias of KRTAP17-1, and R's way to write KRTAP16-1.
    assert RESOLVER.columns(names("KRTAP16.1")).tolist() == [-1]
    # Reads that two genes share.
    assert RESOLVER.columns(names("ENSG00000141510;ENSG00000111640")).tolist() == [-1]


@pytest.mark.parametrize(
    "name",
    [
        *("1-Mar", "Mar-02", "2-Sep", "Sep-02", "1-Dec", "2021-09-09", "03/01/2021", "1-mar-21"),
        *("2021-03-01 00:00:00", "X1.Mar", "1.Mar", "10-March", "'2-Sep"),
    ],
)
def test_dates_are_recognised_and_never_guessed(name: str) -> None:
    labels = names(name, "TP53", "GAPDH")
    assert RESOLVER.columns(labels)[0] == -1
    assert RESOLVER.kinds(labels)["date"] == 1


def test_gene_names_and_numbers_are_no_dates() -> None:
    for name in ("DEC2", "MARCH10", "SEPT9", "APR-1", "MAR9", "OCT4", "marker-12", "12345"):
        assert RESOLVER.kinds(names(name, "TP53"))["date"] == 0, name
    days = names("44256", *GENES.symbols[:30])
    assert RESOLVER.kinds(days)["date"] == 1
    entrez = names(*map(str, range(40_000, 40_030)), "TP53")
    assert RESOLVER.kinds(entrez)["date"] == 0


def test_only_repairs_that_found_a_gene_are_counted() -> None:
    labels = names(
        "GRCh38_TP53", "GRCh38_nothing", "HLA.A", "C1ORF56", "TBCE", "TBCE.1", "hg19_HLA.B"
    )

    gene_map = RESOLVER.resolve(matrix(np.ones((1, len(labels)), dtype=int), index=labels))
    assert gene_map.repairs == {"genome": 2, "characters": 2, "case": 1, "suffix": 1}
    assert set(gene_map.kinds) == set(KINDS)
    assert gene_map.kinds["symbol"] == 6
