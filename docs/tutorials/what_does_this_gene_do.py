# %% [markdown]
# # What does this gene do?
#
# Three questions to a model about one gene, here CD79A: which genes have a similar vector, which
# representations move when it is deleted, and whether that is more than chance. The answers are
# statements about the model. With the small model of [Pretrain and review](pretrain_and_review.md),
# eight steps old, they are worth nothing; the commands are those for a trained one.

# %%
import anndata
import numpy as np
import pandas as pd

import sclong_ds
from sclong_ds.demo import CELLS

GENE = "CD79A"
model = sclong_ds.load_model("model")

# %% [markdown]
# ## Which genes are near it
#
# The vector of a gene before any cell is seen, and its mean representation over the cells that
# express it. The network holds the nearest genes by cosine.

# %%
cells = anndata.read_h5ad(CELLS / "immune_a.h5ad")
expressed = np.asarray((cells[:, GENE].X > 0).sum(axis=1)).ravel() > 0
cells[np.flatnonzero(expressed)[:6]].write_h5ad("few.h5ad")
print(f"{expressed.sum()} of {cells.n_obs} cells express {GENE}; 6 of them are read")

# %%
# !sclong genes model few.h5ad --out genes.h5ad --network cosine --of CD79A --edges 10

# %%
pd.read_csv("genes.cosine.tsv", sep="\t")

# %% [markdown]
# ## What moves when it is deleted
#
# Its value is set to zero, and every other gene goes through the encoder that read it before. Beside
# each shift stands that of random genes of equal expression (100 by default, 10 here, so that no p
# is below 1/11).

# %%
# !sclong perturb model few.h5ad --genes CD79A --mode delete --null 10 --batch-size 11 --out effects.h5ad

# %%
effects = anndata.read_h5ad("effects.h5ad")
effects.obs

# %%
moved = pd.DataFrame({"symbol": effects.var["symbol"].astype(str)})
moved["shift"] = np.asarray(effects.X[0])
moved["p"], moved["q"] = effects.layers["p"][0], effects.layers["q"][0]
moved.dropna().nlargest(10, "shift")

# %% [markdown]
# A gene that moves most may do so for its expression alone: read `p`, and `q` for many genes at
# once. Neither is an effect in a cell: for that, train on perturbed cells and compare with simple
# predictors. More: [What a gene does](../start/what-a-gene-does.md).
