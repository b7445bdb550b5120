"""The GPU check runs all its stages without a GPU, and says what is wrong."""

import json
import re
import subprocess
import sys

import pytest
from launching import ROOT, environment, run_module

from benchmarks.gpu_model import RELEASED_CLASS
from benchmarks.gpu_step import STEPS, WARM
from benchmarks.gpu_targets import add_floors, targets, verdict

STANDS_FOR_RELEASED = f"""
import torch


class {RELEASED_CLASS}(torch.nn.Module):
    def __init__(self, *, max_seq_len, gene2vec_file, G_go, G_go_weight, device, **sizes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(max_seq_len))

    def forward(self, x):
        return x * self.weight, {{}}
"""


NEEDED = {
    "torch",
    "triton",
    "jinja2",
    "numpy",
    "yaml",
    "torch_geometric",
    "fsspec",
    "psutil",
    "tqdm",
    "requests",
}
"""What the machine with the GPU must have, with what torch and torch-geometric need; the project's
other requirements are hidden."""
HIDE = """
import sys
from importlib.machinery import PathFinder


class Finder:
    def find_spec(self, name, path=None, target=None):
        return None if name in {names} else PathFinder.find_spec(name, path, target)

    def find_distributions(self, context=None):
        return PathFinder.find_distributions(context)


sys.meta_path = [Finder() if finder is PathFinder else finder for finder in sys.meta_path]
"""


def other_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines if line[:1].isalpha()}
    renamed = {"pyyaml": "yaml", "scikit_learn": "sklearn"}
    return {renamed.get(name, name) for name in names} - NEEDED


def test_all_stages_run_without_a_gpu(tmp_path):
    """With what its docstring names alone."""
    checkout = tmp_path / "released" / "package"
    checkout.mkdir(parents=True)
    (checkout / "model.py").write_text(STANDS_FOR_RELEASED)
    hidden = other_requirements()
    assert {"deepspeed", "zarr", "numba", "sklearn", "mlflow"} <= hidden
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(names=hidden))
    out = tmp_path / "out.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--tiny",
            "--json", str(out), "--reference", str(checkout.parent),
        ],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    stages = document["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(
        ("device", "resources", "correctness", "timing", "model", "step", "reference", "sweep"),
        "done",
    )
    cases = {row["case"]: row for stage in stages.values() for row in stage["rows"]}
    results = {case: row["correct"] for case, row in cases.items() if "correct" in row}
    assert all(results.values())
    assert {
        "m=266 n=33",
        "float32",
        "32 heads",
        "few queries, all keys",
        "the same bits alone and packed",
    } < set(results)
    assert cases["tiny b=1 m=266 kernels forward"]["floor_us"] > 0
    assert cases["torch micro-batch 2"]["cells_per_s"] > 0
    assert cases["gene encoder alone"]["step_ms"] > 0
    assert cases["released model micro-batch 1"]["cells_per_s"] > 0
    assert cases["step"]["skipped"].startswith("not installed: deepspeed")
    assert document["targets"] == []
    assert "torch micro-batch 2" in done.stdout


@pytest.mark.distributed
def test_the_stage_step_measures_a_run_of_the_product(tmp_path):
    out = tmp_path / "out.json"
    run_module("benchmarks.gpu_check", "--device", "cpu", "--tiny", "--json", out, "--only", "step")
    (row,) = json.loads(out.read_text())["stages"]["step"]["rows"]
    assert row["case"] == "sclong_tiny zero3 micro-batch 2"
    assert row["correct"]
    assert row["steps"] >= STEPS - WARM
    for name in ("forward", "backward", "optimizer", "data_wait"):
        assert row[f"{name}_ms"] > 0
    assert row["cells_per_s"] > 0


def test_stages_stop_with_the_budget(tmp_path):
    out = tmp_path / "out.json"
    done = run_module(
        "benchmarks.gpu_check", "--device", "cpu", "--tiny", "--json", out, "--budget", 1,
        "--only", "model", check=False,
    )  # fmt: skip
    stages = json.loads(out.read_text())["stages"]
    assert [stage["message"] for stage in stages.values()] == ["no time", "no time"]
    assert list(stages) == ["device", "model"]
    assert done.returncode == 1
    assert "error: stage model: skipped" in done.stderr


def stage(*rows, status="done", message=""):
    return {"status": status, "seconds": 1, "message": message, "rows": list(rows)}


H100 = stage(
    {"case": "machine", "gpu": "NVIDIA H100 80GB HBM3"},
    {"case": "copy", "us": 1.0, "tb_per_s": 3.0},
    {"case": "bf16 matrix product", "us": 1.0, "tflops": 800.0},
)


def timed(us, part="forward", way="kernels", m=266, **more):
    key = {"layer": "large", "b": 1, "m": m, "way": way, "part": part}
    return {"case": f"{way} {part}", "us": us} | key | more


def all_timed():
    """Times that reach every target; the last is that of flash's backward pass."""
    times = [timed(50.0), timed(100.0, "backward")]
    times += [
        timed(us, part) | {"layer": "decoder"} for us, part in ((90, "forward"), (180, "backward"))
    ]
    ways = ("literal code", "literal code, torch.compile", "softmax, flash")
    for way, us in zip(ways, (2000.0, 500.0, 800.0), strict=True):
        times += [timed(us, part, way) for part in ("forward", "backward")]
    return times


def test_failures_fail_the_check():
    wrong = {"correctness": stage({"case": "b", "correct": False})}
    assert verdict(wrong) == ["wrong result: b"]
    failed = stage(status="failed", message="Traceback\nRuntimeError: x")
    results = {"model": failed, "reference": failed, "sweep": failed}
    assert verdict(results) == ["stage model: failed: ['RuntimeError: x']"]


def test_targets_fail_the_check_when_missed_by_a_quarter():
    times = all_timed()
    near, far = ([timed(us), *times[1:]] for us in (75.0, 76.0))
    assert verdict({"device": H100, "timing": stage(*near)}) == []
    (line,) = verdict({"device": H100, "timing": stage(*far)})
    assert "76  at most 60: MISSED" in line
    other = stage({"case": "m", "gpu": "NVIDIA A100"})
    assert verdict({"device": other, "timing": stage(*far)}) == []


def test_targets_without_a_figure_fail_the_check():
    *times, flash = all_timed()
    failed = {key: flash[key] for key in ("case", "layer", "b")} | {"failed": ["no kernel"]}
    (line,) = verdict({"device": H100, "timing": stage(*times, failed)})
    assert "softmax, flash over the kernels'" in line
    assert "NOT MEASURED" in line
    step = {"case": "triton micro-batch 4", "out_of_memory": True}
    lines = verdict({"device": H100, "timing": stage(*times, flash), "model": stage(step)})
    assert [line.split()[-2:] for line in lines] == [["NOT", "MEASURED"]] * 3


def test_targets_compare_like_with_like():
    times = [timed(100.0), timed(50.0, m=256), timed(2000.0, way="literal code")]
    times += [timed(450.0, way="softmax, flash"), timed(90.0, "backward")]
    step = {"case": "micro-batch 4", "published": True, "cells_per_s": 17.0, "mfu": 0.4}
    steps = [step | {"gb_per_cell": 9.5}, {"case": "x", "published": False, "cells_per_s": 30.0}]
    released = stage({"case": "r", "cells_per_s": 2.0}, {"case": "s", "out_of_memory": True})
    results = {"timing": stage(*times), "model": stage(*steps), "reference": released}
    found = {target.figure.split(":")[-1].strip(): target for target in targets(results)}
    assert {name: (target.got, target.miss <= 1) for name, target in found.items()} == {
        "large layer, forward, 266 features, us": (100.0, False),
        "large layer, backward, 266 features, us": (90.0, True),
        "time of literal code over the kernels'": (20.0, True),
        "time of softmax, flash over the kernels'": (4.5, False),
        "cells_per_s": (17.0, True),
        "mfu": (0.4, False),
        "activations of a cell without recomputing, GB": (9.5, True),
        "cells per second over the released code's": (8.5, True),
    }


def test_floors_are_what_the_gpu_itself_reaches():
    rows = [timed(60.0, gflop=16.0, mb=67.2), timed(60.0, "backward", gflop=40.0, mb=67.2)]
    add_floors({"device": H100, "timing": stage(*rows)})
    assert [row["floor_us"] for row in rows] == pytest.approx([22.4, 50.0])
    assert rows[0]["of_floor"] == pytest.approx(22.4 / 60)
