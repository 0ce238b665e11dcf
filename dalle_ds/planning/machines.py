"""GPU nodes by name: vendors' specifications, and the measured rate of large matrix products."""

from pydantic import Field

from dalle_ds.errors import ConfigError
from dalle_ds.recipes import Config


class Machine(Config):
    """A node of `gpus_per_node` equal GPUs.

    Rates are peaks; rates of links are for one direction. `timing.py` defines the fractions that programs reach.
    """

    tflops: float = Field(gt=0, description="16-bit matrix peak of a GPU without sparsity, by the vendor")
    product_tflops: float = Field(gt=0, description="measured rate of 16-bit matrix products at their best shape")
    fp32_tflops: float = Field(gt=0)
    tf32_tflops: float = Field(gt=0, description="TF32 matrix peak; if the GPU has no TF32, the fp32 peak")
    multiprocessors: int = Field(ge=1)
    memory_gib: float = Field(gt=0)
    memory_gigabytes_per_second: float = Field(gt=0)
    nvlink_gbps: float = Field(ge=0, description="Gb/s that a GPU sends over NVLink to the others of its node; 0: over PCIe")
    pcie_gbps: float = Field(gt=0, description="Gb/s that a GPU sends over PCIe")
    node_gbps: float = Field(gt=0, description="Gb/s that a node sends to other nodes, all adapters together")
    gpus_per_node: int = Field(8, ge=1)

    @property
    def inside_gbps(self) -> float:
        """Gb/s of the link that collectives inside a node use."""
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
        """Returns a copy of this machine with the given values. Matrix products reach the same fraction of a changed peak."""
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
    """Returns the machine of this name. Raises ConfigError if there is none."""
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
    # The paper's machine: 8 GPUs of 16 GiB, one adapter of 100 Gb/s per node. No measured rate of products is published, so
    # product_tflops has the H100's fraction of the peak.
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
"""SXM modules, eight per node, with an adapter of 200 (A100) or 400 Gb/s (H100, H200) per GPU. Peaks and bandwidths are the
vendors'. `product_tflops` of A100 and H100 is the best of many shapes that S. Bekman measured with torch 2.6 and 2.7 ("Machine
Learning Engineering", compute/accelerator)."""
