"""Expected values from `dalle-ds plan` for one GPU, for the steps that measure time and memory."""

from dataclasses import dataclass
from functools import cache

import torch

from dalle_ds.models.prior import PriorConfig
from dalle_ds.planning.arithmetic import forward_flops
from dalle_ds.planning.machines import MACHINES, Machine
from dalle_ds.planning.settings import PlanInputsConfig
from dalle_ds.planning.timing import LINK_SHARE, MEMORY_SHARE, Product
from dalle_ds.training.prior.cost import plan
from dalle_ds.training.prior.throughput import known_peak_tflops

SLOWER = 0.7
"""A measured rate may be this fraction of `plan`'s estimate: the error of `plan` against published runs is up to 30 %."""
LARGER = 0.15
"""Measured memory may exceed `plan`'s estimate by this fraction: `plan` counts state to the byte, but no fragmentation and no
workspaces of libraries."""
WHY = "`dalle-ds plan`, whose error against published runs is up to 30 %"


@dataclass(frozen=True)
class Expected:
    """Estimates for one micro-step on one GPU. All are None if `plan` doesn't know the device. `binds` names the bottleneck."""

    seconds: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    binds: str = ""


def machine_of(device: torch.device) -> Machine | None:
    """Returns the rates of this GPU's node. If `plan` doesn't know the GPU: None."""
    name = _name(device)
    return MACHINES[name].but(tflops=known_peak_tflops(device)) if name else None  # PCIe and NVL variants have other peaks


def machine_name(name: str, gib: float) -> str | None:
    """Returns `plan`'s name of the machine whose GPU has the device name `name` and about `gib` of memory, or None."""
    kinds = [kind for kind in MACHINES if kind.partition("-")[0] in name]
    # if kinds differ only in memory, choose the nearest
    return min(kinds, key=lambda kind: abs(MACHINES[kind].memory_gib - gib), default=None)


def micro_step(
    config: PriorConfig,
    device: torch.device,
    *,
    samples: int,
    accumulation: int,
    activation_checkpointing: bool,
    moments: str,
    master: str = "fp32",
) -> Expected:
    """Estimate micro-batches of `samples`, `accumulation` of them per update, on one GPU with the default DeepSpeed config."""
    name = _name(device)
    if name is None:
        return Expected()
    settings = PlanInputsConfig.model_validate(
        {
            "machine": name,
            "tflops": known_peak_tflops(device),
            "gpus": 1,
            "micro_batch": samples,
            "activation_checkpointing": int(activation_checkpointing),
            "global_batch": samples * accumulation,
            "updates": 1,
            "moments": moments,
            "master": master,
        }
    )
    told = plan(config, settings)
    return Expected(
        told["seconds_per_update_estimate"] / accumulation,
        told["mfu_estimate"],
        told["memory_gib_per_gpu_estimate"],
        told["binds"],
    )


def product_tflops(device: torch.device, rows: int, columns: int, depth: int) -> float | None:
    """Returns the expected TFLOP/s of one fp16 matrix product. If `plan` doesn't know the GPU: None."""
    machine = machine_of(device)
    product = Product(rows, columns, depth)
    return product.flops / product.seconds(machine) / 1e12 if machine else None


def memory_gbps(device: torch.device) -> float | None:
    """Returns the expected GB/s, reads plus writes, of kernels that only move data. If `plan` doesn't know the GPU: None."""
    machine = machine_of(device)
    return machine.memory_gigabytes_per_second * MEMORY_SHARE if machine else None


def link_gbps(device: torch.device) -> float | None:
    """Returns the expected GB/s that a collective sends from one GPU to the others of its node, by NVLink or else by PCIe. If
    `plan` doesn't know the GPU: None."""
    machine = machine_of(device)
    if machine is None:
        return None
    near = all(torch.cuda.can_device_access_peer(0, i) for i in range(1, torch.cuda.device_count()))
    return (machine.inside_gbps if near else machine.pcie_gbps) / 8 * LINK_SHARE


@cache
def _name(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return machine_name(torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory / 2**30)


def useful_flops(config: PriorConfig, samples: int) -> float:
    """Returns the FLOPs of forward and backward passes, without recomputation."""
    return 3.0 * forward_flops(config) * samples
