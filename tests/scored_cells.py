"""Made cells of two kinds and six donors that `finetune` learns from."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
from exported import named_genes
from scipy.sparse import csr_matrix

N_GENES, N_CELLS, DONORS = 60, 96, 6
GENES = named_genes(N_GENES)


def made_cells() -> anndata.AnnData:
    """Return cells of two kinds, told apart by the first genes, and an age that others follow."""
    rng = np.random.default_rng(0)
    kind, age = np.arange(N_CELLS) % 2, rng.uniform(0, 1, N_CELLS)
    mean = np.full((N_CELLS, N_GENES), 2.0)
    mean[:, :10] += 8 * kind[:, None]
    mean[:, 10:20] += 12 * age[:, None]
    names = np.array(["a", "b"], dtype=object)[kind]
    names[:4] = np.nan
    obs = pd.DataFrame(
        {"kind": names, "age": age, "donor": np.repeat(list("uvwxyz"), N_CELLS // DONORS)},
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    counts = csr_matrix(rng.poisson(mean).astype(np.float32))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=list(GENES.ids)))
