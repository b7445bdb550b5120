"""The search with Optuna that docs/operate/sweep.md shows runs as it stands, at a small size.

It draws what leaves the task as it is; started again, the study adds a trial of its own number."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, run_module
from small_runs import make_corpus, settings

pytestmark = pytest.mark.distributed
DRAWN = ("run.dir", "optim.lr", "optim.weight_decay")


def test_the_search_of_the_page_trains_and_adds_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "operate" / "sweep.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 1
    source = blocks[0].replace("n_trials=20", "n_trials=1")
    corpus = make_corpus(tmp_path / "corpus")

    def launch(command: list[str], *, check: bool) -> None:
        assert command[:3] == ["deepspeed", "--module", "sclong_ds.pretrain"]
        assert check
        given = dict(word.split("=", 1) for word in command[5:])
        small = {"run.max_steps": 2, "run.validate_every_n_steps": 2, "optim.warmup_steps": 0}
        drawn = {name: given[name] for name in DRAWN}
        run_dir = tmp_path / drawn.pop("run.dir")
        run_module(command[2], *settings(run_dir, corpus, **(small | drawn)))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", launch)
    for trials in (1, 2):
        names: dict[str, Any] = {}
        exec(compile(source, "search.py", "exec"), names)
        assert len(names["study"].trials) == trials
    assert sorted(os.listdir("runs/search")) == ["000", "001"]
    errors = []
    for trial in names["study"].trials:
        rows = Path(f"runs/search/{trial.number:03d}/metrics.jsonl").read_text().splitlines()
        validated = [row["val/mse"] for row in map(json.loads, rows) if "val/mse" in row]
        assert trial.value == validated[-1]
        errors.append(trial.value)
    assert str(min(errors)) in capsys.readouterr().out
