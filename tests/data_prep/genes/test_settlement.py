"""The list as a whole, and the other gene columns, decide what a name alone cannot."""

from __future__ import annotations

import re

import anndata
import numpy as np
import pytest
from gene_matrices import GENES, matrix, names

from data_prep.genes.gene_names import RESOURCES, GeneMap, GeneResolver
from data_prep.genes.harmonize import counts_lost, excel_dates
from data_prep.source.source import UnusableError

RESOLVER = GeneResolver(GENES)


def column(symbol: str) -> int:
    return GENES.symbols.index(symbol)


def resolved(**columns: np.ndarray) -> GeneMap:
    values = np.ones((1, len(next(iter(columns.values())))), dtype=int)
    return RESOLVER.resolve(matrix(values, **columns))


def test_a_name_of_several_genes_is_the_one_that_the_list_does_not_name() -> None:
    # SEPT2: SEPTIN2 or SEPTIN6. The list names the other one by symbol, id or alias, or not.
    for other in ("SEPTIN6", GENES.ids[column("SEPTIN6")], "SEPT6"):
        gene_map = resolved(index=names("SEPT2", other, "TP53"))
        assert gene_map.target.tolist()[:2] == [column("SEPTIN2"), column("SEPTIN6")]
        assert gene_map.kinds["settled"] == 1
    alone = resolved(index=names("SEPT2", "TP53"))
    assert alone.target[0] == -1
    assert alone.kinds["ambiguous"] == 1
    assert not alone.measured[[column("SEPTIN2"), column("SEPTIN6")]].any()


def test_a_list_from_before_the_renaming_names_genes_by_the_symbols_of_then() -> None:
    for other in ("MARCH1", "SEPT9", "MARC1"):
        gene_map = resolved(index=names("SEPT2", "DEC1", other, "TP53"))
        assert gene_map.target.tolist()[:2] == [column("SEPTIN2"), column("DELEC1")]
        assert gene_map.kinds["settled"] == 2
    for other in ("SEPTIN9", "MARCHF1", "P53", "1-Mar"):
        gene_map = resolved(index=names("SEPT2", "DEC1", other, "TP53"))
        assert gene_map.target.tolist()[:2] == [-1, -1]
        assert gene_map.kinds["ambiguous"] == 2
    both = resolved(index=names("SEPT2", "SEPTIN2", "DEC1", "BHLHE40", "MARCH1"))
    assert both.target.tolist()[:3] == [column(s) for s in ("SEPTIN6", "SEPTIN2", "DELEC1")]


def test_a_name_of_genes_that_are_all_named_stays_unknown() -> None:
    gene_map = resolved(index=names("SEPT2", "SEPTIN2", "SEPTIN6"))
    assert gene_map.target[0] == -1


def test_two_names_that_are_left_with_one_gene_are_both_unknown() -> None:
    pairs: dict[str, list[str]] = {}
    for name, kind in RESOLVER._kinds.items():
        if kind == "ambiguous":
            pairs.setdefault(RESOLVER._meanings[name], []).append(name)
    first, second = next(found for found in pairs.values() if len(found) > 1)[:2]
    genes = RESOLVER._meanings[first].split("|")
    labels = names(first, second, *genes[1:], "TP53")
    assert RESOLVER.columns(labels).tolist()[:2] == [-1, -1]
    one = RESOLVER.columns(names(first, *genes[1:], "TP53"))
    assert one[0] == GENES.index[genes[0]]


def test_an_alias_yields_to_the_current_name() -> None:
    naa38 = column("NAA38")
    for current in ("NAA38", GENES.ids[naa38], "GRCh38_NAA38"):
        gene_map = resolved(index=names("LSMD1", "TP53", current))
        assert gene_map.target.tolist() == [-1, column("TP53"), naa38]
        assert gene_map.kinds["yielded"] == 1
    assert RESOLVER.columns(names("LSMD1", "TP53"))[0] == naa38


def test_a_retired_id_falls_back_to_the_symbol_beside_it() -> None:
    ids = names(*GENES.ids[:80])
    ids[::40] = ["ENSG00000999000", "ENSG00000999001.4"]
    gene_map = resolved(index=ids, feature_name=names(*GENES.symbols[:80]))
    assert gene_map.column == "index"
    assert gene_map.target.tolist() == list(range(80))
    assert gene_map.repairs == {"beside": 2}
    assert gene_map.kinds["symbol"] == 2
    # Only ids were asked for.
    assert RESOLVER.resolve(matrix(np.ones((1, 80)), index=ids), "index").target[0] == -1


def test_the_id_of_another_gene_does_not_fall_back() -> None:
    # MT-RNR1's id is known and not listed: whatever stands beside it is no name of a listed gene.
    ids = names("ENSG00000211459", *GENES.ids[:9])
    gene_map = resolved(index=ids, symbol=names("TP53", *GENES.symbols[:9]))
    assert gene_map.target[0] == -1
    # Nor where the symbols name the genes: the id says that this TP53 is not TP53.
    gene_map = resolved(index=names("TP53", *GENES.symbols[:9]), ids=ids)
    assert gene_map.target[0] == -1


def test_a_retired_id_yields_where_another_id_is_of_the_gene() -> None:
    ids = names("ENSG00000999000", *GENES.ids[:9])
    gene_map = resolved(index=ids, symbol=names(GENES.symbols[0], *GENES.symbols[:9]))
    assert gene_map.target.tolist() == [-1, *range(9)]
    assert gene_map.kinds["yielded"] == 1
    # Symbols alone do not tell which of the two it is: both are summed.
    assert RESOLVER.columns(names("TBCE", "TBCE")).tolist() == [column("TBCE")] * 2


def test_an_id_beside_a_name_of_several_genes_decides() -> None:
    symbols = names("SEPT2", *GENES.symbols[:9])
    ids = names(GENES.ids[column("SEPTIN2")], *["x"] * 5, *GENES.ids[5:9])
    gene_map = resolved(index=symbols, ids=ids)
    assert gene_map.target[0] == column("SEPTIN2")


def test_a_column_that_names_other_genes_is_not_asked() -> None:
    ids = names("ENSG00000999000", *GENES.ids[:39])
    neighbours = names("TP53", *GENES.symbols[1:40])
    assert resolved(index=ids, nearest=neighbours).target[0] == -1
    others = names("TP53", "CD4", *["gene"] * 38)
    assert resolved(index=ids, note=others).target[0] == -1


def test_counts_of_real_cells_are_kept_or_lost_for_a_reason() -> None:
    """The symbols of the demo's cells, of 2014: what the list as a whole saves, and gives up."""
    cells = anndata.read_h5ad(RESOURCES / "demo" / "immune_a.h5ad")
    labels = np.array(cells.var_names, dtype=object)
    totals = np.asarray(cells.X.sum(axis=0)).ravel().astype(np.int64)
    gene_map = resolved(index=labels)
    assert gene_map.kinds == {
        "ensembl": 0, "symbol": 18871, "alias": 4396, "settled": 47, "yielded": 107,
        "ambiguous": 16, "date": 0, "unlisted": 9349,
    }  # fmt: skip
    by_name = dict(zip(labels, gene_map.target, strict=True))
    for old, new in {"AGPAT9": "GPAT3", "GARS": "GARS1", "SEPT2": "SEPTIN2", "HN1": "JPT1"}.items():
        assert by_name[old] == column(new)
    for name in ("LSMD1", "MKI67IP", "NOTCH2NL", "SHFM1", "MT-RNR2"):
        assert by_name[name] == -1
    for name in ("TRAC", "TRBC2", "IGKC"):
        assert by_name[name] == column(name)
    lost = counts_lost(gene_map, totals)
    assert set(lost) == {"yielded", "ambiguous", "unlisted"}
    assert sum(lost.values()) + totals[gene_map.target >= 0].sum() == totals.sum()


def test_dates_are_named_with_their_counts() -> None:
    gene_map = resolved(index=names("1-Mar", "TP53", "2-Sep", "1-Mar", "what"))
    totals = np.array([3, 5, 0, 4, 9])
    assert excel_dates(gene_map, totals) == {"1-Mar": 7, "2-Sep": 0}
    assert counts_lost(gene_map, totals) == {"date": 7, "unlisted": 9}


@pytest.mark.parametrize("first", ["index", "ids"])
def test_columns_that_differ_are_read_by_their_ids(first: str) -> None:
    # The symbols of two genes are swapped, as names change hands between annotations.
    symbols = names(GENES.symbols[1], GENES.symbols[0], *GENES.symbols[2:40])
    columns = {"index": symbols, "ids": names(*GENES.ids[:40])}
    ordered = {name: columns[name] for name in (first, *columns)}
    assert resolved(**ordered).target.tolist() == list(range(40))


def test_a_symbol_among_ids_yields_to_the_gene_that_is_there_by_its_id() -> None:
    """Antibody CD4, in a list of ids whose types were lost."""
    ids = [*GENES.ids[:40]]
    listed, absent = column(GENES.symbols[3]), GENES.symbols[50]
    gene_map = resolved(index=names(*ids, GENES.symbols[3], absent))
    assert gene_map.target.tolist() == [*range(40), -1, 50]
    assert gene_map.kinds["yielded"] == 1
    # Where symbols are no exception, the list is a mixture: the gene twice.
    half = resolved(index=names(*ids[:8], *GENES.symbols[8:16], GENES.symbols[3]))
    assert half.target.tolist() == [*range(16), listed]


N_BOTH = 400
IDS, SYMBOLS = list(GENES.ids[:N_BOTH]), list(GENES.symbols[:N_BOTH])


@pytest.mark.parametrize(
    "ids", [IDS[1:] + IDS[:1], sorted(IDS, reverse=True), IDS[:100] + IDS[101:] + IDS[100:101]]
)
@pytest.mark.parametrize("index", ["symbols", "ids"])
def test_ids_shifted_beside_their_symbols_are_refused(ids: list[str], index: str) -> None:
    columns = {"symbols": names(*SYMBOLS), "ids": names(*ids)}
    ordered = {name: columns[name] for name in sorted(columns, key=lambda name: name != index)}
    row = next(row for row in range(N_BOTH) if ids[row] != IDS[row])
    beside = f"{ids[row]} is {SYMBOLS[IDS.index(ids[row])]}, beside it stands {SYMBOLS[row]}"
    with pytest.raises(UnusableError, match=re.escape(beside)) as error:
        resolved(**ordered)
    for part in (f"of {N_BOTH} rows", "correct the table", "gene_column (--gene-column)"):
        assert part in str(error.value)
    values = matrix(np.ones((1, N_BOTH), dtype=int), **ordered)
    for named in ({"column": "symbols"}, {"id_type": "symbol"}):
        assert RESOLVER.resolve(values, **named).target.tolist() == list(range(N_BOTH))


def test_some_rows_that_changed_places_are_a_warning() -> None:
    moved = IDS[:30] + IDS[31:50] + IDS[30:31] + IDS[50:]
    (warning,) = resolved(symbols=names(*SYMBOLS), ids=names(*moved)).warnings
    assert f"ids and symbols name different genes in 20 of {N_BOTH} rows" in warning
    assert f"{IDS[31]} is {SYMBOLS[31]}, beside it stands {SYMBOLS[30]}" in warning
    third = resolved(
        symbols=names(*SYMBOLS), ids=names(*IDS), feature_name=names(*reversed(SYMBOLS))
    )
    assert third.target.tolist() == list(range(N_BOTH))
    assert (
        f"ids and feature_name name different genes in {N_BOTH} of {N_BOTH} rows"
        in third.warnings[0]
    )


def test_old_names_and_columns_of_other_genes_are_no_contradiction() -> None:
    alias = {
        RESOLVER._columns[name]: name for name, kind in RESOLVER._kinds.items() if kind == "alias"
    }
    before = [alias.get(column, SYMBOLS[column]) for column in range(N_BOTH)]
    assert sum(old != new for old, new in zip(before, SYMBOLS, strict=True)) > 100
    elsewhere = GENES.symbols[N_BOTH : 2 * N_BOTH]
    nearest = [SYMBOLS[row // 10] for row in range(1, N_BOTH + 1)]
    passed_on = [SYMBOLS[row + 200 if row < 3 else row] for row in range(N_BOTH)]
    for column in (before, elsewhere, nearest, passed_on):
        gene_map = resolved(ids=names(*IDS), gene_name=names(*column))
        assert gene_map.warnings == ()
        assert gene_map.target.tolist() == list(range(N_BOTH))
