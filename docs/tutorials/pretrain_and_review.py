# %% [markdown]
# # Pretrain and review
#
# From files of counts to a trained model and the pictures by which to judge it, on 430 human immune
# cells that come with the package. It takes about a minute on one CPU core, because the model is
# small, reads 10,000 genes instead of 27,874 and trains for eight steps: enough to see each command
# work, not enough to learn biology from. The folder `model` that it leaves is what the other
# tutorials begin with.

# %%
import anndata
import numpy as np
import pandas as pd

import sclong_ds
from sclong_ds.demo import CELLS  # the folder of the bundled cells

cells = anndata.read_h5ad(CELLS / "immune_a.h5ad")
cells

# %% [markdown]
# ## Files to a corpus
#
# A manifest has a line for each dataset. `immune_c` will be the validation set: cells that the
# model never trains on.

# %%
names = {"immune_a": "immune_a.h5ad", "immune_b": "immune_b.h5", "immune_c": "immune_c.csv.gz"}
manifest = pd.DataFrame({"dataset_id": list(names), "path": [CELLS / f for f in names.values()]})
manifest.to_csv("manifest.tsv", sep="\t", index=False)

# %% [markdown]
# Leave the next step out for a real model: it then has all genes of the bundled list.

# %%
listed = sclong_ds.GeneVocabulary.bundled()
totals = pd.Series(np.asarray(cells.X.sum(axis=0)).ravel(), index=cells.var_names)
frequent = set(totals[totals.index.isin(listed.symbols)].nlargest(10_000).index)
chosen = [i for i, symbol in enumerate(listed.symbols) if symbol in frequent]
columns = (listed.ids, listed.symbols, listed.classes)
sclong_ds.GeneVocabulary(*(tuple(c[i] for i in chosen) for c in columns)).write("genes.tsv")

# %%
# !sclong-prep convert manifest.tsv --out corpus --genes genes.tsv

# %%
# !sclong-prep finalize corpus --validation-datasets immune_c

# %% [markdown]
# ## Train
#
# `train` runs in this process, on one rank; on several GPUs the same settings go behind
# `deepspeed --module sclong_ds.pretrain --config sclong_tiny`. The gene graph is left
# out here (`model.gene_encoder=embedding`), and so is MLflow (`tracking.enabled=false`).

# %%
settings = [
    "run.dir=runs/first",
    "data.corpus=corpus",
    "model.gene_encoder=embedding",
    "engine.ds_config=zero1",
    "run.max_steps=8",
    "run.validate_every_n_steps=8",
    "run.validation_cells=32",
    "tracking.enabled=false",
    "tracking.picture_cells=null",
]
run_dir = sclong_ds.train(sclong_ds.load_config("sclong_tiny", settings))

# %% [markdown]
# ## Review
#
# The model must be better than simple predictors of the same hidden values, above all than `nearest`
# and `principal`, a linear prediction corrected by the most similar training cells or by principal
# directions of training cells. A run of eight steps is not; the columns are what to look at in a run
# of your own, in MLflow or, as here, in the run folder.

# %%
rows = pd.read_json(run_dir / "metrics.jsonl", lines=True)
scores = rows[rows["val/mse"].notna()].set_index("step")
mse = [name for name in scores if name.startswith("val/") and name.endswith("mse")]
scores[mse].T.dropna().round(4)

# %%
# !sclong status runs/first

# %%
# !sclong report runs/first --out report.html

# %% [markdown]
# `report.html` is one page without any address in it: open it in a browser, or send it to a
# colleague.
#
# ## Export
#
# The model becomes a folder of weights, genes and a card. `export` also chooses how a cell's
# vector is made, on the validation cells (fewer of them here than it would take).

# %%
# !sclong export runs/first --out model --recipe-cells 32

# %%
model = sclong_ds.load_model("model")
print(f"{model.n_genes} genes; embedding: {model.recipe.text()}")
