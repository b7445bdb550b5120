"""What people see: MLflow's pages of a run, and the report, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser

from benchmarks.tracking_outage import Server, run_outage
from sclong_ds.__main__ import main as command_line
from sclong_ds.config.load import load_config
from sclong_ds.report import report
from sclong_ds.run_folder.files import read_run_json
from sclong_ds.run_folder.record import read_run
from sclong_ds.tracking.tracker import Tracker

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium"
)
SHOWN_IMAGES = "[...document.images].filter(i => i.complete && i.naturalWidth > 300).length"
CHARTS = "document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line').length"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A healthy `mlflow server`."""
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def run_dir(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracked run of 20 steps with two validations and a restart."""
    run_dir = tmp_path_factory.mktemp("runs") / "shown_run"
    settings = {
        "tracking.uri": server.uri, "tracking.experiment": "seen", "tracking.picture_cells": 0,
        "tracking.system_metrics_every_s": 0.2, "tracking.tags": "{project: atlas}",
    }  # fmt: skip
    config = load_config("sclong_tiny", [f"{k}={v}" for k, v in settings.items()])
    rng = np.random.default_rng(0)
    for first in (1, 11):
        tracker = Tracker(config.tracking, run_dir, enabled=True, samples_node=True)
        tracker.start(
            params={}, tags={"corpus_hash": "c" * 64}, artifacts=[], resumed=first > 1,
            step=first - 1,
        )  # fmt: skip
        tracker.event("resume" if first > 1 else "start", step=first - 1, world_size=2)
        for step in range(first, first + 10):
            figures = {"train/loss": 3.0 / step, "train/grad_norm": 1.0 / step}
            tracker.log(step, figures | {"cells_seen": 4 * step, "perf/cells_per_s": 2.5})
        bins = {f"{n}/bin_0": v for n, v in (("val/mse", 0.25), ("val/baseline_mse", 0.5))}
        tracker.log(step, {"val/mse": 0.5, "val/baseline_mse": 0.8, **bins})
        true = rng.gamma(2.0, size=500)
        tracker.draw(step, {"predicted_true": np.stack([true + rng.normal(size=500), true])})
        tracker.finish("FINISHED")
    return run_dir


@needs_chromium
def test_mlflow_shows_the_run_its_metrics_and_its_pictures(
    server: Server, run_dir: Path, tmp_path: Path
) -> None:
    saved = read_run_json(run_dir)
    with Browser() as browser:
        experiments = f"{server.uri}/#/experiments"
        browser.open(f"{experiments}/1/runs")
        browser.wait_until("document.body.innerText.includes('shown_run')")
        browser.open(f"{experiments}/1/runs/{saved['mlflow_run_id']}")
        browser.wait_until("document.body.innerText.includes('val/mse')")
        page = "".join(browser.text().split())
        for text in ("project:atlas", "restarts:1", "restart_001:", "train/loss", "cells_seen"):
            assert text in page, text
        browser.picture(tmp_path / "run.png", height=1400)
        for tab in ("model-metrics", "system-metrics"):
            browser.open(f"{experiments}/1/runs/{saved['mlflow_run_id']}/{tab}")
            browser.wait_until(f"{CHARTS} >= 3")
        page = "artifacts/plots/step_00000020/predicted_vs_true.png"
        browser.open(f"{experiments}/1/runs/{saved['mlflow_run_id']}/{page}")
        browser.wait_until(f"{SHOWN_IMAGES} >= 1")
        picture = browser.picture(tmp_path / "picture.png", height=1000)
        assert picture.stat().st_size > 20_000
        assert browser.errors == []


@needs_chromium
def test_the_page_that_ui_names_shows_the_runs_and_leads_to_each(
    server: Server, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(["ui", str(run_dir)]) == 0
    page = capsys.readouterr().out.split()[-1]
    assert page == f"{server.uri}/#/experiments/1/runs?workflowType=machine_learning"
    link = "[...document.querySelectorAll('a')].find(a => a.innerText.trim() === 'shown_run')"
    with Browser() as browser:  # as new as a first visit
        browser.open(page)
        browser.wait_until(f"Boolean({link})")
        browser.ask(f"{link}.click()")
        browser.wait_until("document.body.innerText.includes('val/mse')")
        assert read_run_json(run_dir)["mlflow_run_id"] in browser.ask("location.href")


@needs_chromium
def test_report_opens_without_a_network_and_shows_all_images(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    report.write_report([read_run(run_dir)], out)
    with Browser(width=1200) as browser:
        browser.open(out.as_uri())
        browser.wait_until("document.readyState === 'complete' && document.images.length >= 5")
        browser.wait_until(f"{SHOWN_IMAGES} === document.images.length")
        page = browser.text()
        assert "shown_run" in page
        assert "Finished" in page
        assert "1 restart" in page
        # Wider than the window: something would be cut off.
        assert browser.ask("document.documentElement.scrollWidth <= window.innerWidth")
        asked = [url for url in browser.requested if not url.startswith("data:")]
        assert asked == [out.as_uri()]
        assert browser.errors == []
        assert browser.picture(tmp_path / "report.png").stat().st_size > 100_000


def test_server_outages_lose_and_double_nothing(tmp_path: Path) -> None:
    """Not there, healthy, hanging, killed, on a full disk, healthy again."""
    counts, passed = run_outage(tmp_path, steps=20)
    assert passed == {
        "not there": False, "healthy": True, "hanging": False, "killed": False,
        "disk full": False, "healthy again": True,
    }, json.dumps(passed)  # fmt: skip
    assert counts.logged > 6 * 20 * 5
    assert counts.replayed == 4 * 20 * 5
    assert (counts.missing, counts.doubled, counts.out_of_order) == (0, 0, 0)
    assert counts.warnings == 2, "one message for each outage"
