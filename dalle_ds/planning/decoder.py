"""A dense decoder as others train it: what one GPU does in an update, by the same arithmetic as the prior's."""

from dataclasses import dataclass

from dalle_ds.planning.machines import Machine
from dalle_ds.planning.timing import Collective, Group, Product, Work, Workload

FLASH_SHARE = 0.5
"""Of the rate of products that fused dense attention reaches, causal pairs counted: FlashAttention 2 on an H100."""

SCORE_BYTES, SCORE_BYTES_BACKWARD = 8.0, 14.0
"""Memory traffic of attention that is not fused, for each score in 16 bits: one product writes it, the softmax reads and writes
it, the other product reads it; backward the gradients of both besides."""

LOGIT_BYTES = 36.0
"""Memory traffic of a loss over logits of 16 bits: cast, log-softmax, its gradient, cast."""

WEIGHT_BYTES = 22.0
"""Memory traffic of a parameter in a micro-step: copies beside collectives, its gradient written and added."""

STEP_BYTES = 60.0
"""Memory traffic of AdamW for a parameter: fp32 weight and two moments read and written, gradient, norm and clipping."""

HOST_MS = 3.0
"""Of a layer in a micro-step: forward and backward of plain torch modules on one CPU core."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A run as its authors describe it."""

    machine: Machine
    n_gpus: int
    n_layers: int
    d_model: int
    n_heads: int
    vocab: int
    length: int
    micro_batch: int
    n_micro_steps: int
    matrices: tuple[tuple[float, float], ...] = ((3, 1), (1, 1), (4, 1), (1, 4))
    """(outputs, inputs) of a layer's, in widths of the model."""
    element_bytes: float
    """Memory traffic of a layer beside products and attention, for each element of the residual stream, what is computed again
    included."""
    recomputed: float = 0.0
    """Share of the layers' products that the backward pass computes again."""
    is_attention_fused: bool = True
    """Fused attention skips the pairs that a causal mask forbids; else all scores are computed, kept and computed again."""
    shard: int = 1
    """GPUs that parameters are sharded over: gathered twice in 16 bits and scattered in fp32 in every micro-step."""
    tensor: int = 1
    """GPUs that share each matrix. They wait for its collectives."""
    tensor_messages: int = 8
    """All-gathers and reduce-scatters of the residual stream in a layer and micro-step. An all-reduce is two."""
    is_sequence_parallel: bool = False
    """Whether they also share what is done between matrices."""
    pipeline: int = 1
    chunks: int = 1
    """Pieces of the model that a GPU of a pipeline holds, for the interleaved schedule."""
    exchange_bytes: float = 0.0
    """Of a parameter, once an update, between data-parallel GPUs, while they compute."""

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, as Megatron-LM counts them: all pairs of tokens, whatever a mask forbids."""
        return 6.0 * (self._of_layers + self.vocab * self.d_model) + 12.0 * self.n_layers * self.d_model * self.length

    def tokens_per_second(self) -> float:
        """For each GPU."""
        workload = self.workload()
        return workload.n_micro_steps * self._rows / self._parts / workload.seconds(self.machine)

    def workload(self) -> Workload:
        n_replicas = self.n_gpus // (self._parts * self.shard)
        n_holders = n_replicas * self.shard if self.exchange_bytes else self.shard  # of one optimizer state
        return Workload(
            micro_step=self._micro_step(n_replicas),
            n_micro_steps=self.n_micro_steps,
            closing=Work(memory_bytes=STEP_BYTES * self._parameters / n_holders),
            useful_flops=self.flops_per_token * self._rows * self.n_micro_steps / self._parts,
            n_idle_steps=(self.pipeline - 1) / self.chunks,
        )

    def _micro_step(self, n_replicas: int) -> Work:
        layers, rows, d = self.n_layers / self.pipeline, self._rows, self.d_model
        elements, vocab = rows * d * layers, self.vocab / self._parts
        pairs = self.micro_batch * self.length**2 * layers / self.tensor
        attention, scores = 4.0 * d * pairs / 2 * (1 + 2.5), 0.0
        if not self.is_attention_fused:
            attention, scores = 4.0 * d * pairs * (2 + 2), pairs * self.n_heads
        logits = (Product(rows, vocab, d), Product(rows, d, vocab), Product(vocab, d, rows))
        return Work(
            products=self._layer_products(layers) + logits,
            attention_flops=attention,
            attention_share=FLASH_SHARE,
            memory_bytes=elements * self.element_bytes / (self.tensor if self.is_sequence_parallel else 1)
            + scores * (2 * SCORE_BYTES + SCORE_BYTES_BACKWARD)
            + rows * vocab * LOGIT_BYTES,
            side_bytes=self._parameters * WEIGHT_BYTES,
            collectives=self._of_weights(layers, n_replicas),
            waited_for=self._of_activations(2.0 * elements, layers),
            host_seconds=layers * HOST_MS / 1e3,
        )

    def _layer_products(self, layers: float) -> tuple[Product, ...]:
        products = []
        for outputs, inputs in self.matrices:
            # tensor parallelism cuts the outputs of one matrix and the inputs of the next: of each its larger side
            is_wide = outputs >= inputs
            out = outputs * self.d_model / (self.tensor if is_wide else 1)
            into = inputs * self.d_model / (1 if is_wide else self.tensor)
            products += [
                Product(self._rows, out, into, layers * (1 + self.recomputed)),
                Product(self._rows, into, out, layers),
                Product(out, into, self._rows, layers),
            ]
        return tuple(products)

    def _of_weights(self, layers: float, n_replicas: int) -> tuple[Collective, ...]:
        per_node, found = self.machine.gpus_per_node, []
        if self.shard > 1:
            found.append(Collective(self._parameters * (2 + 2 + 4), Group.of_neighbours(self.shard, per_node), 3 * layers))
        if self.exchange_bytes:
            peers = Group.of_peers(n_replicas, self._parts * self.shard, per_node)
            found.append(Collective(self._parameters * self.exchange_bytes / self.n_micro_steps, peers))
        return tuple(found)

    def _of_activations(self, stream_bytes: float, layers: float) -> tuple[Collective, ...]:
        if self.tensor == 1:
            return ()
        group = Group.of_neighbours(self.tensor, self.machine.gpus_per_node)
        return (Collective(stream_bytes * self.tensor_messages, group, self.tensor_messages * layers),)

    @property
    def _rows(self) -> int:
        return self.micro_batch * self.length

    @property
    def _parts(self) -> int:
        """GPUs that hold one copy of the model between them, each a piece of its own."""
        return self.tensor * self.pipeline

    @property
    def _of_layers(self) -> float:
        return sum(outputs * inputs for outputs, inputs in self.matrices) * self.d_model**2 * self.n_layers

    @property
    def _parameters(self) -> float:
        """Of one GPU, before sharding."""
        return (self._of_layers + 2 * self.vocab * self.d_model) / self._parts
