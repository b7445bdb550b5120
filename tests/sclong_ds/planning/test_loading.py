"""What feeding a node takes, by hand, and the verdict on a measured rate."""

from dataclasses import asdict, replace

import pytest

from sclong_ds.config.load import load_config
from sclong_ds.planning.loading import CHUNK_VALUES, as_plan, loading, loading_lines, sampling
from sclong_ds.planning.verdict import verdict_of

DATA = replace(load_config("sclong_1b").data, order="lanes", shuffle_group_chunks=256)
SIZES = {
    "sampled": (1, 1000), "cells": 1000, "n_expressed": 1900, "batch": 1024, "cells_per_s": 8000.0,
    "nodes": 4, "world_size": 32, "rate": None,
}  # fmt: skip


def test_by_lanes_each_cell_is_read_once():
    found = loading(DATA, **SIZES)
    assert (found.read_times, found.passes) == (1, 1)
    assert found.cells_per_s == found.decoded_per_s == 2000
    assert found.bytes_per_s == pytest.approx(2000 * 1900 * 0.96)
    assert found.cores == pytest.approx(2000 * 8e-6)
    assert found.requests_per_s == 0
    # Two ranks share a lane.
    assert loading(DATA, **SIZES | {"world_size": 512}).read_times == 2


def test_by_groups_every_rank_reads_all_of_every_pass():
    found = loading(replace(DATA, order="groups"), **SIZES | {"sampled": (6, 3000)})
    assert found.read_times == 32 * 6
    assert found.decoded_per_s == pytest.approx(2000 * 32 * 6 / 3)


def test_weights_by_lanes_read_a_chunk_for_all_its_visits():
    found = loading(DATA, **SIZES | {"sampled": (6, 3000)})
    assert found.decoded_per_s == pytest.approx(2000 / 3)
    # Every visit is gathered, though.
    assert found.cores == pytest.approx(2000 * 8e-6)
    assert sampling(replace(DATA, balance_by="tissue", max_repeats=6), None, 7) == (6, 7)
    assert sampling(DATA, None, 7) == (1, 7)


def test_a_server_is_asked_for_two_parts_of_a_chunk_and_its_indices():
    found = loading(replace(DATA, corpus="s3://bucket/corpus"), **SIZES)
    assert found.requests_per_s == pytest.approx(2.1 * 2000 * 1900 / CHUNK_VALUES)
    assert loading(replace(DATA, corpus="file:///corpus"), **SIZES).requests_per_s == 0


@pytest.mark.parametrize(("measured", "too_slow"), [(1000.0, True), (2000.0, False), (9e4, False)])
def test_a_measured_rate_is_the_verdict(measured, too_slow):
    rate = {"cells_per_s": measured, "cpu_us_per_cell": 10.0}
    found = loading(DATA, **SIZES | {"rate": rate})
    assert found.too_slow is too_slow
    assert found.cores == pytest.approx(0.02)
    plan = {"loading": as_plan(found)}
    assert plan["loading"] == asdict(found) | {"too_slow": too_slow}
    text = "\n".join(loading_lines(plan))
    assert ("TOO SLOW" in text and "50%" in text) is too_slow
    plan |= {
        "memory": {"fits": True, "peak_bytes": 1, "usable_bytes": 2}, "world_size": 1,
        "device": {"name": "h100"}, "cells": 10,
        "time": {
            "micro_batch": {"bound_by": "arithmetic"}, "run_hours": 1, "run_steps": 1,
            "run_epochs": 1,
        },
    }  # fmt: skip
    assert ("TOO SLOW" in verdict_of(plan)) is too_slow
