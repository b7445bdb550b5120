# %% [markdown]
# # From my h5ad to a UMAP
#
# Put the path of your own file for `PATH`: an h5ad with raw counts in `X`, `raw` or a layer, human
# genes named by symbol or Ensembl id. Everything else stays as it is. `model` is the small model of
# [Pretrain and review](pretrain_and_review.md); a trained one, a folder or `hf://ORG/NAME`, goes in
# its place.

# %%
import anndata
import matplotlib.pyplot as plt
import numpy as np
from umap import UMAP

import sclong_ds
from sclong_ds.demo import CELLS

PATH = CELLS / "immune_a.h5ad"
cells = anndata.read_h5ad(PATH)
model = sclong_ds.load_model("model")

# %% [markdown]
# Counts are checked before anything is computed: log values, scaled values or another species are
# refused with the reason.

# %%
cells.obsm["X_sclong"] = sclong_ds.embed(model, cells)
cells.obsm["X_sclong"].shape

# %%
cells.obsm["X_umap"] = UMAP(random_state=0, n_jobs=1).fit_transform(cells.obsm["X_sclong"])

# %% [markdown]
# The cells carry no annotation. Markers tell what the groups are: T cells (CD3D), B cells (CD79A),
# monocytes (LYZ), NK cells (NKG7).

# %%
total = np.asarray(cells.X.sum(axis=1)).ravel()
figure, axes = plt.subplots(1, 4, figsize=(12, 3), constrained_layout=True)
for ax, gene in zip(axes, ["CD3D", "CD79A", "LYZ", "NKG7"], strict=True):
    value = np.log1p(1e4 * cells[:, gene].X.toarray().ravel() / total)
    points = ax.scatter(*cells.obsm["X_umap"].T, c=value, s=8, cmap="viridis")
    ax.set(title=gene, xticks=[], yticks=[])
    figure.colorbar(points, ax=ax)
figure

# %% [markdown]
# The file that scanpy, scvi-tools or cellxgene take further; `sclong embed model my.h5ad --out
# embedded.h5ad` writes the same embedding without Python, block by block.

# %%
cells.write_h5ad("embedded.h5ad")

# %% [markdown]
# A UMAP is a picture, no score. `sclong evaluate` compares the embedding with PCA and with an
# untrained model on your labels: [Use a model](../start/embed-your-cells.md).
