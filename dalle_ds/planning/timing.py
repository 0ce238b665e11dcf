"""Estimate the time that a machine takes for some work: the longest of compute, links inside nodes, links between nodes, host.

Concurrent work is assumed to overlap completely, so the times are optimistic. The constants below are used for all runs: this
project's, and the published runs of others that `published.py` compares them with.
"""

from dataclasses import dataclass
from typing import Literal

from dalle_ds.planning.machines import Machine

PRODUCT_SHARE = 0.80
"""Fraction of the rate at the best shape, which was measured alone on a cool GPU. Long runs reach the power limit."""

TILE = 128
"""Side of the tile of a product's result that a multiprocessor computes at a time. On average the last wave of tiles is half
empty."""

DEPTH = 128
"""A product with this inner dimension spends as much time on filling its pipeline and writing its result as on arithmetic."""

MEMORY_SHARE = 0.87
"""Fraction of a GPU's memory bandwidth that kernels with little arithmetic reach."""

SIDE_SHARE = 0.5
"""Fraction of memory traffic on other streams (copies for collectives) that products do not hide, because both share memory."""

LINK_SHARE, NETWORK_SHARE = 0.78, 0.84
"""Fractions of the rate of NVLink or PCIe, and of the network adapters, that NCCL collectives of many megabytes reach. NCCL's
own model has 235 GB/s on an A100 (of 300). 42 GB/s of a 50 GB/s adapter are common."""

STEP_SECONDS, NODE_STEP_SECONDS = 3.4e-6, 9.6e-6
"""Latency of a step of NCCL's rings to a GPU of the same node, and to a GPU of another node, from NCCL's table
(src/graph/tuning.cc, simple protocol). A ring of n GPUs has n - 1 steps."""

Format = Literal["half", "tf32", "fp32"]


@dataclass(frozen=True)
class Product:
    """`times` matrix products of shape (rows, depth) x (depth, columns)."""

    rows: float
    columns: float
    depth: float
    times: float = 1.0
    format: Format = "half"

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.depth * self.times

    def seconds(self, machine: Machine) -> float:
        peak = {"half": machine.tflops, "tf32": machine.tf32_tflops, "fp32": machine.fp32_tflops}[self.format]
        best = peak * machine.product_tflops / machine.tflops
        tiles, round_of_tiles = self.rows * self.columns, machine.multiprocessors * TILE**2
        share = tiles / (tiles + round_of_tiles / 2) * self.depth / (self.depth + DEPTH)
        return self.flops / (best * 1e12 * PRODUCT_SHARE * share)


@dataclass(frozen=True)
class Group:
    """GPUs of a collective. `twins` such groups run at the same time and share the adapters of every node."""

    ranks: int
    nodes: int
    twins: int = 1

    @classmethod
    def of_neighbours(cls, ranks: int, per_node: int) -> "Group":
        """A group of consecutive GPUs, which fills node after node."""
        return cls(ranks, -(-ranks // per_node))

    @classmethod
    def of_peers(cls, ranks: int, apart: int, per_node: int) -> "Group":
        """A group of every `apart`-th GPU: the GPUs that hold the same shard in different replicas."""
        nodes = min(ranks, -(-ranks * apart // per_node))
        return cls(ranks, nodes, min(apart, per_node))


@dataclass(frozen=True)
class Collective:
    """An all-gather or a reduce-scatter in `calls` messages. `n_bytes` is the total size of all messages.

    An all-reduce counts as two collectives.
    """

    n_bytes: float
    group: Group
    calls: float = 1.0

    def inside_seconds(self, machine: Machine) -> float:
        """Seconds on the links inside nodes."""
        group = self.group
        if group.ranks == group.nodes:
            return 0.0
        seconds = self.n_bytes * (group.ranks - 1) / group.ranks / (machine.inside_gbps * 1e9 / 8 * LINK_SHARE)
        return seconds + self.calls * (group.ranks - group.nodes) * STEP_SECONDS

    def between_seconds(self, machine: Machine) -> float:
        """Seconds on the network between nodes. Data enters a node once and is passed on inside."""
        group = self.group
        if group.nodes == 1:
            return 0.0
        n_bytes = self.n_bytes * group.twins * (group.nodes - 1) / group.nodes
        steps = (group.ranks - group.nodes) * STEP_SECONDS + (group.nodes - 1) * NODE_STEP_SECONDS
        return n_bytes / (machine.node_gbps * 1e9 / 8 * NETWORK_SHARE) + self.calls * steps


@dataclass(frozen=True)
class Work:
    """Work of one GPU in a micro-step, or at the end of an update."""

    products: tuple[Product, ...] = ()
    attention_flops: float = 0.0
    attention_share: float = 1.0
    """Fraction of the rate of products that the attention kernels reach."""
    memory_bytes: float = 0.0
    """Bytes read and written by all kernels other than products and attention."""
    side_bytes: float = 0.0
    """Bytes read and written on streams other than the main stream."""
    collectives: tuple[Collective, ...] = ()
    """Collectives that overlap with compute."""
    waited_for: tuple[Collective, ...] = ()
    """Collectives whose result the next kernel needs. Their time counts as compute."""
    host_seconds: float = 0.0
    """Time of Python and kernel launches. It does not depend on the batch."""


@dataclass(frozen=True)
class Times:
    """Seconds of each of the four components, which run concurrently."""

    compute: float
    inside: float
    between: float
    host: float
    parts: dict[str, float]
    """Seconds of the parts of compute."""

    @property
    def longest(self) -> float:
        return max(self.compute, self.inside, self.between, self.host)

    @property
    def binds(self) -> str:
        """Name of the longest component."""
        named = {"links inside nodes": self.inside, "links between nodes": self.between, "host": self.host}
        return max({"compute": self.compute, **named}.items(), key=lambda item: item[1])[0]

    @property
    def one_after_the_other(self) -> float:
        """Time if compute waits for the links, while the host launches kernels ahead."""
        return max(self.compute + self.inside + self.between, self.host)


def times(work: Work, machine: Machine) -> Times:
    """Estimate the times of `work` on a GPU of `machine`."""
    attention_rate = machine.product_tflops * 1e12 * PRODUCT_SHARE * work.attention_share
    parts = {
        "products": sum(product.seconds(machine) for product in work.products),
        "attention": work.attention_flops / attention_rate,
        "memory": (work.memory_bytes + SIDE_SHARE * work.side_bytes)
        / (machine.memory_gigabytes_per_second * 1e9 * MEMORY_SHARE),
        "links": sum(max(c.inside_seconds(machine), c.between_seconds(machine)) for c in work.waited_for),
    }
    return Times(
        compute=sum(parts.values()),
        inside=sum(collective.inside_seconds(machine) for collective in work.collectives),
        between=sum(collective.between_seconds(machine) for collective in work.collectives),
        host=work.host_seconds,
        parts=parts,
    )


@dataclass(frozen=True)
class Workload:
    """Work of one GPU in an update."""

    micro_step: Work
    n_micro_steps: float
    closing: Work
    """Work after the last micro-step: exchange between replicas, optimizer step."""
    useful_flops: float
    """FLOPs of forward and backward pass, without recomputation."""
    n_idle_steps: float = 0.0
    """Pipeline bubble: micro-steps that a GPU waits for the other stages."""

    def seconds(self, machine: Machine) -> float:
        """Seconds of an update."""
        steps = self.n_micro_steps + self.n_idle_steps
        return steps * times(self.micro_step, machine).longest + times(self.closing, machine).one_after_the_other

    def mfu(self, machine: Machine) -> float:
        """Model FLOPs utilization: fraction of the machine's 16-bit peak that useful FLOPs reach."""
        return self.useful_flops / self.seconds(machine) / (machine.tflops * 1e12)
