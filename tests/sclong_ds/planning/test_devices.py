from __future__ import annotations

import pytest

from sclong_ds.config.load import load_config
from sclong_ds.planning import devices
from sclong_ds.planning.devices import (
    DEVICES,
    GIB,
    check_products,
    cpu_rank,
    device_of_name,
    find_device,
)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx_pro_6000"),
    ],
)
def test_devices_are_known_by_the_names_that_cuda_gives_them(name: str, key: str):
    assert device_of_name(name) is DEVICES[key]


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GH200 480GB", "NVIDIA RTX 4000 Ada", "NVIDIA RTX 6000 Ada Generation", "Tesla T4", ""],
)
def test_others_are_not_guessed(name: str):
    assert device_of_name(name) is None


def test_a_node_of_cpus_is_divided_among_its_ranks():
    one, two = (find_device("cpu", ranks_per_node=n) for n in (1, 2))
    assert two.memory_gib == one.memory_gib / 2
    assert two.flops_per_s("fp32") == one.flops_per_s("fp32") / 2


@pytest.mark.parametrize(
    ("sets", "fp32", "bf16"),
    [
        ({"sse2"}, 1.0, 0.2),
        ({"avx2", "fma"}, 2.0, 0.4),
        ({"avx2", "avx512f"}, 4.0, 0.8),
        ({"avx2", "avx512f", "avx512_bf16"}, 4.0, 8.0),
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, 4.0, 32.0),
    ],
)
def test_a_cpu_counts_by_what_it_multiplies(sets: set[str], fp32: float, bf16: float):
    """In units of 48 GFLOP/s: 16 FLOP per cycle of a core at 3 GHz."""
    device = cpu_rank(sets, cores=2, memory_gib=8)
    assert device.flops_per_s("fp32") == pytest.approx(2 * 48e9 * fp32)
    assert device.flops_per_s("bf16") == pytest.approx(2 * 48e9 * bf16)


def test_a_gpu_keeps_its_memory_and_a_part_of_it_is_usable():
    device = find_device("h100", ranks_per_node=8)
    assert device is DEVICES["h100"]
    assert device.flops_per_s("bf16") == 989e12
    assert 0.85 * device.memory_gib * GIB < device.usable_bytes() < 0.92 * device.memory_gib * GIB


def test_an_unknown_device_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"--device v100: unknown; known devices are a100, .*cpu"):
        find_device("v100", ranks_per_node=1)


def test_devices_with_units_for_8_bits_multiply_twice_as_many():
    ratios = {name: d.flops_per_s("fp8") / d.flops_per_s("bf16") for name, d in DEVICES.items()}
    assert {name for name, ratio in ratios.items() if ratio == 0} == {"a100", "a100_40gb"}
    assert all(ratio == pytest.approx(2, rel=0.03) for ratio in ratios.values() if ratio)


@pytest.mark.parametrize(
    ("products", "place", "overrides", "refused"),
    [
        ("precision", "v100", [], None),
        ("bf16", "cpu", [], None),
        ("bf16", "old cpu", [], "=bf16 is for CPUs with AVX512_BF16 or AMX: this is old cpu; set"),
        ("bf16", "h100", [], "=bf16 is for CPUs with AVX512_BF16 or AMX: this is h100; set"),
        ("fp8", "old cpu", [], None),
        ("fp8", "h100", [], None),
        ("fp8", "a100", [], "capability 8.9 or newer: this is a100; set it to precision"),
        ("fp8", "h100", ["model.large_dim=72"], "the large encoder has 72; set it to precision"),
        ("fp8", "cpu", ["model.large_dim=72"], None),
        ("fp8", "h100", ["model.contextual_encoder=mini"], "which this model lacks: set it to"),
    ],
)
def test_products_that_a_device_cannot_compute_are_refused(
    products: str,
    place: str,
    overrides: list[str],
    refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(devices, "multiplies_bf16", lambda: place == "cpu")
    model = load_config("sclong_tiny", overrides).model
    given = {"device": place, "on_cpu": place.endswith("cpu"), "model": model}
    has_fp8 = place in DEVICES and DEVICES[place].fp8_tflops > 0
    if refused is None:
        check_products(products, has_fp8=has_fp8, **given)
    else:
        with pytest.raises(ValueError, match=refused):
            check_products(products, has_fp8=has_fp8, **given)
