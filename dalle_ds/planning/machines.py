"""Kinds of GPU nodes by name: what their makers promise, and what large matrix products reach on them."""

from pydantic import Field

from dalle_ds.errors import ConfigError
from dalle_ds.recipes import Config


class Machine(Config):
    """A node of `gpus_per_node` equal GPUs. Rates are peaks, of links in one direction; `timing.py` says how much of them
    programs reach."""

    tflops: float = Field(gt=0, description="16-bit matrix peak of a GPU without sparsity, as its maker states it")
    product_tflops: float = Field(gt=0, description="16-bit matrix products at their best shape, measured")
    fp32_tflops: float = Field(gt=0)
    tf32_tflops: float = Field(gt=0, description="that of fp32 where a GPU has no TF32")
    multiprocessors: int = Field(ge=1)
    memory_gib: float = Field(gt=0)
    memory_gigabytes_per_second: float = Field(gt=0)
    nvlink_gbps: float = Field(ge=0, description="Gb/s that a GPU sends to the others of its node; 0: by PCIe")
    pcie_gbps: float = Field(gt=0, description="Gb/s that a GPU sends by PCIe")
    node_gbps: float = Field(gt=0, description="Gb/s that a node sends to others, all its adapters together")
    gpus_per_node: int = Field(8, ge=1)

    @property
    def inside_gbps(self) -> float:
        """Gb/s of the link that collectives inside a node take."""
        return self.nvlink_gbps or self.pcie_gbps

    def but(
        self,
        *,
        tflops: float | None = None,
        gpu_memory: float | None = None,
        nvlink_gbps: float | None = None,
        pcie: bool = False,
        node_gbps: float | None = None,
        gpus_per_node: int | None = None,
    ) -> "Machine":
        """This machine with what is given in place of its own; products reach the same share of another peak."""
        own = self.model_dump()
        if tflops is not None:
            for key in ("tflops", "product_tflops"):
                own[key] *= tflops / self.tflops
        given = {
            "memory_gib": gpu_memory,
            "nvlink_gbps": 0.0 if pcie else nvlink_gbps,
            "node_gbps": node_gbps,
            "gpus_per_node": gpus_per_node,
        }
        return Machine(**{**own, **{key: value for key, value in given.items() if value is not None}})


def machine(name: str) -> Machine:
    """Raises ConfigError where no machine has this name."""
    if name not in MACHINES:
        raise ConfigError(f"machine {name!r}: expected one of {', '.join(MACHINES)}")
    return MACHINES[name]


_H100 = Machine(
    tflops=989,
    product_tflops=794.5,
    fp32_tflops=67,
    tf32_tflops=494.5,
    multiprocessors=132,
    memory_gib=80,
    memory_gigabytes_per_second=3350,
    nvlink_gbps=3600,
    pcie_gbps=512,
    node_gbps=3200,
)
_A100 = Machine(
    tflops=312,
    product_tflops=271.2,
    fp32_tflops=19.5,
    tf32_tflops=156,
    multiprocessors=108,
    memory_gib=80,
    memory_gigabytes_per_second=2039,
    nvlink_gbps=2400,
    pcie_gbps=256,
    node_gbps=1600,
)

MACHINES: dict[str, Machine] = {
    # The paper's: 8 GPUs of 16 GiB, one adapter of 100 Gb/s a node. Of its products nobody published a best: H100's share.
    "V100": Machine(
        tflops=125,
        product_tflops=100,
        fp32_tflops=15.7,
        tf32_tflops=15.7,
        multiprocessors=80,
        memory_gib=16,
        memory_gigabytes_per_second=900,
        nvlink_gbps=1200,
        pcie_gbps=128,
        node_gbps=100,
    ),
    "A100-40": _A100.model_copy(update={"memory_gib": 40.0, "memory_gigabytes_per_second": 1555.0}),
    "A100-80": _A100,
    "H100": _H100,
    "H200": _H100.model_copy(update={"memory_gib": 140.0, "memory_gigabytes_per_second": 4800.0}),
}
"""SXM modules, eight a node, with an adapter of 200 (A100) or 400 Gb/s (H100, H200) for each GPU. Peaks and bandwidths are the
makers'; `product_tflops` of A100 and H100 are the best of many shapes that S. Bekman measured with torch 2.6 and 2.7 ("Machine
Learning Engineering", compute/accelerator)."""
