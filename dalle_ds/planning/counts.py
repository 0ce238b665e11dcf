"""Memory traffic, messages, host time and memory of the prior's step, counted without a GPU. Estimates are based on them."""

from dataclasses import dataclass

from dalle_ds.planning.timing import Format


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts for one layer under ZeRO-3 with fp16 branches and a gradient scale per residual block.

    An element is one number of the residual stream (batch, slots, width). A parameter is any parameter of the whole layer,
    independent of sharding.
    """

    element_bytes: float
    """Memory traffic per element in forward and backward pass, without products and attention."""
    recomputed_bytes: float
    """Additional memory traffic per element if the layer is recomputed."""
    weight_bytes: float
    """Memory traffic per parameter in a micro-step, on the compute stream: three or four products read it, and its gradient is
    written."""
    gather_bytes: float
    """Memory traffic per parameter on other streams, for two all-gathers: its 16-bit copy is received twice. Reading a shard
    adds almost nothing, because it is one of many."""
    alone_bytes: float
    """Replaces `gather_bytes` on a single GPU, which holds the whole shard and rounds it to 16 bits twice."""
    reduce_bytes: float
    """Memory traffic per parameter on other streams, for the reduce-scatter: its gradient is divided and scattered."""
    collectives: float
    """Messages per micro-step."""
    host_ms: float
    """CPU time per micro-step in ms, on one core."""
    host_ms_per_rank: float
    """Additional CPU time in ms for each further GPU of the ZeRO group: DeepSpeed loops over all of them in Python, for every
    tensor."""
    update_host_ms: float
    """CPU time in ms at the end of an update: norm, clipping, optimizer step, gathering small parameters again."""
    heads: Format
    """Number format of the products of the unembeddings."""
    products_a_head_product: int
    """16-bit products that are summed for each product of an unembedding, so that the result is as exact as in fp32."""
    kept_bytes: float
    """Memory per element that is saved from forward to backward pass, in a layer that is not recomputed."""
    working_bytes: float
    """Additional memory per element in the layer whose backward pass is running."""
    gathered_bytes: float
    """Memory per parameter while the layer is gathered."""


NOW = Counts(
    element_bytes=166,
    recomputed_bytes=50,
    weight_bytes=9.3,
    gather_bytes=4,
    alone_bytes=12,
    reduce_bytes=14,
    collectives=13,
    host_ms=4.9,
    host_ms_per_rank=0.069,
    update_host_ms=2.1,
    heads="half",
    products_a_head_product=3,
    kept_bytes=36,
    working_bytes=14,
    gathered_bytes=2,
)
"""Counted at d 2048 and 3968: memory traffic and memory with fake CUDA tensors, messages and `host_ms_per_rank` as one rank of
a fake world (`dalle-ds bench cuda-path`). `host_ms` and `update_host_ms` are half of the times measured there, 9.8 and 4.3 ms
on a shared core of an AMD EPYC, which include the work of operators on small tensors. The cores of a GPU node are assumed to be
twice as fast."""

INPUT_BYTES = 4.0
"""Memory per element that is saved from forward to backward pass, in a layer that is recomputed."""

LOGIT_BYTES, HEAD_WEIGHT_BYTES = 84.0, 36.0
"""Memory traffic of the loss per logit; and, in each chunk of logits, per weight of an unembedding. Counted operation by
operation in `dalle_ds.ops.cross_entropy`, where three products are summed."""

HEAD_MEMORY_BYTES = 8.0
"""Memory per weight of an unembedding while its losses are computed: the gathered weight, and its two fp16 parts."""

HEAD_ROW_BYTES = 8.0
"""Memory per value of the unembedding's gradient while it is computed: two fp32 summands."""

STEP_BYTES = 48.0
"""Memory traffic of the optimizer step per parameter of the shard, without the moments: the fp32 weight is read and written,
and the gradient is un-scaled, measured, flattened, clipped and read."""

ACCUMULATED_BYTES = 12.0
"""Memory traffic per parameter of the shard in a micro-step, to accumulate the gradient."""

MEAN_TEXT_TOKENS = 40
"""Text tokens per sample without padding: only these reach the text unembedding. Captions from the web have 10 to 60."""
