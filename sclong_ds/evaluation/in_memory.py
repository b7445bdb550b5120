"""Score embeddings from Python: `sclong_ds.evaluate`.

    model = sclong_ds.load_model("MODEL_DIR")
    scores = sclong_ds.evaluate(model, adata, label="cell_type")

The rules, rows and scores are those of `python -m sclong_ds evaluate`. Nothing is written, and the
caller's AnnData stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from anndata import AnnData
from pandas import DataFrame

from sclong_ds.command_line import check_whole
from sclong_ds.embedding.in_memory import CellSource, Reading, opened_cells
from sclong_ds.model.sclong import ScLong

if TYPE_CHECKING:
    from sclong_ds.evaluation.scored_cells import ScoredCells


def evaluate(
    model: ScLong,
    cells: CellSource,
    *,
    label: str,
    batch: str | None = None,
    group: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    **reading: Unpack[Reading],
) -> DataFrame:
    """Score the embeddings of labelled cells beside rows that any model must be better than.

    Args:
        model: From `load_model`.
        cells: Raw counts, as for `embed`; AnnData, or the path of a file, with annotations.
        label: Column of `obs` with the labels, say of cell types; 5 cells a label at least.
        batch: Column of `obs` with the batches; None: mixing of batches is not scored.
        group: Column of `obs` with donors or datasets, each predicted from the others; None: folds
            are of cells.
        batch_size: Cells embedded at a time.
        seed: Of folds, resamples, clusters and untrained weights.
        **reading: How they are read: see `sclong_ds.Reading`.

    Returns:
        Scores (columns: see `sclong_ds.evaluation.scores`) of the representations (rows: sclong and
        those of `sclong_ds.evaluation.ladder`), the strongest row first; NaN where a score is
        undefined. `attrs["verdict"]` lists in words what the model is not better than,
        `attrs["intervals"]` the bounds of 95% by row and score.

    Raises:
        FileNotFoundError: No such path.
        ValueError: No such column, too few labels, batches or groups, a wrong batch size or seed,
            or what `embed` refuses.
    """
    check_whole("batch_size", batch_size, least=1)
    check_whole("seed", seed, least=0)
    columns = list(dict.fromkeys(name for name in (label, batch, group) if name is not None))
    if isinstance(cells, DataFrame):
        raise ValueError("a DataFrame of counts has no labels; give AnnData, or a path")
    if isinstance(cells, AnnData):
        absent = [name for name in columns if name not in cells.obs]
        if absent:
            there = ", ".join(map(str, cells.obs)) or "none"
            raise ValueError(f"obs has no column {absent[0]!r}; it has {there}")
    with opened_cells(model, cells, columns, reading) as opened:
        # scikit-learn takes a second to import, which `import sclong_ds` must not.
        from sclong_ds.evaluation.scored_cells import choose_cells

        scored = choose_cells(opened, label=label, batch=batch, group=group)
    return _scored(model, scored, batch_size=batch_size, seed=seed)


def _scored(model: ScLong, scored: ScoredCells, *, batch_size: int, seed: int) -> DataFrame:
    from sclong_ds.evaluation.ladder import NO_CONTEXT
    from sclong_ds.evaluation.representations import embed_scored, representations
    from sclong_ds.evaluation.scores import Layout, fewer_neighbours, score
    from sclong_ds.evaluation.verdict import intervals_of, score_table, verdict

    embedded = embed_scored(model, scored, batch_size=batch_size, what="embed")
    points = representations(model, scored, embedded=embedded, batch_size=batch_size, seed=seed)
    layout = Layout(labels=scored.labels, batches=scored.batches, groups=scored.groups, seed=seed)
    scores = {name: score(x, layout) for name, x in points.items()}
    table = score_table(scores)
    table.attrs["verdict"] = [verdict(scores, name="knn_accuracy", no_context=NO_CONTEXT)]
    table.attrs["verdict"] += fewer_neighbours(layout)
    table.attrs["intervals"] = {name: intervals_of(found) for name, found in scores.items()}
    return table
