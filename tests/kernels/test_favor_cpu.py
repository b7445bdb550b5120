"""The CPU benchmark measures both contenders and finds the working memory that the design saves.

Covers also `kernels/favor_torch.py`.
"""

import json

from launching import run_module


def test_measures_both(tmp_path):
    out = tmp_path / "out.json"
    sizes = ("--heads", 8, "--tokens", 2048, "--features", 128, "--rounds", 1, "--threads", 1)
    done = run_module("benchmarks.favor_cpu", *sizes, "--json", out)
    figures = json.loads(out.read_text())["result"]
    assert figures["relative_difference"] < 1e-4
    assert figures["ratio"]["working_mib"] > 3
    assert figures["median"]["ours"]["total_s"] > 0
    assert "literal/ours" in done.stdout
