"""Settings of `dalle-ds plan`: the machine and the training run."""

from typing import Literal

from pydantic import Field, model_validator

from dalle_ds.parallel.replicas.groups import PAPER_RATE
from dalle_ds.planning.machines import MACHINES, Machine, machine
from dalle_ds.recipes import Config

PAPER_UPDATES, PAPER_BATCH = 430_000, 1024


class PlanInputsConfig(Config):
    """Options of `dalle-ds plan`. The defaults are the paper's batch and updates, on A100s."""

    machine: str = Field("A100-80", description=f"one of {', '.join(MACHINES)}")
    gpus: int = Field(1024, ge=1, description="total number of GPUs")
    shard_gpus: int | None = Field(None, ge=1, description="GPUs that ZeRO-3 shards over; unset: all")
    micro_batch: int = Field(1, ge=1, description="samples per GPU and micro-step")
    activation_checkpointing: int = Field(1, ge=0, description="recompute every N-th layer; 0: none")
    updates: int = Field(PAPER_UPDATES, ge=1, description="updates of the run")
    global_batch: int = Field(PAPER_BATCH, ge=1, description="samples per update")
    moments: Literal["fp32", "low_bit"] = Field("fp32", description="the recipe's optimizer.moments")
    master: Literal["fp32", "none"] = Field("fp32", description="the recipe's optimizer.master; none requires low_bit moments")
    compression: Literal["none", "power_sgd"] = Field("none", description="the recipe's replicas.compression")
    compression_rank: int | None = Field(None, ge=1, description="the recipe's replicas.rank; unset: from sent_fraction")
    sent_fraction: float = Field(PAPER_RATE, gt=0, le=1, description="the recipe's replicas.sent_fraction")
    bucket: int = Field(1_000_000, ge=1, description="reduce_bucket_size of the DeepSpeed JSON")
    live: int = Field(1_000_000_000, ge=1, description="stage3_max_live_parameters of the DeepSpeed JSON")
    prefetch: int = Field(200_000_000, ge=0, description="stage3_prefetch_bucket_size of the DeepSpeed JSON")
    sub_group: int = Field(1_000_000_000, ge=1, description="sub_group_size of the DeepSpeed JSON")
    gpu_memory: float | None = Field(None, gt=0, description="GiB of one GPU; unset: the machine's")
    gpus_per_node: int | None = Field(None, ge=1, description="GPUs of one node; unset: the machine's")
    tflops: float | None = Field(None, ge=0.001, description="16-bit peak of one GPU, TFLOP/s; unset: the machine's")
    nvlink_gbps: float | None = Field(None, gt=0, description="Gb/s that a GPU sends over NVLink; unset: the machine's")
    pcie: bool = Field(False, description="the GPUs of a node are linked only by PCIe")
    node_gbps: float | None = Field(None, gt=0, description="Gb/s of a node's network, all adapters; unset: the machine's")
    host_ms_per_layer: float | None = Field(None, ge=0, description="milliseconds of Python per layer and micro-step")
    mfu: float | None = Field(None, gt=0, le=1, description="fraction of the peak; replaces the estimate from links and counts")
    price: float | None = Field(None, ge=0, description="price of a GPU hour, in any currency")

    @model_validator(mode="after")
    def _check(self) -> "PlanInputsConfig":
        if self.shards > self.gpus:
            raise ValueError(f"shard_gpus is {self.shards}, expected at most gpus, which is {self.gpus}")
        if self.master == "none" and self.moments != "low_bit":
            raise ValueError(f"master none requires moments low_bit, found {self.moments}")
        if self.pcie and self.nvlink_gbps is not None:
            raise ValueError(f"pcie and nvlink_gbps {self.nvlink_gbps:g}: expected only one of them")
        return self

    @property
    def shards(self) -> int:
        """Number of GPUs that ZeRO-3 shards over."""
        return self.shard_gpus or self.gpus

    @property
    def replicas(self) -> int:
        return max(1, self.gpus // self.shards)

    @property
    def is_compressed(self) -> bool:
        """Whether replicas exchange compressed gradients (PowerSGD factors)."""
        return self.replicas > 1 and self.compression == "power_sgd"

    @property
    def n_micro_steps(self) -> float:
        """Micro-steps per update. If the batch does not divide, this is not a whole number, and a training run rejects it."""
        return self.global_batch / (self.gpus * self.micro_batch)

    def build_machine(self) -> Machine:
        """Returns the named machine, with its values replaced by those set here. Raises ConfigError if the name is unknown."""
        return machine(self.machine).but(
            tflops=self.tflops,
            gpu_memory=self.gpu_memory,
            nvlink_gbps=self.nvlink_gbps,
            pcie=self.pcie,
            node_gbps=self.node_gbps,
            gpus_per_node=self.gpus_per_node,
        )
