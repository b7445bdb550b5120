"""Settings of a corpus folder that make no sense."""

from __future__ import annotations

import pytest

from data_prep.staging.settings import Settings


@pytest.mark.parametrize("field", ["min_genes", "min_counts", "min_genes_mapped"])
def test_senseless_settings(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} 0: must be 1 or more"):
        Settings(genes_hash="", **{field: 0})
    with pytest.raises(ValueError, match="between 0 and 1"):
        Settings(genes_hash="", min_share_mapped=1.5)
    with pytest.raises(ValueError, match="max_mito_fraction -1"):
        Settings(genes_hash="", max_mito_fraction=-1)
    with pytest.raises(ValueError, match="max_counts 5: must be min_counts 9 or more"):
        Settings(genes_hash="", min_counts=9, max_counts=5)
