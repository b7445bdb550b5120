"""A command that cannot start is refused in its first moment, without the imports of training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

import sclong_ds
from sclong_ds.input_checks import check_call, check_launch, check_run_dir

RANK = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1",
        "MASTER_PORT": "29500"}  # fmt: skip


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, None),
        # What a shell keeps of another launcher says nothing of this one's ranks.
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS=4, but RANK is not set: each"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2, but RANK is not set"),
        (RANK | {"SLURM_STEP_NUM_TASKS": "2"}, None),
        ({"RANK": "0"}, "LOCAL_RANK and WORLD_SIZE and MASTER_ADDR and MASTER_PORT not"),
        (RANK | {"MASTER_ADDR": ""}, "RANK is set, but MASTER_ADDR not"),
        (RANK | {"MASTER_PORT": "tcp"}, "MASTER_PORT: got 'tcp', must be a whole number"),
        (RANK | {"RANK": "2"}, "RANK: got 2, must be below WORLD_SIZE=2"),
    ],
)
def test_what_a_launcher_tells_is_whole_or_refused(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], said: str | None
) -> None:
    for name in (*RANK, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    if said is None:
        check_launch()
        return
    with pytest.raises(ValueError, match=said) as error:
        check_launch()
    assert "slurm/pretrain.sh" in str(error.value)


@pytest.mark.parametrize("name", ["lr=[1e-3]", "run?", "run*"])
def test_a_folder_from_which_no_run_could_be_resumed_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="could not be resumed"):
        check_run_dir(str(tmp_path / name))
    assert check_run_dir(str(tmp_path / "run a, {b} = 1e-3")) is not None


def test_the_first_checks_import_nothing_that_takes_long() -> None:
    long = ("numpy", "scipy", "torch", "deepspeed", "zarr", "pandas", "h5py", "mlflow")
    program = (
        "import os, sys, runpy\n"
        "os._exit = sys.exit\n"
        "sys.argv = ['pretrain', '--config', 'absent.yaml']\n"
        "try:\n    runpy.run_module('sclong_ds.pretrain', run_name='__main__')\n"
        f"finally:\n    print(sorted(set({long}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("wrong", [{}, "sclong_tiny", None, Path("config.yaml")])
def test_train_takes_a_configuration_and_a_list_of_callbacks(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"config: got .*; give what sclong_ds\.load_config"):
        check_call(wrong, ())
    with pytest.raises(TypeError, match=r"config: got .*; give what sclong_ds\.load_config"):
        sclong_ds.train(wrong)  # type: ignore[arg-type]
    config = sclong_ds.load_config("sclong_tiny", "run.dir=unused")
    assert config.run.dir == "unused"
    with pytest.raises(TypeError, match=r"callbacks: got Callback; give a list"):
        sclong_ds.train(config, sclong_ds.Callback())  # type: ignore[arg-type]
