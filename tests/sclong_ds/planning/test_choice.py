"""The setting that `plan` recommends is the fastest of all that fit, found one by one."""

from __future__ import annotations

import dataclasses

import pytest

from sclong_ds.config.load import load_config
from sclong_ds.engine.ds_config import DS_CONFIGS_DIR, resolve_ds_config
from sclong_ds.planning.choice import AS_FAST, Chooser, Workload
from sclong_ds.planning.devices import find_device
from sclong_ds.planning.memory import memory_per_rank, zero_settings
from sclong_ds.planning.step_time import Site

WORK = Workload(n_genes=27_874, n_edges=100_000, cells=10**6, n_expressed=1_800)


def chooser_of(preset: str, *overrides: str, **site: object) -> Chooser:
    config = load_config(preset, overrides)
    usual = {"nodes": 1, "gpus_per_node": 4, "device": "h100", "mfu": 0.4, "network_gbit": 400.0}
    place = Site(**(usual | site))
    device = find_device(place.device, ranks_per_node=place.gpus_per_node)
    return Chooser(config.model, config.engine, config.objective, place, device, WORK)


def all_that_fit(chooser: Chooser) -> dict[tuple[str, bool, int], float]:
    """Return the step times of every setting that fits, one by one."""
    found = {}
    for name in ("zero1", "zero2", "zero3"):
        for recompute in (False, True):
            for micro in range(1, chooser.engine.train_batch_size + 1):
                engine = dataclasses.replace(
                    chooser.engine, ds_config=name, train_micro_batch_size_per_gpu=micro
                )
                try:
                    ds_config = resolve_ds_config(engine, world_size=chooser.site.world_size)
                except ValueError:  # it does not divide the batch
                    continue
                zero = zero_settings(ds_config)
                memory = memory_per_rank(
                    chooser.model, zero, chooser.setup, micro_batch=micro,
                    element_bytes=chooser.element_bytes, recompute=recompute,
                )  # fmt: skip
                if memory.peak() <= chooser.device.usable_bytes():
                    step = chooser.time(zero, recompute=recompute, micro_batch=micro)
                    found[name, recompute, micro] = step.step_s
    return found


@pytest.mark.parametrize(
    ("preset", "site"),
    [
        ("sclong_1b", {"nodes": 4, "gpus_per_node": 8}),
        ("sclong_1b_recommended", {"device": "a100_40gb"}),
        ("sclong_1b", {"nodes": 4, "device": "l40s", "network_gbit": 10.0}),
        ("sclong_100m", {"device": "rtx5090", "gpus_per_node": 1}),
    ],
)
def test_it_fits_and_none_that_fits_is_faster(preset: str, site: dict[str, object]):
    chooser = chooser_of(preset, **site)
    fitting, choice = all_that_fit(chooser), chooser.fastest()
    assert choice is not None
    key = (choice.ds_config, choice.activation_checkpointing, choice.micro_batch)
    assert fitting[key] == choice.time.step_s <= AS_FAST * min(fitting.values())
    assert choice.peak_bytes <= chooser.device.usable_bytes()


def test_a_configured_setting_that_is_as_fast_stays():
    chooser = chooser_of("sclong_1b", nodes=8, gpus_per_node=8)
    choice = chooser.fastest()
    assert choice is not None
    assert choice.overrides(chooser.engine) == []


def test_states_go_to_the_host_only_where_nothing_fits_without():
    small = {"gpus_per_node": 1, "device": "rtx4090"}
    assert not all_that_fit(chooser_of("sclong_1b", **small))
    offloaded = chooser_of("sclong_1b", **small).fastest()
    assert offloaded is not None
    assert offloaded.ds_config == "zero3_offload"
    kept = chooser_of("sclong_1b", "engine.ds_config=zero3_offload").fastest()
    assert kept is not None
    assert kept.ds_config in ("zero1", "zero2", "zero3")


def test_a_slow_network_asks_for_larger_micro_batches():
    sizes = []
    for gbit in (3200.0, 25.0):
        choice = chooser_of("sclong_1b", nodes=8, gpus_per_node=8, network_gbit=gbit).fastest()
        assert choice is not None
        sizes.append(choice.micro_batch)
    assert sizes[1] > sizes[0]


def test_a_json_of_the_users_own_is_compared_too(tmp_path):
    own = tmp_path / "own.json"
    own.write_text((DS_CONFIGS_DIR / "zero3.json").read_text())
    chooser = chooser_of("sclong_1b", f"engine.ds_config={own}", nodes=8, gpus_per_node=8)
    choice = chooser.fastest()
    assert choice is not None
    assert choice.ds_config == str(own)
