"""What one dataset may take follows the machine, the job and the control group."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.convert import limits
from data_prep.convert.limits import Limits, default_memory_gib, memory_advice, used_gib

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine of 64 GiB without Slurm and control groups."""
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}
    monkeypatch.setattr("os.sysconf", lambda name: pages[name])
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path)
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_share_of_the_machine_up_to_a_bound(machine: pytest.MonkeyPatch) -> None:
    assert default_memory_gib(1) == 16
    assert default_memory_gib(8) == pytest.approx(0.9 * 64 / 8)
    assert default_memory_gib(1000) == 1


def test_slurm_gives_less_than_the_machine_has(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("SLURM_MEM_PER_NODE", "4096")
    assert default_memory_gib(1) == pytest.approx(0.9 * 4)
    machine.setenv("SLURM_MEM_PER_NODE", "0")
    assert default_memory_gib(1) == 16
    machine.setenv("SLURM_MEM_PER_CPU", "2048")
    machine.setenv("SLURM_CPUS_ON_NODE", "4")
    assert default_memory_gib(2) == pytest.approx(0.9 * 4)


@pytest.mark.parametrize(
    ("line", "file"),
    [("0::/a/b", "a/memory.max"), ("5:cpu,memory:/a/b", "memory/a/memory.limit_in_bytes")],
)
def test_the_least_of_the_control_groups_counts(
    machine: pytest.MonkeyPatch, tmp_path: Path, line: str, file: str
) -> None:
    real = Path.read_text

    def read_text(path: Path) -> str:
        return f"1:name=x:/\n{line}\n" if path == Path("/proc/self/cgroup") else real(path)

    machine.setattr(Path, "read_text", read_text)
    assert default_memory_gib(1) == 16
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"{2 * GIB}\n")
    assert default_memory_gib(1) == pytest.approx(1.8)
    (tmp_path / file).write_text("max\n")
    assert default_memory_gib(1) == 16


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_cannot_take_more_than_allowed() -> None:
    program = (
        "import numpy as np, os\n"
        "from data_prep.convert import limits\n"
        "limits.limit_memory(0.25)\n"
        "held = np.ones(2**24)\n"
        "assert limits.used_gib(os.getpid()) > 0.12\n"
        "try:\n"
        "    np.ones(2**26)\n"
        "except MemoryError:\n"
        "    print(limits.memory_advice())\n"
    )
    command = [sys.executable, "-c", program]
    root = Path(__file__).parents[3]
    held = np.ones(2**26)  # a large parent: its own peak is not the child's
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, close_fds=False)
    del held
    assert 0.1 < float(done.stdout.split()[0]) < 0.5
    assert "GiB used, at most " in done.stdout
    assert "raise --max-memory" in done.stdout


def test_without_a_limit_only_the_use_is_named() -> None:
    if resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY:
        assert "allowed" not in memory_advice()
    assert used_gib(2**30) is None


@pytest.mark.parametrize(("gib", "minutes"), [(0, 1), (-1, 1), (1, 0), (float("nan"), 1)])
def test_limits_that_nothing_could_keep(gib: float, minutes: float) -> None:
    with pytest.raises(ValueError, match="both must be above 0"):
        Limits(memory_gib=gib, minutes=minutes)
