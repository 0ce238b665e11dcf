"""How long a machine takes for some work, on paper: the longest of compute, links inside nodes, links between nodes, host.

What overlaps is taken to overlap wholly, so these are times that nothing disturbs. The constants below are the only ones, for
this project's runs and for those of others that `published.py` holds them against.
"""

from dataclasses import dataclass
from typing import Literal

from dalle_ds.planning.machines import Machine

PRODUCT_SHARE = 0.80
"""Of what products reach at their best shape, alone on a cool GPU: long runs meet the power limit."""

TILE = 128
"""Side of what a multiprocessor computes at a time of a product's result. On average the last round of tiles is half empty."""

DEPTH = 128
"""A product as deep as this spends as much time on filling its pipeline and on writing its result as on arithmetic."""

MEMORY_SHARE = 0.87
"""Of a GPU's memory bandwidth, in kernels that read, compute little, and write."""

SIDE_SHARE = 0.5
"""Of memory traffic on other streams (copies beside collectives) that products do not hide: both want the same memory."""

LINK_SHARE, NETWORK_SHARE = 0.78, 0.84
"""Of NVLink's or PCIe's rate, and of the network adapters', in NCCL's collectives of many megabytes. NCCL itself counts with
235 GB/s on an A100 (of 300); 42 GB/s of a 50 GB/s adapter are common."""

STEP_SECONDS, NODE_STEP_SECONDS = 3.4e-6, 9.6e-6
"""Latency of a step of NCCL's rings to a GPU of the same node and of another, as in its own table (src/graph/tuning.cc, simple
protocol). A ring of n GPUs takes n - 1 of them."""

Format = Literal["half", "tf32", "fp32"]


@dataclass(frozen=True)
class Product:
    """`times` matrix products of (rows, depth) with (depth, columns)."""

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
    """GPUs that take part in a collective. `twins` groups like it share every node's adapters and work at the same time."""

    ranks: int
    nodes: int
    twins: int = 1

    @classmethod
    def of_neighbours(cls, ranks: int, per_node: int) -> "Group":
        """GPUs that follow each other, node after node."""
        return cls(ranks, -(-ranks // per_node))

    @classmethod
    def of_peers(cls, ranks: int, apart: int, per_node: int) -> "Group":
        """Every `apart`-th GPU: those that hold the same shard of different replicas."""
        nodes = min(ranks, -(-ranks * apart // per_node))
        return cls(ranks, nodes, min(apart, per_node))


@dataclass(frozen=True)
class Collective:
    """An all-gather or a reduce-scatter, in `calls` messages. `n_bytes` is all that is gathered or scattered, in one message or
    many; an all-reduce is two of them."""

    n_bytes: float
    group: Group
    calls: float = 1.0

    def inside_seconds(self, machine: Machine) -> float:
        """On the links of the nodes."""
        group = self.group
        if group.ranks == group.nodes:
            return 0.0
        seconds = self.n_bytes * (group.ranks - 1) / group.ranks / (machine.inside_gbps * 1e9 / 8 * LINK_SHARE)
        return seconds + self.calls * (group.ranks - group.nodes) * STEP_SECONDS

    def between_seconds(self, machine: Machine) -> float:
        """On the network: what enters a node enters once and is handed on inside."""
        group = self.group
        if group.nodes == 1:
            return 0.0
        n_bytes = self.n_bytes * group.twins * (group.nodes - 1) / group.nodes
        steps = (group.ranks - group.nodes) * STEP_SECONDS + (group.nodes - 1) * NODE_STEP_SECONDS
        return n_bytes / (machine.node_gbps * 1e9 / 8 * NETWORK_SHARE) + self.calls * steps


@dataclass(frozen=True)
class Work:
    """What one GPU does in one micro-step, or at the end of an update."""

    products: tuple[Product, ...] = ()
    attention_flops: float = 0.0
    attention_share: float = 1.0
    """Of the rate of products that attention's kernels reach."""
    memory_bytes: float = 0.0
    """Read and written by all kernels that are neither products nor attention."""
    side_bytes: float = 0.0
    """The same on streams beside the main one."""
    collectives: tuple[Collective, ...] = ()
    """Beside computing."""
    waited_for: tuple[Collective, ...] = ()
    """Collectives whose result the next kernel needs: part of the time of compute."""
    host_seconds: float = 0.0
    """Of Python and launches; does not depend on the batch."""


@dataclass(frozen=True)
class Times:
    """Seconds of each of four things that go on at the same time."""

    compute: float
    inside: float
    between: float
    host: float
    parts: dict[str, float]
    """Of compute."""

    @property
    def longest(self) -> float:
        return max(self.compute, self.inside, self.between, self.host)

    @property
    def binds(self) -> str:
        """Name of the longest."""
        named = {"links inside nodes": self.inside, "links between nodes": self.between, "host": self.host}
        return max({"compute": self.compute, **named}.items(), key=lambda item: item[1])[0]

    @property
    def one_after_the_other(self) -> float:
        """Where compute waits for links, and the host launches ahead."""
        return max(self.compute + self.inside + self.between, self.host)


def times(work: Work, machine: Machine) -> Times:
    """Of `work` on a GPU of `machine`."""
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
    """One update of a run, seen by one GPU."""

    micro_step: Work
    n_micro_steps: float
    closing: Work
    """After the last micro-step: exchange between replicas, the optimizer's step."""
    useful_flops: float
    """Forward and backward, nothing computed twice."""
    n_idle_steps: float = 0.0
    """Micro-steps that a GPU of a pipeline waits for the others."""

    def seconds(self, machine: Machine) -> float:
        """Of an update."""
        steps = self.n_micro_steps + self.n_idle_steps
        return steps * times(self.micro_step, machine).longest + times(self.closing, machine).one_after_the_other

    def mfu(self, machine: Machine) -> float:
        """Share of the machine's 16-bit peak that useful arithmetic reaches."""
        return self.useful_flops / self.seconds(machine) / (machine.tflops * 1e12)
