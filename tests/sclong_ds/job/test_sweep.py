"""A sweep's file gives every task its own arguments, or says what is wrong before a task starts.

Covers also `sclong_ds/sweep/folder.py`.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from sclong_ds.config.load import load_config
from sclong_ds.job.sweep import main, read_tasks
from sclong_ds.sweep.folder import read_sweep, task_folders

SWEEP = """\
# three rates
optim.lr=1e-4

   # and more
optim.lr=2e-4 run.seed=1  # it's another seed, "
tracking.tags="{project: a b}" tracking.run_name='#1'
"""


def sweep(tmp_path: Path, text: str, *more: str) -> int:
    file = tmp_path / "sweep.txt"
    file.write_text(text)
    shared = ("--config", "sclong_tiny", f"run.dir={tmp_path / 's w'}")
    return main(["--sweep", str(file), *shared, *more])


def test_each_task_gets_its_line_and_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, configs = tmp_path / "s w", []
    for task in ("1", "2", "3"):
        more = ("run.max_steps=7", "--task", task, "--last", "3", "--dry-run")
        assert sweep(tmp_path, SWEEP, *more) == 0
        words = shlex.split(capsys.readouterr().out)
        assert words[:2] == ["--config", "sclong_tiny"]
        assert words[-1] == "--dry-run"
        configs.append(load_config(words[1], words[2:-1]))
    assert [c.run.dir for c in configs] == [str(folder / f"task_00{n}") for n in (1, 2, 3)]
    assert [(c.optim.lr, c.run.seed) for c in configs[:2]] == [(1e-4, 0), (2e-4, 1)]
    assert configs[2].tracking.tags == {"project": "a b"}
    names = ["task_001: optim.lr=1e-4", "task_002: optim.lr=2e-4 run.seed=1", "#1"]
    assert [c.tracking.run_name for c in configs] == names
    assert {(c.run.max_steps, c.tracking.parent_run) for c in configs} == {(7, str(folder))}
    known = read_sweep(folder)
    assert known is not None
    assert list(known.tasks) == ["task_001", "task_002", "task_003"]
    sweep(tmp_path, f"{SWEEP}optim.lr=3e-4\n", "--task", "4", "--last", "4")
    later = read_sweep(folder)
    assert later is not None
    assert (later.id, len(later.tasks)) == (known.id, 4)


def test_without_a_task_it_says_how_to_submit_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, SWEEP) == 0
    assert "3 tasks, submit with sbatch --array=1-3" in capsys.readouterr().out
    assert not (tmp_path / "s w").exists()


@pytest.mark.parametrize(
    ("text", "last", "said"),
    [
        ("optim.lr=1e-4\noptim.lr=2e-4\n", "3", "2 lines of settings, but the array goes to 3"),
        ("optim.lr=1e-4\noptim.rate=1\n", "1", "line 2: override 'optim.rate=1'"),
        ("optim.lr=fast\n", "1", "line 1: "),
        ("optim.lr\n", "1", "line 1: override 'optim.lr': write section.key=value"),
        ("run.seed=1\n\n#\nrun.seed=2 run.dir=x\n", "1", "line 4: run.dir is set by the sweep"),
        ("optim.lr=1e-4\noptim.lr=0.0001\n", "1", "line 2: trains the same as line 1"),
        ("run.seed='1\n", "1", "line 1: No closing quotation"),
        ("run.seed=1 optim.lr=1 run.seed=2\n", "1", "line 1: run.seed=1 and run.seed=2: the same"),
        ("run.seed=1\n", "2", "1 line of settings, but the array goes to 2: submit with"),
        ("# nothing\n\n", "1", "no settings in it"),
    ],
)
def test_what_is_wrong_with_any_line_stops_every_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, last: str, said: str
) -> None:
    assert sweep(tmp_path, text, "--task", "1", "--last", last) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "s w").exists()


def test_a_task_of_no_line_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "run.seed=1\n", "--task", "2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --task 2: ")
    assert line.endswith("has 1 line of settings; allowed: 1 to 1")


def test_a_line_replaces_a_setting_of_all_tasks_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "run.seed=1\nrun.seed=2 optim.lr=2e-4\n"
    assert sweep(tmp_path, text, "optim.lr=1e-4", "--task", "2", "--last", "2") == 0
    said = capsys.readouterr()
    assert said.err == "task 2: line 2 replaces optim.lr=1e-4 of all tasks\n"
    words = shlex.split(said.out)[2:]
    keys = [word.partition("=")[0] for word in words]
    assert len(set(keys)) == len(keys)  # the training refuses a key that it is given twice
    assert "optim.lr=2e-4" in words


def test_a_task_that_has_begun_continues_whatever_the_other_lines_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "run.seed=1\nrun.seed=2\noptim.rate=\n"
    task = tmp_path / "s w" / "task_002"
    task.mkdir(parents=True)
    assert sweep(tmp_path, text, "--task", "2", "--last", "4") == 2
    (task / "run.json").write_text("{}")
    assert sweep(tmp_path, text, "--task", "2", "--last", "4") == 0
    assert "run.seed=2" in shlex.split(capsys.readouterr().out)
    (task.parent / "task_003").mkdir()
    (task.parent / "task_003" / "run.json").write_text("{}")
    assert sweep(tmp_path, text, "--task", "3", "--last", "4") == 2
    assert "line 3" in capsys.readouterr().err


def test_every_wrong_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "a=1\nrun.seed=1\nb.c=2\n", "--task", "2", "--last", "9") == 2
    lines = capsys.readouterr().err.splitlines()
    said = ["line 1: override 'a=1'", "line 3: override 'b.c=2'", "3 lines of settings"]
    assert all(part in line for part, line in zip(said, lines, strict=True))


def test_a_sweep_needs_a_run_folder_and_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep"
    assert main(["--sweep", str(file), "--config", "sclong_tiny", "run.dir=x"]) == 2
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_tasks(file)
    file.write_text("run.seed=1\n")
    assert main(["--sweep", str(file), "--config", "sclong_tiny"]) == 2
    assert "add run.dir=SWEEP_DIR" in capsys.readouterr().err


def test_the_folder_of_a_sweep_stands_for_its_runs(tmp_path: Path) -> None:
    assert task_folders(tmp_path) == [tmp_path]
    sweep(tmp_path, SWEEP, "--task", "1", "--last", "1")
    folder = tmp_path / "s w"
    with pytest.raises(ValueError, match="no task of this sweep of 3 has begun yet"):
        task_folders(folder)
    for name in ("task_003", "task_001", "other"):
        (folder / name).mkdir()
        (folder / name / "run.json").write_text("{}")
    assert task_folders(folder) == [folder / "task_001", folder / "task_003"]
