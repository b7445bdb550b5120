# %% [markdown]
# # Annotate cells, judged on held-out donors
#
# A model learns your labels on some donors and is scored on others: only that says how it will do on
# the next one. You need an h5ad with a column of labels and a column of donors.
#
# The bundled cells have neither, so both are made here: labels from the strongest of four groups of
# marker genes, and three "donors" by position in the file. Put your own file and columns instead.

# %%
import anndata
import numpy as np
import pandas as pd

from sclong_ds.demo import CELLS

cells = anndata.read_h5ad(CELLS / "immune_a.h5ad")
markers = {
    "T": ["CD3D", "CD3E", "CD3G"],
    "B": ["CD79A", "CD79B", "MS4A1"],
    "monocyte": ["LYZ", "S100A8", "S100A9"],
    "NK": ["NKG7", "GNLY", "KLRD1"],
}
share = {name: np.asarray(cells[:, genes].X.sum(axis=1)).ravel() for name, genes in markers.items()}
table = pd.DataFrame(share, index=cells.obs_names)
table = table / table.mean()
clear = table.max(axis=1) > 2 * table.apply(lambda row: row.nlargest(2).iloc[1], axis=1)
cells.obs["cell_type"] = table.idxmax(axis=1).where(clear & (table.max(axis=1) > 0.3))
cells.obs["donor"] = [f"donor{i % 3 + 1}" for i in range(cells.n_obs)]
pd.crosstab(cells.obs["cell_type"].fillna("no label"), cells.obs["donor"])

# %% [markdown]
# The markers made the labels, so they must not be what is learnt from. The small model was
# pretrained on these cells, without labels; without the markers the check for training cells does
# not know them again.

# %%
hidden = [gene for genes in markers.values() for gene in genes]
cells[:, ~cells.var_names.isin(hidden)].write_h5ad("labelled.h5ad")

# %% [markdown]
# Each donor is predicted from the others; a third one stops the training and calibrates it. Cells
# without a label are predicted too. Take the default `--seeds 3` for figures that you publish, and
# `--mode lora` to train more of the model than a head on its embedding.

# %%
# !sclong finetune model labelled.h5ad --label cell_type --group donor --folds 3 --seeds 1 --max-epochs 20 --out annotated tracking.enabled=false

# %% [markdown]
# The table has the baselines beside the model, on the same cells and donors. If logistic regression
# on PCA does as well, take that.

# %%
pd.read_csv("annotated/scores.tsv", sep="\t")

# %%
predicted = anndata.read_h5ad("annotated/predictions.h5ad")
predicted.obs.filter(like="cell_type").head()

# %% [markdown]
# `annotated/model` is a model folder like any other: `sclong embed annotated/model new.h5ad --out
# out.h5ad` adds the predictions, their probability and who is unknown to `obs` of new cells.
# More: [Fine-tune](../start/finetune.md).
