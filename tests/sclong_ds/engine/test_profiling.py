"""What `run.profile` leaves of a step.

DeepSpeed's two profilers are run in tests/sclong_ds/test_pretrain.py (flops) and
tests/sclong_ds/test_survival.py (communication), where ranks train.
"""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from sclong_ds.engine.profiling import check_profile, profiled, unseen_profile
from sclong_ds.training.timing import StepTimer

CPU = torch.device("cpu")


def traced(folder, kind, *, rank=0):
    """Return the events of a step that multiplies two matrices, or None."""
    timer = StepTimer(CPU)
    with profiled(kind, folder, 3, engine=None, ranks=SimpleNamespace(rank=rank, device=CPU)):
        with timer.part("forward"):
            torch.ones(64, 64) @ torch.ones(64, 64)
    path = folder / "step_00000003.json.gz"
    if not path.exists():
        return None
    with gzip.open(path) as trace:
        return json.load(trace)["traceEvents"]


def test_a_trace_has_the_operators_and_the_parts_of_the_step(tmp_path):
    events = traced(tmp_path / "profile", "trace")
    names = {str(event.get("name")) for event in events}
    assert {"aten::matmul", "forward"} <= names
    assert not any("[memory]" in name for name in names)


def test_memory_is_the_trace_with_each_allocation(tmp_path):
    events = traced(tmp_path / "profile", "memory")
    moved = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"]
    assert 4 * 64 * 64 in moved
    assert -4 * 64 * 64 in moved


def test_the_log_of_collectives_of_the_run_is_as_it_was(tmp_path, monkeypatch):
    from deepspeed.comm.comm import comms_logger

    own = {"enabled": True, "prof_all": False, "verbose": True}
    own["comms_dict"] = {"barrier": {0: [2, [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]}}
    for name, value in own.items():
        monkeypatch.setattr(comms_logger, name, value)
    folder = tmp_path / "profile"
    ranks = SimpleNamespace(rank=0, device=CPU)
    with profiled("communication", folder, 3, engine=None, ranks=ranks):
        assert comms_logger.enabled
        assert comms_logger.prof_all
        assert not comms_logger.comms_dict
        comms_logger.comms_dict["all_reduce"] = {8: [1, [1.0], [0.0], [0.0]]}
    written = json.loads((folder / "step_00000003_communication.json").read_text())
    assert "all_reduce" in json.dumps(written)
    assert "barrier" not in json.dumps(written)
    assert {name: getattr(comms_logger, name) for name in own} == own


def test_rank_zero_alone_writes(tmp_path):
    assert traced(tmp_path / "profile", "trace", rank=1) is None
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(("kind", "step"), [("nsys", 0), ("trace", 3), ("flops", 3)])
def test_what_a_cpu_can_do_is_accepted(kind, step):
    check_profile(kind, step, CPU)


def test_nsys_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match=r"run\.profile=nsys.*take\s+run\.profile=trace"):
        check_profile("nsys", 3, CPU)
    check_profile("nsys", 3, torch.device("cuda"))


@pytest.mark.parametrize(
    ("step", "told"), [(0, False), (3, True), (4, False), (9, False), (10, True)]
)
def test_a_step_that_does_not_come_is_told(step: int, told: bool) -> None:
    said = unseen_profile(step, first=4, last=9)
    assert (said is not None) == told
    assert said is None or f"run.profile_step={step}: " in said
