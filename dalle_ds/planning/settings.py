"""The machine and the run that a plan is of."""

from typing import Literal

from pydantic import Field, model_validator

from dalle_ds.planning.machines import MACHINES, Machine, machine
from dalle_ds.recipes import Config

PAPER_UPDATES, PAPER_BATCH = 430_000, 1024


class PlanInputsConfig(Config):
    """Options of `dalle-ds plan`; the defaults are the paper's run on A100s."""

    machine: str = Field("A100-80", description=f"one of {', '.join(MACHINES)}")
    gpus: int = Field(1024, ge=1, description="GPUs in all")
    shard_gpus: int | None = Field(None, ge=1, description="GPUs that ZeRO-3 shards over; unset: all of them")
    micro_batch: int = Field(1, ge=1, description="samples a GPU takes at a time")
    recompute: int = Field(1, ge=0, description="every how many layers one is recomputed; 0: none (activation_checkpointing)")
    updates: int = Field(PAPER_UPDATES, ge=1, description="updates of the run")
    global_batch: int = Field(PAPER_BATCH, ge=1, description="samples of an update")
    moments: Literal["fp32", "low_bit"] = Field("fp32", description="the recipe's optimizer.moments")
    master: Literal["fp32", "none"] = Field("fp32", description="the recipe's optimizer.master; none: with low_bit moments")
    compression: Literal["none", "power_sgd"] = Field("none", description="the recipe's replicas.compression")
    bucket: int = Field(1_000_000, ge=1, description="reduce_bucket_size of the DeepSpeed JSON")
    live: int = Field(1_000_000_000, ge=1, description="stage3_max_live_parameters of the DeepSpeed JSON")
    prefetch: int = Field(200_000_000, ge=0, description="stage3_prefetch_bucket_size of the DeepSpeed JSON")
    sub_group: int = Field(1_000_000_000, ge=1, description="sub_group_size of the DeepSpeed JSON")
    gpu_memory: float | None = Field(None, gt=0, description="GiB of one GPU; unset: the machine's")
    gpus_per_node: int | None = Field(None, ge=1, description="unset: the machine's")
    tflops: float | None = Field(None, ge=0.001, description="16-bit peak of one GPU; unset: the machine's")
    nvlink_gbps: float | None = Field(None, gt=0, description="Gb/s that a GPU sends by NVLink; unset: the machine's")
    pcie: bool = Field(False, description="GPUs of a node are linked by PCIe alone")
    node_gbps: float | None = Field(None, gt=0, description="Gb/s of a node's network, all adapters; unset: the machine's")
    host_ms_per_layer: float | None = Field(None, ge=0, description="Python's time for a layer and micro-step")
    mfu: float | None = Field(None, gt=0, le=1, description="share of the peak, instead of what links and counts give")
    price: float | None = Field(None, ge=0, description="a GPU hour, any currency")

    @model_validator(mode="after")
    def _check(self) -> "PlanInputsConfig":
        if self.shards > self.gpus:
            raise ValueError(f"shard_gpus is {self.shards}, expected at most the {self.gpus} gpus")
        if self.master == "none" and self.moments != "low_bit":
            raise ValueError(f"master none needs moments low_bit, found {self.moments}")
        if self.pcie and self.nvlink_gbps is not None:
            raise ValueError(f"pcie and nvlink_gbps {self.nvlink_gbps:g}: expected one of them")
        return self

    @property
    def shards(self) -> int:
        """GPUs that ZeRO-3 shards over."""
        return self.shard_gpus or self.gpus

    @property
    def replicas(self) -> int:
        return max(1, self.gpus // self.shards)

    @property
    def is_compressed(self) -> bool:
        """Whether gradients go between replicas as factors."""
        return self.replicas > 1 and self.compression == "power_sgd"

    @property
    def n_micro_steps(self) -> float:
        """Of an update; no whole number where the batch does not divide, which a run refuses."""
        return self.global_batch / (self.gpus * self.micro_batch)

    def build_machine(self) -> Machine:
        """The named machine with what is set in place of its own. Raises ConfigError where none has this name."""
        return machine(self.machine).but(
            tflops=self.tflops,
            gpu_memory=self.gpu_memory,
            nvlink_gbps=self.nvlink_gbps,
            pcie=self.pcie,
            node_gbps=self.node_gbps,
            gpus_per_node=self.gpus_per_node,
        )
