"""Mapping from a GPU's device name and memory to a machine of `plan`."""

import pytest
import torch

from dalle_ds.acceptance.expected import Expected, machine_name, machine_of, micro_step
from dalle_ds.models.presets import PRESETS


@pytest.mark.parametrize(
    "name, gib, kind",
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA H100 NVL", 93.1, "H100"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40"),
        ("NVIDIA A100 80GB PCIe", 79.2, "A100-80"),
        ("Tesla V100-SXM2-16GB", 15.8, "V100"),
        ("NVIDIA L40S", 44.4, None),
    ],
)
def test_kind_of_a_gpu(name, gib, kind):
    assert machine_name(name, gib) == kind


def test_a_cpu_is_none():
    cpu = torch.device("cpu")
    assert machine_of(cpu) is None
    assert (
        micro_step(PRESETS["1.2b"], cpu, samples=8, accumulation=2, activation_checkpointing=True, moments="fp32") == Expected()
    )
