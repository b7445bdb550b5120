"""The schedule follows the length of a run, and one that a run does not finish is warned of."""

from __future__ import annotations

import pytest

from sclong_ds.config.load import load_config, preset_names
from sclong_ds.config.sections import RunConfig
from sclong_ds.engine.schedule import learning_rate, unfinished_schedule
from sclong_ds.training.run import describe_schedule

PUBLISHED = {
    "sclong_1b": (2000, 45000), "sclong_1b_recommended": (2000, 45000),
    "sclong_1gpu": (500, 20000), "sclong_100m": (1000, 50000),
    "sclong_tiny_published": (40, 640),
    "sclong_tiny": (20, 320),
    "sclong_reference": (1200610, 3601830),
}  # fmt: skip
"""Steps of warm-up and of decay by preset, at the preset's own length."""


def rates(config: RunConfig) -> list[float]:
    """Return the learning rate of every step as a share of the peak."""
    steps = config.run.max_steps
    optim = config.optim.in_steps(steps)
    return [learning_rate(optim, step) / optim.lr for step in range(steps)]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_of_its_own_length_has_its_published_schedule(name: str) -> None:
    config = load_config(name)
    optim = config.optim.in_steps(config.run.max_steps)
    assert (optim.warmup_steps, optim.decay_steps) == PUBLISHED[name]
    assert unfinished_schedule(config.optim, max_steps=config.run.max_steps) is None


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 17, 160, 5000])
@pytest.mark.parametrize("name", preset_names())
def test_the_length_of_the_run_alone_changes_the_schedule(name: str, steps: int) -> None:
    config = load_config(name, [f"run.max_steps={steps}"])
    shares = rates(config)
    assert unfinished_schedule(config.optim, max_steps=config.run.max_steps) is None
    if steps >= 16:
        warm_up, whole = PUBLISHED[name]
        assert shares[-1] < config.optim.min_lr_ratio + 0.05
        assert shares.index(max(shares)) == pytest.approx(steps * warm_up / whole, abs=1.51)


def test_steps_that_are_set_stay() -> None:
    """As in every configuration that was saved before the schedule could follow."""
    fixed = ["optim.warmup_steps=40", "optim.decay_steps=640", "optim.lr=2e-3"]
    short, long = (load_config("sclong_tiny", [*fixed, f"run.max_steps={n}"]) for n in (640, 900))
    assert rates(long)[:640] == rates(short) == rates(load_config("sclong_tiny_published"))
    assert set(rates(long)[640:]) == {0.1}
    share = load_config("sclong_tiny", [*fixed[1:], "run.max_steps=900"])
    assert rates(share) == rates(long)


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["run.max_steps=5000", "optim.warmup_steps=2000", "optim.decay_steps=45000"],
         r"last step is 99% of its peak: optim.decay_steps=45000, run.max_steps=5000; set"),
        (["run.max_steps=22500", "optim.warmup_steps=0", "optim.decay_steps=45000"],
         "last step is 55% of its peak"),
        (["run.max_steps=24750", "optim.warmup_steps=0", "optim.decay_steps=45000"], None),
        (["run.max_steps=100", "optim.warmup_steps=100"], "within the warm-up"),
        (["run.max_steps=100", "optim.warmup_steps=99"], None),
        (["run.max_steps=4", "optim.warmup_steps=2000"], "within the warm-up"),
        (["run.max_steps=100", "optim.schedule=constant", "optim.warmup_steps=200"],
         "within the warm-up"),
        (["run.max_steps=100", "optim.schedule=constant"], None),
        (["run.max_steps=100", "optim.min_lr_ratio=0.7"], None),
        (["run.max_steps=50", "optim.decay_steps=100", "optim.min_lr_ratio=0.7"], "86% of its"),
        (["run.max_steps=105", "optim.decay_steps=50", "optim.warmup_steps=10",
          "optim.schedule=warm_restarts"], "within the warm-up"),
        (["run.max_steps=112", "optim.decay_steps=50", "optim.warmup_steps=10",
          "optim.schedule=warm_restarts"], "100% of its peak"),
        (["run.max_steps=100", "optim.decay_steps=50", "optim.schedule=warm_restarts"], None),
    ],
)  # fmt: skip
def test_a_run_that_ends_before_its_schedule_is_warned_of(
    overrides: list[str], warning: str | None
) -> None:
    config = load_config("sclong_1b", overrides)
    found = unfinished_schedule(config.optim, max_steps=config.run.max_steps)
    if warning is None:
        assert found is None
    else:
        assert found is not None
        assert warning in found


@pytest.mark.parametrize("text", ["1000", "1e3", "0.05", "5e-2"])
def test_a_warm_up_is_steps_or_a_share(text: str) -> None:
    config = load_config("sclong_1gpu", [f"optim.warmup_steps={text}"])
    assert config.optim.in_steps(config.run.max_steps).warmup_steps == 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.warmup_steps=1.0", r"got 1\.0, allowed: a whole number of steps, or a share"),
        ("optim.warmup_steps=-0.1", "must be >= 0"),
        ("optim.warmup_steps=true", "warmup_steps: expected float, got True"),
        ("optim.warmup_steps=null", "warmup_steps: expected float, got null"),
        ("optim.decay_steps=0", r"decay_steps: got 0, must be >= 1, or null for run\.max_steps"),
    ],
)
def test_what_is_no_length_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("sclong_1gpu", [override])


def test_a_run_of_one_step_is_told_in_the_singular(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config("sclong_tiny", ["run.max_steps=1", "optim.warmup_steps=0"])
    with caplog.at_level("INFO"):
        describe_schedule(config.optim, max_steps=1, warns=False)
    assert caplog.text.rstrip().endswith("in the last of 1 step")
