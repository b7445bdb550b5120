"""The GPU check runs all its stages without a GPU, and says what is wrong."""

import json

from launching import run_module

from benchmarks.gpu_check import verdict
from benchmarks.gpu_model import RELEASED_CLASS

STANDS_FOR_RELEASED = f"""
import torch


class {RELEASED_CLASS}(torch.nn.Module):
    def __init__(self, *, max_seq_len, gene2vec_file, G_go, G_go_weight, device, **sizes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(max_seq_len))

    def forward(self, x):
        return x * self.weight, {{}}
"""


def test_all_stages_run_without_a_gpu(tmp_path):
    checkout = tmp_path / "released" / "package"
    checkout.mkdir(parents=True)
    (checkout / "model.py").write_text(STANDS_FOR_RELEASED)
    out = tmp_path / "out.json"
    done = run_module(
        "benchmarks.gpu_check", "--device", "cpu", "--tiny", "--json", out,
        "--reference", checkout.parent, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stages = json.loads(out.read_text())["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(
        ("device", "correctness", "resources", "timing", "model", "sweep", "reference"), "done"
    )
    cases = {row["case"]: row for stage in stages.values() for row in stage["rows"]}
    assert cases["m=266 n=33"]["correct"]
    assert cases["torch micro-batch 2"]["cells_per_s"] > 0
    assert cases["released model micro-batch 1"]["cells_per_s"] > 0
    assert "torch micro-batch 2" in done.stdout


def test_stages_stop_with_the_budget(tmp_path):
    out = tmp_path / "out.json"
    done = run_module(
        "benchmarks.gpu_check", "--device", "cpu", "--tiny", "--json", out, "--budget", 1,
        "--only", "device,model", check=False,
    )  # fmt: skip
    stages = json.loads(out.read_text())["stages"]
    assert [stage["message"] for stage in stages.values()] == ["no time", "no time"]
    assert done.returncode == 0


def stage(status="done", message="", **row):
    return {"status": status, "seconds": 1, "message": message, "rows": [row] if row else []}


def test_verdict():
    good = {"timing": stage(case="a", us=70.0, target_us=60.0)}
    assert verdict(good, on_gpu=True) == []
    slow = {"timing": stage(case="a", us=76.0, target_us=60.0)}
    assert verdict(slow, on_gpu=True) == ["a: 76 us, target 60 us"]
    assert verdict(slow, on_gpu=False) == []
    wrong = {"correctness": stage(case="b", correct=False)}
    assert verdict(wrong, on_gpu=True) == ["wrong result: b"]
    failed = {"model": stage("failed", "Traceback\nRuntimeError: x"), "reference": stage("failed")}
    assert verdict(failed, on_gpu=True) == ["stage model: failed: ['RuntimeError: x']"]
