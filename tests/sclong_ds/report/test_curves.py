"""The curves of a run: smoothing, restarts, what is drawn.

Covers also `sclong_ds/report/figures.py`.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from matplotlib.figure import Figure

from sclong_ds.report import curves as plots
from sclong_ds.report.figures import bin_error_figure, prediction_density_figure
from sclong_ds.run_folder.rows import running_mean


def lines_of(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    lines = figure.axes[0].get_lines()
    return {str(i.get_label()): (list(i.get_xdata()), list(i.get_ydata())) for i in lines}


def train_rows(values: Sequence[float]) -> list[dict[str, float]]:
    return [{"step": s, "train/loss": v} for s, v in enumerate(values, start=1)]


def test_loss_figure_shows_all_three_curves_and_restarts() -> None:
    rows = train_rows([3.0, 2.0, math.nan, 1.0])
    rows += [{"step": s, "val/mse": 2.0 - s / 4, "val/baseline_mse": 1.5} for s in (0, 4)]
    lines = lines_of(plots.loss_figure(rows, ylabel="MSE", restarts=[2, 3]))
    assert lines["training"] == ([1, 2, 4], [3.0, 2.0, 1.0])
    assert lines["validation"] == ([0, 4], [2.0, 1.0])
    assert lines["validation, per-gene mean predictor"] == ([0, 4], [1.5, 1.5])
    assert lines["restart"][0] == [2, 2]


def test_a_legend_takes_no_width_from_the_axes() -> None:
    rows = train_rows([3.0, 2.0] * 20)
    more = {"val/mse": 1.0, "val/baseline_mse": 1.5, "val/strongest_mse": 1.2}
    rows += [{"step": s, **more} for s in (0, 40)]
    names = {f"a run whose name is rather long {n}": rows for n in range(5)}
    for figure in (
        plots.loss_figure(rows, ylabel="MSE", restarts=[2]),
        plots.runs_figure(names, "train/loss", ylabel="loss"),
        plots.runs_figure({"a": rows, "b": rows}, "train/loss", ylabel="loss"),
    ):
        figure.draw_without_rendering()
        box = figure.axes[0].get_position()
        assert box.width > 0.85
        assert box.height > 0.5


def test_single_spike_does_not_set_the_scale() -> None:
    figure = plots.loss_figure(train_rows([1.0] * 500 + [1e6] + [1.0] * 500), ylabel="MSE")
    assert figure.axes[0].get_ylim() == pytest.approx((0.0, 1.12))


def test_long_curves_are_thinned() -> None:
    figure = plots.curve_figure(train_rows([1.0] * 9001), "train/loss", ylabel="loss")
    lengths = [len(x) for x, _ in lines_of(figure).values()]
    assert max(lengths) <= 2000
    assert min(lengths) > 1000


def test_running_mean_is_centred_and_shrinks_at_the_ends() -> None:
    mean = running_mean(np.array([0.0, 3.0, 6.0, 9.0, 0.0]), window=3)
    assert mean.tolist() == [1.5, 3.0, 6.0, 5.0, 4.5]


def test_bins_keep_their_labels_where_one_is_empty() -> None:
    row = {"step": 1.0, "val/mse": 1.0}
    for k, value in ((0, 0.5), (2, 0.7), (10, 0.9)):
        row |= {f"val/mse/bin_{k}": value, f"val/baseline_mse/bin_{k}": 2 * value}
    axes = bin_error_figure(row, labels=[f"about {k}" for k in range(11)]).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["about 0", "about 2", "about 10"]
    assert [p.get_height() for p in axes.patches] == [0.5, 0.7, 0.9, 1.0, 1.4, 1.8]
    with pytest.raises(ValueError, match="10 bin labels, but there is a bin 10"):
        bin_error_figure(row, labels=["x"] * 10)
    with pytest.raises(ValueError, match="no val/mse/bin_K"):
        bin_error_figure({"step": 1.0, "val/mse": 1.0})


def test_density_states_the_agreement() -> None:
    true = np.random.default_rng(0).gamma(2.0, size=400).astype(np.float32)
    axes = prediction_density_figure(true + np.float32(0.5), true).axes[0]
    assert axes.get_title(loc="left") == "Pearson 1.000   MSE 0.250   400 values"
    assert axes.collections[0].get_array().sum() == 400


def test_density_of_constant_predictions_has_no_pearson() -> None:
    true = np.linspace(0.0, 4.0, 50)
    axes = prediction_density_figure(np.zeros(50), true).axes[0]
    assert axes.get_title(loc="left").startswith("MSE ")


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_density_refuses_other_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="two 1-D arrays of one length, not empty"):
        prediction_density_figure(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_same_rows_give_the_same_bytes() -> None:
    rows = train_rows(np.linspace(2, 1, 50).tolist())
    first, second = (plots.loss_figure(rows, ylabel="MSE") for _ in range(2))
    assert plots.svg_bytes(first) == plots.svg_bytes(second)
    assert plots.png_bytes(first) == plots.png_bytes(second)


def test_validations_of_several_runs_are_drawn_as_they_are_and_means_say_so() -> None:
    rows = [{"step": s, "val/mse": 1.25 if s == 200 else 0.25} for s in range(400)]
    plain = plots.runs_figure({"a": rows}, "val/mse", ylabel="error", smooth=False).axes[0]
    assert max(plain.lines[0].get_ydata()) == 1.25
    assert plain.get_ylabel() == "error"
    both = {"a": rows, "b": rows[:100]}
    smooth = plots.runs_figure(both, "val/mse", ylabel="error").axes[0]
    assert smooth.get_ylabel() == "error\nmean of 5 to 17 values"
