"""Callbacks of real trainings: what they are told, and what comes of their errors, on all ranks.

Covers also `sclong_ds/training/callbacks/callback.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import run_forked, start_ranks
from small_runs import make_corpus

from sclong_ds.run_folder.files import read_events
from sclong_ds.run_folder.rows import read_metrics

pytestmark = pytest.mark.distributed
PROGRAM = """
import json, sys
import sclong_ds

corpus, run_dir = sys.argv[1:]


def config(steps=6):
    return sclong_ds.load_config("sclong_tiny", [
        f"run.dir={run_dir}", f"data.corpus={corpus}", f"run.max_steps={steps}",
        "model.gene_encoder=embedding", "model.top_seq_len=32", "run.validate_every_n_steps=3",
        "run.validation_cells=8", "checkpoint.every_n_steps=3", "optim.decay_steps=6",
        "tracking.enabled=false", "tracking.picture_cells=null", "engine.train_batch_size=4",
    ])


class Told(sclong_ds.Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, run):
        self.run = run
        self.calls.append(["start", run.step, run.rank, run.world_size, str(run.run_dir)])
        assert isinstance(run.model, sclong_ds.ScLong) and run.config.run.max_steps == 6

    def on_step(self, step, metrics):
        self.calls.append(["step", step, dict(metrics)])

    def on_validation(self, step, metrics):
        self.calls.append(["validation", step, dict(metrics)])

    def on_checkpoint(self, step, path):
        assert (path / "manifest.json").is_file()
        self.calls.append(["checkpoint", step, str(path)])

    def on_end(self, step, outcome):
        self.calls.append(["end", step, outcome])


class Raises(sclong_ds.Callback):
    def __init__(self, method, error):
        def fail(*args):
            raise error
        setattr(self, method, fail)


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("callbacks") / "corpus")


def alone(corpus: Path, run_dir: Path, code: str) -> str:
    """Run code after PROGRAM in a process of its own; returns what it printed."""
    done = run_forked(["-c", PROGRAM + code, str(corpus), str(run_dir)], timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return str(done.stdout)


def steps(run_dir: Path) -> list[tuple[float, float]]:
    rows = (r for r in read_metrics(run_dir) if "train/loss" in r)
    return [(r["train/loss"], r["data/cells_crc32"]) for r in rows]


def finish(run_dir: Path) -> dict[str, object]:
    return [e for e in read_events(run_dir) if e["event"] == "finish"][-1]


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    alone(corpus, run_dir, "sclong_ds.train(config())")
    return steps(run_dir)


def test_callbacks_are_told_what_the_run_records_and_change_nothing(
    corpus: Path, plain: list[tuple[float, float]], tmp_path: Path
) -> None:
    code = """
told = Told()
assert str(sclong_ds.train(config(), callbacks=[told])) == run_dir
print(json.dumps(told.calls))
"""
    run_dir = tmp_path / "run"
    calls = json.loads(alone(corpus, run_dir, code).splitlines()[-1])
    assert steps(run_dir) == plain
    assert calls[0] == ["start", 0, 0, 1, str(run_dir)]
    assert calls[-1] == ["end", 6, "FINISHED"]
    order = [(kind, step) for kind, step, *_ in calls if kind != "checkpoint"]
    assert order == [
        ("start", 0), ("validation", 0), ("step", 1), ("step", 2), ("step", 3), ("validation", 3),
        ("step", 4), ("step", 5), ("step", 6), ("validation", 6), ("end", 6),
    ]  # fmt: skip
    rows = [
        {k: v for k, v in r.items() if k not in ("step", "time")} for r in read_metrics(run_dir)
    ]
    assert [c[2] for c in calls if c[0] in ("step", "validation")] == rows
    saved = [(step, Path(path)) for kind, step, path in (c for c in calls if c[0] == "checkpoint")]
    assert [step for step, _ in saved] == [3, 6]
    assert all(path.parent == run_dir / "checkpoints" for _, path in saved)


def test_a_callback_that_stops_or_raises_leaves_a_run_that_resumes(
    corpus: Path, plain: list[tuple[float, float]], tmp_path: Path
) -> None:
    code = """
class Stops(Told):
    def on_step(self, step, metrics):
        if step == 2:
            self.run.stop("the loss is fine")
stops = Stops()
error = raised(lambda: sclong_ds.train(config(), callbacks=[stops]))
assert isinstance(error, InterruptedError) and "stopped by the loss is fine" in str(error), error
saved = ["checkpoint", 2, f"{run_dir}/checkpoints/step_00000002"]
assert stops.calls[-2:] == [saved, ["end", 2, "KILLED"]], stops.calls

class Late(Told):
    def on_step(self, step, metrics):
        if step == 4:
            raise own
own, told = KeyError("mine"), Late()
assert raised(lambda: sclong_ds.train(config(), callbacks=[told])) is own
assert told.calls[0][:2] == ["start", 2] and told.calls[-1] == ["end", 4, "FAILED"], told.calls

for method in ("on_start", "on_checkpoint", "on_validation", "on_end"):
    own = ZeroDivisionError(method)
    assert raised(lambda: sclong_ds.train(config(), [Raises(method, own)])) is own, method
sclong_ds.train(config())
"""
    run_dir = tmp_path / "run"
    alone(corpus, run_dir, code)
    assert steps(run_dir) == plain
    ends = [e for e in read_events(run_dir) if e["event"] == "finish"]
    # on_end is called when all is recorded: the run before the last is finished.
    expected = ["KILLED", *4 * ["FAILED"], "FINISHED", "FINISHED"]
    assert [e["outcome"] for e in ends] == expected
    assert [e.get("error") for e in ends][1:3] == [
        "Late.on_step: KeyError: 'mine'", "Raises.on_start: ZeroDivisionError: on_start"
    ]  # fmt: skip


PENDING = """
from sclong_ds import pretrain
from sclong_ds.training import saving

# Checkpoint 3 is still being written when step 5 ends.
saving.Saver.settle_if_written = lambda *_: None


class Fails(Told):
    def on_step(self, step, metrics):
        if step == 5:
            self.at_step_5()

    def on_checkpoint(self, step, path):
        super().on_checkpoint(step, path)
        raise KeyError(f"checkpoint {step}")


fails = Fails()


def at_step_5(what):
    fails.at_step_5 = what
    print(repr(raised(lambda: sclong_ds.train(config(), [fails]))))
    print(json.dumps([call[:2] for call in fails.calls if call[0] == "checkpoint"]))
"""
STOPS = "at_step_5(lambda: fails.run.stop('enough'))"
RAISES = """
def server_is_down():
    raise OSError("the server is down")
at_step_5(server_is_down)
"""
POISONED = """
loss_of, calls = pretrain.loss_of, []

def poisoned(*args):
    calls.append(args)
    # Four micro-batches a step: one of the fifth.
    return loss_of(*args) * (float("nan") if len(calls) == 17 else 1)

pretrain.loss_of = poisoned
at_step_5(lambda: None)
"""


@pytest.mark.parametrize(
    ("code", "error", "told"),
    [
        (STOPS, "KeyError('checkpoint 3')", [3]),
        (RAISES, "OSError('the server is down')", [3, 5]),
        (POISONED, "KeyError('checkpoint 3')", [3, 5]),
    ],
    ids=["stops", "raises", "poisoned"],
)
def test_a_pending_checkpoint_whose_callback_raises_costs_neither_the_last_step_nor_the_reason(
    corpus: Path, tmp_path: Path, code: str, error: str, told: list[int]
) -> None:
    run_dir = tmp_path / "run"
    *_, raised, calls = alone(corpus, run_dir, PENDING + code).splitlines()
    assert raised == error
    assert json.loads(calls) == [["checkpoint", step] for step in told]
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert saved == ["step_00000003", "step_00000005"]
    end = finish(run_dir)
    assert (end["outcome"], end["step"]) == ("FAILED", 5)


def test_a_stop_at_the_last_step_stops_a_validation_that_is_due_and_nothing_else(
    corpus: Path, tmp_path: Path
) -> None:
    code = """
class Stops(Told):
    def __init__(self, method):
        super().__init__()
        setattr(self, method, lambda step, *_: step == 6 and self.run.stop("enough"))
error = raised(lambda: sclong_ds.train(config(), [Stops("on_step")]))
assert isinstance(error, InterruptedError), error
last = Stops("on_validation")
sclong_ds.train(config(), [last])
assert last.calls[-1] == ["end", 6, "FINISHED"], last.calls
"""
    run_dir = tmp_path / "run"
    alone(corpus, run_dir, code)
    ends = [e["outcome"] for e in read_events(run_dir) if e["event"] == "finish"]
    assert ends == ["KILLED", "FINISHED"]


SLOW = """
import time
from pathlib import Path
from sclong_ds.engine.ranks import join_process_group
from sclong_ds.job.failures import run_to_end
from sclong_ds.job.watchdog import Watchdog
from sclong_ds.training.callbacks.calling import Callbacks


class Slow(sclong_ds.Callback):
    def on_step(self, step, metrics):
        time.sleep(3)


def main():
    ranks = join_process_group(timeout_s=60)
    folder = Path(sys.argv[2])
    with Watchdog(folder, rank=0, world_size=1, timeout_s=1, node="here") as watchdog:
        Callbacks([Slow()], ranks, watchdog).step(1, {})
    return 0


run_to_end(main)
"""


def test_a_callback_may_take_longer_than_a_step(corpus: Path, tmp_path: Path) -> None:
    alone(corpus, tmp_path / "heartbeat", SLOW)


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_on_one_rank_ends_all_after_a_checkpoint(
    corpus: Path, tmp_path: Path, who: int
) -> None:
    code = f"""
class OnOne(Told):
    def on_step(self, step, metrics):
        if step == 2 and self.run.rank == {who}:
            raise KeyError("mine")
import os
rank = int(os.environ["RANK"])
# The other rank has none: it is told all the same.
callbacks = [OnOne()] if rank == {who} else []
error = raised(lambda: sclong_ds.train(config(), callbacks=callbacks))
if rank == {who}:
    assert isinstance(error, KeyError), error
else:
    assert isinstance(error, RuntimeError), error
    assert str(error) == "rank {who}: OnOne.on_step: KeyError: 'mine'", error
"""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = ["-c", PROGRAM + code, corpus, run_dir]
    ranks = start_ranks(2, command, log=log)
    assert [rank.wait(120) for rank in ranks] == [0, 0], log.read_text()[-4000:]
    assert (run_dir / "checkpoints" / "step_00000002" / "manifest.json").is_file()
    assert finish(run_dir)["outcome"] == "FAILED"
