"""What a step takes, against sums made by hand."""

from __future__ import annotations

import dataclasses

import pytest

from sclong_ds.planning.costs import Rounded
from sclong_ds.planning.devices import Device
from sclong_ds.planning.memory import zero_settings
from sclong_ds.planning.step_time import (
    ADAM_BYTES,
    GEMM_SHARE,
    HOST_MEMORY_GB_PER_S,
    HOST_MS_PER_LAYER,
    LINK_SHARE,
    FewerBits,
    Site,
    StepTime,
    Work,
    collective_s,
    step_time,
)

DEVICE = Device(80, bf16_tflops=1000, fp32_tflops=50, link_gb_per_s=400, host_gb_per_s=50,
                memory_gb_per_s=2000, fp8_tflops=2000)  # fmt: skip
SITE = Site(nodes=2, gpus_per_node=8, device="h100", mfu=0.5, network_gbit=800)
WORK = Work(parameters=10**9, layers=40, element_bytes=2, training_flops=30e12, recompute_flops=0.0)


def predicted(stage: int, site: Site = SITE, work: Work = WORK, **zero: object) -> StepTime:
    settings = zero_settings({"zero_optimization": {"stage": stage, "overlap_comm": True} | zero})
    return step_time(work, settings, DEVICE, site, precision="bf16", step_cells=256, micro_batch=4)


def test_arithmetic_is_flops_over_what_is_reached():
    assert predicted(3).compute_s == pytest.approx(4 * 30e12 / (0.5 * 1000e12))
    again = dataclasses.replace(WORK, recompute_flops=10e12)
    assert predicted(3, work=again).compute_s == pytest.approx(4 * 40e12 / (0.5 * 1000e12))


SIZES = Rounded(flops=int(8e12), elements=10**9, weights=10**8)


@pytest.mark.parametrize(
    ("compiled", "recomputed", "products", "moved"),
    [
        # Of three products two are in fp8, of the repeated forward pass one more.
        (False, False, 2, 21 * (4e9 + 2e8)),
        (True, False, 2, 5 * (4e9 + 2e8)),
        (True, True, 3, 1.5 * 5 * (4e9 + 2e8)),
    ],
)
def test_fewer_bits_save_arithmetic_and_cost_memory_traffic(
    compiled: bool, recomputed: bool, products: int, moved: float
):
    plain = dataclasses.replace(WORK, recompute_flops=10e12 * recomputed)
    fewer = FewerBits(products="fp8", sizes=SIZES, compiled=compiled)
    times = [
        predicted(1, work=dataclasses.replace(plain, fewer_bits=how)).compute_s
        for how in (None, fewer)
    ]
    faster = products * 4 * 8e12 * (1 / 1000e12 - 1 / 2000e12) / GEMM_SHARE
    assert times[0] - times[1] == pytest.approx(faster - moved / 2000e9)


def test_where_nothing_multiplies_8_bits_they_only_cost():
    fewer = FewerBits(products="fp8", sizes=SIZES, compiled=True)
    without = dataclasses.replace(DEVICE, fp8_tflops=0.0)
    saved = [
        fewer.saves_s(device, precision="bf16", mfu=0.4, micro_batch=4, forwards=1)
        for device in (DEVICE, without)
    ]
    assert saved[0] > 0 > saved[1]


def test_bf16_products_of_an_fp32_model_count_all_three():
    fewer = FewerBits(products="bf16", sizes=SIZES, compiled=False)
    saved = fewer.saves_s(DEVICE, precision="fp32", mfu=0.9, micro_batch=1, forwards=1)
    faster = 3 * 8e12 * (1 / 50e12 - 1 / 1000e12) / 0.9
    assert saved == pytest.approx(faster - (12 * 1e9 + 18 * 1e8) / 2000e9)


def test_python_follows_the_layers_the_stage_and_what_is_recomputed():
    again = dataclasses.replace(WORK, recompute_flops=1.0)
    for stage, work, key in ((1, WORK, (False, False)), (2, again, (False, True)),
                             (3, WORK, (True, False)), (3, again, (True, True))):  # fmt: skip
        assert predicted(stage, work=work).host_s == pytest.approx(0.04 * HOST_MS_PER_LAYER[key])


def test_a_collective_takes_as_long_as_the_slower_of_its_links():
    """2 GB: half of it through 100 GB/s to the other node, 15/16 through 400 GB/s within one."""
    assert collective_s(2e9, DEVICE, SITE) == pytest.approx(0.01 / LINK_SHARE)
    one = dataclasses.replace(SITE, nodes=1)
    assert collective_s(2e9, DEVICE, one) == pytest.approx(2e9 * 7 / 8 / 400e9 / LINK_SHARE)
    assert collective_s(2e9, DEVICE, dataclasses.replace(one, gpus_per_node=1)) == 0


def test_stages_move_their_bytes_in_a_micro_batch_or_once_a_step():
    """Weights twice and gradients once; gradients; nothing: and what is left once a step."""
    whole = collective_s(2e9, DEVICE, SITE)
    for stage, links, update in ((3, 3, 0), (2, 1, 1), (1, 0, 2)):
        step = predicted(stage)
        assert (step.links_s, step.update_s) == pytest.approx((links * whole, update * whole))


def test_offloaded_states_go_to_the_host_and_back():
    on_host = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    near, far = predicted(3), predicted(3, **on_host)
    share, link = 10**9 / 16, 50e9 * LINK_SHARE
    assert far.links_s - near.links_s == pytest.approx(2 * 2 * share / link)
    adam = 8 * share * ADAM_BYTES / (HOST_MEMORY_GB_PER_S * 1e9)
    assert far.update_s - near.update_s == pytest.approx(6 * share / link + adam)


def test_the_longest_counts_and_what_is_not_overlapped_is_added():
    parts = {"compute_s": 3.0, "host_s": 1.0, "links_s": 2.0, "accumulated": 4, "update_s": 0.5,
             "training_flops": 1.0}  # fmt: skip
    assert StepTime(**parts, overlapped=True).step_s == 4 * 3 + 0.5
    assert StepTime(**parts, overlapped=False).step_s == 4 * 5 + 0.5
    for name, bound in (("host_s", "Python"), ("links_s", "links"), ("compute_s", "arithmetic")):
        assert StepTime(**(parts | {name: 9.0}), overlapped=True).bound_by == bound
