"""Species are told from ids, genomes before names and the names that manifests give organisms."""

import numpy as np
import pytest

from data_prep.genes.species import find_other_species, is_species, species_of, species_of_id


@pytest.mark.parametrize(
    ("name", "species"),
    [
        ("mm10---Gapdh", "mouse"),
        ("GRCm38.p6_Gapdh", "mouse"),
        ("MOUSE_Gapdh", "mouse"),
        ("Gapdh_ENSMUSG00000057666.3", "mouse"),
        ("ensmusg00000057666", "mouse"),
        ("Rnor_6.0_Gapdh", "rat"),
        ("GRCz11:gapdh", "zebrafish"),
        ("GRCh38_GAPDH", None),
        ("ENSG00000111640", None),
        ("mm1", None),
        ("MOUSE", None),
    ],
)
def test_the_species_of_a_name(name: str, species: str | None) -> None:
    assert species_of_id(name) == species


def test_a_vocabulary_without_ensembl_ids_is_human() -> None:
    assert species_of(["a", "b"]) == "human"
    assert species_of(["ENSDARG00000000001", "transgene"]) == "zebrafish"


@pytest.mark.parametrize("name", ["mouse", "Mus musculus", "mus_musculus", "NCBITaxon:10090"])
def test_organisms_have_several_names(name: str) -> None:
    assert is_species(name, "mouse")
    assert not is_species(name, "human")


def test_human_symbols_are_named_for_a_mouse_vocabulary() -> None:
    """Upper case alone tells them; spike-ins and unknown words tell nothing."""
    known = {"Actb", "Gapdh", "Tp53", "mt-Nd1"}.__contains__
    names = np.array(["ACTB", "GAPDH", "TP53", "ERCC-00002", "x1"], object)
    found = find_other_species(names, known, home="mouse")
    assert found is not None
    assert (found.name, found.n_genes, found.kind) == ("human", 3, "symbols")
    own = np.array(["Actb", "Gapdh", "TP53", *(f"Gm{i}" for i in range(20))], object)
    assert find_other_species(own, known, home="mouse") is None
