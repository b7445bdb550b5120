import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclong_ds.run_folder.files import RunFolder
from sclong_ds.run_folder.metric_names import SKIPPED_METRIC
from sclong_ds.run_folder.rows import read_metrics
from sclong_ds.training.guards import (
    MIN_LOSSES,
    SHIFT_STEPS,
    History,
    StepGuard,
    Verdict,
    history_of,
)

ORDINARY = [1.0 + 0.01 * (i % 7) for i in range(60)]


def guard_of(zscore: float = 8.0, window: int = 40, most: int = 3) -> StepGuard:
    return StepGuard(spike_zscore=zscore, spike_window=window, max_skipped_in_a_row=most)


def judge(guard: StepGuard, loss: float, *, applied: bool = True, step: int = 1) -> Verdict:
    return guard.judge(
        loss,
        grad_norm=1.0 if applied else math.inf,
        applied=applied,
        step=step,
        cells=range(100, 120),
        last_checkpoint="step_00000010",
    )


def kinds(guard: StepGuard, losses: list[float]) -> list[str]:
    return [judge(guard, loss).kind for loss in losses]


def test_ordinary_and_falling_losses_are_ok():
    assert set(kinds(guard_of(), ORDINARY)) == {"ok"}
    assert set(kinds(guard_of(), [10.0 * 0.9**i for i in range(100)])) == {"ok"}


def test_a_spike_is_reported_with_its_figures_and_cells():
    guard = guard_of()
    kinds(guard, ORDINARY)
    verdict = judge(guard, 5.0, step=61)
    assert verdict.kind == "spike"
    assert "step 61" in verdict.text
    assert "the loss is 5" in verdict.text
    assert "corpus rows 100, 101," in verdict.text
    assert "119" not in verdict.text


def test_a_spike_does_not_hide_the_next_one():
    guard = guard_of()
    kinds(guard, ORDINARY)
    assert kinds(guard, [50.0, 1.0, 1.0, 2.0]) == ["spike", "ok", "ok", "spike"]


def test_equal_losses_have_a_spread_to_measure_against():
    guard = guard_of()
    kinds(guard, [2.0] * 40)
    assert kinds(guard, [2.0 + 1e-6, 3.0]) == ["ok", "spike"]


def test_too_few_losses_and_zero_find_no_spike():
    assert kinds(guard_of(), [*ORDINARY[: MIN_LOSSES - 1], 50.0])[-1] == "ok"
    assert kinds(guard_of(), [*ORDINARY[:MIN_LOSSES], 50.0])[-1] == "spike"
    assert kinds(guard_of(zscore=0.0, window=1), [*ORDINARY, 50.0])[-1] == "ok"
    with pytest.raises(ValueError, match=r"run\.spike_window: got 19, allowed: at least 20"):
        guard_of(window=19)


def test_a_new_level_is_reported_a_few_times_only():
    guard = guard_of()
    kinds(guard, ORDINARY)
    verdicts = [judge(guard, 3.0 + 0.01 * (i % 7)) for i in range(100)]
    assert [v.kind for v in verdicts] == ["spike"] * SHIFT_STEPS + ["ok"] * (100 - SHIFT_STEPS)
    assert "not reported again" in verdicts[SHIFT_STEPS - 1].text
    assert judge(guard, 9.0).kind == "spike"


def test_skipped_steps_are_counted_and_stop_the_run_when_too_many_in_a_row():
    guard = guard_of(most=3)
    assert [judge(guard, math.nan, applied=False).kind for _ in range(2)] == ["skipped"] * 2
    assert judge(guard, 1.0).kind == "ok"
    verdict = judge(guard, 1.0, applied=False, step=4)
    assert verdict.kind == "skipped"
    assert "gradient norm inf (corpus rows 100" in verdict.text
    judge(guard, 1.0, applied=False)
    assert guard.skipped == 4
    with pytest.raises(ValueError, match="step 6: the loss is nan") as caught:
        judge(guard, math.nan, applied=False, step=6)
    for part in ("corpus rows 100", "3 in a row", "optim.lr", "step_00000010"):
        assert part in str(caught.value)


def test_a_skipped_step_is_no_part_of_the_window():
    guard = guard_of(most=99)
    kinds(guard, ORDINARY)
    before = guard.history.losses
    judge(guard, 1e9, applied=False)
    assert guard.history.losses == before


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_an_applied_step_that_is_not_finite_stops_the_run(loss: float, grad_norm: float):
    with pytest.raises(ValueError, match=r"the optimizer has changed .*checkpoint: none yet"):
        guard_of().judge(
            loss, grad_norm=grad_norm, applied=True, step=1, cells=[1], last_checkpoint=None
        )


steps = st.lists(
    st.one_of(st.floats(0.9, 1.1), st.just(None), st.sampled_from([1.0, 1.0, 9.0, 9.0, 9.0, 30.0])),
    min_size=30,
    max_size=160,
)


@settings(max_examples=60, deadline=None)
@given(losses=steps, data=st.data())
def test_a_resumed_run_judges_as_an_uninterrupted_one(losses, data, tmp_path_factory):
    """None stands for a skipped step; the cut-off start has continued after the checkpoint."""
    folder: Path = tmp_path_factory.mktemp("run")
    cut = data.draw(st.integers(1, len(losses)))
    straight, resumed = (guard_of(window=20, most=1000) for _ in range(2))
    verdicts = []
    with RunFolder(folder) as files:
        for step, loss in enumerate(losses, start=1):
            value = math.nan if loss is None else loss
            verdicts.append(judge(straight, value, applied=loss is not None, step=step))
            files.append_metrics(step, {"train/loss": value, SKIPPED_METRIC: straight.skipped})
            if step % 10 == 0:
                files.append_metrics(step, {"val/mse": 100.0})
    resumed.restore(history_of(read_metrics(folder), step=cut, spike_window=20))
    again = [
        judge(resumed, math.nan if loss is None else loss, applied=loss is not None, step=step)
        for step, loss in enumerate(losses[cut:], start=cut + 1)
    ]
    # The texts say how many skipped steps came in a row, so these agree too.
    assert again == verdicts[cut:]
    assert resumed.history == straight.history


@pytest.mark.parametrize("cut", range(41, 49))
def test_a_run_resumed_at_a_new_level_knows_how_often_it_was_reported(cut: int):
    losses = ORDINARY[:40] + [3.0] * 12
    straight, resumed = guard_of(window=20), guard_of(window=20)
    expected = kinds(straight, losses)
    rows = [{"step": i, "train/loss": loss} for i, loss in enumerate(losses, start=1)]
    resumed.restore(history_of(rows, step=cut, spike_window=20))
    assert kinds(resumed, losses[cut:]) == expected[cut:]


def test_history_of_a_run_without_the_skipped_column_and_of_a_new_run():
    rows = [{"step": 1.0, "train/loss": 2.0}, {"step": 2.0, "train/loss": 1.0}]
    assert history_of(rows, step=2, spike_window=20) == History((2.0, 1.0), 0, 0)
    assert history_of([], step=0, spike_window=20) == History()


def test_messages_are_one_line():
    guard = guard_of()
    kinds(guard, ORDINARY)
    for verdict in (judge(guard, 5.0), judge(guard, 5.0, applied=False)):
        assert re.fullmatch(r"[^\n]+", verdict.text)
