"""Work of one GPU in an update of the prior: compute, memory traffic, communication and host time."""

from dalle_ds.models.prior import PriorConfig
from dalle_ds.ops.cross_entropy import MAX_LOGITS
from dalle_ds.parallel.replicas.groups import BUCKET_VALUES
from dalle_ds.planning.arithmetic import attention_flops, count_parameters, forward_flops
from dalle_ds.planning.counts import (
    ACCUMULATED_BYTES,
    HEAD_WEIGHT_BYTES,
    LOGIT_BYTES,
    MEAN_TEXT_TOKENS,
    NOW,
    STEP_BYTES,
    Counts,
)
from dalle_ds.planning.machines import Machine
from dalle_ds.planning.memory import planned_factors, state_bytes
from dalle_ds.planning.settings import PlanInputsConfig
from dalle_ds.planning.timing import Collective, Group, Product, Work, Workload

FLEX_SHARE = 0.13
"""Fraction of the rate of products that FlexAttention reaches, counting only attended pairs. Its blocks of 128 x 128 contain
about as many masked pairs, and sequences of 1,280 are short."""

GATHERED, REDUCED = 2.0, 4.0
"""Bytes sent per parameter: the 16-bit weight before each pass, and the fp32 gradient."""

BESIDE_LAYERS = 2
"""Host time of embeddings, unembeddings and losses, in layers."""

COMPRESSION_BYTES = 60.0
"""Memory traffic of PowerSGD per parameter of the shard: gradient and error are read, three products, error and average are
written."""


def prior_workload(config: PriorConfig, settings: PlanInputsConfig, machine: Machine, counts: Counts = NOW) -> Workload:
    """Returns the work of one GPU in an update of `config` under `settings`."""
    return Workload(
        micro_step=_micro_step(config, settings, machine, counts),
        n_micro_steps=settings.n_micro_steps,
        closing=_closing(config, settings, machine, counts),
        useful_flops=3 * forward_flops(config) * settings.global_batch / settings.gpus,
    )


def recomputed_share(config: PriorConfig, every: int) -> float:
    """Fraction of the layers that is recomputed: the first of every `every` layers, or none if `every` is 0."""
    return len(range(0, config.n_layers, every)) / config.n_layers if every else 0.0


def _micro_step(config: PriorConfig, settings: PlanInputsConfig, machine: Machine, counts: Counts) -> Work:
    batch, shards, layers = settings.micro_batch, settings.shards, config.n_layers
    share = recomputed_share(config, settings.activation_checkpointing)
    n_parameters = sum(count_parameters(config))
    elements = batch * config.n_slots * config.d_model * layers
    gather_bytes = counts.gather_bytes if shards > 1 else counts.alone_bytes
    host_ms = counts.host_ms if settings.host_ms_per_layer is None else settings.host_ms_per_layer
    loops_ms = counts.host_ms_per_rank * max(0, shards - machine.gpus_per_node)
    wire = n_parameters * (2 * GATHERED + REDUCED)
    group = Group.of_neighbours(shards, machine.gpus_per_node)
    return Work(
        products=(*_layer_products(config, batch, share), *_head_products(config, batch, counts)),
        attention_flops=batch * attention_flops(config) * (1 + share + 2.5),
        attention_share=FLEX_SHARE,
        memory_bytes=elements * (counts.element_bytes + share * counts.recomputed_bytes)
        + n_parameters * counts.weight_bytes
        + n_parameters / shards * ACCUMULATED_BYTES
        + _head_bytes(config, batch),
        side_bytes=n_parameters * (gather_bytes + counts.reduce_bytes),
        collectives=(Collective(wire, group, counts.collectives * layers),) if shards > 1 else (),
        host_seconds=((layers + BESIDE_LAYERS) * host_ms + layers * loops_ms) / 1e3,
    )


def _layer_products(config: PriorConfig, batch: int, recomputed: float) -> tuple[Product, ...]:
    """Products of all layers: forward pass, gradients of inputs, gradients of weights.

    A recomputed layer repeats the forward products except the last, whose result is not needed.
    """
    rows, d, layers = batch * config.n_slots, config.d_model, config.n_layers
    products = []
    for outputs, inputs, again in ((3 * d, d, 1), (d, d, 1), (4 * d, d, 1), (d, 4 * d, 0)):
        products += [
            Product(rows, outputs, inputs, layers * (1 + again * recomputed)),
            Product(rows, inputs, outputs, layers),
            Product(outputs, inputs, rows, layers),
        ]
    return tuple(products)


def _logits(config: PriorConfig, batch: int) -> tuple[tuple[int, int], ...]:
    """Returns (rows, vocabulary) of the logits of text and of image."""
    n_text = min(config.text_len - 1, MEAN_TEXT_TOKENS)
    return (batch * n_text, config.vocab_size), (batch * config.n_image, config.n_codes)


def _chunk(rows: int, vocab: int) -> int:
    """Rows of logits per chunk, as in `dalle_ds.ops.cross_entropy`."""
    return min(rows, max(1, MAX_LOGITS // vocab))


def _head_products(config: PriorConfig, batch: int, counts: Counts) -> tuple[Product, ...]:
    d, products = config.d_model, []
    for rows, vocab in _logits(config, batch):
        chunk = _chunk(rows, vocab)
        times = counts.products_a_head_product * rows / chunk
        products += [
            Product(chunk, vocab, d, times, counts.heads),
            Product(chunk, d, vocab, times, counts.heads),
            Product(vocab, d, chunk, times, counts.heads),
        ]
    return tuple(products)


def _head_bytes(config: PriorConfig, batch: int) -> float:
    return sum(
        rows * vocab * LOGIT_BYTES + vocab * config.d_model * HEAD_WEIGHT_BYTES * rows / _chunk(rows, vocab)
        for rows, vocab in _logits(config, batch)
    )


def _closing(config: PriorConfig, settings: PlanInputsConfig, machine: Machine, counts: Counts) -> Work:
    """Work at the end of an update: replicas average their gradients, then every GPU updates its shard."""
    shard = sum(count_parameters(config)) / settings.shards
    memory_bytes = shard * (STEP_BYTES + 2 * state_bytes(config, settings.moments).moments)
    products: tuple[Product, ...] = ()
    collectives: tuple[Collective, ...] = ()
    if settings.replicas > 1:
        n_bytes = exchanged_bytes(config, settings)
        peers = Group.of_peers(settings.replicas, settings.shards, machine.gpus_per_node)
        # a reduce-scatter and an all-gather per bucket; with PowerSGD, two of each for the factors
        n_messages = -(-shard // BUCKET_VALUES) * (4 if settings.compression == "power_sgd" else 2)
        collectives = (Collective(2 * n_bytes, peers, n_messages),)
        if settings.compression == "power_sgd":
            memory_bytes += shard * COMPRESSION_BYTES
            rank = planned_factors(config, settings).rank
            # three fp32 products of the shard with a factor, treating the shard as one matrix of the layers' width
            products = (Product(shard / config.d_model, rank, config.d_model, 3, "fp32"),)
    return Work(
        products=products,
        memory_bytes=memory_bytes,
        collectives=collectives,
        host_seconds=config.n_layers * counts.update_host_ms / 1e3,
    )


def exchanged_bytes(config: PriorConfig, settings: PlanInputsConfig) -> float:
    """Bytes that a GPU averages with its peers in other replicas once per update.

    Without compression: the fp32 gradients of its shard. With PowerSGD: the factors of its matrices in 16-bit codes, and the
    other gradients in fp32.
    """
    n_matrices, n_embedding, n_other = count_parameters(config)
    if settings.compression == "none":
        return 4.0 * (n_matrices + n_embedding + n_other) / settings.shards
    return 4.0 * (n_embedding + n_other) / settings.shards + 2.0 * planned_factors(config, settings).sent
