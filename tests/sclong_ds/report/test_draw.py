"""The pictures of a validation: what is drawn from which data, and what is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from kernels.reference import favor_attention_oracle
from sclong_ds.report import draw
from sclong_ds.report import figures as validation_plots
from sclong_ds.report.curves import png_bytes
from sclong_ds.run_folder.pending_pictures import (
    RANK_COLUMNS,
    pending,
    put_back,
    take_data,
    write_data,
)
from sclong_ds.training import pictured as review


def texts(figure: Figure) -> list[str]:
    """Return titles, tick labels and legends of a figure."""
    found = []
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_xlabel()]
        found += [t.get_text() for t in axes.get_yticklabels()]
        legend = axes.get_legend()
        found += [t.get_text() for t in legend.get_texts()] if legend else []
    return found


def data(n: int = 30) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(n, 8)).astype(np.float32)
    embedding[n // 2 :] += 9
    return {
        "predicted_true": rng.gamma(2.0, size=(2, 50)),
        "embedding": embedding,
        "n_expressed": np.arange(n) + 1,
        "dataset": np.where(np.arange(n) % 2, "odd", "even"),
        "label": np.where(np.arange(n) < n // 2, "T", "B"),
        "label_name": np.array("cell type"),
        "gene_symbols": np.array(["A", "B", "C", "D"]),
        "gene_encodings": np.array([[0.0, 1], [5, 0], [0, 1.1], [0, 0]]),
        "gene_attention": np.full((4, 4), 2.0),
        "rank_times": np.ones((3, len(RANK_COLUMNS))),
    }


def rows() -> list[dict[str, float]]:
    found = [
        {"step": s, "train/grad_norm": 1.0, "train/grad_norm/large": 0.5, "train/spike": s == 3,
         "train/skipped_steps": 2}
        for s in range(1, 6)
    ]  # fmt: skip
    return [*found, {"step": 5, "val/mse": 1.0, "val/mse/bin_0": 1.0, "val/pearson/bin_0": 0.3}]


@pytest.mark.thorough
def test_all_six_pictures_are_drawn_from_full_data() -> None:
    found = dict(draw.validation_figures(data(), rows(), step=5, bin_labels=["low"]))
    assert list(found) == [
        "predicted_vs_true", "expression_bins", "cells", "genes", "gradient_norms", "ranks",
    ]  # fmt: skip
    assert all(len(png_bytes(figure)) > 10_000 for figure in found.values())
    cells = texts(found["cells"])
    assert {"by dataset", "by cell type", "by expressed genes"} <= set(cells)
    assert {"even (15)", "odd (15)", "T (15)", "B (15)", "UMAP 1"} <= set(cells)
    norms = texts(found["gradient_norms"])
    assert {"whole model", "large", "loss spike"} <= set(norms)
    assert found["gradient_norms"].axes[0].get_title(loc="right") == "2 skipped steps"


def test_without_cells_and_steps_the_other_pictures_are_drawn() -> None:
    given = {"predicted_true": data()["predicted_true"]}
    assert [n for n, _ in draw.validation_figures(given, [], step=0, bin_labels=None)] == [
        "predicted_vs_true"
    ]


def test_cells_without_counts_are_left_out_and_few_are_projected_plainly() -> None:
    given = data(8)
    given["n_expressed"][0] = 0
    found = dict(draw.validation_figures(given, [], step=0, bin_labels=None))["cells"]
    assert len(found.axes[0].collections[0].get_offsets()) == 4
    assert len(found.axes[-2].collections[0].get_offsets()) == 7
    assert "PCA 1" in texts(found)


def test_projection_is_the_same_again_and_keeps_groups_apart() -> None:
    embedding = data(40)["embedding"]
    points, method = draw.project(embedding)
    assert method == "UMAP"
    assert np.array_equal(points, draw.project(embedding)[0])
    first, second = points[:20], points[20:]
    apart = np.linalg.norm(first.mean(axis=0) - second.mean(axis=0))
    assert apart > 2 * max(first.std(axis=0).max(), second.std(axis=0).max())


def test_alike_genes_stand_side_by_side_and_unexpressed_ones_are_left_out() -> None:
    given = data()
    figure = validation_plots.gene_figure(
        given["gene_encodings"], given["gene_attention"], given["gene_symbols"]
    )
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert sorted(names) == ["A", "B", "C"]
    assert abs(names.index("A") - names.index("C")) == 1
    likeness, attention = (figure.axes[i].images[0].get_array() for i in (0, 1))
    assert likeness[names.index("A"), names.index("C")] > 0.9
    assert likeness[names.index("A"), names.index("B")] < 0
    assert np.allclose(attention, 0.0), "what all rows attend to alike is removed"


def test_many_groups_share_the_last_colour() -> None:
    groups = np.repeat([f"type {k:02d}" for k in range(14)], range(20, 6, -1))
    figure = validation_plots.cell_figure(
        np.zeros((len(groups), 2)), {"label": groups}, n_expressed=np.ones(len(groups), int),
        method="PCA",
    )  # fmt: skip
    legend = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert legend[0] == "type 00 (20)"
    assert legend[-1] == f"5 others ({sum(range(11, 6, -1))})"


def test_of_many_ranks_those_that_differ_are_shown() -> None:
    times = np.ones((500, len(RANK_COLUMNS)))
    times[321, 0] = 9.0
    figure = validation_plots.rank_figure(times)
    assert "the 64 of 500 ranks that differ most" in figure.axes[0].get_title(loc="left")
    tops = [p.get_y() + p.get_height() for p in figure.axes[0].patches]
    assert max(tops) == pytest.approx(12.0)


def test_every_waiting_validation_is_drawn_once(tmp_path: Path) -> None:
    given = {"predicted_true": data()["predicted_true"]}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0, "time": 1.0}\n')
    for step in (10, 5):
        write_data(tmp_path, step, given)
    taken, _ = take_data(pending(tmp_path)[0])
    assert [f.name for f in pending(tmp_path)] == ["step_00000010.npz"]
    put_back(tmp_path)  # as the start of a run does with what a killed process was drawing
    assert [f.name for f in pending(tmp_path)] == ["step_00000005.npz", "step_00000010.npz"]
    assert draw.main([str(tmp_path)]) == 0
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        "predicted_vs_true.png", "step_00000005", "step_00000010",
    }  # fmt: skip
    assert (tmp_path / "report.html").is_file()
    assert not taken.exists()


def test_attention_is_that_of_all_genes_and_embedding_that_of_the_expressed() -> None:
    heads, width, genes = 2, 8, np.array([1, 4, 9])
    torch.manual_seed(0)
    features = torch.randn(12, width)
    attention = SimpleNamespace(heads=heads, dim_head=width, scope="sample", eps=1e-4)
    layers = [SimpleNamespace(attention=attention)]
    decoder = SimpleNamespace(layers=layers, favor=True, features=lambda device: [features])
    config = SimpleNamespace(base_dim=5, zero_genes=None)
    model: Any = SimpleNamespace(decoder=decoder, config=config)
    sums = review._GeneSums(model, genes, device=torch.device("cpu"), compiled=False)
    qkv, h = torch.randn(3, 50, 3 * heads * width), torch.randn(3, 50, 5)
    q, k, _ = qkv.unflatten(-1, (3, heads, width)).unbind(2)
    # Values that are the keys' own places make the output the weights.
    places = torch.eye(50)[None, :, None].expand(3, 50, heads, 50)
    x = (torch.rand(3, 50) > 0.5).float()
    x[0, genes] = 1.0
    got = sums._computed_attention(qkv, x, None)
    for column, gene in enumerate(genes):
        v = places[..., gene : gene + 1].expand(3, 50, heads, width).contiguous()
        weights = favor_attention_oracle(q, k, v, features)[..., 0].mean(dim=2) * 50
        torch.testing.assert_close(got[:, :, column], weights[:, genes], rtol=1e-4, atol=1e-4)
    sums._h, sums._qkv = h, qkv
    pooled = torch.stack([h[b][x[b] > 0].mean(dim=0) for b in range(3)])
    torch.testing.assert_close(sums.add(x), pooled)
    shown = x[:, genes].bool()
    mean = torch.stack([h[:, g][shown[:, i]].mean(dim=0) for i, g in enumerate(genes)])
    torch.testing.assert_close(sums._encoded[:, :-1] / sums._encoded[:, -1:], mean)


@pytest.mark.parametrize(
    ("columns", "label"),
    [(["barcode", "Cell Type"], "Cell Type"), (["label", "cell.type"], "cell.type"),
     (["barcode"], None)],
)  # fmt: skip
def test_label_is_found_by_its_usual_names(columns: list[str], label: str | None) -> None:
    obs = pd.DataFrame({"dataset_id": ["a", "b"], **{c: [f"{c} 1", None] for c in columns}})
    corpus: Any = SimpleNamespace(obs=lambda _: obs)
    found = review._annotation(corpus, np.arange(2))
    assert found["dataset"].tolist() == ["a", "b"]
    if label is None:
        assert "label" not in found
    else:
        assert str(found["label_name"]) == label
        assert found["label"].tolist() == [f"{label} 1", ""]
