"""What the report shows of validations: the baselines first, then the model, then how it got there.

All of it is of hidden values alone, in runs whose rows have `val/n_hidden`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from sclong_ds.page import html as page
from sclong_ds.page.words import cell, counted, recorded
from sclong_ds.report import compare
from sclong_ds.run_folder.metric_names import (
    BASELINES,
    DATASET_MSE,
    MEAN_MSE,
    MSE,
    N_CELLS,
    N_HIDDEN,
    PEARSON,
    PER_GENE,
    SEVERAL_MSE,
    SHOWN_MSE,
    STRONGEST_MSE,
    WITHIN_CELL,
    of_baseline,
)
from sclong_ds.run_folder.record import Rows, RunRecord
from sclong_ds.run_folder.rows import (
    cells_scored,
    compared,
    is_hidden_only,
    sentence,
    standing,
    strongest,
    unlisted,
    verdict,
)

_MAX_ROWS = 12
PREDICTORS = {
    "gene_mean": "gene's mean value",
    "offset": "gene mean + one offset of the cell's visible values",
    "poisson": "Poisson counts of the visible depth",
    "linear": "linear in gene mean and visible depth",
    "nearest": "linear + 30 most similar cells of a training sample",
    "principal": "linear + 32 principal directions of a training sample",
}
"""What each baseline predicts with; none of them is trained for more than a few numbers."""
_FIGURES = (
    (MSE, "MSE"),
    (SEVERAL_MSE, "MSE, counts ≥ 2"),
    (PEARSON, "Pearson"),
    (WITHIN_CELL, "within a cell"),
    (PER_GENE, "per gene across cells"),
)
ATTENTION_MSE, SOFTMAX_MSE = "attention/mse", "attention/softmax_mse"
MEAN_OF_VALUES = "/mean_mse"
_LAYER_FIGURES = (
    ("eps_share", "eps share of the denominator"),
    ("effective_keys", "effective keys / all keys"),
    ("beyond_mean", "|out - mean of values| / |mean of values|"),
)
_UNUSED = 0.01
"""Least relative rise of the error by which an attention counts as used."""
_COLUMNS = (
    ("step", "Step"),
    ("cells_seen", "Cells seen"),
    (STRONGEST_MSE, "Strongest baseline"),
    (MSE, "MSE"),
    (MEAN_MSE, "Gene mean"),
    (PEARSON, "Pearson"),
    (WITHIN_CELL, "within a cell"),
    (PER_GENE, "per gene"),
    (SHOWN_MSE, "Shown targets"),
    (N_HIDDEN, "Hidden values"),
    (N_CELLS, "Cells"),
)


def verdict_sentence(record: RunRecord) -> str:
    """Return what a run came to, in one sentence: its error beside the strongest baseline's.

    Args:
        record: The run.
    """
    if not record.validation:
        return "No validation was made: what the model has learnt is not known."
    last = record.validation[-1]
    when = f"After {counted(int(last['step']), 'step')}"
    if not is_hidden_only(last) or not standing(last):
        text = f"{when} the error of the validation on {cells_scored(last)} is "
        text += cell(last[MSE], MSE)
        if MEAN_MSE not in last:
            return f"{text}; no baseline was recorded to judge it by."
        mean = last[MEAN_MSE]
        return f"{text}, {compared(last[MSE], mean)} the per-gene mean ({cell(mean, MSE)})."
    pearson = last.get(PER_GENE, math.nan)
    across = (
        f"; across cells, a gene's hidden values correlate with the predictions by {pearson:.2f}"
        if math.isfinite(pearson)
        else ""
    )
    return (
        f"{when} the model's error on hidden values of {cells_scored(last)} is {last[MSE]:.4f}, "
        f"{standing(last)}{across}."
    )


def validation_section(record: RunRecord) -> Markup:
    """Return the HTML on the validations of a run; nothing where there are none."""
    if not record.validation:
        return Markup("")
    last = record.validation[-1]
    parts = [_headline(last), _predictors(last), _unlisted(last), _datasets(last)]
    final = compare.scores_table(last, record.summary.get("expression_bins"))
    if final:
        head = ["last validation", "values", *compare.SCORE_HEAD]
        note = "Beside each figure that of the predictor that knows every gene's mean."
        parts.append(page.table(head, final, numeric=True) + page.note(note))
    parts.append(_history(record.validation))
    if record.n_other_validations:
        parts.append(page.note(other_validations(record)))
    return page.join(part for part in parts if part)


def other_validations(record: RunRecord) -> str:
    """Return why earlier validations of a run are left out."""
    return (
        f"Left out: {counted(record.n_other_validations, 'validation')} of {record.name} by "
        "another version, whose error is not that of hidden values alone or is only that, and does "
        "not compare with the last one's."
    )


def attention_section(record: RunRecord) -> Markup:
    """Return the HTML on what attention does; nothing where no validation measured it."""
    rows = [row for row in record.validation if ATTENTION_MSE in row]
    if not rows:
        return Markup("")
    row = rows[-1]
    whole, names = row[ATTENTION_MSE], list(row)
    body = [["as it is", f"{whole:.4f}", ""]]
    for key in names:
        stack, is_mean = key.removeprefix("attention/"), key.endswith(MEAN_OF_VALUES)
        if is_mean or key == SOFTMAX_MSE:
            what = "all attention by exact softmax"
            if is_mean:
                name = stack.removesuffix(MEAN_OF_VALUES).replace("_", " ")
                what = f"attention of the {name} by the mean of values"
            body.append([what, f"{row[key]:.4f}", _change(row[key], whole, unused=is_mean)])
    head = ["replaced", "MSE of hidden values", "in words"]
    text = page.paragraph(f"Step {int(row['step']):,}, on a few validation cells.")
    text += page.table(head, body, numeric=True)
    layers = dict.fromkeys(
        key.split("/")[1] for key in names if key.startswith("attention/") and key.count("/") == 2
    )
    figures = [(figure, title) for figure, title in _LAYER_FIGURES]
    lines = [
        [layer.replace("_", " ").replace(".", ", layer "), *values]
        for layer in layers
        if any(
            values := [
                _four_digits(row.get(f"attention/{layer}/{figure}")) for figure, _ in figures
            ]
        )
    ]
    text += page.table(["layer", *(title for _, title in figures)], lines, numeric=True)
    return text + page.note(
        "FAVOR+ adds a constant, eps, to all its features: the part of the denominator that it "
        "makes gives every key the same weight. Effective keys: 1 means that every key gets the "
        "same weight, which is the mean of values. A stack whose attention can be replaced by the "
        "mean of values at no cost does not use it, whatever computing it costs."
    )


def _four_digits(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _change(error: float, whole: float, *, unused: bool) -> str:
    """Return what a replacement does to the error, in words."""
    if not (math.isfinite(error) and math.isfinite(whole) and whole > 0):
        return "not comparable"
    share = (error - whole) / whole
    size = f"{abs(share):.1%}"
    words = f"{size} {'higher' if share > 0 else 'lower'}" if float(size[:-1]) else "equal to 0.1%"
    if unused and share < _UNUSED:
        return f"{words}: this attention is not used"
    return words


def _headline(row: Mapping[str, float]) -> Markup:
    return page.paragraph(f"Step {int(row['step']):,}: {sentence(row)}.")


def _predictors(row: Mapping[str, float]) -> Markup:
    """Return the table of all predictors: the strongest baseline, the model, the others."""
    best = strongest(row)
    if best is None:
        return Markup("")
    known = [name for name in BASELINES if of_baseline(name, MSE) in row]
    others = sorted(
        (name for name in known if name != best), key=lambda name: row[of_baseline(name, MSE)]
    )
    body = []
    for name in (best, None, *others):
        words = f"the model is {compared(row[MSE], row[of_baseline(name, MSE)])}" if name else ""
        if name == best and STRONGEST_MSE in row:
            words = f"the model is {verdict(row)}"
        figures = (
            row.get(metric if name is None else of_baseline(name, metric), math.nan)
            for metric, _ in _FIGURES
        )
        title = "model" if name is None else PREDICTORS[name]
        if name == best:
            title = f"strongest baseline: {title}"
        shown = (f"{value:.4f}" if math.isfinite(value) else "" for value in figures)
        body.append([title, *shown, words])
    head = ["hidden values of held-out cells", *(title for _, title in _FIGURES), "in words"]
    note = (
        "Half of the values of droplet data are single counts, which follow from a cell's depth: "
        "what a model has learnt is what it predicts better than the strongest baseline. Within a "
        "cell: which genes are high in it. Per gene: in which cells of a dataset a gene is high."
    )
    return page.table(head, body, numeric=True) + page.note(note)


def _unlisted(row: Mapping[str, float]) -> Markup:
    """Return the table of figures that no other table has, under their own names."""
    best = strongest(row)
    body = []
    for name, value in unlisted(row).items():
        other = of_baseline(best, name) if best else ""
        body.append([name, recorded(value), recorded(row[other]) if other in row else ""])
    head = ["other figures", "model", "strongest baseline"]
    return page.table(head, body, numeric=True) if body else Markup("")


def _datasets(row: Mapping[str, float]) -> Markup:
    """Return the table of errors by dataset."""
    best = strongest(row)
    names = sorted(key.removeprefix(DATASET_MSE) for key in row if key.startswith(DATASET_MSE))
    if best is None or not names:
        return Markup("")
    body = []
    for name in names:
        ours = row[f"{DATASET_MSE}{name}"]
        other = row.get(of_baseline(best, f"{DATASET_MSE}{name}"), math.nan)
        body.append([name, cell(other, MSE), cell(ours, MSE), compared(ours, other)])
    head = ["dataset", f"MSE, strongest baseline ({best})", "MSE, model", "the model is"]
    return page.table(head, body, numeric=True)


def _history(rows: Rows) -> Markup:
    """Return the table of validations, a row each, thinned."""
    columns = [(key, name) for key, name in _COLUMNS if any(key in row for row in rows)]
    picked = _spread(rows, _MAX_ROWS)
    body = [[cell(row.get(key, math.nan), key) for key, _ in columns] for row in picked]
    text = page.table([name for _, name in columns], body, numeric=True)
    if len(picked) < len(rows):
        text += page.note(f"{len(picked)} of {len(rows)} validations, evenly spread.")
    return text


def _spread(rows: Rows, count: int) -> Rows:
    """Return at most `count` rows, evenly spread, the first and the last among them."""
    if len(rows) <= count:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).round().astype(int)]
