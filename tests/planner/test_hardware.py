"""The table of devices: names as drivers give them, and figures that belong together."""

from __future__ import annotations

import dataclasses

import pytest

from odysseus_kernels.planner.hardware import CPU, GENERIC_GPU, KNOWN_GPUS, Hardware, hardware_for


@pytest.mark.parametrize(
    ("device_name", "name"),
    (
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("cpu", "CPU"),
    ),
)
def test_known_names(device_name: str, name: str) -> None:
    assert hardware_for(device_name).name == name


@pytest.mark.parametrize(
    "device_name",
    ("NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA L40", "NVIDIA H800", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""),
)
def test_names_that_only_resemble_known_ones(device_name: str) -> None:
    assert hardware_for(device_name) is GENERIC_GPU


@pytest.mark.parametrize("hardware", (*KNOWN_GPUS, GENERIC_GPU, CPU), ids=lambda one: one.name)
def test_figures_belong_together(hardware: Hardware) -> None:
    assert set(hardware.flops) == {"bfloat16", "float16", "float32", "float64"}
    assert hardware.flops_of("torch.float32") == hardware.flops_of("float32") >= hardware.flops_of("float64")
    # Bytes in one direction of a link: never faster than the memory that they come from.
    assert hardware.link_bytes_per_s < hardware.memory_bytes_per_s
    assert hardware.link_latency_s < 1e-3 and hardware.launch_overhead_s < 1e-3
    assert hardware.overlaps == (hardware is not CPU)
    assert isinstance(hash(hardware), int)


def test_sizes_of_memory() -> None:
    """Every device of the table has one, which takes between a hundredth and a tenth of a second to read."""
    for hardware in KNOWN_GPUS:
        assert 0.01 < hardware.memory_bytes / hardware.memory_bytes_per_s < 0.1, hardware.name
    assert hardware_for("NVIDIA H200").memory_bytes == 141e9
    assert hardware_for("NVIDIA A100-SXM4-40GB").memory_bytes == 40e9
    assert CPU.memory_bytes == GENERIC_GPU.memory_bytes == float("inf")
    with pytest.raises(ValueError, match="expected memory_bytes above 0, got 0"):
        dataclasses.replace(CPU, memory_bytes=0)


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="expected a dtype among float32.*got torch.int8"):
        CPU.flops_of("torch.int8")


def test_rates_must_be_positive() -> None:
    with pytest.raises(ValueError, match="expected link_bytes_per_s above 0, got 0"):
        dataclasses.replace(CPU, link_bytes_per_s=0)
    with pytest.raises(ValueError, match="expected float32 above 0"):
        dataclasses.replace(CPU, flops={"float32": -1.0})
    with pytest.raises(ValueError, match="expected link_latency_s of at least 0"):
        dataclasses.replace(CPU, link_latency_s=float("nan"))


def test_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        CPU.flops["float32"] = 1.0  # type: ignore[index]
