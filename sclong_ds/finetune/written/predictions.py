"""Write predictions.h5ad: the input's annotation with what held-out fits predict of each cell.

    obs   predicted_LABEL, predicted_LABEL_probability (_error of numbers),
          predicted_LABEL_unknown, predicted_LABEL_by: the fold whose fits, which did not see
          the cell's group, predicted it; `final`: a cell that was not learnt from,
          predicted by the model that is written
    obsm  X_sclong, by the model that is written

Shapes: N cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from pandas import DataFrame

from sclong_ds.embedding.cells import Cells
from sclong_ds.embedding.embed import KEY, embed_counts, plain_columns
from sclong_ds.embedding.record import input_record, record_of
from sclong_ds.embedding.stored import UNS_KEY, measured_column, measured_record
from sclong_ds.exported.head import FittedHead, prediction_columns
from sclong_ds.exported.model_dir import load_model
from sclong_ds.files.atomic import whole_file
from sclong_ds.finetune.fit import Fitted
from sclong_ds.finetune.scored.compare import Outcome
from sclong_ds.finetune.setting import Setting
from sclong_ds.finetune.written.model import MODEL

PREDICTIONS = "predictions.h5ad"


def write_predictions(
    setting: Setting,
    outcome: Outcome,
    last: Fitted,
    head: FittedHead,
    cells: Cells,
    *,
    embedded: NDArray[np.float32],
    with_counts: bool,
    batch_size: int,
) -> None:
    """Write predictions.h5ad; it appears whole or not at all.

    Args:
        setting: Of the fits.
        outcome: Predictions of the held-out fits.
        last: The fit of all groups, with outputs for the cells that it did not learn from.
        head: Its head.
        cells: The input.
        embedded: (N, W) embedding by the model before fine-tuning.
        with_counts: Whether to write the counts as X.
        batch_size: Cells embedded at a time.
    """
    model, examples = load_model(setting.out / MODEL, device=setting.ranks.device), setting.examples
    if not setting.on_features:
        embedded = embed_counts(
            model, examples.counts, batch_size=batch_size, measured=examples.measured
        )
    empty = np.diff(examples.counts.indptr) == 0
    genes = DataFrame({"symbol": model.genes.symbols}, index=list(model.genes.ids))
    table = AnnData(
        examples.counts.astype(np.float32) if with_counts else None,
        obs=plain_columns(
            cells.obs.assign(
                **measured_column(cells.measured), **columns_of(setting, outcome, last, head)
            )
        ),
        var=plain_columns(genes),
        obsm={KEY: np.where(empty[:, None], 0.0, embedded).astype(np.float32)},
        uns={
            UNS_KEY: record_of(model, setting.out / MODEL)
            | input_record(cells)
            | measured_record(cells.measured)
        },
    )
    with whole_file(setting.out / PREDICTIONS) as partial:
        table.write_h5ad(partial, compression="gzip")


def columns_of(
    setting: Setting, outcome: Outcome, last: Fitted, head: FittedHead
) -> dict[str, NDArray[Any]]:
    """Return the columns of obs: predictions of held-out fits, and of the last one for the rest."""
    examples, name = setting.examples, f"predicted_{head.label}"
    distance = head.reference.distance(last.features)
    rest = prediction_columns(
        head.label, head.classes, outputs=last.outputs * head.spread + head.offset,
        distance=distance, judgement=head.judgement,
    )  # fmt: skip
    rest[f"{name}_unknown"] |= np.diff(examples.counts[last.rows].indptr) == 0
    used = examples.used
    shares = outcome.shares[used]
    own: dict[str, NDArray[Any]] = {f"{name}_unknown": outcome.unknown[used]}
    if examples.classes:
        own[name] = np.array(examples.classes, dtype=object)[shares.argmax(axis=1)]
        own[f"{name}_probability"] = shares.max(axis=1)
    else:
        own[name], own[f"{name}_error"] = shares[:, 0], outcome.error[used]
    found = {}
    for column, values in rest.items():
        whole = np.empty(len(used), dtype=values.dtype)
        whole[used], whole[last.rows] = own[column], values
        found[column] = whole
    by = np.array([f"fold {fold + 1}" for fold in examples.fold], dtype=object)
    return found | {f"{name}_by": np.where(used, by, "final")}
