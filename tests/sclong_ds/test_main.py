"""The command line as a whole: what is not there is refused at once.

Covers `sclong_ds/__main__.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("model_is_there", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        "embed MODEL absent.h5ad --out x.h5ad",
        "evaluate MODEL absent.h5ad --label cell_type --out x",
        "finetune MODEL absent.h5ad --label cell_type --group donor --out x",
        "genes MODEL absent.h5ad --out x.h5ad",
        "perturb MODEL absent.h5ad --genes GATA1 --mode delete --out x.tsv",
        "perturb-bench MODEL absent.h5ad --perturbation guide --control none --out x.tsv",
        "export absent.h5ad --out x",
        "import-reference --checkpoint absent.h5ad --hyper-params x.pkl --genes x.txt --out x",
    ],
)
def test_what_is_not_there_is_refused_without_torch(command, model_is_there, tmp_path):
    if model_is_there:
        (tmp_path / "MODEL").mkdir()
        for name in ("config.yaml", "genes.tsv", "model.safetensors"):
            (tmp_path / "MODEL" / name).touch()
    program = (
        "import sys; from sclong_ds.__main__ import main; assert main(sys.argv[1:]) == 1;"
        "print(*sorted({'torch', 'sklearn', 'anndata', 'scanpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command.split()], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == []
    (line,) = done.stderr.splitlines()
    expected = "absent.h5ad: no such file"
    if "MODEL" in command and not model_is_there:
        expected = "MODEL is no exported model"
    assert line.startswith(f"error: {expected}")
