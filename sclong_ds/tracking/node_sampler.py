"""Samples of a node while it trains: CPU, memory, disk, network, GPUs.

The first rank of every node runs a `NodeSampler` thread, which appends a row to `system/NODE.jsonl`
of the run folder every few seconds; `sclong_ds.tracking.sender` sends the rows of all nodes to the
one MLflow run. Names are those of MLflow's own system metrics,
`system/NODE/cpu_utilization_percentage` and so on, so that its page shows them as such. Needs no
GPU; with NVIDIA ones the figures come from NVML.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from sclong_ds.files.json_lines import Lines
from sclong_ds.run_folder.files import SYSTEM_DIR
from sclong_ds.run_folder.identity import node_name

log = logging.getLogger(__name__)

_MB = 1e6


class NodeSampler:
    """Appends a row a few seconds apart until stopped.

    Args:
        run_dir: Run folder.
        every_s: Seconds between rows.
        step: Tells the optimizer step that training has reached.
    """

    def __init__(self, run_dir: Path, *, every_s: float, step: Callable[[], int]) -> None:
        folder = run_dir / SYSTEM_DIR
        folder.mkdir(parents=True, exist_ok=True)
        # As far as the names of files and metrics allow.
        self._node = re.sub(r"[^\w.-]", "_", node_name())
        self._every_s, self._step = every_s, step
        self._file = Lines(folder / f"{self._node}.jsonl")
        self._run_dir = run_dir
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write a last row and end."""
        self._stop.set()
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        # Here and not above: psutil measures since the last reading of the same thread.
        source, gpus, stopped = _Counters(self._run_dir), _open_gpus(), False
        while not stopped:
            stopped = self._stop.wait(self._every_s)
            figures = source.read() | _gpu_figures(gpus)
            row: dict[str, Any] = {"step": self._step()}
            row |= {f"system/{self._node}/{name}": value for name, value in figures.items()}
            self._file.append(row | {"time": time.time()})


class _Counters:
    """Reads the figures of the node; rates are since the last reading."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        psutil.cpu_percent()  # the first call only starts the measurement
        self._network, self._time = psutil.net_io_counters(), time.monotonic()

    def read(self) -> dict[str, float]:
        memory, network, now = psutil.virtual_memory(), psutil.net_io_counters(), time.monotonic()
        figures = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": memory.percent,
        }
        try:
            disk = psutil.disk_usage(str(self._run_dir))
        except OSError:  # a file system that hangs or is gone: the other figures stand
            pass
        else:
            figures["disk_usage_percentage"] = disk.percent
            figures["disk_available_megabytes"] = disk.free / _MB
        seconds = max(now - self._time, 1e-3)
        self._time = now
        if network is None or self._network is None:  # no network interface
            return figures
        for name, counter in (("receive", "bytes_recv"), ("transmit", "bytes_sent")):
            moved = getattr(network, counter) - getattr(self._network, counter)
            figures[f"network_{name}_megabytes_per_s"] = moved / _MB / seconds
        self._network = network
        return figures


def _open_gpus() -> list[Any]:
    """Return the NVML handles of this node's GPUs; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
    except pynvml.NVMLError:
        return []


def _gpu_figures(handles: list[Any]) -> dict[str, float]:
    """Return use, memory and power of every GPU; a figure that a GPU does not give is left out."""
    import pynvml

    figures: dict[str, float] = {}
    for i, handle in enumerate(handles):
        readings: dict[str, Callable[[Any], float]] = {
            "utilization_percentage": lambda h: pynvml.nvmlDeviceGetUtilizationRates(h).gpu,
            "memory_usage_megabytes": lambda h: pynvml.nvmlDeviceGetMemoryInfo(h).used / _MB,
            "memory_usage_percentage": _gpu_memory_percentage,
            "power_usage_watts": lambda h: pynvml.nvmlDeviceGetPowerUsage(h) / 1e3,
            "temperature_celsius": lambda h: pynvml.nvmlDeviceGetTemperature(h, 0),
        }
        for name, read in readings.items():
            try:
                figures[f"gpu_{i}_{name}"] = float(read(handle))
            except pynvml.NVMLError:
                continue
    return figures


def _gpu_memory_percentage(handle: Any) -> float:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return 100.0 * memory.used / memory.total
