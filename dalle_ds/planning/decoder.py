"""Work of one GPU in an update of a dense decoder of another project, computed like that of the prior."""

from dataclasses import dataclass

from dalle_ds.planning.machines import Machine
from dalle_ds.planning.timing import Collective, Group, Product, Work, Workload

FLASH_SHARE = 0.5
"""Fraction of the rate of products that fused dense attention reaches, counting causal pairs: FlashAttention 2 on an H100."""

SCORE_BYTES, SCORE_BYTES_BACKWARD = 8.0, 14.0
"""Memory traffic of unfused attention per 16-bit score. In the forward pass, one product writes the score, the softmax reads
and writes it, and the other product reads it. In the backward pass, the gradients of both are added."""

LOGIT_BYTES = 36.0
"""Memory traffic of the loss per 16-bit logit: cast, log-softmax, its gradient, cast."""

WEIGHT_BYTES = 22.0
"""Memory traffic per parameter in a micro-step: copies for collectives, and writing and accumulating the gradient."""

STEP_BYTES = 60.0
"""Memory traffic of AdamW per parameter: fp32 weight and two moments read and written, gradient, norm and clipping."""

HOST_MS = 3.0
"""Host time in ms per layer and micro-step: forward and backward of plain PyTorch modules on one CPU core."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A training run of a dense decoder, as described by its authors."""

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
    """(outputs, inputs) of each matrix of a layer, in multiples of the model's width."""
    element_bytes: float
    """Memory traffic of a layer per element of the residual stream, without products and attention, but with recomputation."""
    recomputed: float = 0.0
    """Fraction of the layers' products that is recomputed in the backward pass."""
    is_attention_fused: bool = True
    """Fused attention skips the pairs that the causal mask excludes. Unfused attention computes, saves and recomputes all
    scores."""
    shard: int = 1
    """Number of GPUs that parameters are sharded over. In every micro-step, parameters are gathered twice in 16 bits, and
    gradients are scattered in fp32."""
    tensor: int = 1
    """Tensor parallelism: number of GPUs that share each matrix and wait for its collectives."""
    tensor_messages: int = 8
    """All-gathers and reduce-scatters of the residual stream per layer and micro-step. An all-reduce counts as two."""
    is_sequence_parallel: bool = False
    """Whether the tensor-parallel GPUs also share the work between matrices."""
    pipeline: int = 1
    chunks: int = 1
    """Number of model chunks per pipeline stage, for the interleaved schedule."""
    exchange_bytes: float = 0.0
    """Bytes per parameter that data-parallel GPUs exchange once per update, while they compute."""

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward pass, counted as in Megatron-LM: all pairs of tokens, independent of the mask."""
        return 6.0 * (self._of_layers + self.vocab * self.d_model) + 12.0 * self.n_layers * self.d_model * self.length

    def tokens_per_second(self) -> float:
        """Tokens per second and GPU."""
        workload = self.workload()
        return workload.n_micro_steps * self._rows / self._parts / workload.seconds(self.machine)

    def workload(self) -> Workload:
        n_replicas = self.n_gpus // (self._parts * self.shard)
        n_holders = n_replicas * self.shard if self.exchange_bytes else self.shard  # GPUs that share one optimizer state
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
            # tensor parallelism splits the outputs of one matrix and the inputs of the next: the larger side of each
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
        """Number of GPUs that a copy of the model is divided over by tensor and pipeline parallelism."""
        return self.tensor * self.pipeline

    @property
    def _of_layers(self) -> float:
        return sum(outputs * inputs for outputs, inputs in self.matrices) * self.d_model**2 * self.n_layers

    @property
    def _parameters(self) -> float:
        """Parameters of one GPU before sharding."""
        return (self._of_layers + 2 * self.vocab * self.d_model) / self._parts
