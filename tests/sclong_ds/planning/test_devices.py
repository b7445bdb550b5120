from __future__ import annotations

import pytest

from sclong_ds.planning.devices import DEVICES, GIB, device_of_name, find_device


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
    ],
)
def test_devices_are_known_by_the_names_that_cuda_gives_them(name: str, key: str):
    assert device_of_name(name) is DEVICES[key]


@pytest.mark.parametrize("name", ["NVIDIA GH200 480GB", "NVIDIA RTX 4000 Ada", "Tesla T4", ""])
def test_others_are_not_guessed(name: str):
    assert device_of_name(name) is None


def test_a_node_of_cpus_is_divided_among_its_ranks():
    one, two = (find_device("cpu", ranks_per_node=n) for n in (1, 2))
    assert two.memory_gib == one.memory_gib / 2
    assert two.flops_per_s("fp32") == one.flops_per_s("fp32") / 2
    assert one.flops_per_s("bf16") < one.flops_per_s("fp32")


def test_a_gpu_keeps_its_memory_and_a_part_of_it_is_usable():
    device = find_device("h100", ranks_per_node=8)
    assert device is DEVICES["h100"]
    assert device.flops_per_s("bf16") == 989e12
    assert 0.85 * device.memory_gib * GIB < device.usable_bytes() < 0.92 * device.memory_gib * GIB


def test_an_unknown_device_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"--device v100: unknown; known devices are a100, .*cpu"):
        find_device("v100", ranks_per_node=1)
