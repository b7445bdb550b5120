"""Species are told from ids, genomes before names and the names that manifests give organisms."""

import pytest

from data_prep.genes.species import is_species, species_of, species_of_id


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
